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
from glob import glob

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

from common.augment import Recipe, View, crop_batch, crop_boxes, crops_of, make_views, rng
from common.flags import check

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HALF = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # for methods that do not normalise
NAMES = {"demo": 32, "cifar10": 32, "cifar100": 32, "stl10": 96, "fashion-mnist": 28}  # pixels
TRAIN = "train", "training", "trainval"  # words in the names of splits, in any case
HELD = "val", "valid", "validation", "dev", "eval", "test", "testing"  # the first is preferred
SUFFIXES = tuple(".jpg .jpeg .jfif .png .bmp .ppm .pgm .tif .tiff .webp .gif".split())
FORMATS = "JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF"  # PIL's EPS, say, starts programs
IN_MEMORY = 2**30  # bytes: a folder of equally sized images up to this size is decoded at the start


class DataError(Exception):
    """What the user can put right: the message says what was wrong, what was found, what to do."""


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
    names: str = ""  # of the set, or a digest: by it a run that continues knows its data again

    def __len__(self):
        return len(self.paths if self.pixels is None else self.pixels)

    def __getitem__(self, rows):
        """The images of some row numbers, or of a mask (n,)."""
        columns = {k: getattr(self, k) for k in ("pixels", "paths", "labels")}
        rows = np.asarray(rows)  # a tensor of one number would make of paths a single one
        return replace(self, **{k: v[rows] for k, v in columns.items() if v is not None})

    def decode(self, row, lost=None, need=1024):
        """Image number row, see read_image(), and what was wrong with it, or "". One that cannot be
        read is replaced by the next, so that processes and resumed runs agree; labels stay."""
        if self.pixels is not None:
            return self.pixels[row], ""
        wrong = ""
        for there in range(row, row + 100):
            path = os.fsdecode(self.paths[there % len(self)])
            try:
                return read_image(path, lost, need), wrong
            except Exception as e:  # PIL raises nearly anything
                wrong = wrong or f"{path} ({type(e).__name__}: {e})"
        raise DataError(f"no readable image among 100, the first {wrong}")

    @classmethod
    def report(cls, wrong):
        """Names and counts unreadable images. wrong: what decode() says of each, "" if nothing."""
        for image in filter(None, wrong):
            cls.unreadable += 1
            print(f"unreadable image, replaced by the next: {image}", file=sys.stderr)


def read_image(path, lost=None, need=1024):
    """An image file as uint8 (3, h, w): turned as its EXIF says, grey repeated, CMYK converted, put
    on white where it is transparent. ValueError for more than 8 bits, as a file does not say which
    value is white. lost: a Counter of what is dropped. need: pixels of a side that suffice."""
    with Image.open(path, formats=FORMATS) as image:
        coding = f"{image.mode} {image.tile[:1]}"
        if re.search("^[FI]|;16", coding):  # PIL would clip grey, and take the upper bits of colour
            raise ValueError("more than 8 bits, of unknown range; save it with 8 bits")
        image.draft(None, (need, need))  # a JPEG 2, 4 or 8 times smaller, but not below
        image.load()  # before EXIF is read: in PNG it may come last, and TIFF turns itself
        with contextlib.suppress(Exception):  # broken EXIF is no broken image
            ImageOps.exif_transpose(image, in_place=True)

        if lost is not None:
            lost["all bands but three"] += bool(re.search("[BLK]X", coding))  # RGBXX, say
            lost["all frames but the first"] += getattr(image, "is_animated", False)
            lost["what is transparent: now white"] += image.has_transparency_data
        if image.has_transparency_data:
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image.convert("RGBA"))
        image = image if image.mode == "RGB" else image.convert("RGB")  # convert() copies
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

# ---- loading ----

def load(name, root="data", download=False, normalize=True):
    """The images to train on, and the bank and the queries of kNN, which are None without labels.
    name: one of NAMES, a file for load_npz(), or a folder. root: where torchvision's sets are, or
    go. normalize=False: stats become RAW. Says what was found. Raises DataError."""
    with contextlib.suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # for names, now and later
    tell = not download and os.environ.get("RANK", "0") == "0"
    sets = load_named(name, root, download) if name in NAMES else load_files(name, tell)
    for images in sets:
        if images is not None and not normalize:
            images.stats = RAW
    return sets


def load_files(name, tell):
    """load() of a file, or of a folder: with splits, see splits(), a class tree, or plain images.
    Without val a tenth of the images are queries, the others the bank, and all train."""
    train, held = splits(name)  # of a file: itself
    images = load_npz(train) if train.endswith(".npz") else in_memory(scan(train), tell)
    held = held if images.classes else ""
    source, left = os.path.basename(os.path.abspath(train)), list(images.left)
    if train != name:
        others = sorted({*glob("*", root_dir=name)} - {source, os.path.basename(held)})
        left += [f"{x} beside {source}" for x in others]

    sets, knn = (images, None, None), "no kNN"
    if held:
        queries = os.path.basename(held)
        if os.path.samefile(train, held):
            raise DataError(f"--data {name}: {queries}/ is {source}/ itself, by a link; remove it")
        val = in_memory(scan(held), tell)
        if odd := sorted(set(images.classes) ^ set(val.classes)):
            raise DataError(f"--data {name}: {source}/ and {queries}/ differ in class folders, as "
                            f"in {show(odd)}; make them equal, or move {queries}/ away")
        sets, knn = (images, images, val), f"kNN queries: the {len(val)} of {queries}"
        left += [f"in {queries}: {what}" for what in val.left]
    elif images.classes and len(images) >= 10:
        tenth = torch.randperm(len(images), generator=rng("queries")) % 10 == 9
        sets, knn = (images, images[~tenth], images[tenth]), "kNN queries: a tenth of these"

    if tell:
        n = len(images.classes)
        what = f"{n} classes ({show(images.classes)})" if n else "no labels"
        print(f"data: {len(images)} images from {source}, {what}; {knn}; left out: "
              f"{show(left, 9) or 'nothing'}", flush=True)
    return sets


def show(names, most=3):
    """The first of some names, in one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name)[1:-1] for name in names[:most]) + more


def splits(folder):
    """The folder to train on, and the one for kNN queries, or "". One whose name has a word of
    TRAIN is a split if all with images beside it are, too. DataError if that leaves it open."""
    path = {f[:-1]: os.path.join(folder, f[:-1]) for f in sorted(glob("*/", root_dir=folder))}
    folders = [f for f in path if any(walk(path[f], Counter()))]
    kind = lambda f: next((w for w in re.split("[^a-z]+", f.lower()) if w in TRAIN + HELD), "")
    train = [f for f in folders if kind(f) in TRAIN]
    held = sorted([f for f in folders if kind(f) in HELD], key=lambda f: HELD.index(kind(f)))
    classes = [f for f in folders if not kind(f)]
    if len(train) == 1 and not classes:
        return path[train[0]], path[held[0]] if held else ""

    if held or len(train) > 1 and not classes:
        raise DataError(f"--data {folder}: which of {show(train + held + classes)} to train on? "
                        "Name one, leave one train/ with only val/ or test/, or rename classes")
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
    parts, halves = [], ({"train": True}, {"train": False})
    if name == "stl10":
        halves = {"split": "train+unlabeled"}, {"split": "test"}
    for half in halves:
        try:
            found = getattr(torchvision.datasets, kind)(root, download=download, **half)
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
    try:
        with open(name, "rb") as file:
            arrays = dict(np.load(file))
        found = ", ".join(f"{k} {x.dtype} {x.shape}" for k, x in arrays.items()) or "nothing"
    except Exception as e:  # NumPy raises nearly anything on files that are something else
        arrays, found = {}, f"{type(e).__name__}: {e}"

    x, y = arrays.pop("images", np.empty(0)), arrays.pop("labels", None)
    grey = x.ndim == 3 and x.shape[2] > 4  # else one image in colour
    good = x.dtype == np.uint8 and (grey or x.shape[3:] == (3,)) and x.size and x.max() > 1
    if y is not None:
        good = good and y.dtype.kind in "iu" and y.shape == x.shape[:1] and y.min() >= 0
    if not good:
        raise DataError(f"--data {name}: found {found}; wanted images, uint8 (n, h, w, 3) or "
                        "(n, h, w) up to 255, and if there are labels, integers (n,) from 0")

    digest = hashlib.sha256(np.ravel(x))
    images = Images(channels_first(x), left=[f"array {other}" for other in arrays])
    if y is not None:
        digest.update(np.ravel(y))
        classes, labels = np.unique(y, return_inverse=True)
        images.labels, images.classes = torch.from_numpy(labels), tuple(map(str, classes))
    images.names = digest.hexdigest()[:16]
    return images


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
    images = Images(paths=np.array([os.fsencode(path) for path in paths]), names=names, left=left)

    tops = [os.path.dirname(path).split("/")[0] for path in below]  # "" for none: these come first
    classes, labels = np.unique(tops, return_inverse=True)
    if tops[0] == "":
        left.insert(0, f"labels, as {below[0]} is in no class folder")
    elif len(classes) == 1:
        left.insert(0, f"labels, as all images are in {tops[0]}")
    else:
        images.labels, images.classes = torch.from_numpy(labels), tuple(map(str, classes))
    folders = sorted(glob("*/", root_dir=folder))
    left += [f"{f} without images" for f in folders if f[:-1] not in classes]
    return images


def walk(folder, left):
    """Yields paths of image files below a folder, sorted; left, a Counter, counts what else is."""
    def unlisted(e):
        raise DataError(f"--data {folder}: {e}; name a folder, a file .npz, or {' '.join(NAMES)}")

    seen = set()
    for here, folders, files in os.walk(folder, onerror=unlisted, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # a circle, perhaps
            raise DataError(f"--data {folder}: a link makes {here} come twice; remove it")
        seen.add(real)
        left["hidden folder"] += sum(f.startswith(".") for f in folders)  # .ipynb_checkpoints
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            kind = "hidden" if file.startswith(".") else os.path.splitext(file)[1].lower()
            if kind in SUFFIXES:
                yield os.path.join(here, file)
            else:
                left[kind or "without suffix"] += 1


def in_memory(images, tell):
    """Decodes a small folder of equally sized images once; returns any other as it is. Looks at
    fifty for what is dropped of files. tell: name the unreadable."""
    sample = range(0, len(images), max(1, len(images) // 50))
    lost, shapes = Counter(), set()
    for row in sample:
        pixels, wrong = images.decode(row, lost)
        lost["what cannot be read: the next instead"] += wrong != ""
        shapes.add(pixels.shape)
    images.left[:0] = [f"{k}, in {n} of {len(sample)} looked at" for k, n in lost.items() if n]

    if len(shapes) > 1 or len(images) * math.prod(*shapes) > IN_MEMORY:
        return images
    with ThreadPoolExecutor(8) as pool:
        pixels, wrong = zip(*pool.map(images.decode, range(len(images))), strict=True)
    if len({x.shape for x in pixels}) > 1:
        return images
    if tell:
        images.report(wrong)
    return replace(images, pixels=torch.stack(pixels))


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
    and what was wrong, see Images.decode(). Drawn from (seed, step, row); or, with a share, the
    central square of a share of the shorter side."""

    def __init__(self, images, views, seed=0, share=None):
        self.images, self.views, self.seed, self.share = images, views, seed, share
        sizes = [v.size / (0.75 * v.recipe.scale[0]) ** 0.5 for v in views]  # enlarges no 3:4 crop
        self.need = 2 * views[0].size if share else math.ceil(max(sizes))

    def __getitem__(self, key):
        _, row = key
        image, wrong = self.images.decode(row, need=self.need)
        h, w = image.shape[1:]
        if self.share:
            side = round(min(h, w) * self.share)
            boxes = [((h - side) // 2, (w - side) // 2, side, side)]
        else:
            scales, generator = [v.recipe.scale for v in self.views], rng(self.seed, "crops", *key)
            boxes = crop_boxes(len(scales), h, w, scales, generator).tolist()

        crops = []
        for (top, left, h, w), view in zip(boxes, self.views, strict=True):
            box = image[None, :, top : top + h, left : left + w]
            mode = "bicubic" if view.recipe.bicubic else "bilinear"
            crops.append(F.interpolate(box, view.size, mode=mode, antialias=True)[0])
        return crops, wrong


def global_batches(n, batch, seed, first, last):
    """(step, rows of the global batch), first <= step < last: a permutation of n for each epoch."""
    for step in range(first, last):
        epoch, i = divmod(step, n // batch)
        if step == first or i == 0:
            order = torch.randperm(n, generator=rng(seed, "order", epoch))
        yield step, order[i * batch : (i + 1) * batch]


def stream(images, plan, steps, seed, part, workers, device):
    """Yields, for each (step, rows of the global batch) in steps, a slice of them as views on the
    device, arranged as in the plan, and the generator that drew them from (seed, step)."""
    steps, ahead = itertools.tee(steps)
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
    yield from loader(Crops(images, views, seed), batches, workers, device)


def centres(images, rows, size, workers, device, share=None, bicubic=False, batch=256):
    """Yields images for evaluation, in the order of rows (n,), as floats (n, 3, size, size) in
    [0, 1] on the device: the central square of a share of the shorter side, by default all up to
    size 64, 7/8 above (resize to 256, crop 224)."""
    crops = Crops(images, [View(Recipe(bicubic=bicubic), size)],
                  share=share or (1 if size <= 64 else 224 / 256))
    batches = ([(0, row) for row in part.tolist()] for part in rows.split(batch))
    for (x,) in loader(crops, batches, workers if images.pixels is None else 0, device):
        yield x


def loader(dataset, batches, workers, device):
    """Yields, for each list of keys in batches, the dataset's crops of them, as floats in [0, 1] on
    the device; names images that cannot be read, or ends."""
    fork = workers and sys.platform == "linux"  # 3.14's default would import torch in each worker
    try:
        for crops, wrong in torch.utils.data.DataLoader(
                dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=begin_worker,
                pin_memory=torch.device(device).type == "cuda",
                multiprocessing_context="fork" if fork else None,
                generator=torch.Generator()):  # else it would draw from the global one
            Images.report(wrong)
            # not / 255, which a GPU rounds in another way
            yield [x.to(device, non_blocking=True) * (1 / 255) for x in crops]
    except (DataError, RuntimeError) as e:  # this process's alone, perhaps
        why = str(e).strip().rpartition("\n")[2]  # above it is the worker's traceback
        if "shared memory" in str(e):
            why = "/dev/shm is too small for workers; add --workers 0, or docker run --shm-size 16g"
        elif not isinstance(e, DataError):
            raise
        e.with_traceback(None)  # in which it refers to itself and to the workers: now these end
        check(False, why, alone=True)


def begin_worker(worker):
    """Launchers signal all processes of a group, and the trainer needs its workers to finish the
    step. SIGTERM, by which Python ends workers, acts late: if it never did, exits could hang."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # seconds


def show_views(path, images, plan, seed):
    """Draws the first eight images: in a row each, the source's views, white, the target's."""
    steps, plain = [(0, torch.arange(min(8, len(images))))], replace(images, stats=RAW)
    (((src, tgt), _),) = stream(plain, plan, steps, seed, slice(None), 0, "cpu")
    views, edge = [*sum(src, []), torch.ones_like(src[0][0]), *sum(tgt, [])], plan[0][0][0].size
    columns = [F.pad(x, (0, edge - x.shape[3]) * 2, value=1.0) for x in views]
    tiles = torch.stack(columns, 1).flatten(0, 1)
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // edge))
    try:
        torchvision.utils.save_image(tiles, path, nrow=len(columns), pad_value=1.0)
    except (OSError, ValueError) as e:  # no such folder; no such format
        raise DataError(f"--show-views {path}: {e}") from e
