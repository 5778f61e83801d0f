"""common/data.py: folders, kinds of files, crops that do not depend on who makes them, sets."""

import io
import itertools
import multiprocessing
import os
import re
import signal
import struct
import sys
import tarfile
import time
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

from common import data, knn
from common.augment import V2, View, crop_boxes, rng, weak
from common.data import DataError, Images, load, read_image

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # with one core


def view(size, scale, bicubic=False):
    return View(replace(weak(V2), scale=scale, bicubic=bicubic), size)


VIEWS = [view(24, (0.2, 1.0)), view(24, (0.08, 1.0), True), view(16, (0.05, 0.14))]


def write(folder, *names, size=(40, 40)):
    """Writes smooth pictures, all different, to names below folder; their pixels (n, h, w, 3)."""
    images = []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        r = np.random.default_rng(zlib.crc32(name.encode()))
        small = Image.fromarray(r.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images.append(small.resize(size, Image.BICUBIC))
        images[-1].save(folder / name)
    return np.stack(images)


def names(images, folder):
    return [os.path.relpath(os.fsdecode(p), folder) for p in images.paths]


# ---- folders ----

def test_flat_folder(tmp_path):
    (tmp_path / "0.jpg").write_text("not an image")
    for look in (load, data.image_size):
        with pytest.raises(DataError, match="no readable.*0.jpg.*Unidentified"):
            look(str(tmp_path))
    (tmp_path / "0.jpg").rename(tmp_path / "notes.txt")
    write(tmp_path, "b.png", "a ü 日本.jpg", "C.JPEG")
    write(tmp_path, "deep/er/d.bmp", size=(9, 70))
    assert data.image_size(str(tmp_path)) == 70
    images, bank, queries = load(str(tmp_path))
    assert names(images, tmp_path) == ["C.JPEG", "a ü 日本.jpg", "b.png", "deep/er/d.bmp"]
    assert images.labels is None and bank is None and queries is None and len(images) == 4
    assert images.paths.dtype.kind == "S" and names(images[[1]], tmp_path) == ["a ü 日本.jpg"]


def test_class_tree_a_tenth_are_queries(tmp_path):
    files = [f"{c}/{i:02d}.png" for c in ("ant/nest", "big cat", "dög") for i in range(7)]
    write(tmp_path, *files[::-1])
    images, bank, queries = load(str(tmp_path))
    assert images.classes == ("ant", "big cat", "dög") and names(images, tmp_path) == files
    assert images.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert len(queries) == 2 and torch.equal(queries.labels, torch.tensor(
        [files.index(name) // 7 for name in names(queries, tmp_path)]))
    assert sorted(names(bank, tmp_path) + names(queries, tmp_path)) == files


def test_train_and_val(tmp_path):
    write(tmp_path, *[f"train/{c}/{i}.png" for c in "ab" for i in range(4)])
    assert load(str(tmp_path))[1:] == (None, None)  # fewer than ten, and no val
    files = [f"val/{c}/{i}.png" for c in "ab" for i in range(2)]
    write(tmp_path, *files)
    images, bank, queries = load(str(tmp_path))
    assert images is bank and images.labels.tolist() == [0] * 4 + [1] * 4
    assert queries.labels.tolist() == [0, 0, 1, 1] and names(queries, tmp_path) == files
    (tmp_path / "val").rename(tmp_path / ".held")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(DataError, match="val/ is train/ itself"):
        load(str(tmp_path))


@pytest.mark.parametrize("files, said", [
    ("Train Val", "4 images from Train, 2 classes .a, b.; kNN queries: the 4 of Val; left out: "
     "nothing$"),
    ("train valid notes/n.txt", "the 4 of valid; left out: notes beside train"),
    ("training test dev", "from training,.* 4 of dev; left out: test beside training"),
    ("train2017 val2017", "from train2017,.* 4 of val2017"), ("train val more", "train, val, more to train"),
    ("train/1.png bus/2.png car/3.png", "3 .*3 classes .bus, car, train"),
    ("trainval eval", "from trainval,.* 4 of eval"), ("Train_set test-2", "Train_set, .*of test-2"),
    ("seg_train seg_pred", "2 classes .seg_pred, seg_train."), ("val a b", "of val, a, b to train"),
    ("notes/n.txt z/train z/val", "z/ in it has splits.*use .*/z"), ("val 1.png", "of val to train"),
    ("c/a.heic val/b.heic train val", "left out: c beside train, in val: 1 .heic$"),
    ("val test", "val, test to train"), ("train train_2", "train, train_2 to train"),
    ("cup/train cup/test jar/train jar/test", "cup/ in it has splits.*use .*/cup"),
    ("a/1.png b/2.jfif b/3.HEIC a/4.heic b/.5.png", "left out: 2 .heic, 1 hidden$"),
    ("a/1.png b/2.png .c/3.png", "left out: 1 hidden folder$"),
    ("a/1.png b/2.png c/3.heic", "(a, b).* left out: 1 .heic, c/ without images"),
    ("a/1.png b/2.png é.png", r"no labels; no kNN; left out: labels, as \\xe9.png is in no class"),
    ("a/1.png a/b/2.png", "labels, as all images are in a"), ("1.png", "as 1.png is in no class f"),
    ("train val val/newt/1.png", "train/ and val/ differ in class folders, as in newt; make"),
    ("a/1.heic b/2.heic", "ends in .jpg .*found 2 .heic"),
])
def test_one_line_says_what_was_found_and_what_left_out(tmp_path, monkeypatch, files, said):
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith((".png", ".jfif")):
            write(tmp_path, name)
        elif "." in name:
            (tmp_path / name).write_text("no image")
        else:
            write(tmp_path, *[f"{name}/{c}/{i}.png" for c in "ab" for i in range(2)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))  # a terminal's
    try:
        images = load(str(tmp_path))[0]
        line = sys.stdout.buffer.getvalue().decode().strip()
        source = re.search("images from (.*?),", line)[1]
        tops = {name.split("/")[0] for name in names(images, tmp_path)}
        assert source == tmp_path.name or tops == {source}
    except DataError as e:
        line = str(e)
    assert re.search(said, line) and "\n" not in line, line


def test_links_are_followed_and_folders_that_come_twice_or_cannot_be_listed_named(
        tmp_path, monkeypatch):
    write(tmp_path, "set/a/1.png", "set/b/1.png", "elsewhere/2.png")
    (tmp_path / "set/b/aside").symlink_to(tmp_path / "elsewhere")
    assert names(data.scan(tmp_path / "set"), tmp_path / "set") == ["a/1.png", "b/1.png", "b/aside/2.png"]
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "set/b")
    with pytest.raises(DataError, match="a link makes .*set/b/aside/circle come twice"):
        data.scan(tmp_path / "set")

    def denied(path, scandir=os.scandir):  # as another user's
        if os.path.basename(path) == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match="Permission denied.*/a'"):
        data.scan(tmp_path / "set")


def test_equally_sized_images_are_decoded_at_the_start(tmp_path, monkeypatch):
    pixels = write(tmp_path, *[f"{i:03d}.png" for i in range(120)], size=(20, 16))
    assert np.array_equal(load(str(tmp_path))[0].pixels, pixels.transpose(0, 3, 1, 2))
    for limit, fits in ((pixels.size - 1, False), (pixels.size, True)):
        monkeypatch.setattr(data, "IN_MEMORY", limit)
        assert (load(str(tmp_path))[0].pixels is not None) == fits
    for name in ("001.png", "000.png"):  # of another size: outside the sample, then in it
        write(tmp_path, name, size=(16, 16))
        assert load(str(tmp_path))[0].pixels is None


# ---- files ----

def test_kinds_of_image_files(tmp_path):
    (rgb,) = write(tmp_path, "rgb.png")
    grey, colour = rgb[..., 0], Image.fromarray(rgb)
    palette, inverse = (Image.fromarray(x).quantize(16) for x in (rgb, 255 - rgb))
    share = grey[..., None] / 255
    on_white = (rgb * share + 255 * (1 - share)).round()
    flat = np.array(palette.convert("RGB"))
    for name, image, want, options in (
        ("grey.png", Image.fromarray(grey), grey, {}),
        ("rgba.png", Image.fromarray(np.dstack([rgb, grey])), on_white, {}),
        ("index.png", palette, np.where(np.asarray(palette)[..., None] == 3, 255, flat),
         {"transparency": 3}),
        ("cmyk.jpg", colour.convert("CMYK"), rgb, {"quality": 100, "subsampling": 0}),
        ("bit.png", Image.fromarray(grey > 127), (grey > 127) * 255, {}),
        ("moves.gif", palette, flat, {"save_all": True, "append_images": [inverse]}),
    ):
        image.save(tmp_path / name, **options)
        pixels = read_image(tmp_path / name)
        want = np.broadcast_to(want.reshape(40, 40, -1), (40, 40, 3)).transpose(2, 0, 1)
        assert pixels.shape == (3, 40, 40) and pixels.dtype == torch.uint8, name
        near = {"cmyk.jpg": 6, "rgba.png": 1}.get(name, 0)
        assert np.abs(pixels.int().numpy() - want).max() <= near, name


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(tmp_path, suffix):
    (pixels,), exif, file = write(tmp_path, "0.png", size=(40, 24)), Image.Exif(), f"1.{suffix}"
    for turn in range(1, 10):
        exif[0x0112] = turn
        how = {"exif": exif, "quality": 100, "subsampling": 0, "lossless": True}
        Image.fromarray(pixels).save(tmp_path / file, **how)
        x = pixels.transpose(2, 1, 0) if 5 <= turn <= 8 else pixels.transpose(2, 0, 1)
        x = x[:, :, ::-1] if turn in (2, 3, 6, 7) else x  # after TIFF 6.0, tag 274
        x = x[:, ::-1] if turn in (3, 4, 7, 8) else x
        assert np.abs(read_image(tmp_path / file).numpy() - x.astype(int)).max() < 5, turn


def tiff(array):
    """A TIFF file of an array (h, w, bands), three or more."""
    h, w, bands = array.shape
    tags = [(256, 1, w), (257, 1, h), (258, 1, 8 * array.itemsize), (259, 1, 1), (262, 1, 2),
            (273, 1, 200), (277, 1, bands), (278, 1, h), (279, 1, array.nbytes)]
    tags += [(338, bands - 3, 0)] * (bands > 3)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, 3, n, value) for tag, n, value in tags)
    return (head + bytes(4)).ljust(200, b"\0") + array.tobytes()


@pytest.mark.parametrize("white, kind, suffix", [
    (1, np.float32, "tif"), (4095, np.int32, "tif"), (4095, np.uint16, "tif"),
    (65535, np.uint16, "png"), (65535, np.uint16, "pgm"), (4095, np.uint16, "colour.tif")])
def test_pixels_of_which_no_file_states_the_range(tmp_path, white, kind, suffix):
    x, file = (np.arange(256).reshape(16, 16) * white / 255).astype(kind), tmp_path / f"0.{suffix}"
    if "colour" in suffix:
        file.write_bytes(tiff(np.dstack([x] * 3)))
    else:
        Image.fromarray(x).save(file)
    with pytest.raises(DataError, match=f"no readable.*0.{suffix} .ValueError: more than 8 bits"):
        load(str(tmp_path))


def test_what_is_dropped_of_files_is_counted(tmp_path, capsys):
    (rgb,) = write(tmp_path, "0.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(tmp_path / "1.png")
    (tmp_path / "2.tif").write_bytes(tiff(np.dstack([rgb, rgb[..., :2]])))
    first, second = Image.fromarray(rgb), Image.fromarray(255 - rgb)
    first.save(tmp_path / "3.gif", save_all=True, append_images=[second])
    assert np.array_equal(load(str(tmp_path))[0].pixels[2].permute(1, 2, 0), rgb)
    said = capsys.readouterr().out
    for what in ("bands but three", "frames but the first", "what is transparent: now white"):
        assert f"{what}, in 1 of 4 looked at" in said


def test_broken_files_are_replaced_by_the_next_named_and_counted(tmp_path, monkeypatch, capfd):
    pixels = write(tmp_path, *[f"{i}.png" for i in range(9)], "9.jpg")
    broken = [tmp_path / name for name in ("2.jpg", "5.png", "6.png", "9.jpg")]
    (tmp_path / "2.png").rename(broken[0]).write_text("I am a text")
    Image.new("RGB", (40, 40)).save(broken[1], "EPS")  # PIL would start Ghostscript
    for path in broken[2:]:
        path.write_bytes(path.read_bytes()[:-200])
    rows = torch.tensor([0, 1, 3, 3, 4, 7, 7, 7, 8, 0])
    want = torch.from_numpy(pixels)[rows].permute(0, 3, 1, 2)
    monkeypatch.setattr(Images, "unreadable", 0)
    memory = load(str(tmp_path))[0]
    assert torch.equal(memory.pixels, want) and Images.unreadable == 4
    at_start = capfd.readouterr().err.splitlines()

    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr(Images, "unreadable", 0)
    paths = replace(load(str(tmp_path))[0], labels=torch.arange(10))
    assert paths.left[0] == "what cannot be read: the next instead, in 4 of 10 looked at"
    ((crops,),) = data.crop(paths, VIEWS[:1], [(0, torch.arange(10))], 0, slice(None), 2, "cpu")
    said = capfd.readouterr().err.splitlines()
    assert crops.shape == (10, 3, 24, 24) and Images.unreadable == len(said) == 4
    why = "UnidentifiedImageError", "UnidentifiedImageError", "truncated", "truncated"
    assert at_start == said
    for line, path, reason in zip(said, broken, why, strict=True):
        assert str(path) in line and reason in line

    centres = [next(data.centres(x, torch.arange(10), 32, 2, "cpu")) for x in (memory, paths)]
    assert (centres[0] - centres[1]).abs().max() <= 1 / 255 + 1e-6
    _, labels = knn.features(lambda x: x.flatten(1), paths, torch.arange(10), 8, 0, "cpu")
    assert torch.equal(labels, torch.arange(10)) and Images.unreadable == 12


@pytest.mark.parametrize("labels", [None, np.arange(200, dtype=np.int16) % 10 * 5])
@pytest.mark.parametrize("shape", [(200, 12, 16, 3), (200, 12, 16)])
def test_npz(tmp_path, shape, labels):
    file, x = str(tmp_path / "own.npz"), np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    arrays = {"images": x} | ({} if labels is None else {"labels": labels})
    np.savez_compressed(file, **arrays, more=np.zeros(3))
    images, bank, queries = load(file)
    want = np.stack([x] * 3, 1) if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    assert np.array_equal(images.pixels, want) and data.image_size(file) == 16
    if labels is None:
        assert images.labels is None and bank is None and queries is None
    else:
        assert images.classes[:3] == ("0", "5", "10") and len(images.classes) == 10
        assert np.array_equal(images.labels, labels // 5) and len(bank) == 180
        assert len({*queries.labels.tolist()}) > 5  # queries do not follow the order of classes
    np.savez(file, **arrays)
    assert load(file)[0].names == images.names  # a digest of the contents
    for other in ({"images": x // 2}, {"labels": np.arange(200)}):
        np.savez(file, **arrays | other)
        assert load(file)[0].names != images.names


EIGHT = np.full((4, 8, 8), 200, np.uint8)


@pytest.mark.parametrize("content, found", [
    ({"images": EIGHT / 1}, "images float64 (4, 8, 8)"), ({"x": EIGHT}, "x uint8 (4, 8, 8)"),
    ({"images": EIGHT[:0]}, "images uint8 (0, 8, 8)"), ({"images": EIGHT % 2}, "(4, 8, 8)"),
    ({"images": EIGHT[:, :, :3]}, "images uint8 (4, 8, 3)"), (None, "FileNotFoundError"),
    ({"images": EIGHT[:, None]}, "images uint8 (4, 1, 8, 8)"), ({}, "found nothing"),
    ({"images": EIGHT, "labels": np.arange(4) - 1}, "labels int64 (4,)"), (b"PK\3\4 zip", "BadZipFile"),
    ({"images": EIGHT, "labels": np.zeros(3, int)}, "labels int64 (3,)"),
    ({"images": EIGHT, "labels": np.zeros(4)}, "labels float64 (4,)"),
    ({"images": EIGHT, "labels": np.array(list("abcd"), object)}, "allow_pickle"),
])
def test_npz_of_something_else(tmp_path, content, found):
    file = tmp_path / "own.npz"
    if isinstance(content, dict):
        np.savez(file, **content)
    elif content:
        file.write_bytes(content)
    for look in (load, data.image_size):
        with pytest.raises(DataError, match="own.npz: found.*wanted images, uint8") as error:
            look(str(file))
        assert found in str(error.value)


# ---- crops ----

@pytest.fixture
def both(tmp_path):
    pixels = write(tmp_path, *[f"{i:02d}.png" for i in range(30)], size=(48, 36))
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return {"memory": Images(pixels), "disk": data.scan(str(tmp_path))}


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_stream_does_not_depend_on_workers_nor_on_its_first_step(both, kind):
    """Nor on the number of processes: tests/test_processes.py."""
    def run(first=0, workers=0, seed=3):
        plan, images = [[VIEWS[:2]], [VIEWS[2:]]], both[kind]
        steps = [(step, torch.randperm(30, generator=rng(step))[:8]) for step in range(first, 3)]
        stream = data.stream(images, plan, steps, seed, slice(None), workers, "cpu")
        return [[*src[0], *tgt[0]] for (src, tgt), _ in stream]

    same = lambda a, b: all(all(map(torch.equal, p, q)) for p, q in zip(a, b, strict=True))
    whole, state = run(), torch.get_rng_state()
    assert same(run(workers=2), whole) and same(run(first=1), whole[1:])
    assert not same(run(seed=4), whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_and_centres_equal_torchvision(both):
    step, rows, together = 2, torch.randperm(30, generator=rng(2))[:8], rng(3, "crops", 2)
    crop = lambda kind: data.crop(both[kind], VIEWS, [(step, rows)], 3, slice(None), 0, "cpu")
    (disk,), (memory,) = crop("disk"), crop("memory")
    boxes = [crop_boxes(8, 36, 48, view.recipe.scale, together) for view in VIEWS]
    for i, row in enumerate(rows.tolist()):
        image, alone = both["memory"].pixels[row], rng(3, "crops", step, row)
        own = crop_boxes(3, 36, 48, [view.recipe.scale for view in VIEWS], alone)
        for k, view in enumerate(VIEWS):
            mode = InterpolationMode.BICUBIC if view.recipe.bicubic else InterpolationMode.BILINEAR
            for got, box in ((disk, own[k]), (memory, boxes[k][i])):
                size = [view.size] * 2  # in bytes, which kernels round differently
                want = TF.resized_crop(image.double(), *box.tolist(), size, mode, antialias=True)
                assert (got[k][i] * 255 - want.clamp(0, 255)).abs().max() < 1.1, (k, i)

    for size, box in ((32, (0, 6, 36, 36)), (80, (2, 8, 32, 32))):  # 36 * 224 / 256 = 31.5
        want = TF.resized_crop(both["memory"].pixels, *box, [size, size], antialias=True)
        for kind, images in both.items():
            parts = data.centres(images, torch.arange(30), size, 1, "cpu", batch=7)
            assert (torch.cat([*parts]) * 255 - want).abs().max() < 1.1, kind


@pytest.mark.parametrize("turn, size, decoded", [
    (1, (1200, 1600), (600, 800)), (6, (1200, 1600), (800, 600)),
    (1, (2400, 2440), (600, 610)), (1, (1199, 1600), (1199, 1600))])
def test_large_jpeg_files_are_decoded_smaller(tmp_path, turn, size, decoded):
    """By 2, 4 or 8, not below what is needed; and to nearly what the whole is, made as small."""
    x = TF.resize(torch.randint(50, 200, (3, 9, 12), generator=rng(1)).byte(), size)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=95, exif=exif)
    want = x.rot90(-1, (1, 2)) if turn == 6 else x
    want = TF.resize(want.double(), decoded, antialias=True)
    assert (read_image(tmp_path / "a.jpg", need=600) - want).abs().mean() < 1
    views = [view(232, (0.2, 1)), view(96, (0.05, 1))]
    images, seen = data.scan(str(tmp_path)), []
    images.decode = lambda *a, **k: seen.append(Images.decode(images, *a, **k)) or seen[-1]
    data.Crops(images, views)[0, 0], data.Crops(images, [view(300, (1, 1))], share=1)[0, 0]
    assert [image.shape[1:] for image, *_ in seen] == [decoded] * 2  # as with need=600
    for v in views:  # of so many pixels, but for rounding, no crop is enlarged
        assert v.size - 1 <= crop_boxes(10_000, 600, 600, v.recipe.scale, rng(2))[:, 2:].min()


@pytest.mark.parametrize("height, width", [(1, 1), (4, 6000), (6000, 4), (1, 300), (7, 3)])
def test_any_shape(tmp_path, height, width):
    x = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(x).save(tmp_path / name)
    disk, rows = data.scan(str(tmp_path)), torch.arange(2)
    for images in (disk, load(str(tmp_path))[0]):
        (crops,) = data.crop(images, VIEWS, [(0, rows)], 0, slice(None), 0, "cpu")
        (centre,) = data.centres(images, rows, 224, 0, "cpu")
        assert [x.shape[2] for x in crops] == [24, 24, 16] and centre.shape == (2, 3, 224, 224)


def test_an_error_in_a_worker_ends_in_one_line_of_its_process_and_leaves_no_worker(
        capsys, monkeypatch):
    class Broken(torch.utils.data.Dataset):
        def __getitem__(self, error):
            raise error

    others = {*multiprocessing.active_children()}  # of other tests
    monkeypatch.setenv("LOCAL_RANK", "1")  # the others may not have met it
    for error, said in ((RuntimeError("unable to allocate shared memory(shm)"), "--workers 0, .*"),
                        (DataError("no readable image"), "no readable image")):
        with pytest.raises(SystemExit) as e:
            next(data.loader(Broken(), [[error]], 2, "cpu"))
        assert e.value.code == 2 and re.fullmatch(f".*{said}\n", capsys.readouterr().err)
        assert {*multiprocessing.active_children()} <= others


def test_show_views(tmp_path):
    images, file = Images(torch.randint(256, (3, 3, 16, 16)).byte(), stats=data.HALF), "views.png"
    plan = [[[view(16, (1.0, 1.0))], [view(8, (1.0, 1.0))]], [[view(16, (0.5, 0.6))]]]
    data.show_views(tmp_path / file, images, plan, 0)
    ((src, tgt), _) = next(data.stream(images, plan, [(0, torch.arange(3))], 0, slice(None), 0, "cpu"))
    grid = read_image(tmp_path / file) / 255  # a pixel became six by six; two between the tiles
    assert (grid[:, :, 198:294] == 1).all() and (grid[:, :, 148:194] == 1).all()  # beside views
    for column, x in ((0, src[0][0]), (1, src[1][0]), (3, tgt[0][0])):
        for row in range(3):
            tile = grid[:, 98 * row + 2 :: 6, 98 * column + 2 :: 6]
            tile = tile[:, : x.shape[2], : x.shape[2]]
            assert (tile - (x[row] / 4 + 0.5)).abs().max() < 1 / 255
    with pytest.raises(DataError, match="--show-views.*nothing"):
        data.show_views(tmp_path / "views.nothing", images, plan, 0)


def test_sigterm_ends_a_worker_late_but_surely(monkeypatch):
    """Or an exit could hang. That no signal ends it at once: tests/test_faults.py."""
    alarm = lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds / 30)
    monkeypatch.setattr(signal, "alarm", alarm)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=lambda: (data.begin_worker(0), ready.set(), time.sleep(20)))
    worker.start(), ready.wait(10)
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == -signal.SIGALRM


# ---- named data sets ----

@pytest.mark.parametrize("name, kind, shape, labels", [
    ("cifar10", "CIFAR10", (6, 32, 32, 3), "targets"),
    ("cifar100", "CIFAR100", (6, 32, 32, 3), "targets"),
    ("stl10", "STL10", (6, 3, 96, 96), "labels"),
    ("fashion-mnist", "FashionMNIST", (6, 28, 28), "targets"),
])
def test_torchvision_data_sets(monkeypatch, name, kind, shape, labels):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def stand_in(root, download, train=None, split=None):  # as torchvision's has them
        rows = slice(4) if train or split == "train+unlabeled" else slice(4, 6)
        y = np.array([1, 0, -1, 1, 0, 1])[rows]
        return SimpleNamespace(data=x[rows], classes=["a", "b"], **{labels: y})

    monkeypatch.setattr(torchvision.datasets, kind, stand_in)
    train, bank, queries = load(name)
    pixels = {3: lambda: np.stack([x] * 3, 1), 4: lambda: np.moveaxis(x, shape.index(3), 1)}
    assert np.array_equal(torch.cat([train.pixels, queries.pixels]), pixels[x.ndim]())
    assert bank.labels.tolist() == [1, 0, 1] and train.labels.tolist() == [1, 0, -1, 1]
    assert queries.labels.dtype == torch.int64 and train.names == name
    assert max(train.pixels.shape[2:]) == data.image_size(name)


def test_demo():
    train, bank, queries = load("demo")
    again = data.draw_demo(1024, 1)
    assert torch.equal(again.pixels, queries.pixels) and torch.equal(again.labels, queries.labels)
    assert bank is train and len(train.classes) == 10 and train.names == "demo"
    for part in (train, queries):
        count, means = part.labels.bincount(minlength=10), part.pixels.float().mean((2, 3))
        assert count.max() - count.min() <= 1 and part.pixels.shape[1:] == (3, 32, 32)
        assert (means.amax(1) - means.amin(1)).mean() < 40  # colour does not tell the family
    assert not {*map(bytes, train.pixels.numpy())} & {*map(bytes, queries.pixels.numpy())}


@pytest.mark.parametrize("archive", ["imagenet-sample.tar", "cifar10-jpeg.tar.xz"])
def test_real_images(tmp_path, archive):
    folder = os.environ.get("ASYM_TEST_DATA") or pytest.skip("ASYM_TEST_DATA is not set")
    with tarfile.open(os.path.join(folder, archive)) as tar:
        files = (member for member in tar if member.isfile() and "/train/" in member.name)
        tar.extractall(tmp_path, itertools.islice(files, 8), filter="data")
    name, large = str(next(tmp_path.iterdir())), archive.startswith("imagenet")
    images, rows = load(name)[0], torch.arange(8)
    assert (images.pixels is None) == (data.image_size(name) > 64) == large and not Images.unreadable
    crop = lambda w: data.crop(images, VIEWS, [(0, rows)], 0, slice(None), w, "cpu")
    assert all(torch.equal(a, b) and a.std() > 0.1 for a, b in zip(*crop(0), *crop(2), strict=True))
