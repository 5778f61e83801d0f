"""Table 4's data sets and metrics. Loaders of (root, download) yield Images: train, (val,) test."""

import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torchvision

from common import data
from common.augment import rng


def images_of(paths, labels, classes):
    paths = np.array([os.fsencode(path) for path in paths])
    return data.Images(paths=paths, labels=torch.as_tensor(labels), classes=tuple(classes))


def listed(kind, *splits):
    """The loader of torchvision's class of that name."""
    def load(root, download):
        for split in splits:
            found = getattr(torchvision.datasets, kind)(root, download=download, split=split)
            if kind == "StanfordCars":
                paths, labels = zip(*found._samples, strict=True)
            else:
                paths, labels = getattr(found, "_images", None) or found._image_files, found._labels
            yield images_of(paths, labels, found.classes)
    return load


def sun397(root, download):
    """Split 1 of SUN's own ten, lists of lines such as /a/abbey/sun_xyz.jpg."""
    if download:
        torchvision.datasets.SUN397(root, download=True)
    lists = [Path(root, "SUN397", f"{part}_01.txt") for part in ("Training", "Testing")]
    classes = sorted({os.path.dirname(line) for line in lists[0].read_text().split()})
    for lines in (file.read_text().split() for file in lists):
        labels = [classes.index(os.path.dirname(line)) for line in lines]
        yield images_of([f"{root}/SUN397{line}" for line in lines], labels, classes)


def voc2007(root, download):
    """Several classes per image. VOC's lists say 1, -1, or 0 for 'difficult', not counted."""
    for part in ("train", "val", "test"):
        paths = torchvision.datasets.VOCDetection(root, "2007", part, download=download).images
        lists = sorted(Path(root, "VOCdevkit/VOC2007/ImageSets/Main").glob(f"*_{part}.txt"))
        columns = []
        for file in lists:
            said = dict(line.split() for line in file.read_text().splitlines())
            columns.append([{"1": 1, "-1": 0, "0": -1}[said[Path(path).stem]] for path in paths])
        yield images_of(paths, torch.tensor(columns).T, [x.stem.split("_")[0] for x in lists])


def caltech101(root, download):
    """25 images of each class to train, 5 to choose, the rest to test; the draw is ours, the same
    in all runs. 102 classes: with the background, as BYOL's; torchvision's class leaves it out."""
    if download:
        torchvision.datasets.Caltech101(root, download=True)
    images = data.scan(f"{root}/caltech101/101_ObjectCategories")
    rows = [(images.labels == c).nonzero()[:, 0] for c in range(len(images.classes))]
    rows = [r[torch.randperm(len(r), generator=rng("caltech101", c))] for c, r in enumerate(rows)]
    for part in (slice(25), slice(25, 30), slice(30, None)):
        yield images[torch.cat([r[part] for r in rows])]


def top1(logits, labels):
    """Share of images (n, c), (n,) whose largest logit is right."""
    return (logits.argmax(1) == labels).float().mean().item()


def mean_per_class(logits, labels):
    """Mean over the classes of the share of a class's images that are right."""
    right = (logits.argmax(1) == labels).float()
    return torch.stack([right[labels == c].mean() for c in labels.unique()]).mean().item()


def map11(logits, labels):
    """VOC 2007's mean average precision. For each class, at the recalls 0, 0.1, ..., 1 the best
    precision at that recall or more; the mean of these 11. Labels (n, c): see losses()."""
    means = []
    for score, label in zip(logits.T, labels.T, strict=True):
        known = label >= 0
        order = score[known].argsort(descending=True, stable=True)
        hits = label[known][order].cumsum(0).double()
        if len(hits) and hits[-1] > 0:  # a class that occurs
            recall, precision = hits / hits[-1], hits / torch.arange(1, len(hits) + 1)
            best = [precision[recall >= t / 10].max().item() for t in range(11)]
            means.append(sum(best) / 11)
    return sum(means) / max(1, len(means))


TOP1, MEAN, MAP = "top-1", "mean per class", "11-point mAP"
METRICS = {TOP1: top1, MEAN: mean_per_class, MAP: map11}

# How to get the images: docs/linear_probe.md. paper: its result in per cent. held_out: so many of
# train's images BYOL held out to choose by; 0: there is a val split. load None: by data.load().
Target = namedtuple("Target", "title paper metric held_out load")
TRANSFER = {
    "food101": Target("Food-101", 79.4, TOP1, 7575, listed("Food101", "train", "test")),
    "cifar10": Target("CIFAR-10", 92.8, TOP1, 5000, None),
    "cifar100": Target("CIFAR-100", 77.8, TOP1, 5067, None),
    "birdsnap": Target("Birdsnap", 58.5, TOP1, 4981, None),
    "sun397": Target("SUN-397", 67.8, TOP1, 3970, sun397),
    "cars": Target("Cars", 69.7, TOP1, 1650, listed("StanfordCars", "train", "test")),
    "aircraft": Target("Aircraft", 59.3, MEAN, 0, listed("FGVCAircraft", "train", "val", "test")),
    "voc2007": Target("VOC-07", 93.8, MAP, 0, voc2007),  # 93.8: probably of another metric
    "dtd": Target("DTD", 80.2, TOP1, 0, listed("DTD", "train", "val", "test")),  # split 1 of ten
    "pets": Target("Pets", 87.2, MEAN, 740, listed("OxfordIIITPet", "trainval", "test")),
    "caltech101": Target("Caltech-101", 93.1, MEAN, 0, caltech101),
    "flowers102": Target("Flowers", 92.5, MEAN, 0, listed("Flowers102", "train", "val", "test")),
    "places205": Target("Places-205", 56.8, TOP1, 20500, None),
}
