"""Linear probe: how good are frozen features? ImageNet's protocols, kNN, transfer to the paper's data sets.

The backbone is frozen, in eval mode. On its features x (a ResNet's pooled ones, a ViT's class token) a linear
classifier W x + b learns, or none:

    lars    LARS 1.6 at batch 4096, 90 epochs of random crops      the paper's probe (Sec. 7, after SimSiam)
    sgd     SGD 120 at batch 256, 100 epochs of random crops       the paper's final model; MoCo: --lr 30
    lbfgs   min of sum of losses + l2/2 |W|^2 over W, b; l2 chosen    transfer in SimCLR and BYOL (45 l2's)
    knn     a vote of the k nearest training images, weights exp(cosine / 0.1)

    python linear_probe.py runs/mocov2_asym-demo                                   the run's own data, lbfgs
    torchrun --nproc_per_node=8 linear_probe.py moco_v2_800ep.pth.tar --data IMAGENET            the paper's
    python linear_probe.py RUN --transfer all --data-root DATA                           Table 4, l2 search
    python linear_probe.py RUN --transfer all --data-root DATA --protocol sgd --lr-sweep          lr search

What decides, lr or l2, is chosen on images held out of the training set; then the classifier is trained again
on all of these. Nothing is chosen on the test set. Published checkpoints are read too: FORMATS. The plumbing
is mocov2_asym.py's; the network comes from the script that made the checkpoint.
"""

import argparse  # noqa: I001 (the last import is shorter this way)
import fcntl
import hashlib
import importlib
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import data
from common.augment import rng
from common.lars import LARS
from mocov2_asym import (CORES, all_sum, count, dashed, finite, gather, global_batches, join_processes, knn,
                         listen, lost, lr_factor, mine, near, number, rank, reason, spawn, speak, world_size)

SCRIPTS = sorted(path.stem for path in Path(__file__).resolve().parent.glob("*_asym.py"))

# ============================================================================== protocols
PROTOCOLS = {  # lr: per 256 images. Epochs and schedule of sgd are our choice, the paper is silent
    "lars": dict(lr=0.1, batch_size=4096, epochs=90, schedule="cosine"),
    "sgd": dict(lr=120.0, batch_size=256, epochs=100, schedule="cosine"),
}
LR_SWEEP = {"lars": [0.02, 0.05, 0.1, 0.2, 0.5], "sgd": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]}  # our choice
L2_SWEEP = torch.logspace(5, -6, 45, dtype=torch.float64).tolist()  # SimCLR's, the strongest first


def losses(logits, labels):
    """A loss per image, (n,). Labels (n,): cross-entropy. Labels (n, c) of 1, 0, or -1, which does not count:
    a logistic loss for each class (one-vs-rest), summed."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    each = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).to(logits), reduction="none")
    return (each * (labels >= 0)).sum(1)


def gradient_probe(args, run, task, features):
    """lars and sgd. features: pairs (step, rows) -> triples (step, rows, this process's features of them)."""
    lr, found, learn = args.lr, {}, lambda *about: train(args, run, task, features, *about)
    if args.lr_sweep:
        found = learn("search", args.lr_sweep, task.rest, task.held_x, task.labels[task.held])
        lr = max(found, key=found.get)
        if lr in (min(found), max(found)):
            say(f"note: the chosen lr {lr:g} is at an end of the sweep; a wider --lr-sweep may do better")
    value = learn("final", [lr], torch.arange(len(task.labels)), task.test_x, task.test_labels)[lr]
    return {"value": value, "chosen": {"lr": lr}, "scores": found}


def train(args, run, task, features, stage, lrs, rows, judge_x, judge_labels):
    """Trains one classifier per learning rate, all on the same features of the images rows, and measures them
    after each epoch on judge_x (m, d). Returns learning rate -> result of the last epoch."""
    batch, epoch, device, started = args.batch_size, len(rows) // args.batch_size, args.place, time.time()
    heads = nn.ModuleList(classifier(judge_x.shape[1], task.classes, args.seed) for _ in lrs).to(device)
    groups = [{"params": list(head.parameters()), "lr": 0.0} for head in heads]
    if args.protocol == "lars":  # the bias has a trust ratio too, as in the paper's code
        optimizer = LARS(groups, lr=0.0, momentum=0.9, adapt_1d=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    total, summed, judge_x = args.epochs * epoch, torch.zeros(len(lrs), device=device), judge_x.to(device)

    def resume(state):
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        check(len(lrs) > 1 or finite(heads, optimizer),  # of a sweep's, the large may diverge
              f"{run.path(stage, task.name)} holds values that are not finite; remove it")
        return number(int, 0, total)(state["step"])

    first = run.restore(stage, task.name, resume) or 0
    run.forget(lambda line: (line.get("data"), line.get("stage")) == (task.name, stage)
               and line["epoch"] > first // epoch)
    if args.protocol == "lars" and max(lrs) * batch / 256 * total < 3000:  # ImageNet's: 1.6 x 28,000
        say(f"warning: LARS moves a weight by lr x 0.001 of its norm in a step, and {total} steps are few "
            "to grow in: use --protocol lbfgs, or --lr-sweep 1 3 10 30")
    batches = ((step, rows[i]) for step, i in global_batches(len(rows), batch, args.seed, first, total))
    for step, chosen, x in features(batches):  # x (n, d)
        heed(args)
        labels = task.labels[chosen[mine()]].to(device)
        loss = torch.stack([losses(head(x), labels).mean() for head in heads])
        optimizer.zero_grad()
        loss.sum().backward()  # each classifier gets the gradient of its own loss
        for lr, group in zip(lrs, optimizer.param_groups, strict=True):
            group["lr"] = lr * batch / 256 * schedule(args, step, total)
            for p in group["params"]:
                p.grad = all_sum(p.grad) / world_size()
        optimizer.step()
        summed, done = summed + loss.detach(), step + 1
        if done % epoch == 0:
            mean, passed = (all_sum(summed) / world_size() / epoch).tolist(), done // epoch
            check(len(lrs) > 1 or math.isfinite(mean[0]) and finite(heads, optimizer),
                  f"epoch {passed} ends with a loss of {mean[0]}, or with weights that are not finite: "
                  f"--lr {lrs[0]} is too large; try a tenth of it, or --lr-sweep")
            entry = {"data": task.name, "stage": stage, "epoch": passed, "lr": lrs, "loss": mean,
                     task.metric: grades(task, heads, judge_x, judge_labels),
                     "eta_s": round((time.time() - started) / (done - first) * (total - done))}
            run.log(entry, show=passed % max(1, args.epochs // 10) == 0)
            summed = torch.zeros_like(summed)
            if task.x is None or done == total:  # on stored features a stage is quickly repeated
                run.save(stage, task.name, {"step": done, "heads": heads.state_dict(),
                                            "optimizer": optimizer.state_dict()})
    return dict(zip(lrs, grades(task, heads, judge_x, judge_labels), strict=True))


def classifier(width, classes, seed):
    """Weights from N(0, 0.01), bias 0."""
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=rng(seed, "classifier"))
    nn.init.zeros_(head.bias)
    return head


def schedule(args, step, total):
    """The learning rate's share: half a cosine, or MoCo's steps at 60 and 80 per cent."""
    if args.schedule == "cosine":
        return lr_factor(step, total, 0)
    return 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))


@torch.no_grad()
def grades(task, heads, x, labels):
    return [METRICS[task.metric](head(x).cpu(), labels.cpu()) for head in heads]


def lbfgs_probe(args, run, task):
    """l2 by the held-out images; then a fit on all training images, begun at the chosen one."""
    run.forget(lambda line: line.get("data") == task.name)  # a stopped search begins again
    place = "cpu" if args.place.type == "mps" else args.place  # mps has no float64
    x, labels, fit, best = task.x[0].to(place).double(), task.labels.to(place), None, None
    for l2 in L2_SWEEP:
        heed(args)
        fit = fit_l2(x[task.rest], labels[task.rest], task.classes, l2, fit, args.max_iter)
        value, = grades(task, [fit.predict], x[task.held], labels[task.held])
        run.log({"data": task.name, "l2": l2, "held_out": value, "iterations": fit.iterations}, show=False)
        if best is None or value > best[0]:  # the strongest of equals
            best = value, l2, fit
    fit = fit_l2(x, labels, task.classes, *best[1:], 10 * args.max_iter)
    if fit.gradient > 1e-4:
        say(f"warning: L-BFGS stopped short of the optimum, gradient {fit.gradient:.1g}; raise --max-iter")
    value, = grades(task, [fit.predict], task.test_x.to(place).double(), task.test_labels)
    run.save("classifier", task.name, {"weight": fit.w.float().cpu(), "bias": fit.b.float().cpu()})
    return {"value": value, "chosen": {"l2": best[1]}, "iterations": fit.iterations, "gradient": fit.gradient}


def fit_l2(x, labels, classes, l2, start=None, most=1000):
    """Minimises sum of losses + l2/2 |w|^2 over w (c, d) and b (c,), which has no penalty. x: float64 (n, d).
    start: the fit to begin at. As b is free, taking the mean off x changes nothing but the speed; a common
    scale s of x goes into w. Returns w, b, predict, iterations, and the largest gradient of the mean loss."""
    mean = x.mean(0)
    s = (x - mean).square().mean().sqrt().clamp_min(1e-12)
    z, w, b = (x - mean) / s, x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    if start:
        w, b = start.w * s, start.b + start.w @ mean
    w.requires_grad_(), b.requires_grad_()
    optimizer = torch.optim.LBFGS([w, b], max_iter=most, max_eval=2 * most, tolerance_grad=1e-6,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = (losses(z @ w.T + b, labels).sum() + l2 / 2 * (w / s).square().sum()) / len(x)
        value.backward()
        return value

    optimizer.step(objective)
    objective()
    largest = max(p.grad.abs().max().item() for p in (w, b))
    w, b = w.detach() / s, b.detach() - w.detach() / s @ mean
    return SimpleNamespace(w=w, b=b, predict=lambda x: x @ w.T + b, gradient=largest,
                           iterations=optimizer.state[optimizer.param_groups[0]["params"][0]]["n_iter"])


def knn_probe(args, task):
    """k -> top-1, for each k of --knn-k that the training images allow."""
    bank, queries = ((F.normalize(x.to(args.place)), labels.to(args.place)) for x, labels in
                     ((task.x[0], task.labels), (task.test_x, task.test_labels)))
    return {k: knn(bank, queries, k) for k in args.knn_k if k <= len(task.labels)}


# ============================================================================== metrics
def top1(logits, labels):
    """Share of images (n, c), (n,) whose largest logit is right."""
    return (logits.argmax(1) == labels).float().mean().item()


def mean_per_class(logits, labels):
    """Mean over the classes of the share of a class's images that are right."""
    right = (logits.argmax(1) == labels).float()
    return torch.stack([right[labels == c].mean() for c in labels.unique()]).mean().item()


def map11(logits, labels):
    """VOC 2007's mean average precision. For each class, at the recalls 0, 0.1, ..., 1 the best precision at
    that recall or more; the mean of these 11. Labels (n, c): 1, 0, or -1 for what does not count."""
    means = []
    for score, label in zip(logits.T, labels.T, strict=True):
        known = label >= 0
        hits = label[known][score[known].argsort(descending=True, stable=True)].cumsum(0).double()
        if len(hits) and hits[-1] > 0:  # a class that occurs
            recall, precision = hits / hits[-1], hits / torch.arange(1, len(hits) + 1)
            means.append(sum(precision[recall >= t / 10].max().item() for t in range(11)) / 11)
    return sum(means) / max(1, len(means))


METRICS = {"top-1": top1, "mean per class": mean_per_class, "11-point mAP": map11}


# ============================================================================== data sets of Table 4
# A loader, called with (root, download), yields Images: train, val where the data set has one, test.
def torchvision_lists(kind, *splits):
    """The loader of torchvision's class of that name."""
    def load(root, download):
        for split in splits:
            found = getattr(torchvision.datasets, kind)(root, download=download, split=split)
            if kind == "StanfordCars":
                yield images_of(*zip(*found._samples, strict=True), found.classes)
            else:
                paths = found._images if kind == "OxfordIIITPet" else found._image_files
                yield images_of(paths, found._labels, found.classes)
    return load


def images_of(paths, labels, classes):
    paths = np.array([os.fsencode(path) for path in paths])
    return data.Images(paths=paths, labels=torch.as_tensor(labels), classes=tuple(classes))


def cifar(name):
    return lambda root, download: data.load(name, root, download)[1:]


def tree(name):
    return lambda root, download: data.load(f"{root}/{name}")[1:]


def sun397(root, download):
    """Split 1 of SUN's own ten, lists of lines such as /a/abbey/sun_xyz.jpg."""
    if download:
        torchvision.datasets.SUN397(root, download=True)
    parts = [Path(root, "SUN397", f"{part}_01.txt").read_text().split() for part in ("Training", "Testing")]
    number_of = {c: i for i, c in enumerate(sorted({os.path.dirname(line) for line in parts[0]}))}
    for lines in parts:
        labels = [number_of[os.path.dirname(line)] for line in lines]
        yield images_of([f"{root}/SUN397{line}" for line in lines], labels, number_of)


def voc2007(root, download):
    """Several classes per image. VOC's lists have 1, -1 for absent, 0 for 'difficult', which do not count."""
    for part in ("train", "val", "test"):
        paths = torchvision.datasets.VOCDetection(root, "2007", part, download=download).images
        lists = sorted(Path(root, "VOCdevkit/VOC2007/ImageSets/Main").glob(f"*_{part}.txt"))
        rows = [dict(line.split() for line in file.read_text().splitlines()) for file in lists]
        labels = [[{"1": 1, "0": -1, "-1": 0}[row[Path(path).stem]] for row in rows] for path in paths]
        yield images_of(paths, labels, [file.stem.split("_")[0] for file in lists])


def caltech101(root, download):
    """25 images of each class to train, 5 to choose, the rest to test; the draw is ours, the same in all
    runs. 102 classes: with the background, as BYOL's; torchvision's class leaves it out."""
    if download:
        torchvision.datasets.Caltech101(root, download=True)
    images = data.scan(f"{root}/caltech101/101_ObjectCategories")
    rows = [(images.labels == c).nonzero()[:, 0] for c in range(len(images.classes))]
    rows = [r[torch.randperm(len(r), generator=rng("caltech101", c))] for c, r in enumerate(rows)]
    for part in (slice(25), slice(25, 30), slice(30, None)):
        yield images[torch.cat([r[part] for r in rows])]


@dataclass(frozen=True)
class Target:
    """A row of Table 4: title, the paper's per cent, metric, how many of train's images BYOL held out (0:
    there is a val split), loader, where to get the data and where to put them."""

    title: str
    paper: float
    metric: str
    held_out: int
    load: Callable
    where: str = "add --download"


listed, TOP1, MEAN = torchvision_lists, "top-1", "mean per class"
TRANSFER = {
    "food101": Target("Food-101", 79.4, TOP1, 7575, listed("Food101", "train", "test")),
    "cifar10": Target("CIFAR-10", 92.8, TOP1, 5000, cifar("cifar10")),
    "cifar100": Target("CIFAR-100", 77.8, TOP1, 5067, cifar("cifar100")),
    "birdsnap": Target("Birdsnap", 58.5, TOP1, 4981, tree("birdsnap"),
        "thomasberg.org lists links, some dead; put the images into ROOT/birdsnap/{train,test}/SPECIES/"),
    "sun397": Target("SUN-397", 67.8, TOP1, 3970, sun397,
        "--download gets the images; Partitions.zip at vision.princeton.edu/projects/2010/SUN has the lists "
        "Training_01.txt and Testing_01.txt, to be put into ROOT/SUN397/"),
    "cars": Target("Cars", 69.7, TOP1, 1650, listed("StanfordCars", "train", "test"),
        "its address is dead; put a copy's cars_train/, cars_test/, devkit/ and "
        "cars_test_annos_withlabels.mat into ROOT/stanford_cars/, and install scipy"),
    "aircraft": Target("Aircraft", 59.3, MEAN, 0, listed("FGVCAircraft", "train", "val", "test")),
    "voc2007": Target("VOC-07", 93.8, "11-point mAP", 0, voc2007),  # the paper's is a quoted, other metric
    "dtd": Target("DTD", 80.2, TOP1, 0, listed("DTD", "train", "val", "test")),  # split 1 of its ten
    "pets": Target("Pets", 87.2, MEAN, 740, listed("OxfordIIITPet", "trainval", "test")),
    "caltech101": Target("Caltech-101", 93.1, MEAN, 0, caltech101),
    "flowers102": Target("Flowers", 92.5, MEAN, 0, listed("Flowers102", "train", "val", "test"),
        "add --download, and install scipy, which its lists need"),
    "places205": Target("Places-205", 56.8, TOP1, 20500, tree("places205"),
        "places.csail.mit.edu has it; put it into ROOT/places205/{train,val}/CLASS/"),
}


@dataclass
class Task:
    """A data set to classify, and the features of its images."""

    name: str
    metric: str
    classes: int
    labels: torch.Tensor  # of all training images: (n,), or (n, c) of 1, 0, -1
    held: torch.Tensor  # the rows of those held out to choose
    test_labels: torch.Tensor
    x: torch.Tensor = None  # stored features (views, n, d); None for fresh crops
    held_x: torch.Tensor = None  # of centre crops, as test_x; for --lr-sweep
    test_x: torch.Tensor = None

    @property
    def rest(self):
        return torch.ones(len(self.labels), dtype=torch.bool).index_fill(0, self.held, False).nonzero()[:, 0]


def load_task(args, name):
    """A Task without features, its training and its test images. Raises data.DataError."""
    target = TRANSFER.get(name)
    try:
        load = target.load if target else lambda root, download: data.load(name, root, download)[1:]
        train, *val, test = load(args.data_root, args.download)
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, data.DataError) as e:
        if not target or isinstance(e, data.DataError) and "--download" in str(e):
            raise
        where = target.where.replace("ROOT", args.data_root)
        raise data.DataError(f"{name} is not in {args.data_root}/ ({str(e).splitlines()[0]}): {where}") from e
    if train is None or len(train.classes) < 2 or len(train) < 10:
        raise data.DataError(f"{name} has no labels to learn, or less than ten images: give a folder with "
                             "train/CLASS/ and val/CLASS/, or with CLASS/, of two or more classes")
    if bad := sorted({*train.bad, *test.bad}):
        raise data.DataError(f"{len(bad)} unreadable image(s), such as {bad[0]}: repair or remove them")
    n = len(train)
    if val:  # chosen on val, then trained on train and val
        paths, labels = np.concatenate([train.paths, val[0].paths]), torch.cat([train.labels, val[0].labels])
        train = data.Images(paths=paths, labels=labels, classes=train.classes)
        held = torch.arange(n, len(train))
    else:
        size = target.held_out if target and target.held_out < n / 2 else n // 10
        held = torch.randperm(n, generator=rng(args.seed, "held out"))[:size]
    metric = target.metric if target else "top-1"
    return Task(name, metric, len(train.classes), train.labels, held, test.labels), train, test


# ============================================================================== features
class Frozen(nn.Module):
    """Images (n, 3, s, s) in [0, 1] -> features (n, d): normalisation and a backbone in eval mode."""

    def __init__(self, backbone, size, bicubic, mean, std):
        super().__init__()
        self.backbone, self.size, self.bicubic = backbone, size, bicubic
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x):
        return self.backbone((x - self.mean) / self.std).float()


class Squares(data.Centres):
    """Row -> the central square of a share of the shorter side, uint8 (3, s, s); row if unreadable or -1."""

    def __init__(self, images, size, share, bicubic):
        super().__init__(images, size)
        self.share, self.bicubic = share, bicubic

    def __getitem__(self, row):
        image, really = self.images.decode(row)
        h, w = image.shape[1:]
        side = round(min(h, w) * self.share)
        top, left = (h - side) // 2, (w - side) // 2
        square = data.resize(image[:, top : top + side, left : left + side], self.size, self.bicubic)
        return square, row if really != row else -1


def encode(args, net, images, transfer, view=None):
    """Features (len(images), d), the images shared out among the processes: of centre crops (ImageNet: resize
    to 256, crop 224; transfer, and up to 64 px: all of the square), or of a view's random crops."""
    rows = torch.arange(math.ceil(len(images) / world_size()) * world_size()) % len(images)
    if view is None:
        share, part, parts, bad = 1 if transfer or net.size <= 64 else 224 / 256, images[rows[mine()]], [], []
        squares = Squares(part, net.size, share, transfer or net.bicubic)
        workers = args.workers if part.pixels is None else 0
        for x, unreadable in data.loader(squares, workers, args.place, batch_size=256):
            heed(args)
            bad += [os.fsdecode(part.paths[row]) for row in unreadable.tolist() if row >= 0]
            parts.append(net(x.to(args.place).float() / 255).cpu())
        refuse(bad)
    else:
        steps = ((f"view {view}, {i}", part) for i, part in enumerate(rows.split(256 * world_size())))
        parts = [x.cpu() for *_, x in fresh(args, net, images)(steps)]
    return gather(torch.cat(parts))[: len(images)]


def fresh(args, net, images):
    """features for gradient_probe: of new random crops and flips at each step."""
    def features(steps):
        steps, again = itertools.tee(steps)
        crop = data.Crop(net.size, (0.08, 1.0), net.bicubic)
        stream = data.stream(images, [crop], again, args.seed, rank(), world_size(), args.workers, args.place)
        for (step, rows), ((x,), bad) in zip(steps, stream, strict=True):
            refuse(bad)
            flip = torch.rand(len(rows), generator=rng(args.seed, "flip", step))[mine()] < 0.5
            x = torch.where(flip.view(-1, 1, 1, 1).to(x.device), x.flip(3), x)
            yield step, rows, torch.cat([net(part) for part in x.split(256)])  # 4096 would fill a small GPU
    return features


def stored(args, x):
    """features for gradient_probe: from x (views, n, d), each step from the next view."""
    return lambda steps: ((step, rows, x[step % len(x), rows].to(args.place)) for step, rows in steps)


def refuse(paths):
    """An unreadable image would be replaced by the next, whose label is another."""
    for path in paths:
        print(f"linear_probe: unreadable image: {path}", file=sys.stderr, flush=True)
    bad = int(all_sum(torch.tensor(float(len(paths)))))
    check(not bad, f"{bad} unreadable image(s); repair or remove them")


# ============================================================================== checkpoints
FORMATS = (  # whose; what the names of source and target begin with, after "module."
    ("last.pt of our scripts", "source.backbone.", "target.backbone."),
    ("MoCo v1, MoCo v2 or asym-siam", "encoder_q.", "encoder_k."),
    ("MoCo v3", "base_encoder.", "momentum_encoder."),
    ("SimSiam", "encoder.", None),
    ("Barlow Twins, DINO or solo-learn", "backbone.", "momentum_backbone."),
    ("plain names, as backbone.pth, torchvision, Barlow Twins, SwAV, DINO", "", None),
)
STEMS = ("conv1.weight", "conv_proj.weight", "patch_embed.proj.weight")  # a backbone has one
HEADS = ("fc.", "head.", "heads.", "projection_head.", "prototypes.")
VIT_NAMES = (  # timm's names of a ViT's tensors (MoCo v3, DINO), and torchvision's old ones -> its new ones
    (r"^cls_token$", "class_token"), (r"^pos_embed$", "encoder.pos_embedding"), (r"^norm\.", "encoder.ln."),
    (r"^patch_embed\.proj", "conv_proj"), (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."), (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."), (r"\.mlp\.(fc|linear_)1\.", ".mlp.0."),
    (r"\.mlp\.(fc|linear_)2\.", ".mlp.3."))


def read(path):
    """A file of torch.save: a dict. Nothing in it is executed."""
    check(path.is_file(), f"{path}: no such file; give the folder of a run, or a checkpoint")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a truncated or foreign file raises nearly anything
        code = isinstance(e, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+)", str(e))
        check(not code, f"{path} holds {code and code[1]}, and to load that would run the file's code. If "
              "you trust it, keep its tensors: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW), "
              "where KEY is state_dict, model, or DINO's student or teacher")
        stop(f"{path} is not a whole checkpoint of torch ({type(e).__name__} in reading it): another kind of "
             "file, or truncated; compare its size with the original's")
    check(isinstance(found, dict), f"{path} holds a {type(found).__name__}, not a dict; save a state_dict()")
    return found


def backbone_of(found, encoder, path):
    """The encoder's backbone in torchvision's names, without heads, and whose format it is."""
    if found.keys() >= {"student", "teacher"}:  # DINO's source and target
        found, encoder = found["teacher" if encoder == "target" else "student"], "source"
    found = next((found[k] for k in ("model", "state_dict") if isinstance(found.get(k), dict)), found)
    state = {k.removeprefix("module."): v for k, v in found.items() if isinstance(v, torch.Tensor)}
    fits = [row for row in FORMATS if any(row[1] + stem in state for stem in STEMS)]
    names = ", ".join([*state][:4]) or "no tensor"
    check(fits, f"{path} holds no backbone: none of {', '.join(STEMS)}, but {names}"
          "; a head or classifier alone cannot be probed: give a run's folder, its backbone.pth or last.pt")
    title, *prefixes = fits[0]
    prefix = prefixes[encoder == "target"]
    check(prefix is not None and any(prefix + stem in state for stem in STEMS), f"--encoder target: {path} "
          f"({title}) has none; give a run's folder or its backbone_target.pth, or leave it out")
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    for pattern, name in VIT_NAMES if "conv1.weight" not in state else ():
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    return state, title


def load_backbone(args):
    """What open_backbone() gives."""
    try:
        return open_backbone(args)
    except Exception as e:  # a foreign or edited file raises nearly anything
        if "allocate" in str(e):  # the memory is too small, not the file
            raise
        stop(f"{args.checkpoint} cannot be used ({reason(e)}): what it holds, or the args.json beside it, is "
             "cut short or of no run; use another, or the backbone.pth alone, in another folder")


def open_backbone(args):
    """The Frozen network of a checkpoint, and a dict about it. A run's args.json or last.pt tell the arch,
    size, interpolation and normalisation. For other files: the architecture whose tensors fit; 224 px, or 32
    with the 3 x 3 convolution of CIFAR's stem; bilinear; ImageNet's normalisation."""
    path, encoder, about = Path(args.checkpoint), args.encoder, {}
    if path.is_dir():
        path, encoder = path / ("backbone_target.pth" if encoder == "target" else "backbone.pth"), "source"
    found, beside = read(path), path.parent / "args.json"
    if found.keys() >= {"method", "args"}:
        about = found
    elif path.name in ("backbone.pth", "backbone_target.pth") and beside.exists():
        about = json.loads(beside.read_text())
    state, title = backbone_of(found, encoder, path)
    vit = "conv_proj.weight" in state
    stem = state["conv_proj.weight" if vit else "conv1.weight"].shape[-1]
    method = about.get("method", "mocov3_asym" if vit else "mocov2_asym")
    check(method in SCRIPTS, f"{path} is of {method!r}, and there are {', '.join(SCRIPTS)}; put that script "
          "beside linear_probe.py, named ..._asym.py, or use the backbone.pth alone, in another folder")
    script = importlib.import_module(method)  # which runs it
    check(about is not found or found.get("format") == script.FORMAT, f"{path} has format "
          f"{found.get('format')}, not {script.FORMAT}; use the version that wrote it")
    if about:
        flags = SimpleNamespace(**about["args"])
        choice, bicubic = {flags.arch: flags}, script.augmentations(flags)[0].bicubic
    else:
        bicubic, size = False, 224 if stem == 7 else 32
        if "encoder.pos_embedding" in state:  # a token per patch, and the class token
            size = math.isqrt(state["encoder.pos_embedding"].shape[1] - 1) * stem
        resnets = torchvision.models.list_models(torchvision.models, include="*resne*")
        resnets = ["resnet50", "resnet18", "tiny", *resnets]  # the likeliest first: the first that fits is it
        choice = {arch: script.parse_args(["--arch", arch, "--img-size", str(size)])
                  for arch in (["vit_tiny", "vit_small", "vit_base"] if vit else resnets)}
    arch, there, of, wrong = nearest(script, choice, state)
    source = "its run's architecture" if about else "the nearest architecture"
    check(not wrong, f"{path} ({title}) does not fit {arch}, {source}: {wrong}")
    check(about or stem != 3 or "solo-learn" not in title, f"{path}: solo-learn pads a 3 x 3 first "
          "convolution by 2 pixels, others by 1, and the file does not tell; if it is 1, take \"backbone.\" "
          "off its names")
    torch.manual_seed(args.seed)
    net, width = build(script, choice[arch])
    positions = "encoder.pos_embedding"
    if vit and not about and not torch.allclose(state[positions], net.state_dict()[positions], atol=1e-3):
        check(args.img_size in (None, size), f"--img-size {args.img_size}: the positions of {path} are "
              f"learned, for {size} px; leave it out")
        for block in net.encoder.layers:  # of DINO and torchvision: 64 channels a head; MoCo v3's S has 32
            block.self_attention.num_heads, block.self_attention.head_dim = width // 64, 64
    if not args.untrained:
        net.load_state_dict(state, strict=False)  # names and shapes were compared
    tensors = net.state_dict().values()
    mean = args.mean or about.get("mean", data.IMAGENET[0])
    std = args.std or about.get("std", data.IMAGENET[1])
    net = Frozen(net, args.img_size or pixels(choice[arch].img_size), bicubic, mean, std)
    check(all(v.isfinite().all() for v in net.state_dict().values()),
          f"{path} has weights, or a mean or std, that are not finite; use another")
    check(net.size >= stem, f"--img-size {net.size}: the first convolution of {arch} has {stem} px; use more")
    return net.to(args.place), {
        "format": title, "arch": arch, "loaded": 0 if args.untrained else there, "of": of,
        "layer": "class token" if vit else "pooled", "dim": width, "size": net.size,
        "heads": net.backbone.encoder.layers[0].self_attention.num_heads if vit else None,
        "interpolation": "bicubic" if bicubic else "bilinear", "mean": mean, "std": std,
        "weights": hashlib.sha256(b"".join(v.numpy().tobytes() for v in tensors)).hexdigest()[:16],
        "data": str(about["args"]["data"]) if about else None}


def build(script, flags):
    if flags.arch.startswith("vit"):
        return script.build_vit(flags)
    return script.build_backbone(flags, nn.BatchNorm2d)


def nearest(script, choice, state):
    """Of the architectures in choice the one whose tensors' names and shapes differ least from state's: its
    name, the numbers of tensors in state and wanted, and what is wrong, or ""."""
    def shapes(tensors):  # some files lack BN's counters of batches, for which eval mode has no use
        return {k: tuple(v.shape) for k, v in tensors.items() if not k.endswith("num_batches_tracked")}

    there, found = shapes(state), []
    for arch, flags in choice.items():
        with torch.device("meta"):
            wanted = shapes(build(script, flags)[0].state_dict())
        found.append((len(wanted.items() ^ there.items()), arch, wanted))
        if wanted == there:
            break
    _, arch, wanted = min(found, key=lambda entry: entry[0])
    wrong = []
    other = {k for k in there.keys() & wanted.keys() if there[k] != wanted[k]}
    for what, names in (("missing", wanted.keys() - there.keys()), ("surplus", there.keys() - wanted.keys()),
                        ("of another shape", other)):
        few = [f"{k} {there.get(k, wanted.get(k))}" for k in sorted(names)[:3]] + ["..."] * (len(names) > 3)
        wrong += [f"{len(names)} tensor(s) {what}: {', '.join(few)}"] if names else []
    return arch, len(there), len(wanted), "; ".join(wrong)


# ============================================================================== flags
# what may differ on resuming, and the flags that only some protocols use
MAY_DIFFER = {"checkpoint", "out", "overwrite", "nproc", "workers", "device", "data_root", "download"}
GRADIENT = {"lr", "lr_sweep", "batch_size", "epochs", "schedule", "cache_features", "cache_views"}
USES = {"lars": GRADIENT, "sgd": GRADIENT, "lbfgs": {"max_iter", "knn_k"}, "knn": {"knn_k"}}
pixels = number(int, 8, 2**31 - 1)  # fewer are no view in the six either


def make_parser():
    p = argparse.ArgumentParser(prog="linear_probe.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: stop(f"{message}; --help lists the flags")
    flag = p.add_argument
    flag("checkpoint", help="the folder of a run, its last.pt or backbone.pth, or a published file")
    flag("--encoder", choices=("source", "target"), default="source", help="which of the two")
    flag("--untrained", action="store_true", help="the same network as initialised, to compare with")
    flag("--mean", type=number(float, -1e6, 1e6), nargs=3,
         help="of the normalisation; default: the run's, or ImageNet's")
    flag("--std", type=number(float, 1e-6, 1e6), nargs=3, help="likewise")
    flag("--img-size", type=pixels, help="pixels; default: the run's, or by the first convolution 224 or 32")
    flag("--data", help=f"{', '.join(data.NAMES)}, a data set of --transfer, or a folder; default: the run's")
    flag("--transfer", nargs="+", choices=["all", *TRANSFER], metavar="NAME",
         help=f"rows of Table 4, beside the paper's results: all, or of {', '.join(TRANSFER)}")
    flag("--data-root", default="data", metavar="DIR", help="where data sets are, or go")
    flag("--download", action="store_true", help="let torchvision download data sets")
    flag("--protocol", choices=USES, help="default: lars for folders of 100,000 images and more, else lbfgs")
    flag("--lr", type=number(float, 0, 1e9), help="lars, sgd: per 256 images; scaled by batch size / 256")
    flag("--lr-sweep", type=number(float, 0, 1e9), nargs="*", metavar="LR", help="choose; default: LR_SWEEP")
    flag("--batch-size", type=count, help="lars, sgd: images per step, of all processes together")
    flag("--epochs", type=count, help="lars, sgd: length of training")
    flag("--schedule", choices=("cosine", "step"), help="step: MoCo's, a tenth at 60 and 80 %%")
    flag("--cache-features", action="store_true", help="lars, sgd: train on stored features of centre crops")
    flag("--cache-views", type=count, metavar="K", help="lars, sgd: on those of K random crops of each image")
    flag("--max-iter", type=count, default=100, help="lbfgs: iterations per l2; the last fit: x 10")
    flag("--knn-k", type=count, nargs="+", default=[200, 20], metavar="K", help="neighbours that vote")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=0,
         help="of held-out images, crops, classifier, --untrained")
    flag("--workers", type=number(int, 0, 1000), help="loader processes of each process; default: up to 8")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps")
    flag("--nproc", type=count, default=1, help="start that many processes on this machine (or use torchrun)")
    flag("--out", metavar="DIR", help="default: runs/linear_probe-RUN-FLAGS; the same command again resumes")
    flag("--overwrite", action="store_true", help="start again instead")
    return p


def parse_args(argv):
    p = make_parser()
    args = p.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if v != p.get_default(k) and k != "checkpoint"}
    empty = [k for k, v in given.items() if v == [] and k != "lr_sweep"]  # what argparse makes of --lr=--
    check(not empty, f"{dashed(empty)}: -- is no value; give one, or leave the flag out")
    check(not (args.data and args.transfer), "--data and --transfer exclude each other; drop one")
    check(args.lr is None or args.lr_sweep is None, "--lr and --lr-sweep exclude each other; drop one")
    if args.workers is None:
        args.workers = min(8, max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc))))
    path, parts = Path(args.checkpoint).resolve(), []
    for k, v in given.items():
        v = "_".join(map(str, v)) if isinstance(v, list) else Path(v).name if k == "data" else v
        parts += [k if v is True or v == "" else f"{k}={v}"] * (k not in MAY_DIFFER)
    ours = path.stem in ("last", "backbone", "backbone_target")
    args.out = args.out or "-".join(["runs/linear_probe", *[path.parent.name] * ours, path.stem, *parts])
    args.given, args.signal = set(given), 0  # signal: the number of one that came, see heed()
    return args


def resolve(args, tasks):
    """What depends on the data: the protocol, and its numbers."""
    images, transfer = next(iter(tasks.values()))[1], args.transfer or args.data in TRANSFER
    large = images.pixels is None and len(images) >= 100_000 and not transfer
    args.protocol = args.protocol or ("lars" if large else "lbfgs")
    useless = args.given & set.union(*USES.values()) - USES[args.protocol]
    check(not useless, f"{dashed(useless)}: nothing in --protocol {args.protocol} to act on; name another?")
    gradient = args.protocol in PROTOCOLS
    args.stores = not gradient or bool(args.cache_features or args.cache_views or transfer)
    for name, value in PROTOCOLS.get(args.protocol, {}).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.lr_sweep = LR_SWEEP[args.protocol] if args.lr_sweep == [] else args.lr_sweep
    world, batch, k, voting = world_size(), args.batch_size, max(args.knn_k), args.protocol == "knn"
    check(args.stores or batch % world == 0,
          f"--batch-size {batch} does not divide among {world} processes; use {near(batch or 1, world)}")
    for name, (task, *_) in tasks.items():
        n = len(task.rest if args.lr_sweep else task.labels)
        check(not gradient or batch <= n, f"--batch-size {batch}: {name} has {n} images to learn; use less")
        check(not voting or k <= n, f"--knn-k {k} is more than the {n} training images of {name}; use less")
        check(not voting or task.labels.ndim == 1,
              f"{name} has several classes per image, and kNN votes for one; use --protocol lbfgs")


# ============================================================================== run
def check(good, message):
    if not good:
        stop(message)


def stop(message, code=2):
    """Ends this process; the first of each node says why."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        speak("stderr", f"linear_probe: {message}")
    raise SystemExit(code)


def say(message):
    if rank() == 0:
        speak("stdout", message)


def brief(value):
    if isinstance(value, list | tuple):
        return " ".join(map(brief, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Run:
    """A probe's folder: args.json, log.jsonl, result.json, and what it resumes from. Rank 0 writes."""

    def __init__(self, args, about):
        self.out, self.results = Path(args.out), {}
        flags = {k: v for k, v in vars(args).items() if k not in ("given", "place", "signal")}
        self.about = json.loads(json.dumps({"args": flags, "backbone": about, "torch": torch.__version__}))
        ours, result, self.file = (self.out / name for name in ("args.json", "result.json", "log.jsonl"))
        self.lock = None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if rank() == 0:
                self.lock = os.open(self.out / ".lock", os.O_CREAT | os.O_RDWR)
                try:  # the lock goes when this process does, even by kill -9
                    fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    stop(f"--out {self.out} is in use by another process; wait for it, or use another")
                except OSError:  # some file systems have no locks
                    pass
            if rank() == 0 and args.overwrite:
                for path in (ours, result, self.file, *self.out.glob("*.pt")):
                    path.unlink(missing_ok=True)
            all_sum(torch.zeros(1))  # wait for rank 0
            old = json.loads(ours.read_text()) if ours.exists() else self.about
            pairs = [(k, old[part].get(k), v) for part in ("args", "backbone")
                     for k, v in self.about[part].items() if k not in MAY_DIFFER]
            self.results = json.loads(result.read_text())["results"] if result.exists() else {}
            fresh = not ours.exists()
            self.lines()  # what is broken stops it now, not after hours
            for pair in self.results.items():
                sentence(*pair)
            all_sum(torch.zeros(1))  # all have looked
        except Exception as e:  # a foreign file raises nearly anything
            if lost(e):
                raise
            stop(f"--out {self.out} cannot be used ({reason(e)}); use another, or --overwrite")
        differ = ", ".join(f"{k} {a} there, {b} here" for k, a, b in pairs if a != b)
        check(not differ, f"--out {self.out} holds another probe ({differ}); use another, or --overwrite")
        if fresh:
            begin = json.dumps({"command": sys.argv, **self.about}) + "\n"
            self.write("log.jsonl", lambda path: path.write_text(begin))
            self.write("args.json", lambda path: path.write_text(json.dumps(self.about, indent=1)))

    def path(self, what, name):
        return self.out / f"{what}-{Path(name).name}.pt"

    def lines(self):
        """The lines of the log, without the half one that a killed process leaves."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(x) for x in lines if x.endswith("}")]

    def restore(self, what, name, use):
        """use(what save() wrote), or None if there is nothing."""
        path = self.path(what, name)
        try:
            if path.exists():
                return use(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as e:  # a truncated or foreign file raises nearly anything
            stop(f"{path} cannot be used ({reason(e)}); remove it, and the same command makes it again")

    def save(self, what, name, state):
        self.write(self.path(what, name).name, lambda path: torch.save(state, path))

    def finish(self, name, result):
        self.results[name] = result
        text = json.dumps({**self.about, "results": self.results}, indent=1)
        self.write("result.json", lambda path: path.write_text(text))

    def write(self, name, how, aside=".tmp"):
        """Rank 0 writes aside, then renames: a reader finds the old file or the new one, never a part of it.
        If it cannot, all processes stop."""
        error, path = "", self.out / name
        try:
            if rank() == 0:
                how(part := self.out / (name + aside))
                os.replace(part, path)
        except (OSError, RuntimeError) as e:
            if lost(e):
                raise
            error = reason(e)
        if all_sum(torch.tensor(len(error))):
            stop(f"cannot write {path} ({error}); make room, or use another --out", 1)

    def log(self, entry, show=True):
        def append(path):
            with open(path, "a") as f:
                f.write(json.dumps(entry) + "\n")

        self.write("log.jsonl", append, aside="")
        if show:
            say("  " + "  ".join(f"{k} {brief(v)}" for k, v in entry.items()))

    def forget(self, repeated):
        """Takes from the log what will be done again."""
        lines = [json.dumps(x) + "\n" for x in self.lines() if not repeated(x)] if rank() == 0 else []
        self.write("log.jsonl", lambda path: path.write_text("".join(lines)))


def work(args):
    """All that one process does."""
    args.place = join_processes(args)
    net, about = load_backbone(args)
    args.data = args.data or (None if args.transfer else about["data"])
    check(args.data or args.transfer, f"{args.checkpoint} does not say what to probe on: name it with --data")
    if args.download and rank() == 0:  # alone, and before the others look
        load_tasks(args)
    all_sum(torch.zeros(1))
    args.download = False
    tasks, absent = load_tasks(args)
    check(tasks, "; ".join(absent.values()))
    resolve(args, tasks)
    run = Run(args, about)
    try:
        probe(args, run, net, about, tasks, absent)
    finally:
        if run.lock is not None:
            os.close(run.lock)


def probe(args, run, net, about, tasks, absent):
    """What is left to do in the run's folder, and the report."""
    heads = f" of {about['heads']} heads" if about["heads"] else ""
    say(f"{args.checkpoint}: {about['format']}; {args.encoder} encoder, {about['arch']}{heads}, "
        f"{about['loaded']} of {about['of']} tensors loaded{', UNTRAINED' * args.untrained}\n"
        f"  {about['layer']} features of {about['dim']}; {net.size} px, {about['interpolation']}, "
        f"mean {brief(about['mean'])}, std {brief(about['std'])}\n"
        f"  protocol {args.protocol} on {'stored features' if args.stores else 'crops'}; output: {run.out}")
    for lr in args.lr_sweep or [args.lr] if args.protocol in PROTOCOLS else []:
        say(f"  lr {lr:g} x {args.batch_size}/256 = {lr * args.batch_size / 256:g}")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for name in [k for k in tasks if k not in run.results]:
        result = look(args, run, net, *tasks[name])
        moved = [k for k, v in net.state_dict().items() if not v.equal(before[k])]
        check(not moved, f"frozen tensors have moved, so the result is void: {', '.join(moved)}")
        if result:
            run.finish(name, result)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank() == 0:  # what follows needs no images, and one process
        for name in [k for k in tasks if k not in run.results]:
            task = run.restore("features", name, task_of)
            run.finish(name, learn(args, run, task, stored(args, task.x)))
        report(args, run, absent)


def load_tasks(args):
    """name -> what load_task gives, and, where --transfer asks for several, name -> why it is absent."""
    tasks, absent = {}, {}
    for name in [args.data] if args.data else [k for k in TRANSFER if {k, "all"} & set(args.transfer)]:
        try:
            tasks[name] = load_task(args, name)
        except data.DataError as e:
            check(args.transfer, e)
            absent[name] = str(e)
    return tasks, absent


def task_of(state):
    """The Task that look() stored, features and all."""
    task = Task(**state)
    n, d = task.test_x.shape
    if task.x.shape[1:] != (len(task.labels), d) or n != len(task.test_labels):
        raise ValueError("not a feature for each label")
    return task


def look(args, run, net, task, train_images, test_images):
    """The passes over the images. Stores features, or returns the result of a probe on fresh crops."""
    if args.stores and run.path("features", task.name).exists():
        return None
    transfer, started = task.name in TRANSFER, time.time()
    task.test_x = encode(args, net, test_images, transfer)
    if args.stores:
        views = range(args.cache_views) if args.cache_views else [None]
        task.x = torch.stack([encode(args, net, train_images, transfer, view) for view in views])
    if args.lr_sweep:
        task.held_x = encode(args, net, train_images[task.held], transfer)
    say(f"{task.name}: {len(train_images)} training images, {len(test_images)} test, {task.classes} classes\n"
        f"  features: norm {task.test_x.norm(dim=1).mean():.4g}, standard deviation per channel "
        f"{task.test_x.std(0).mean():.4g}; {time.time() - started:.0f} s")
    if not args.stores:
        return learn(args, run, task, fresh(args, net, train_images))
    run.save("features", task.name, vars(task))


def learn(args, run, task, features):
    """A data set's result, as result.json has it."""
    known = [x for x in (task.x, task.held_x, task.test_x) if x is not None]
    check(all(x.isfinite().all() for x in known), f"the features of {task.name} are not finite; are the "
          "network's weights, --mean and --std right? --overwrite makes them again")
    rule = "l2 search" if args.protocol == "lbfgs" else "lr search" if args.lr_sweep else "fixed"
    metric = task.metric
    votes = knn_probe(args, task) if args.protocol in ("knn", "lbfgs") and task.labels.ndim == 1 else {}
    if args.protocol == "knn":
        found, metric = {"value": votes[args.knn_k[0]], "chosen": {"k": args.knn_k[0]}}, "top-1"
    elif args.protocol == "lbfgs":
        found = lbfgs_probe(args, run, task)
    else:
        found = gradient_probe(args, run, task, features)
    return {"metric": metric, **found, "protocol": args.protocol, "rule": rule, "train": len(task.labels),
            "held_out": 0 if rule == "fixed" else len(task.held), "test": len(task.test_labels), "knn": votes}


def sentence(name, r):
    """A data set's result in words."""
    chosen = " ".join(f"{k} {brief(v)}" for k, v in r["chosen"].items())
    held = f", on {r['held_out']} held-out training images" if r["held_out"] else ""
    votes = "".join(f"; kNN k={k}: {v:.1%}" for k, v in r["knn"].items())
    return (f"{name}: {r['metric']} {r['value']:.1%} of {r['test']} test images; {r['protocol']}, {chosen} "
            f"({r['rule']}{held}){votes}")


def report(args, run, absent):
    for name, r in run.results.items():
        say(sentence(name, r))
    if args.transfer:
        rule = next(iter(run.results.values()))["rule"]
        say(f"\n{'':12s}{'paper':>6s} {'here':>6s}   in %; {args.protocol}, {rule} (the paper: lr search)")
        for name, t in TRANSFER.items():
            here = f"{100 * run.results[name]['value']:.1f}" if name in run.results else "-"
            note = f"; {absent[name]}" if name in absent else ""
            note += "; the paper's figure is another metric" if name == "voc2007" else ""
            say(f"{t.title:12s}{t.paper:6.1f} {here:>6s}   {t.metric}{note}")
    say(f"written to {run.out}/result.json")


# ============================================================================== launch
def child(index, argv, nproc, port):
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(max(1, CORES // nproc))
    code = 0
    try:
        guarded(parse_args(argv))
    except SystemExit as e:
        code = e.code
    raise SystemExit(code)  # now the frames, and with them the loader's workers, are gone: no wait for them


def heed(args):
    """Ends this process if it got a signal. Between batches: within one, loader workers complain."""
    if args.signal:
        stop(f"{signal.Signals(args.signal).name}: stopped; the same command continues", 128 + args.signal)


def guarded(args):
    """work(), and one line instead of a traceback where it ends by no fault of the program."""
    before = listen(lambda number, frame: setattr(args, "signal", number))
    try:
        work(args)
    except data.DataError as e:  # a loader worker's comes with its traceback
        e.__traceback__ = None  # whose frames hold the workers: the exit would wait for them
        stop(str(e).splitlines()[-1].split("DataError: ")[-1])
    except (RuntimeError, ConnectionError) as e:
        why = [line.split("RuntimeError: ")[-1] for line in str(e).splitlines() if "allocate" in line]
        if not why and not lost(e):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of dead workers again
        e.__traceback__ = None
        stop(f"out of memory ({why[0]}); use a smaller --batch-size or --img-size" if why else
             f"lost another process ({reason(e)}); the same command continues", 1)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    args = parse_args(argv)
    check(args.nproc == 1 or "RANK" not in os.environ, "--nproc and torchrun exclude each other; drop one")
    (kind, _, i), local = args.device.partition(":"), int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc))
    check(args.device in ("cpu", "cuda", "mps") or kind == "cuda" and i.isdecimal(),
          f"--device {args.device} is unknown; use cpu, cuda, cuda:N or mps")
    gpus, world = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", args.nproc))
    check(kind != "cuda" or max(local, int(i or 0) + 1) <= gpus, f"--device {args.device}, {local} "
          f"process(es): torch sees {gpus or 'no'} GPU; start fewer, or use --device cpu")
    check(kind != "mps" or torch.backends.mps.is_available() and world == 1,
          "--device mps: not available, or more than one process; use --device cpu")
    return spawn(argv, args.nproc, child) if args.nproc > 1 else guarded(args)


if __name__ == "__main__":
    main()
