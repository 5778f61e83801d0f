"""common/data.py: folders, kinds of image files, crops that do not depend on who makes them, named sets."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import struct
import tarfile
import time
import traceback
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import EpsImagePlugin, Image
from torchvision import datasets as sets
from torchvision.transforms import InterpolationMode

from common import data
from common.augment import crop_boxes, rng
from common.data import Crop, DataError, Images, load, read_image

CROPS = [Crop(24, (0.2, 1.0)), Crop(24, (0.08, 1.0), True), Crop(16, (0.05, 0.14))]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of a machine with one core


def write(folder, *names, size=(40, 40)):
    """Writes smooth pictures, all different, to the names below folder; returns their pixels (h, w, 3)."""
    images = []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        images.append(Image.fromarray(small).resize(size, Image.BICUBIC))
        images[-1].save(folder / name)
    return [np.array(image) for image in images]


def names(images, folder):
    return [os.path.relpath(os.fsdecode(p), folder) for p in images.paths]


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0)

# ---- folders ----

def test_flat_folder(tmp_path, on_disk):
    with pytest.raises(DataError, match="no such folder.*demo.*cifar10"):
        load(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(DataError, match="no images in .*jpg"):
        load(str(tmp_path))
    write(tmp_path, "b.png", "a ü 日本.jpg", "C.JPEG", "deep/er/d.bmp")
    images, bank, queries = load(str(tmp_path))
    assert names(images, tmp_path) == ["C.JPEG", "a ü 日本.jpg", "b.png", "deep/er/d.bmp"]
    assert images.labels is None and bank is None and queries is None and len(images) == 4
    assert images.paths.dtype.kind == "S" and not any(isinstance(v, list) for v in vars(images).values())


def test_class_tree_every_tenth_asks(tmp_path, on_disk):
    files = [f"{c}/{i:02d}.png" for c in ("ant/nest", "big cat", "dög") for i in range(7)]
    write(tmp_path, *files[::-1])
    images, bank, queries = load(str(tmp_path))
    assert images.classes == ("ant", "big cat", "dög") and names(images, tmp_path) == files
    assert images.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7 and images.labels.dtype == torch.int64
    assert names(queries, tmp_path) == files[9::10] and queries.labels.tolist() == [1, 2]
    assert sorted(names(bank, tmp_path) + names(queries, tmp_path)) == files
    assert names(images[[3, 0]], tmp_path) == [files[3], files[0]]


def test_train_and_val(tmp_path, on_disk):
    write(tmp_path, *[f"train/{c}/{i}.png" for c in "ab" for i in range(6)])
    assert [len(part) for part in load(str(tmp_path))] == [12, 11, 1]
    for held in ("test", "val"):  # val is preferred
        write(tmp_path, *[f"{held}/{c}/{i}.png" for c in "ab" for i in range(2)])
        images, bank, queries = load(str(tmp_path))
        assert images is bank and images.labels.tolist() == [0] * 6 + [1] * 6
        assert queries.labels.tolist() == [0, 0, 1, 1]
        assert names(queries, tmp_path) == [f"{held}/{c}/{i}.png" for c in "ab" for i in range(2)]
    write(tmp_path, "val/newt/1.png")
    with pytest.raises(DataError, match=r"train/ \(2\) and val/ \(3\).*newt"):
        load(str(tmp_path))


def test_links_in_a_circle(tmp_path):
    write(tmp_path, "set/a/1.png", "set/b/1.png", "elsewhere/2.png")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/b/aside").symlink_to(tmp_path / "elsewhere")
    assert names(data.scan(tmp_path / "set"), tmp_path / "set") == ["a/1.png", "b/1.png", "b/aside/2.png"]

# ---- image files ----

def test_kinds_of_image_files(tmp_path):
    (rgb,) = write(tmp_path, "rgb.png")
    grey = rgb[..., 0]
    palette, inverse = Image.fromarray(rgb).quantize(16), Image.fromarray(255 - rgb).quantize(16)
    flat, deep = np.array(palette.convert("RGB")), Image.fromarray(grey.astype(np.uint16) * 257)
    for name, image, want, options in (
        ("grey.png", Image.fromarray(grey), grey, {}), ("deep.png", deep, grey, {}),
        ("rgba.png", Image.fromarray(np.dstack([rgb, grey])), rgb, {}),
        ("palette.png", palette, flat, {"transparency": bytes(range(0, 256, 16))}),
        ("index.png", palette, flat, {"transparency": 3}),
        ("cmyk.jpg", Image.fromarray(rgb).convert("CMYK"), rgb, {"quality": 100, "subsampling": 0}),
        ("bit.png", Image.fromarray(grey > 127), (grey > 127) * 255, {}),
        ("moves.gif", palette, flat, {"save_all": True, "append_images": [inverse]}),
    ):
        image.save(tmp_path / name, **options)
        pixels = read_image(tmp_path / name)
        want = np.broadcast_to(want.reshape(40, 40, -1), (40, 40, 3)).transpose(2, 0, 1)
        assert pixels.shape == (3, 40, 40) and pixels.dtype == torch.uint8, name
        assert np.abs(pixels.numpy().astype(int) - want).max() <= (6 if name == "cmyk.jpg" else 0), name


def test_broken_files_are_replaced_by_the_next_and_named(tmp_path, monkeypatch):
    pixels = write(tmp_path, *[f"{i}.png" for i in range(9)], "9.jpg")
    broken = [tmp_path / name for name in ("2.jpg", "5.png", "6.png", "9.jpg")]
    (tmp_path / "2.png").rename(broken[0]).write_text("I am a text"), broken[1].write_bytes(b"")
    for path in broken[2:]:
        path.write_bytes(path.read_bytes()[:-200])
    want = torch.from_numpy(np.stack([pixels[i] for i in (0, 1, 3, 3, 4, 7, 7, 7, 8, 0)])).permute(0, 3, 1, 2)
    memory = load(str(tmp_path))[0]
    assert torch.equal(memory.pixels, want) and list(memory.bad) == list(map(str, broken))
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    paths = load(str(tmp_path))[0]
    assert all(torch.equal(paths.decode(i)[0], want[i]) for i in range(10)) and paths.pixels is None
    ((crops, bad),) = data.stream(paths, CROPS[:1], [(0, torch.arange(10))], 0, 0, 1, 2, "cpu")
    assert bad == list(map(str, broken)) and crops[0].shape == (10, 3, 24, 24)
    (a, rows), (b, really) = (next(data.centres(x, torch.arange(len(x)), 32, 2, "cpu")) for x in (memory, paths))
    assert really.tolist() == [0, 1, 3, 3, 4, 7, 7, 7, 8, 0] and rows.tolist() == list(range(10))  # in memory, known
    assert a.shape == (10, 3, 32, 32) and (a - b).abs().max() <= 1 / 255 + 1e-6


def test_no_format_that_starts_programs(tmp_path, monkeypatch):
    """PIL would hand a PostScript file, whatever its name, to Ghostscript; here to a program that leaves a trace."""
    write(tmp_path / "images", "0.jpg", "2.jpg")
    eps, program, trace = tmp_path / "images" / "1.jpg", tmp_path / "gs", tmp_path / "trace"
    Image.new("RGB", (40, 40)).save(eps, "EPS")
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what PIL remembers of an earlier search
    with Image.open(eps) as image, contextlib.suppress(OSError):
        image.load()
    assert trace.exists()
    trace.unlink()
    assert load(str(tmp_path / "images"))[0].bad == (str(eps),) and not trace.exists()


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """As another user's: its images would be missing without a word."""
    write(tmp_path, "0.png"), (tmp_path / "a").mkdir()
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"a: cannot be listed \(Permission denied\); make it readable"):
        data.scan(str(tmp_path))


def test_nothing_readable(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("no")
    with pytest.raises(DataError, match="no readable image.*0.jpg"):
        load(str(tmp_path))
    with pytest.raises(DataError, match="no readable image") as error:
        next(data.stream(data.scan(str(tmp_path)), CROPS, [(0, torch.arange(3))], 0, 0, 1, 1, "cpu"))
    traceback.clear_frames(error.tb)  # which hold the loader, whose worker should end now


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    write(tmp_path, "0.png", "2.png"), write(tmp_path, "1.png", size=(70, 70))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # 4900 is under twice that, where PIL only warns
    images = load(str(tmp_path))[0]
    assert torch.equal(images.pixels[1], images.pixels[2]) and images.bad == (str(tmp_path / "1.png"),)


def test_in_memory(tmp_path, monkeypatch):
    write(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(60)], size=(20, 16))
    even, bank, queries = load(str(tmp_path))
    assert even.pixels.shape == (120, 3, 16, 20) and even.paths is None and not even.bad
    assert len(bank) == len(bank.pixels) == 108 and torch.equal(queries.pixels, even.pixels[9::10])
    for limit, fits in ((even.pixels.numel() - 1, False), (even.pixels.numel(), True)):
        monkeypatch.setattr(data, "IN_MEMORY", limit)
        assert (load(str(tmp_path))[0].pixels is not None) == fits
    for name in ("a/1.png", "a/0.png"):  # of another size: outside the sample, then in it
        write(tmp_path, name, size=(16, 16))
        assert load(str(tmp_path))[0].pixels is None

# ---- crops ----

steps = lambda first=0: [(step, torch.randperm(30, generator=rng(step))[:8]) for step in range(first, 3)]


@pytest.fixture
def both(tmp_path):
    pixels = np.stack(write(tmp_path, *[f"{i:02d}.png" for i in range(30)], size=(48, 36)))
    return {"memory": Images(torch.from_numpy(pixels).permute(0, 3, 1, 2)), "disk": data.scan(str(tmp_path))}


def run(images, at=None, rank=0, world=1, workers=0, seed=3):
    stream = data.stream(images, CROPS, at or steps(), seed, rank, world, workers, "cpu")
    return [crops for crops, _ in stream]  # [step][crop]: (n, 3, s, s)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_stream_does_not_depend_on_processes(both, kind):
    same = lambda a, b: all(all(map(torch.equal, p, q)) for p, q in zip(a, b, strict=True))
    images, state = both[kind], torch.get_rng_state()
    whole = run(images)
    assert kind == "disk" or torch.equal(torch.get_rng_state(), state)
    assert [c.shape for c in whole[0]] == [(8, 3, 24, 24), (8, 3, 24, 24), (8, 3, 16, 16)]
    assert all(0 <= c.min() and c.max() <= 1 and c.std() > 0.05 for crops in whole for c in crops)
    ranks = [run(images, rank=rank, world=2, workers=rank) for rank in range(2)]
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        both_ranks = [torch.stack(c, 1).flatten(0, 1) for c in zip(*parts, strict=True)]
        assert all(map(torch.equal, step, both_ranks))
    assert same(run(images, workers=2), whole) and same(run(images, steps(1)), whole[1:])
    assert not same(run(images, seed=4), whole)
    if kind == "disk":  # a crop is a function of seed, step and row: batch-mates and position do not matter
        step, rows = steps(2)[0]
        assert same(run(images, [(step, rows.flip(0)[:5])]), [[c.flip(0)[:5] for c in whole[2]]])
        assert not same(run(images, [(step + 1, rows)]), whole[2:])


def test_crops_and_centres_equal_torchvision(both):
    (step, rows), together = steps(2)[0], rng(3, "crops", 2)
    disk, memory = run(both["disk"], [(step, rows)])[0], run(both["memory"], [(step, rows)])[0]
    boxes = [crop_boxes(8, 36, 48, crop.scale, together) for crop in CROPS]
    for i, row in enumerate(rows.tolist()):
        image, alone = both["memory"].pixels[row], rng(3, "crops", step, row)
        for k, crop in enumerate(CROPS):
            mode = InterpolationMode.BICUBIC if crop.bicubic else InterpolationMode.BILINEAR
            own = crop_boxes(1, 36, 48, crop.scale, alone)[0]
            for got, box, levels in ((disk, own, 0.01), (memory, boxes[k][i], 1.1)):
                want = TF.resized_crop(image, *box.tolist(), [crop.size] * 2, mode, antialias=True)
                assert (got[k][i] * 255 - want).abs().max() < levels, (k, i)
    for size, box in ((16, (0, 6, 36, 36)), (80, (2, 8, 32, 32))):  # 36 * 224 / 256 = 31.5
        for kind, images in both.items():
            got = torch.cat([x for x, _ in data.centres(images, torch.arange(len(images)), size, 1, "cpu", batch=7)])
            want = TF.resized_crop(both["memory"].pixels, *box, [size, size], antialias=True)
            assert (got * 255 - want).abs().max() < 1.1, kind


def test_large_jpeg_files_are_decoded_at_a_lower_resolution(tmp_path, monkeypatch):
    """Where the crops are small beside the image, and to nearly the crops of the whole; else not at all."""
    low = torch.randn(1, 3, 9, 12, generator=rng(1, "photograph"))
    x = ((torch.nn.functional.interpolate(low, (1201, 1603), mode="bicubic")[0] * 0.2 + 0.5).clamp(0, 1) * 255).byte()
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=95)
    x, images, seen = read_image(tmp_path / "a.jpg"), data.scan(str(tmp_path)), []
    read = lambda path, shrink: seen.append(read_image(path, shrink).shape[1]) or read_image(path, shrink)
    monkeypatch.setattr(data, "read_image", read)
    for size, scale, rows in ((64, (0.2, 1.0), {301}), (160, (0.2, 1.0), {601}), (64, (0.01, 0.02), {1201}), (320, (0.2, 1.0), {1201})):
        crops, generator = [Crop(size, scale)] * 2, rng(3, "crops", 0, 0)
        got, bad = data.Crops(images, crops, 3)[0, 0]
        for crop in got:
            top, left, h, w = crop_boxes(1, 1201, 1603, scale, generator)[0].tolist()
            want = TF.resized_crop(x, top, left, h, w, [size] * 2, InterpolationMode.BILINEAR, antialias=True)
            assert (crop.float() - want).abs().mean() < (2 if rows != {1201} else 1e-6), size
        assert {seen.pop()} == rows and bad == -1
    ((centre, _),), want = data.centres(images, torch.arange(1), 224, 0, "cpu"), TF.resized_crop(x, 75, 276, 1051, 1051, [224, 224], antialias=True)
    assert (centre[0] * 255 - want).abs().max() < 1.1 and seen.pop() == 1201  # evaluation sees the whole


def test_sigterm_ends_a_worker_late(monkeypatch):
    """Not at once, as the training process has a step to finish; but surely, or its exit could hang."""
    monkeypatch.setattr(signal, "alarm", lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds / 30))
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    parent = os.getpid()
    worker = fork.Process(target=lambda: (data.begin_worker(0, parent), ready.set(), time.sleep(20)))
    worker.start(), ready.wait(10)
    [os.kill(worker.pid, s) for s in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)]
    worker.join(0.4)
    assert worker.is_alive()
    worker.join(5)
    assert worker.exitcode == -signal.SIGALRM

# ---- named data sets ----

@pytest.mark.parametrize("name", data.NAMES[1:])
def test_absent_data_sets_are_explained(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}.*--download.*--data-root"):
        load(name, str(tmp_path))


def test_torchvision_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(sets.cifar, "check_integrity", lambda path, md5: os.path.isfile(path))
    for kind in (sets.CIFAR10, sets.CIFAR100, sets.STL10):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    for folder in (sets.CIFAR10.base_folder, sets.CIFAR100.base_folder, "stl10_binary", "FashionMNIST/raw"):
        (tmp_path / folder).mkdir(parents=True)
    r, ten = np.random.default_rng(0), [f"class {i}" for i in range(10)]
    x, y = r.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8), r.integers(0, 10, 60, dtype=np.uint8)
    for key, kind in (("labels", sets.CIFAR10), ("fine_labels", sets.CIFAR100)):
        files = [f for f, _ in kind.train_list + kind.test_list]
        for file, rows in zip(files, np.array_split(np.arange(60), len(files)), strict=True):
            entry = {"data": x[rows].reshape(len(rows), -1), key: y[rows].tolist()}
            (tmp_path / kind.base_folder / file).write_bytes(pickle.dumps(entry))
        meta = pickle.dumps({kind.meta["key"]: ten})
        (tmp_path / kind.base_folder / kind.meta["filename"]).write_bytes(meta)
    grey = np.repeat(x[:, :1, :28, :28], 3, 1)
    for part, rows in (("train", slice(0, 50)), ("t10k", slice(50, 60))):
        for file, a in (("images-idx3", grey[rows, 0]), ("labels-idx1", y[rows])):
            content = struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape) + a.tobytes()
            (tmp_path / f"FashionMNIST/raw/{part}-{file}-ubyte").write_bytes(content)
    large = r.integers(0, 256, (9, 3, 96, 96), dtype=np.uint8)
    turned, mixed = large.transpose(0, 1, 3, 2), np.r_[y[:4].astype(int), [-1] * 3, y[4:6]]
    for file, a in {"train_X": turned[:4], "train_y": y[:4] + 1, "unlabeled_X": turned[4:7],
                    "test_X": turned[7:], "test_y": y[4:6] + 1}.items():  # columns first, classes from 1
        (tmp_path / f"stl10_binary/{file}.bin").write_bytes(a.tobytes())
    (tmp_path / "stl10_binary/class_names.txt").write_text("a\nb")
    for name, pixels, labels, n, bank in (("cifar10", x, y, 50, 50), ("cifar100", x, y, 30, 30),
                                          ("fashion-mnist", grey, y, 50, 50), ("stl10", large, mixed, 7, 4)):
        rows = slice(n), slice(bank), slice(n, None)
        for part, i in zip(load(name, str(tmp_path)), rows, strict=True):
            assert np.array_equal(part.pixels, pixels[i]) and np.array_equal(part.labels, labels[i]), name
            assert part.pixels.dtype == torch.uint8 and part.labels.dtype == torch.int64


def test_demo():
    train, bank, queries = load("demo")
    assert all(map(torch.equal, data.draw_demo(len(queries), 1), (queries.pixels, queries.labels)))
    assert bank is train and len(train.classes) == len(set(train.classes)) == 10
    for part in (train, queries):
        count, means = part.labels.bincount(minlength=10), part.pixels.float().mean((2, 3))
        assert count.max() - count.min() <= 1 and part.pixels.shape[1:] == (3, 32, 32)
        assert (means.amax(1) - means.amin(1)).mean() < 40 and part.pixels.float().std((2, 3)).mean() > 10
    assert not (set(map(bytes, train.pixels.numpy())) & set(map(bytes, queries.pixels.numpy())))


@pytest.mark.parametrize("archive, size", [("imagenet-sample.tar", 224), ("cifar10-jpeg.tar.xz", 32)])
def test_real_images(tmp_path, archive, size):
    folder = os.environ.get("ASYM_TEST_DATA") or pytest.skip("ASYM_TEST_DATA is not set")
    with tarfile.open(os.path.join(folder, archive)) as tar:
        files = (member for member in tar if member.isfile() and "/train/" in member.name)
        tar.extractall(tmp_path, itertools.islice(files, 8), filter="data")
    images = load(str(next(tmp_path.iterdir())))[0]
    crops = [Crop(size, (0.2, 1.0)), Crop(size // 2, (0.05, 0.14))]
    stream = lambda workers: data.stream(images, crops, [(0, torch.arange(8))], 0, 0, 1, workers, "cpu")
    (a, bad), (b, _) = (next(stream(workers)) for workers in (0, 2))
    assert len(images) == 8 and (images.pixels is None) == (size == 224)
    assert not bad and a[0].shape == (8, 3, size, size) and all(map(torch.equal, a, b))
    assert a[0].std() > 0.1 and 0 <= a[0].min() and a[0].max() <= 1


def test_a_worker_whose_parent_was_killed_before_it_began_ends(monkeypatch):
    """torch looks only whether its parent changes from then on, so such a worker would wait for ever."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(SystemExit):
        data.begin_worker(0, parent=os.getpid())
