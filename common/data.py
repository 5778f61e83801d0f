"""Data sets in, views out.

load() gives an Images object: all pixels in memory as one uint8 tensor (demo data, CIFAR, folders
of equally sized images), or a table of paths that workers decode. From either, stream() yields,
step by step, the views of this process's share of the global batch.
"""

import contextlib
import hashlib
import itertools
import math
import os
import re
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

from common.augment import crop_batch, crop_boxes, crops_of, make_views, rng

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HALF = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # for methods that do not normalise
NAMES = {"demo": 32, "cifar10": 32, "cifar100": 32, "stl10": 96, "fashion-mnist": 28}  # pixels
TRAIN = "train", "training", "trainval"  # names of splits, in any case, with or without a number
HELD = "val", "valid", "validation", "dev", "eval", "test", "testing"  # the first is preferred
SUFFIXES = tuple(".jpg .jpeg .jfif .png .bmp .ppm .pgm .tif .tiff .webp .gif".split())
FORMATS = "JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF"  # PIL's EPS, say, starts programs
IN_MEMORY = 2**30  # bytes: a folder of equally sized images up to this size is decoded at the start


class DataError(Exception):
    """What the user can put right: the message says what was wrong, what was found, what to do."""


class LoaderError(DataError):
    """One met while images are loaded, perhaps by one process alone."""


@dataclass
class Images:
    """Images of one split."""

    unreadable = 0  # met by this process, in any split

    pixels: torch.Tensor = None  # uint8 (n, 3, h, w), in memory; or None, and then
    paths: np.ndarray = None  # bytes (n,): a list would be copied into each worker as it is used
    labels: torch.Tensor = None  # int64 (n,), -1 for none
    classes: tuple = ()
    stats: tuple = IMAGENET  # mean and standard deviation per channel
    left: tuple = ()  # what is left out of files and folders, in words
    bad: tuple = ()  # paths found unreadable in loading; of those to train on, val's too
    names: str = ""  # of the set, or a digest: by it a run that continues knows its data again

    def __len__(self):
        return len(self.paths if self.pixels is None else self.pixels)

    def __getitem__(self, rows):
        """The images of some row numbers, or of a mask (n,)."""
        columns = {k: getattr(self, k) for k in ("pixels", "paths", "labels")}
        rows = np.asarray(rows)  # a tensor of one number would make of paths a single one
        return replace(self, **{k: v[rows] for k, v in columns.items() if v is not None})

    def decode(self, row, shrink=None):
        """Image number row as uint8 (3, h, w), and the row it really is: one that cannot be read is
        replaced by the next, so that processes and resumed runs agree. shrink: see read_image()."""
        if self.pixels is not None:
            return self.pixels[row], row
        for i in range(100):
            there = (row + i) % len(self)
            with contextlib.suppress(Exception):  # PIL raises nearly anything; fault() says what
                return read_image(os.fsdecode(self.paths[there]), shrink), there
        raise DataError(f"no readable image among 100, the last {fault(self.paths[there])}")

    @classmethod
    def report(cls, paths):
        """Names, with the reason, and counts unreadable images."""
        cls.unreadable += len(paths)
        for path in paths:
            print(f"unreadable image, replaced by the next: {fault(path)}", file=sys.stderr)


def fault(path):
    """The name of a file, and why it cannot be read as an image, in one line."""
    path, why = os.fsdecode(path), "now it can be"
    try:
        read_image(path)
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
    return f"{show([path])} ({why})"


def read_image(path, shrink=None):
    """An image file as uint8 (3, h, w): turned as its EXIF says, grey repeated, CMYK converted, put
    on white where it is transparent, 16 bits scaled to 8. ValueError for floats and 32 bits, whose
    range a file does not state. shrink(height, width): so many times smaller it may come, as JPEG
    files are decoded faster by 2, 4 or 8."""
    with Image.open(path, formats=FORMATS) as image:
        if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
            raise ValueError(f"{image.mode} pixels have no known range; save them with 8 bits")
        if image.format not in ("JPEG", "MPO"):
            image.load()  # before EXIF is read: in PNG it may come last, and TIFF turns itself
        sideways = False
        with contextlib.suppress(Exception):  # broken EXIF is no broken image
            sideways = image.getexif().get(0x0112) in (5, 6, 7, 8)
        width, height = image.size[::-1] if sideways else image.size
        if shrink and (times := int(shrink(height, width))) > 1:
            image.draft(None, (image.width // times, image.height // times))
        image.load()
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)

        if image.mode[0] == "I":  # PIL would clip 16 bits at 255
            grey, clear = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray((grey / 257).round().astype(np.uint8))
            if clear is not None:
                image.putalpha(Image.fromarray(np.uint8(255) * (grey != clear)))
        if image.has_transparency_data:
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

# ---- loading ----

def load(name, root="data", download=False):
    """The images to train on, and the bank and the queries of kNN, which are None without labels.
    name: one of NAMES, a file for load_npz(), or a folder: with splits, see splits(), a class tree,
    or plain images. Without val a tenth of the images are queries, the others the bank, and all
    train. root: where torchvision's sets are, or go. Says what was found. Raises DataError."""
    with contextlib.suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # for names, now and later
    first = not download and os.environ.get("RANK", "0") == "0"
    if name in NAMES:
        if first and os.path.isdir(name):
            print(f"data: {name} is the built-in set; --data ./{name} is the folder", flush=True)
        return load_named(name, root, download)

    if name.endswith(".npz"):
        train, held, images = name, "", load_npz(name)
    else:
        train, held = splits(name)
        images = in_memory(scan(train))
    held = held if images.classes else ""
    source, held_out = (show([os.path.basename(os.path.abspath(path))]) for path in (train, held))
    beside = [x for x in sum(listing(name), []) if os.path.join(name, x) not in (train, held)]
    left = [*images.left, *(f"{x} beside {source}" for x in beside if train != name)]

    sets, knn = (images, None, None), "no kNN"
    if held:
        if os.path.realpath(train) == os.path.realpath(held):
            raise DataError(f"--data {name}: {held_out}/ is {source}/ itself, by a link")
        val = in_memory(scan(held))
        if odd := sorted(set(images.classes) ^ set(val.classes)):
            raise DataError(f"--data {name}: the class folders in {source}/ ({len(images.classes)})"
                            f" and {held_out}/ ({len(val.classes)}) differ, as in {show(odd, 1)}; "
                            f"make them equal, or move {held_out}/ away")
        sets, knn = (images, images, val), f"kNN queries: the {len(val)} of {held_out}"
        left += [f"in {held_out}: {what}" for what in val.left]
        images.bad += val.bad
    elif images.classes and len(images) >= 10:
        tenth = torch.randperm(len(images), generator=rng("queries")) % 10 == 9
        sets, knn = (images, images[~tenth], images[tenth]), "kNN queries: a tenth of these"

    if first:
        n = len(images.classes)
        what = f"{n} classes ({show(images.classes)})" if n else "no labels"
        if images.pixels is not None:
            what += ", {2} x {1} pixels".format(*images.pixels.shape[1:])
        print(f"data: {len(images)} images from {source}, {what}; {knn}; left out: "
              f"{show(left, 9) or 'nothing'}", flush=True)
    return sets


def show(names, most=3):
    """The first of some names, in one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name)[1:-1] for name in names[:most]) + more


def listing(folder):
    """The names of the folders and of the files in a folder, sorted, without hidden ones."""
    _, *both = next(os.walk(folder), ("", [], []))
    return [sorted(name for name in names if not name.startswith(".")) for names in both]


def splits(folder):
    """The folder to train on, and the one for kNN queries, or "". train/ is a split if all folders
    with images beside it are splits too. DataError if that leaves it open."""
    path = {f: os.path.join(folder, f) for f in listing(folder)[0]}
    folders = [f for f in path if any(walk(path[f]))]
    stem = {f: f.lower().rstrip("0123456789-_") for f in folders}
    train = [f for f in folders if stem[f] in TRAIN]
    held = sorted([f for f in folders if stem[f] in HELD], key=lambda f: HELD.index(stem[f]))
    other = [f for f in folders if f not in train + held]
    if len(train) == 1 and not other:
        return path[train[0]], path[held[0]] if held else ""

    # They are classes, unless names tell of splits, or the same classes lie in a split and beside.
    words = {w for f in path for w in re.split("[^a-z]+", f.lower())} & {*TRAIN, *HELD}
    inside = lambda f: {*listing(path[f])[0]}
    alike = any(inside(f) & {g, *inside(g)} for f in train + held for g in other)
    if len(words) > 1 or len(train) > 1 or held and not other or alike:
        raise DataError(f"--data {folder}: of {show(folders)}, what is to be trained on? Name one "
                        "folder, or leave one train/, and beside it only val/ or test/")
    inner = path[folders[0]] if folders else ""
    if inner and splits(inner)[0] != inner:
        raise DataError(f"--data {folder}: {folders[0]}/ in it has splits of its own; use {inner}, "
                        "or make folders train/CLASS and val/CLASS")
    return folder, ""


def image_size(name):
    """The longer side in pixels of load()'s images; of a folder's first twenty."""
    if name in NAMES:
        return NAMES[name]
    images = load_npz(name) if name.endswith(".npz") else scan(splits(name)[0], 20)
    return max(max(images.decode(row)[0].shape) for row in range(min(20, len(images))))


def load_named(name, root, download):
    if name == "demo":
        train = draw_demo(4096, 0)
        return train, train, draw_demo(1024, 1)
    kind, stats = {"cifar10": ("CIFAR10", CIFAR), "cifar100": ("CIFAR100", CIFAR),
                   "stl10": ("STL10", IMAGENET), "fashion-mnist": ("FashionMNIST", HALF)}[name]
    parts = []
    for train in (True, False):
        split = {"train": train}
        if name == "stl10":
            split = {"split": "train+unlabeled" if train else "test"}
        try:
            found = getattr(torchvision.datasets, kind)(root, download=download, **split)
        except (RuntimeError, OSError) as e:
            raise DataError(f"--data {name}: not in {root}/; add --download, or say where with "
                            f"--data-root ({str(e).splitlines()[0]})") from e
        labels = torch.as_tensor(found.labels if name == "stl10" else found.targets).long()
        parts.append(Images(channels_first(found.data), labels=labels, stats=stats, names=name,
                            classes=tuple(found.classes)))
    train, val = parts
    return train, train[train.labels >= 0], val  # some of STL-10's have none


def channels_first(pixels):
    """(n, h, w, 3), (n, 3, h, w) or (n, h, w) as (n, 3, h, w)."""
    pixels = torch.as_tensor(pixels)
    if pixels.ndim == 3:
        pixels = pixels[..., None].expand(-1, -1, -1, 3)
    return (pixels.permute(0, 3, 1, 2) if pixels.shape[3] == 3 else pixels).contiguous()


def load_npz(name):
    """The images of a file of arrays: images, uint8 (n, h, w, 3) or (n, h, w), and perhaps labels,
    integers (n,), of which each value is a class."""
    arrays = {}
    try:
        with open(name, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays |= file
        found = ", ".join(f"{k} {x.dtype} {x.shape}" for k, x in arrays.items()) or "nothing"
    except Exception as e:  # NumPy raises nearly anything on files that are something else
        arrays, found = {}, f"{type(e).__name__}: {e}"

    x, y = arrays.get("images", np.empty(0)), arrays.get("labels")
    grey = x.ndim == 3 and x.shape[2] > 4  # else one image in colour
    good = x.dtype == np.uint8 and (grey or x.shape[3:] == (3,)) and x.size and x.max() > 1
    if y is not None:
        good = good and y.dtype.kind in "iu" and y.shape == x.shape[:1] and y.min() >= 0
    if not good:
        raise DataError(f"--data {name}: found {found}; wanted images, uint8 (n, h, w, 3) or "
                        "(n, h, w) up to 255, and if there are labels, integers (n,) from 0")
    digest, images = hashlib.sha256(np.ravel(x)), Images(channels_first(x))
    if y is not None:
        digest.update(np.ravel(y))
        classes, labels = np.unique(y, return_inverse=True)
        images.labels, images.classes = torch.from_numpy(labels), tuple(map(str, classes))
    left = [f"array {name}" for name in arrays if name not in ("images", "labels")]
    return replace(images, names=digest.hexdigest()[:16], left=left)


def scan(folder, most=None):
    """The images below a folder, at most so many, in sorted order. The folders directly in it are
    the classes, if two or more have images and no image lies beside them. DataError without any."""
    counts = Counter()
    paths = list(itertools.islice(walk(folder, counts), most))
    left = [f"{n} {kind}" for kind, n in counts.most_common() if n]
    if not paths:
        raise DataError(f"--data {folder}: no file there or below ends in {' '.join(SUFFIXES)}; "
                        f"found {show(left) or 'nothing'}")
    below = [path[len(str(folder)) :].lstrip("/") for path in paths]
    names = hashlib.sha256(os.fsencode("\n".join(below))).hexdigest()[:16]
    tops = [os.path.dirname(path).split("/")[0] for path in below]
    classes, labels = np.unique(tops, return_inverse=True)
    classes = tuple(map(str, classes))
    left += [f"{f}, a folder without images" for f in listing(folder)[0] if f not in classes]
    inner = {tuple(path.split("/")[:2]) for path in below if path.count("/") > 1}
    again = sorted(f for f, n in Counter(f for _, f in inner).items() if n > 1)
    if len(again) > 1:  # splits or domains of other names, perhaps
        left.append(f"the level of {show(again)}, folders in several of {show(classes)}")
    images = Images(paths=np.array([os.fsencode(path) for path in paths]), names=names, left=left)

    if "" not in classes and len(classes) > 1:
        return replace(images, labels=torch.from_numpy(labels), classes=classes)
    why = f"all images are in {classes[0]}" if classes[0] else "there are no folders"
    if len(classes) > 1:
        why = f"{below[tops.index('')]} lies beside {show(classes[1:])}"
    return replace(images, left=[f"labels, as {why}", *left])


def walk(folder, left=None):
    """Yields the paths of image files in a folder and below, in sorted order. left, a Counter,
    counts what else there is."""
    def unlisted(e):
        raise DataError(f"--data {folder}: {e}; name a folder, a file .npz, or {' '.join(NAMES)}")

    seen, left = set(), Counter() if left is None else left
    for here, folders, files in os.walk(folder, onerror=unlisted, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # links in a circle
            left["folder linked again"] += 1
            folders.clear()
            continue
        seen.add(real)
        left["hidden folder"] += sum(f.startswith(".") for f in folders)  # .ipynb_checkpoints
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            kind = "hidden" if file.startswith(".") else os.path.splitext(file)[1].lower()
            if kind in SUFFIXES:
                yield os.path.join(here, file)
            else:
                left[kind or "without suffix"] += 1


def in_memory(images):
    """Decodes a small folder of equally sized images once; returns any other as it is. In fifty
    images, evenly spaced, it looks for what is lost; DataError where most cannot be read, most of
    those of 16 bits leave the upper half of the range, as with 12 bits, or all are of one value."""
    sample = range(0, len(images), max(1, len(images) // 50))
    shapes, values, dark, broken, left = set(), set(), [], None, Counter()
    for row in sample:
        pixels, there = images.decode(row)
        shapes.add(pixels.shape)
        values |= {pixels.min().item(), pixels.max().item()}
        with Image.open(os.fsdecode(images.paths[there]), formats=FORMATS) as image:
            coding = f"{image.mode} {image.tile[:1]}"
            left["what cannot be read: the next instead"] += there != row
            broken = images.paths[row] if there != row else broken
            left["all bands but three"] += bool(re.search("[BLK]X", coding))  # RGBXX, say
            left["all frames but the first"] += getattr(image, "is_animated", False)
            left["what is transparent: now white"] += image.has_transparency_data
        if re.search("^I|;16[BLN]", coding):  # grey; colours, of which PIL has the upper 8 bits
            dark.append((pixels > 127).float().mean().item() < 1e-3)  # a dead pixel is white

    low, high, first = min(values), max(values), repr(os.fsdecode(images.paths[0]))
    if sum(dark) * 2 > len(dark):
        raise DataError(f"{first} and others have 16 bits, of which the upper ones are not used: "
                        "white is not known; save them with 8 bits")
    if high - low < 2:
        raise DataError(f"{first} and others are of one shade: values from {low} to {high}; wanted "
                        "0 to 255, and no transparency where there is image")
    unread = left["what cannot be read: the next instead"]
    if unread * 2 > len(sample):
        raise DataError(f"{unread} of {len(sample)} images looked at cannot be read, as "
                        f"{fault(broken)}")
    left["dark 16 bits, or fewer"] = sum(dark)
    left[f"values above {high}"] = (high < 128) * len(sample)
    left = [f"{what}, in {n} of {len(sample)} looked at" for what, n in left.items() if n]
    images = replace(images, left=[*left, *images.left])

    if len(shapes) > 1 or len(images) * math.prod(*shapes) > IN_MEMORY:
        return images
    with ThreadPoolExecutor(8) as pool:
        pixels, rows = zip(*pool.map(images.decode, range(len(images))), strict=True)
    if len({p.shape for p in pixels}) > 1:
        return images
    bad = tuple(os.fsdecode(images.paths[i]) for i, row in enumerate(rows) if i != row)
    return replace(images[rows], pixels=torch.stack(pixels), bad=bad)


def draw_demo(n, seed, size=32):
    """The demo data: n images of ten families of patterns, the classes; place, scale, polarity,
    bending, shading and light are each image's own. Light and contrast differ less than the jitter
    changes: else they tell images apart, and methods without negatives settle on that."""
    generator = rng(seed, "demo")
    sin = lambda t: torch.sin(2 * math.pi * t)
    edge = lambda t: (t % 1 - 0.5).abs() * 2  # 0 in the middle of a cell of length 1, 1 at its ends

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    def smooth(channels):
        field = torch.randn(n, channels, 4, 4, generator=generator)
        return F.interpolate(field, size=size, mode="bicubic")

    labels = (torch.arange(n) % 10)[torch.randperm(n, generator=generator)]
    y, x = torch.meshgrid(*[torch.arange(size) - size / 2] * 2, indexing="ij")
    angle, wavelength = uniform(-0.2, 0.2), 4.5 * 2.3 ** uniform(0, 1)  # 4.5 to 10 pixels
    bend = 0.15 * smooth(2)  # in periods
    u = (angle.cos() * x - angle.sin() * y) / wavelength + uniform(0, 4) + bend[:, 0]
    v = (angle.sin() * x + angle.cos() * y) / wavelength + uniform(0, 4) + bend[:, 1]
    odd = (torch.floor(u / 2) + torch.floor(v / 2)) % 2 == 1

    families = {
        "lying stripes": 2 * sin(v),
        "standing stripes": 2 * sin(u),
        "checks": 4 * sin(u) * sin(v),
        "slanted stripes": 2 * sin(0.7 * (u - v)),
        "rings": 2 * sin(((u - 2) ** 2 + (v - 2) ** 2).sqrt()),
        "dots": 4 * (0.6 - (edge(u) ** 2 + edge(v) ** 2).sqrt()),
        "bricks": 6 * (torch.maximum(edge(u / 2 + 0.5 * (v.floor() % 2)) * 2 - 1, edge(v)) - 0.65),
        "zigzag": 2 * sin(v + 0.8 * (edge(u / 2) - 0.5)),
        "weave": 2 * torch.where(odd, sin(v), sin(u)),
        "marble": sin(u / 2 + 0.8 * sin(v / 3)) + sin(v / 2 + 0.8 * sin(u / 3)),
    }
    pattern = torch.stack(list(families.values()))[labels, torch.arange(n)].clamp(-1, 1)
    contrast = uniform(0.18, 0.22) * (2 * torch.randint(2, (n, 1, 1), generator=generator) - 1)
    light = uniform(0.45, 0.55) + (uniform(-0.2, 0.2) * x + uniform(-0.2, 0.2) * y) / size
    noise = 0.1 * torch.randn(n, 3, size, size, generator=generator)
    pixels = ((light + contrast * pattern)[:, None] + 0.12 * smooth(1) + noise).clamp(0, 1) * 255
    return Images(pixels.byte(), labels=labels, classes=tuple(families), stats=HALF, names="demo")

# ---- crops ----

class Crops(torch.utils.data.Dataset):
    """The workers' side: (step, row) -> an image's crops, uint8 (3, s, s) for each View of views,
    and the row if it is unreadable, else -1."""

    def __init__(self, images, views, seed):
        self.images, self.views, self.seed = images, views, seed

    def __getitem__(self, key):
        (step, row), boxes, full = key, [], 1

        def shrink(height, width):  # boxes keep twice the size of their crops, lest these blur
            nonlocal boxes, full
            generator, full = rng(self.seed, "crops", step, row), height
            scales = [view.recipe.scale for view in self.views]
            boxes = crop_boxes(len(scales), height, width, scales, generator).tolist()
            return min(min(b[2:]) / v.size / 2 for b, v in zip(boxes, self.views, strict=True))

        image, really = self.images.decode(row, shrink)
        crops, times = [], full / image.shape[1]
        for (top, left, h, w), view in zip(boxes, self.views, strict=True):
            top, bottom, left, right = (round(x / times) for x in (top, top + h, left, left + w))
            box = image[:, top:bottom, left:right]
            crops.append(resize(box, view.size, view.recipe.bicubic))
        # a tensor too: a number would be put into shared memory by a thread that hides errors
        return crops, torch.tensor(row if really != row else -1)


class Centres(torch.utils.data.Dataset):
    """Row -> the central square of a share of the shorter side, uint8 (3, size, size), and the row
    it really is. share: by default all up to size 64, 7/8 above (resize to 256, crop 224)."""

    def __init__(self, images, size, share=None, bicubic=False):
        self.images, self.size, self.bicubic = images, size, bicubic
        self.share = share or (1 if size <= 64 else 224 / 256)

    def __getitem__(self, row):
        image, really = self.images.decode(row)
        h, w = image.shape[1:]
        side = round(min(h, w) * self.share)
        top, left = (h - side) // 2, (w - side) // 2
        square = image[:, top : top + side, left : left + side]
        return resize(square, self.size, self.bicubic), torch.tensor(really)


def resize(image, size, bicubic=False):
    """A uint8 image (3, h, w) resized to (3, size, size) with antialiasing."""
    mode = "bicubic" if bicubic else "bilinear"
    return F.interpolate(image[None], size, mode=mode, antialias=True)[0]


def global_batches(n, batch, seed, first, last):
    """(step, rows of the global batch), first <= step < last: a permutation of n for each epoch."""
    for step in range(first, last):
        epoch, i = divmod(step, n // batch)
        if step == first or i == 0:
            order = torch.randperm(n, generator=rng(seed, "order", epoch))
        yield step, order[i * batch : (i + 1) * batch]


def stream(images, plan, steps, seed, rank, world, workers, device):
    """Yields, for each (step, rows of the global batch) in steps, this process's share as views on
    the device, arranged as in the plan, and the generator that drew them from (seed, step)."""
    steps, ahead = itertools.tee(steps)
    part = slice(rank, None, world)
    batches = crop(images, crops_of(plan), ahead, seed, part, workers, device)
    for (step, rows), crops in zip(steps, batches, strict=True):
        generator = rng(seed, "views", step)
        yield make_views(plan, crops, len(rows), generator, images.stats, part), generator


def crop(images, views, steps, seed, part, workers, device):
    """Yields, for each (step, rows), part of the rows: floats (n, 3, s, s) in [0, 1] a View."""
    if images.pixels is not None:  # boxes drawn for the global batch at once
        for step, rows in steps:
            generator, crops = rng(seed, "crops", step), []
            pixels = images.pixels[rows[part]].to(device, non_blocking=True)
            for view in views:
                boxes = crop_boxes(len(rows), *pixels.shape[2:], view.recipe.scale, generator)
                crops.append(crop_batch(pixels, boxes[part], view.size, view.recipe.bicubic))
            yield crops
        return
    batches = ([(step, row) for row in rows[part].tolist()] for step, rows in steps)
    for crops, bad in loader(Crops(images, views, seed), workers, device, batch_sampler=batches):
        images.report([images.paths[row] for row in bad.tolist() if row >= 0])
        yield [x.to(device, non_blocking=True).to(torch.get_default_dtype()) / 255 for x in crops]


def centres(images, rows, size, workers, device, share=None, bicubic=False, batch=256):
    """Yields images for evaluation, in the order of rows (n,), as floats (n, 3, size, size) in
    [0, 1] on the device, and the rows that they really are: see Images.decode(), Centres."""
    dataset = Centres(images, size, share, bicubic)
    workers = workers if images.pixels is None else 0
    loaded = loader(dataset, workers, device, sampler=rows.tolist(), batch_size=batch)
    for asked, (x, really) in zip(rows.split(batch), loaded, strict=True):
        images.report([images.paths[row] for row in asked[asked != really].tolist()])
        yield x.to(device, non_blocking=True).to(torch.get_default_dtype()) / 255, really


def loader(dataset, workers, device, **batches):
    """torch's DataLoader, whose workers leave signals to the training process."""
    batches |= {"num_workers": workers, "worker_init_fn": begin_worker}
    batches |= {"pin_memory": torch.device(device).type == "cuda"}
    batches |= {"generator": torch.Generator()}  # else it would draw from the global one
    if workers and sys.platform == "linux":
        batches["multiprocessing_context"] = "fork"  # 3.14's default would import torch in each
    try:
        return (yield from torch.utils.data.DataLoader(dataset, **batches))
    except (DataError, RuntimeError) as e:  # a worker's
        why = str(e)
        if "shared memory" in why:
            why = ("/dev/shm is too small for the batches of loader workers; add --workers 0, "
                   "or make it larger (docker run --shm-size 16g)")
        elif not isinstance(e, DataError):
            raise
        e.with_traceback(None)  # in which it refers to itself and to the workers: now these end
    raise LoaderError(why)


def begin_worker(worker):
    """Launchers signal all processes of a group, and the trainer needs its workers to finish the
    step. SIGTERM, by which Python ends workers, acts late: if it never did, exits could hang."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # seconds


def show_views(path, images, plan, seed):
    """Draws the first eight images: in a row each, the source's views, white, the target's."""
    steps, columns = [(0, torch.arange(min(8, len(images))))], []
    ((sides, _),) = stream(images, plan, steps, seed, 0, 1, 0, "cpu")
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in images.stats)
    edge = plan[0][0][0].size
    for bags in sides:
        for x in sum(bags, []):
            x = (x * std + mean).clamp(0, 1)
            columns.append(F.pad(x, (0, edge - x.shape[3]) * 2, value=1.0))
        columns.append(torch.ones_like(columns[0]))
    tiles = torch.stack(columns[:-1], 1).flatten(0, 1)
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // edge))
    try:
        torchvision.utils.save_image(tiles, path, nrow=len(columns) - 1, pad_value=1.0)
    except (OSError, ValueError) as e:  # no such folder; no such format
        raise DataError(f"--show-views {path}: {e}") from e
