"""Data sets in, crops out.

load() gives an Images object: either all pixels in memory as one uint8 tensor (demo data, CIFAR, folders of
equally sized images), or a table of paths that workers decode. Either way stream() yields, step by step, the
crops of this process's share of the global batch; common/augment.py does the rest on the training device.
"""

import hashlib
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from common.augment import crop_batch, crop_boxes, rng

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HALF = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # for methods that do not normalise
NAMES = ("demo", "cifar10", "cifar100", "stl10", "fashion-mnist")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # PIL's others, as EPS, may start programs
IN_MEMORY = 2**30  # bytes: a folder of equally sized images up to this size is decoded once, at the start


class DataError(Exception):
    """What the user can put right: the message says what was wrong, what was found and what to do."""


@dataclass
class Images:
    """Images of one split. pixels: uint8 (n, 3, h, w), or None; then paths: bytes (n,), a NumPy array, as
    a list would be copied into each worker when reference counts are touched. labels: int64 (n,), -1 for
    none, or None. stats: mean and standard deviation per channel. bad: paths found unreadable in loading.
    names: a digest of a folder's file names, by which a run that continues knows its data again."""

    pixels: torch.Tensor = None
    paths: np.ndarray = None
    labels: torch.Tensor = None
    classes: tuple = ()
    stats: tuple = IMAGENET
    bad: tuple = ()
    names: str = ""

    def __len__(self):
        return len(self.paths if self.pixels is None else self.pixels)

    def __getitem__(self, rows):
        """The images of a list, range or tensor of row numbers."""
        rows = torch.as_tensor(rows)
        take = lambda column: None if column is None else column[rows]  # noqa: E731
        paths = None if self.paths is None else self.paths[rows.numpy()]
        return replace(self, pixels=take(self.pixels), paths=paths, labels=take(self.labels))

    def decode(self, row, shrink=None):
        """Image number row as uint8 (3, h, w), and the row it really is: one that cannot be read is replaced
        by the next that can, so that processes and resumed runs agree. shrink: as for read_image()."""
        if self.pixels is not None:
            return self.pixels[row], row
        for i in range(100):
            there = (row + i) % len(self)
            try:
                return read_image(os.fsdecode(self.paths[there]), shrink), there
            except Exception:  # PIL raises nearly anything on a broken file; the caller names it
                continue
        raise DataError(f"no readable image among the 100 from {os.fsdecode(self.paths[row])} on")


def read_image(path, shrink=None):
    """An image file as uint8 (3, h, w): grey repeated, alpha dropped, CMYK converted, 16 bits scaled to 8.

    shrink(height, width), if given, says how many times smaller the image may come: by 2, 4 or 8 a JPEG file
    is decoded in a fraction of the time."""
    if not os.path.isfile(path):  # a pipe would block
        raise FileNotFoundError(path)
    with Image.open(path, formats=FORMATS) as image:
        if math.prod(image.size) > Image.MAX_IMAGE_PIXELS:  # PIL only warns
            raise Image.DecompressionBombError(path)
        if shrink and (times := int(shrink(image.height, image.width))) > 1:
            image.draft(None, (image.width // times, image.height // times))
        if image.mode.startswith(("I", "F")):  # PIL would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
        elif "transparency" in image.info:  # PIL warns of some palettes when alpha is dropped at once
            image = image.convert("RGBA")
        image = image if image.mode == "RGB" else image.convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

# ---- loading ----

def load(name, root="data", download=False):
    """The images to train on, and the bank and the queries of kNN, which are None without labels.

    name: one of NAMES, or a folder: an ImageNet-style tree with train/ and val/ (or test/), a class tree, or
    plain images. Without val every tenth image asks and the others answer; all train. Raises DataError."""
    if name == "demo":
        drawn = draw_demo(4096, 0), draw_demo(1024, 1)
        train, val = (Images(x, labels=labels, classes=DEMO_CLASSES, stats=HALF) for x, labels in drawn)
        return train, train, val
    if name in NAMES:
        return load_torchvision(name, root, download)
    if not os.path.isdir(name):
        raise DataError(f"--data {name}: no such folder, and not one of {', '.join(NAMES)}")
    parts = [part for part in ("train", "val", "test") if os.path.isdir(os.path.join(name, part))]
    if parts[:1] != ["train"]:
        parts = [""]
    train = in_memory(scan(os.path.join(name, parts[0])))
    if train.labels is None or len(parts) == 1 and len(train) < 10:
        return train, None, None
    if len(parts) == 1:
        asks = torch.arange(len(train)) % 10 == 9
        return train, train[(~asks).nonzero().squeeze(1)], train[asks.nonzero().squeeze(1)]
    val = in_memory(scan(os.path.join(name, parts[1])))
    if odd := sorted(set(train.classes) ^ set(val.classes)):
        raise DataError(f"--data {name}: the class folders in train/ ({len(train.classes)}) and {parts[1]}/ "
                        f"({len(val.classes)}) differ, as in {odd[0]}; make them equal or move {parts[1]}/")
    return train, train, val


def load_torchvision(name, root, download):
    sets = torchvision.datasets
    kind, stats, splits = {
        "cifar10": (sets.CIFAR10, CIFAR, ({"train": True}, {"train": False})),
        "cifar100": (sets.CIFAR100, CIFAR, ({"train": True}, {"train": False})),
        "stl10": (sets.STL10, IMAGENET, ({"split": "train+unlabeled"}, {"split": "test"})),
        "fashion-mnist": (sets.FashionMNIST, HALF, ({"train": True}, {"train": False})),
    }[name]
    try:
        train, val = (from_torchvision(kind(root, download=download, **split), stats) for split in splits)
    except (RuntimeError, OSError) as e:
        raise DataError(f"--data {name}: not in {root}/ ({str(e).splitlines()[0]}); add --download, or name "
                        "the folder that holds it with --data-root") from e
    return train, train[(train.labels >= 0).nonzero().squeeze(1)], val


def from_torchvision(dataset, stats):
    """CIFAR's data are (n, h, w, 3), STL's (n, 3, h, w), Fashion-MNIST's (n, h, w)."""
    pixels = torch.as_tensor(dataset.data)
    if pixels.ndim == 3:
        pixels = pixels[:, None].expand(-1, 3, -1, -1)
    elif pixels.shape[3] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(dataset.targets if hasattr(dataset, "targets") else dataset.labels).long()
    return Images(pixels.contiguous(), labels=labels, classes=tuple(dataset.classes), stats=stats)


def scan(folder):
    """The images below a folder, in sorted order. The folders directly in it are the classes, if two or more
    have images in them and no image lies beside them. Raises DataError where there is no image."""
    paths, labels, seen = [], [], set()

    def unlisted(e):
        raise DataError(f"{e.filename}: cannot be listed ({e.strerror}); make it readable or remove it")

    for here, folders, files in os.walk(folder, onerror=unlisted, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # symbolic links in a circle
            folders[:], files = [], []
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))  # .ipynb_checkpoints is no class
        files = sorted(f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        paths += [os.fsencode(os.path.join(here, f)) for f in files]
        labels += [os.path.relpath(here, folder).split(os.sep)[0]] * len(files)
    if not paths:
        raise DataError(f"no images in {folder}: looked there and below for {' '.join(SUFFIXES)}")
    classes = tuple(sorted(set(labels)))
    names = hashlib.sha256(b"/".join(path[len(os.fsencode(folder)) :] for path in paths)).hexdigest()[:16]
    images = Images(paths=np.array(paths), names=names)
    if "." in classes or len(classes) < 2:
        return images
    number = {c: i for i, c in enumerate(classes)}
    return replace(images, labels=torch.tensor([number[c] for c in labels]), classes=classes)


def in_memory(images):
    """Decodes a small folder of equally sized images once; returns any other as it is."""
    shapes = {images.decode(row)[0].shape for row in range(0, len(images), max(1, len(images) // 50))}
    if len(shapes) > 1 or len(images) * math.prod(*shapes) > IN_MEMORY:
        return images
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pixels, rows = zip(*pool.map(images.decode, range(len(images))), strict=True)
    if len({p.shape for p in pixels}) != 1:
        return images
    bad = tuple(os.fsdecode(images.paths[i]) for i, row in enumerate(rows) if i != row)
    labels = None if images.labels is None else images.labels[list(rows)]
    return replace(images, pixels=torch.stack(pixels), paths=None, labels=labels, bad=bad)


DEMO_CLASSES = ("lying stripes", "standing stripes", "checks", "slanted stripes", "rings", "dots", "bricks",
                "zigzag", "weave", "marble")


def draw_demo(n, seed, size=32):
    """The demo data: n images uint8 (n, 3, 32, 32) of ten families of patterns, labels (n,). The class is the
    pattern; place, scale, polarity, contrast, light, shading and a faint tint are each image's own."""
    generator = rng(seed, "demo")

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *(shape or (1, 1)), generator=generator)

    def sin(t):
        return torch.sin(2 * math.pi * t)

    def edge(t):  # 0 in the middle of a cell of length 1, 1 at its ends
        return (t % 1 - 0.5).abs() * 2

    labels = (torch.arange(n) % 10)[torch.randperm(n, generator=generator)]
    y, x = torch.meshgrid(torch.arange(size) - size / 2, torch.arange(size) - size / 2, indexing="ij")
    angle, wavelength = uniform(-0.2, 0.2), 4.5 * 2.3 ** uniform(0, 1)  # 4.5 to 10 pixels
    u = (angle.cos() * x - angle.sin() * y) / wavelength + uniform(0, 4)
    v = (angle.sin() * x + angle.cos() * y) / wavelength + uniform(0, 4)
    odd = (torch.floor(u / 2) + torch.floor(v / 2)) % 2 == 1
    families = torch.stack([
        2 * sin(v), 2 * sin(u), 4 * sin(u) * sin(v), 2 * sin(0.7 * (u - v)),
        2 * sin(((u - 2) ** 2 + (v - 2) ** 2).sqrt()),
        4 * (0.6 - (edge(u) ** 2 + edge(v) ** 2).sqrt()),
        6 * (torch.maximum(edge(u / 2 + 0.5 * (v.floor() % 2)) * 2 - 1, edge(v)) - 0.65),
        2 * sin(v + 0.8 * (edge(u / 2) - 0.5)),
        2 * torch.where(odd, sin(v), sin(u)),
        sin(u / 2 + 0.8 * sin(v / 3)) + sin(v / 2 + 0.8 * sin(u / 3)),
    ])
    pattern = families[labels, torch.arange(n)].clamp(-1, 1)
    contrast = uniform(0.08, 0.28) * (2 * torch.randint(2, (n, 1, 1), generator=generator) - 1)
    light = uniform(0.25, 0.75) + (uniform(-0.2, 0.2) * x + uniform(-0.2, 0.2) * y) / size
    shade = F.interpolate(torch.randn(n, 1, 4, 4, generator=generator), size=size, mode="bicubic")
    noise = uniform(-0.04, 0.04, 3, 1, 1) + 0.05 * torch.randn(n, 3, size, size, generator=generator)
    images = (light + contrast * pattern)[:, None] + 0.12 * shade + noise
    return (images.clamp(0, 1) * 255).byte(), labels

# ---- crops ----

@dataclass(frozen=True)
class Crop:
    """One random crop: resized to size x size pixels, its share of the area uniform in scale."""

    size: int
    scale: tuple
    bicubic: bool = False


class Crops(torch.utils.data.Dataset):
    """The workers' side: (step, row) -> an image's crops, uint8 (3, s, s), and row if unreadable, else -1."""

    def __init__(self, images, crops, seed):
        self.images, self.crops, self.seed = images, crops, seed

    def __getitem__(self, key):
        (step, row), boxes, full = key, [], 1

        def shrink(height, width):  # boxes keep twice the size of their crops, lest these blur
            nonlocal boxes, full
            generator, full = rng(self.seed, "crops", step, row), height
            scales = [crop.scale for crop in self.crops]
            boxes = crop_boxes(len(scales), height, width, scales, generator).tolist()
            return min(min(box[2:]) / crop.size / 2 for box, crop in zip(boxes, self.crops, strict=True))

        image, really = self.images.decode(row, shrink)
        out, times = [], full / image.shape[1]
        for (top, left, h, w), crop in zip(boxes, self.crops, strict=True):
            top, bottom, left, right = (round(x / times) for x in (top, top + h, left, left + w))
            out.append(resize(image[:, top:bottom, left:right], crop.size, crop.bicubic))
        return out, row if really != row else -1


class Centres(torch.utils.data.Dataset):
    """Row -> what an evaluation looks at, uint8 (3, size, size): the central square of the shorter side where
    size is up to 64, of 7/8 of it above (resize to 256, crop 224); and the row that it really is."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        image, really = self.images.decode(row)
        h, w = image.shape[1:]
        side = min(h, w) if self.size <= 64 else round(min(h, w) * 224 / 256)
        top, left = (h - side) // 2, (w - side) // 2
        return resize(image[:, top : top + side, left : left + side], self.size), really


def resize(image, size, bicubic=False):
    """A uint8 image (3, h, w) resized to (3, size, size) with antialiasing."""
    if image.shape[1:] == (size, size):
        return image
    return F.interpolate(image[None], size, mode="bicubic" if bicubic else "bilinear", antialias=True)[0]


def stream(images, crops, steps, seed, rank, world, workers, device):
    """Yields, for each (step, rows of the global batch) in steps, this process's crops, a float tensor
    (n, 3, s, s) in [0, 1] on the device for each Crop, and the paths of images that could not be read."""
    if images.pixels is not None:  # boxes drawn for the global batch at once
        for step, rows in steps:
            n, size, generator = len(rows), images.pixels.shape[2:], rng(seed, "crops", step)
            boxes = [crop_boxes(n, *size, crop.scale, generator)[rank::world] for crop in crops]
            pixels = images.pixels[rows[rank::world]].to(device, non_blocking=True)
            yield [crop_batch(pixels, b, c.size, c.bicubic) for b, c in zip(boxes, crops, strict=True)], []
        return
    batches = ([(step, row) for row in rows[rank::world].tolist()] for step, rows in steps)
    for batch, bad in loader(Crops(images, crops, seed), workers, device, batch_sampler=batches):
        batch = [b.to(device, non_blocking=True).float() / 255 for b in batch]
        yield batch, [os.fsdecode(images.paths[row]) for row in bad.tolist() if row >= 0]


def centres(images, rows, size, workers, device, batch=256):
    """Yields images for evaluation, in the order of rows (n,): float (n, 3, size, size) in [0, 1] on the
    device, and the rows that they really are, as one that cannot be read is replaced by the next."""
    workers, dataset = workers if images.pixels is None else 0, Centres(images, size)
    for x, really in loader(dataset, workers, device, sampler=rows.tolist(), batch_size=batch):
        yield x.to(device, non_blocking=True).float() / 255, really


def loader(dataset, workers, device, **batches):
    batches |= {"num_workers": workers, "pin_memory": torch.device(device).type == "cuda"}
    own = torch.Generator()  # else it would draw from the global one
    begin = partial(begin_worker, parent=os.getpid())
    if workers and os.path.isdir("/proc/self/task"):  # Linux
        batches["multiprocessing_context"] = "fork"  # Python 3.14's default would import torch in each
        wait_for_threads()
    return torch.utils.data.DataLoader(dataset, worker_init_fn=begin, generator=own, **batches)


def wait_for_threads(seconds=1.0):
    """Until the other threads of this process rest. If one of them, as gloo's after an exchange, holds a lock
    of the interpreter while a worker is forked, the worker hangs (CPython issue 112275, mended in 3.12)."""
    def busy(thread):
        try:
            with open(f"/proc/self/task/{thread}/stat") as f:
                return f.read().rsplit(")", 1)[1].split()[0] == "R"
        except OSError:  # it ended just now
            return False

    end, ours = time.monotonic() + seconds, str(threading.get_native_id())
    time.sleep(0.001)  # one that waits for this thread goes on
    while time.monotonic() < end and any(busy(t) for t in os.listdir("/proc/self/task") if t != ours):
        time.sleep(0.001)


def begin_worker(worker, parent):
    """Signals are the training process's to answer. SIGTERM, Python's way to end workers, acts late."""
    if os.getppid() != parent:  # killed just now; torch looks for that later, and would wait for ever
        raise SystemExit
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # seconds; if it never did, exits could hang
