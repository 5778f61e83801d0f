"""Linear probe: how good are frozen features? ImageNet's protocols, kNN, transfer.

The backbone is frozen, in eval mode. On its features x (a ResNet's pooled ones, a ViT's class
token) a linear classifier W x + b learns, or none:

    lars     LARS 1.6 at batch 4096, 90 epochs of random crops     the paper's (Sec. 7)
    sgd      SGD 120 at batch 256, 100 epochs of random crops      its final model; MoCo: --lr 30
    lbfgs    min of sum of losses + l2/2 |W|^2, one of 45 l2's     transfer in SimCLR and BYOL
    knn      a vote of the k nearest training images, weights exp(cosine / 0.1)

What decides, lr or l2, is chosen on images held out of the training set; then the classifier is
trained again on all of these. Nothing is chosen on the test set.

    python linear_probe.py runs/mocov2_asym-demo                  the run's own data, lbfgs
    torchrun --nproc_per_node=8 linear_probe.py moco_v2_800ep.pth.tar --data IMAGENET
    python linear_probe.py RUN --transfer all --data-root DATA    Table 4
    python linear_probe.py FILE --export backbone.pth             weights in torchvision's names
"""

import argparse  # noqa: I001 (the last import is shorter this way)
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import augment, data, knn, resnet
from common.augment import View, rng
from common.lars import LARS
from common.transfer import TRANSFER
from mocov2_asym import (SIGNALS, all_sum, amount, barrier, check, check_launch, fit, fraction,
                         gather, join_processes, launch, lr_factor, mine, positive, rank, say,
                         whole, world_size)

# ============================================================================== protocols
PROTOCOLS = {  # lr: per 256 images. Epochs and schedule of sgd are our choice, the paper is silent
    "lars": {"lr": 0.1, "batch_size": 4096, "epochs": 90, "schedule": "cosine"},
    "sgd": {"lr": 120.0, "batch_size": 256, "epochs": 100, "schedule": "cosine"},
    "lbfgs": {},
    "knn": {},
}
LR_SWEEP = {"lars": [0.02, 0.05, 0.1, 0.2, 0.5], "sgd": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]}
L2_SWEEP = torch.logspace(5, -6, 45, dtype=torch.float64).tolist()  # SimCLR's, the strongest first


def losses(logits, labels):
    """A loss per image, (n,). Labels (n,): cross-entropy. Labels (n, c) of 1, 0, or -1, which does
    not count: a logistic loss for each class (one-vs-rest), summed."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    target = labels.clamp_min(0).to(logits)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * (labels >= 0)).sum(1)


def gradient_probe(args, task, features):
    """lars and sgd. Returns the result, what was chosen, and the score of each lr."""
    lr, scores = args.lr, {}
    if args.lr_sweep:
        held = task.held_x, task.labels[task.held]
        scores = train(args, task, features, "search", args.lr_sweep, task.rest, *held)
        lr = max(scores, key=scores.get)
    rows, test = torch.arange(len(task.labels)), (task.test_x, task.test_labels)
    value = train(args, task, features, "final", [lr], rows, *test)[lr]
    return {"value": value, "chosen": {"lr": lr}, "scores": scores}


def train(args, task, features, stage, lrs, rows, judge_x, judge_labels):
    """Trains one classifier per learning rate, all on the same features of the images rows (n,),
    and measures them after each epoch on judge_x (m, d). features: pairs (step, rows) -> triples
    (step, rows, this process's features of them). Returns lr -> result of the last epoch."""
    batch, judge_x, file = args.batch_size, judge_x.to(args.device), file_of(stage, task)
    epoch = len(rows) // batch  # in steps, as total
    total = args.epochs * epoch
    heads = nn.ModuleList(classifier(judge_x.shape[1], task.classes, args.seed) for _ in lrs)
    groups = [{"params": list(head.parameters())} for head in heads.to(args.device)]
    if args.protocol == "lars":  # the bias has a trust ratio too, as in the paper's code
        optimizer = LARS(groups, lr=0.0, momentum=0.9, adapt_1d=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)

    first = 0
    if state := load(args, file):
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    steps = data.global_batches(len(rows), batch, args.seed, first, total)
    summed = torch.zeros(len(lrs), device=args.device)
    for step, chosen, x in features((step, rows[i]) for step, i in steps):  # x (n, d)
        labels = task.labels[chosen[mine()]].to(args.device)
        loss = torch.stack([losses(head(x), labels).mean() for head in heads])
        optimizer.zero_grad()
        loss.sum().backward()  # each classifier gets the gradient of its own loss
        for lr, group in zip(lrs, optimizer.param_groups, strict=True):
            group["lr"] = lr * batch / 256 * schedule(args, step, total)
            for p in group["params"]:
                p.grad = all_sum(p.grad) / world_size()
        optimizer.step()

        summed, (passed, rest) = summed + loss.detach(), divmod(step + 1, epoch)
        if rest == 0:
            mean = (all_sum(summed) / world_size() / epoch).tolist()
            finite = all(p.isfinite().all() for p in heads.parameters())
            check(len(lrs) > 1 or finite and math.isfinite(mean[0]), f"loss {mean[0]}, or weights "
                  f"that are not finite, after epoch {passed}: try a tenth of --lr {lrs[0]}")
            log(args, {"data": task.name, "stage": stage, "epoch": passed, "lr": lrs, "loss": mean,
                       task.metric: grades(task, heads, judge_x, judge_labels)},
                show=passed % max(1, args.epochs // 10) == 0)
            summed = torch.zeros_like(summed)
            if task.x is None or passed == args.epochs:  # stored features: quickly repeated
                save(args, file, {"step": step + 1, "heads": heads.state_dict(),
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


def lbfgs_probe(args, task):
    """l2 by the held-out images; then a fit on all training images, begun at the chosen one."""
    device = "cpu" if args.device.type == "mps" else args.device  # mps has no float64
    x, labels = task.x[0].to(device).double(), task.labels.to(device)
    solved, best = None, None
    for l2 in L2_SWEEP:
        solved = fit_l2(x[task.rest], labels[task.rest], task.classes, l2, solved, args.max_iter)
        value, = grades(task, [solved.predict], x[task.held], labels[task.held])
        log(args, {"data": task.name, "l2": l2, "held_out": value, "iterations": solved.iterations},
            show=False)
        if best is None or value > best[0]:  # the strongest of equals
            best = value, l2, solved

    solved = fit_l2(x, labels, task.classes, *best[1:], 10 * args.max_iter)
    if solved.gradient > 1e-4:
        say(f"warning: L-BFGS stopped at a gradient of {solved.gradient:.1g}; raise --max-iter")
    value, = grades(task, [solved.predict], task.test_x.to(device).double(), task.test_labels)
    weights = {"weight": solved.w.float().cpu(), "bias": solved.b.float().cpu()}
    save(args, file_of("classifier", task), weights)
    return {"value": value, "chosen": {"l2": best[1]}, "iterations": solved.iterations,
            "gradient": solved.gradient}


def fit_l2(x, labels, classes, l2, start=None, most=1000):
    """Minimises sum of losses + l2/2 |w|^2 over w (c, d) and b (c,), which has no penalty.

    x: float64 (n, d). start: the fit to begin at. As b is free, taking the mean off x changes
    nothing but the speed; a common scale s of x goes into w. Returns w, b, predict, iterations, and
    the largest gradient of the mean loss.
    """
    mean = x.mean(0)
    s = (x - mean).square().mean().sqrt().clamp_min(1e-12)
    z, w, b = (x - mean) / s, x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    if start:
        w, b = start.w * s, start.b + start.w @ mean
    w.requires_grad_()
    b.requires_grad_()
    optimizer = torch.optim.LBFGS([w, b], max_iter=most, max_eval=2 * most, tolerance_grad=1e-6,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        penalty = l2 / 2 * (w / s).square().sum()
        value = (losses(z @ w.T + b, labels).sum() + penalty) / len(x)
        value.backward()
        return value

    optimizer.step(objective)
    objective()
    largest = max(p.grad.abs().max().item() for p in (w, b))
    iterations = optimizer.state[w]["n_iter"]
    w, b = w.detach() / s, b.detach() - w.detach() / s @ mean
    return SimpleNamespace(w=w, b=b, predict=lambda x: x @ w.T + b, gradient=largest,
                           iterations=iterations)


def knn_probe(args, task):
    """k -> top-1, for each k of --knn-k that the training images allow."""
    bank = F.normalize(task.x[0].to(args.device)), task.labels.to(args.device)
    queries = F.normalize(task.test_x.to(args.device)), task.test_labels.to(args.device)
    return {k: knn.vote(bank, queries, k) for k in args.knn_k if k <= len(task.labels)}


# ============================================================================== metrics
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


METRICS = {"top-1": top1, "mean per class": mean_per_class, "11-point mAP": map11}


# ============================================================================== data sets
def load_tasks(args, download=False):
    """name -> load_task(); and, where --transfer asks for several, name -> why it is absent."""
    tasks, absent = {}, {}
    asked = [args.data] if args.data else args.transfer
    for name in TRANSFER if "all" in asked else asked:
        try:
            tasks[name] = load_task(args, name, download)
        except data.DataError as e:
            absent[name] = str(e)
    check(tasks, "; ".join(absent.values()))
    return tasks, absent


def load_task(args, name, download=False):
    """A data set to classify, its training and its test images. Raises data.DataError. Labels are
    (n,), or (n, c) of 1, 0, -1; held and rest are the rows of the images held out to choose and of
    the others. measure() adds features: x (views, n, d), or None for fresh crops, test_x (m, d),
    and, for --lr-sweep, held_x."""
    target, root = TRANSFER.get(name), args.data_root
    try:
        if target and target.load:
            train, *val, test = target.load(root, download)
        else:
            place = f"{root}/{name}" if target and name not in data.NAMES else name
            train, *val, test = data.load(place, root, download)[1:]
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, data.DataError) as e:
        if not target or name in data.NAMES:
            raise
        raise data.DataError(f"{name} is not in {root}/ ({str(e).splitlines()[0]}): "
                             f"{target.where.replace('ROOT', root)}") from e
    if train is None or len(train.classes) < 2 or len(train) < 10:
        raise data.DataError(f"{name} has no labels to learn, or less than ten images; give a "
                             "folder with train/CLASS/ and val/CLASS/, or with CLASS/, several")
    if bad := sorted({*train.bad, *test.bad}):
        raise data.DataError(f"{len(bad)} unreadable image(s), such as {bad[0]}: remove them")

    n, metric, held_out = len(train), "top-1", len(train) // 10
    if target:
        metric, held_out = target.metric, target.held_out if target.held_out < n / 2 else held_out
    held = torch.randperm(n, generator=rng(args.seed, "held out"))[:held_out]
    if val:  # chosen on val, then trained on train and val
        paths = np.concatenate([train.paths, val[0].paths])
        labels = torch.cat([train.labels, val[0].labels])
        train = data.Images(paths=paths, labels=labels, classes=train.classes)
        held = torch.arange(n, len(train))
    chosen = torch.ones(len(train), dtype=torch.bool).index_fill(0, held, False)
    task = SimpleNamespace(
        name=name, metric=metric, classes=len(train.classes), labels=train.labels, held=held,
        rest=chosen.nonzero()[:, 0], test_labels=test.labels, x=None, held_x=None, test_x=None)
    return task, train, test


# ============================================================================== features
class Frozen(nn.Module):
    """Images (n, 3, s, s) in [0, 1] -> features (n, d): normalisation, a backbone in eval mode."""

    def __init__(self, backbone, size, bicubic, mean, std):
        super().__init__()
        self.backbone, self.size, self.bicubic = backbone, size, bicubic
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x):
        return self.backbone((x - self.mean) / self.std).to(torch.get_default_dtype())


def encode(args, net, images, transfer, view=None):
    """Features (len(images), d), the images shared out among the processes: of centre crops
    (ImageNet: resize to 256, crop 224; transfer, and up to 64 px: all of the square), or of a
    view's random crops."""
    rows = torch.arange(math.ceil(len(images) / world_size()) * world_size()) % len(images)
    parts, part = [], images[rows[mine()]]
    if view is not None:
        splits = rows.split(256 * world_size())
        steps = ((f"view {view}, {i}", split) for i, split in enumerate(splits))
        for _, _, x in fresh(args, net, images, steps):
            parts.append(x.cpu())
        return gather(torch.cat(parts))[: len(images)]

    share = 1 if transfer or net.size <= 64 else 224 / 256
    squares = data.Centres(part, net.size, share, transfer or net.bicubic)
    workers, next_row = args.workers if part.pixels is None else 0, 0
    for x, really in data.loader(squares, workers, args.device, batch_size=256):
        bad = (really != next_row + torch.arange(len(x))).nonzero()[:, 0] + next_row
        next_row += len(x)
        data.Images.report([os.fsdecode(part.paths[row]) for row in bad.tolist()])
        refuse_unreadable()
        x = x.to(args.device).to(torch.get_default_dtype()) / 255
        parts.append(net(x).cpu())
    return gather(torch.cat(parts))[: len(images)]


def fresh(args, net, images, steps):
    """features for train(): of new random crops and flips at each step."""
    view = View(replace(augment.V2, scale=(0.08, 1.0), bicubic=net.bicubic), net.size)
    steps, again = itertools.tee(steps)
    crops = data.crop(images, [view], again, args.seed, mine(), args.workers, args.device)
    for (step, rows), (x,) in zip(steps, crops, strict=True):
        refuse_unreadable()
        flip = torch.rand(len(rows), generator=rng(args.seed, "flip", step))[mine()] < 0.5
        x = torch.where(flip.view(-1, 1, 1, 1).to(x.device), x.flip(3), x)
        yield step, rows, torch.cat([net(part) for part in x.split(256)])  # 4096 fill a small GPU


def stored(args, x, steps):
    """features for train(): from x (views, n, d), each step from the next view."""
    for step, rows in steps:
        yield step, rows, x[step % len(x), rows[mine()]].to(args.device)


def refuse_unreadable():
    """Stops all processes if one met an image that it could not read, and which it has named: the
    next would be in its place, whose label is another."""
    bad = all_sum(torch.tensor(data.Images.unreadable)).item()
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
VIT_NAMES = {  # timm's names of a ViT's tensors, and torchvision's old ones -> its new ones
    r"^cls_token$": "class_token", r"^pos_embed$": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj", r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.", r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".self_attention.in_proj_", r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.(fc|linear_)1\.": ".mlp.0.", r"\.mlp\.(fc|linear_)2\.": ".mlp.3.",
}


def load_backbone(args):
    """The network of a checkpoint, a Frozen, and a dict about it. Of a run: whatever network its
    own script builds. Of other files: the architecture whose tensors fit; 224 px, or 32 with the
    3 x 3 convolution of CIFAR's stem; bilinear; ImageNet's normalisation."""
    path, encoder = Path(args.checkpoint), args.encoder
    if path.is_dir():
        path = path / ("backbone_target.pth" if encoder == "target" else "backbone.pth")
    found, beside, run = read(path), path.with_name("args.json"), {}
    if found.keys() >= {"args", "step", "model"}:  # last.pt
        run, title = found["args"], FORMATS[0][0]
        state = part_of(found["model"], f"{encoder}.backbone.")
    elif path.name in ("backbone.pth", "backbone_target.pth") and beside.exists():
        run, title, state = json.loads(beside.read_text()), FORMATS[-1][0], found
    else:
        state, title = plain_names(found, encoder, path)
    net, arch, size, bicubic, origin = of_run(args, run, path) if run else of_others(args, state)
    if not args.untrained:
        fit(net, state, f"{path} ({title}; {origin})")
    tensors = [v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")]

    mean = args.mean or run.get("mean", data.IMAGENET[0])
    std = args.std or run.get("std", data.IMAGENET[1])
    frozen = Frozen(net, args.img_size or size, bicubic, mean, std)
    try:
        width = frozen(torch.zeros(1, 3, frozen.size, frozen.size)).shape[1]
    except (RuntimeError, AssertionError) as e:
        check(False, f"--img-size {frozen.size} is not for {arch}: {str(e).splitlines()[0]}")
    vit = isinstance(net, torchvision.models.VisionTransformer)
    return frozen.to(args.device), {
        "format": title, "arch": arch, "loaded": 0 if args.untrained else len(tensors),
        "of": len(tensors), "layer": "class token" if vit else "pooled", "dim": width,
        "size": frozen.size, "interpolation": "bicubic" if bicubic else "bilinear",
        "heads": net.encoder.layers[0].self_attention.num_heads if vit else None,
        "mean": mean, "std": std, "data": run.get("data"),
        "weights": hashlib.sha256(b"".join(v.numpy().tobytes() for v in tensors)).hexdigest()[:16]}


def read(path):
    """A file of torch.save: a dict. Nothing in it is executed."""
    check(path.is_file(), f"{path}: no such file; give the folder of a run, or a checkpoint")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a truncated or foreign file raises nearly anything
        code = re.search(r"GLOBAL ([\w.]+)", str(e))
        check(not code, f"{path} holds {code and code[1]}, and to load that would run the file's "
              "code. If you trust it, keep its tensors: torch.save(torch.load(FILE, "
              "weights_only=False)[KEY], NEW), where KEY is state_dict, model, student or teacher")
        check(False, f"{path} is not a whole checkpoint of torch ({type(e).__name__}); truncated?")
    check(isinstance(found, dict), f"{path} holds a {type(found).__name__}; save a state_dict()")
    return found


def of_run(args, run, path):
    """The backbone that the script of a run builds from run, its args.json; arch, pixels, whether
    crops are bicubic, and the origin of the network."""
    method = str(run.get("method"))
    here, copy = Path(__file__).parent / f"{method}.py", path.parent / f"{method}.py"
    check(method.isidentifier() and here.is_file() and run.get("format") == 3, f"{path} is of "
          f"another version of these scripts, or {here.name} is not beside linear_probe.py; put it "
          "there, or use the backbone.pth alone, in another folder")
    differs = copy.is_file() and copy.read_bytes() != here.read_bytes()
    origin = f"{here.name} here{' differs from the copy in the run' * differs}"
    script, flags = importlib.import_module(method), SimpleNamespace(**run)
    try:
        torch.manual_seed(args.seed)
        net = getattr(script.Method(flags), args.encoder).backbone
        return net, run["arch"], run["img_size"], script.augmentations(flags)[0].bicubic, origin
    except (AttributeError, KeyError, TypeError, ValueError) as e:  # other flags than the script's
        check(False, f"{path}: its flags build no network "
              f"({f'{type(e).__name__}: {e}'.splitlines()[0]}; {origin})")


def plain_names(found, encoder, path):
    """The encoder's backbone in torchvision's names, without heads, and whose format it is."""
    if found.keys() >= {"student", "teacher"}:  # DINO's source and target
        found, encoder = found["teacher" if encoder == "target" else "student"], "source"
    found = next((found[k] for k in ("model", "state_dict") if k in found), found)
    found = {k.removeprefix("module."): v for k, v in found.items() if torch.is_tensor(v)}
    fits = [row for row in FORMATS if any(row[1] + stem in found for stem in STEMS)]
    check(fits, f"{path} holds no backbone, but {', '.join([*found][:4]) or 'no tensor'}; give a "
          "run's folder, its backbone.pth or last.pt, or a file that is not of a head alone")

    title, *prefixes = fits[0]
    prefix = prefixes[encoder == "target"]
    state = {} if prefix is None else part_of(found, prefix)
    state = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    check(any(stem in state for stem in STEMS), f"--encoder target: {path} ({title}) has none; "
          "give a run's folder or its backbone_target.pth, or leave it out")
    if "conv1.weight" not in state:
        for pattern, name in VIT_NAMES.items():
            state = {re.sub(pattern, name, k): v for k, v in state.items()}
    elif state["conv1.weight"].shape[-1] == 3:
        check("solo-learn" not in title, f"{path}: solo-learn pads a 3 x 3 first convolution by 2, "
              "others by 1, and the file does not tell; if by 1, take 'backbone.' off its names")
    return state, title


def part_of(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def of_others(args, state):
    """As of_run(), of the architecture whose tensors differ least from state's."""
    if "conv1.weight" in state:
        size = 224 if state["conv1.weight"].shape[-1] == 7 else 32
        archs = ["resnet50", "resnet18", *resnet.ARCHS]  # the likeliest first
        build = lambda arch: resnet.build(arch, size, nn.BatchNorm2d)[0]
    else:
        mocov3, positions = importlib.import_module("mocov3_asym"), state["encoder.pos_embedding"]
        size = math.isqrt(positions.shape[1] - 1) * state["conv_proj.weight"].shape[-1]
        archs, flags = mocov3.VITS, ["--img-size", str(size), "--arch"]
        build = lambda arch: mocov3.build_vit(mocov3.parse_args([*flags, arch]))[0]

    def shapes(tensors):  # without BN's counters of batches, which some files lack
        names = [k for k in tensors if not k.endswith("num_batches_tracked")]
        return {(k, tensors[k].shape) for k in names}

    differences = {}
    for arch in archs:
        with torch.device("meta"):
            differences[arch] = len(shapes(build(arch).state_dict()) ^ shapes(state))
        if not differences[arch]:
            break
    arch = min(differences, key=differences.get)
    torch.manual_seed(args.seed)
    net = build(arch)
    if "conv1.weight" not in state and positions[:, 0].any():  # learned; MoCo v3's are 0 there
        check(args.img_size in (None, size), f"--img-size {args.img_size}: the positions of "
              f"{args.checkpoint} are learned, for {size} px; leave it out")
        for block in net.encoder.layers:  # DINO, torchvision: 64 channels a head; MoCo v3's S: 32
            block.self_attention.num_heads = positions.shape[2] // 64
            block.self_attention.head_dim = 64
    return net, arch, size, False, f"nearest to {arch}"


# ============================================================================== flags
MAY_DIFFER = {  # between a probe and its continuation
    "checkpoint", "data_root", "device", "download", "export", "nproc", "out", "overwrite",
    "save_features", "workers"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="linear_probe.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: check(False, f"{message}; --help lists the flags")
    flag = p.add_argument
    flag("checkpoint", help="the folder of a run, its last.pt or backbone.pth, or a published file")
    flag("--encoder", choices=("source", "target"), default="source", help="which of the two")
    flag("--untrained", action="store_true", help="the network as initialised, to compare with")
    flag("--mean", type=float, nargs=3, help="of the normalisation; default: the run's, ImageNet's")
    flag("--std", type=fraction, nargs=3, help="likewise")
    flag("--img-size", type=positive, help="pixels; default: the run's, or by the weights")
    flag("--export", metavar="FILE", help="write the backbone in torchvision's names, and exit")
    flag("--save-features", metavar="FILE.npz", help="write features, labels and file names")

    flag("--data", help=f"{', '.join(data.NAMES)}, one of Table 4, FILE.npz or a folder")
    flag("--transfer", nargs="+", choices=["all", *TRANSFER], metavar="NAME",
         help=f"rows of Table 4, beside the paper's results: all, or of {', '.join(TRANSFER)}")
    flag("--data-root", default="data", metavar="DIR", help="where data sets are, or go")
    flag("--download", action="store_true", help="let torchvision download data sets")

    flag("--protocol", choices=PROTOCOLS, help="default: lars for 100,000 files and more, or lbfgs")
    flag("--lr", type=amount, help="lars, sgd: per 256 images; scaled by batch size / 256")
    flag("--lr-sweep", type=amount, nargs="*", metavar="LR", help="choose; default: LR_SWEEP")
    flag("--batch-size", type=positive, help="lars, sgd: images per step, of all processes")
    flag("--epochs", type=positive, help="lars, sgd: length of training")
    flag("--schedule", choices=("cosine", "step"), help="step: MoCo's, a tenth at 60 and 80 %%")
    flag("--cache-features", action="store_true", help="lars, sgd: on features of centre crops")
    flag("--cache-views", type=positive, metavar="K", help="lars, sgd: on those of K random crops")
    flag("--max-iter", type=positive, default=100, help="lbfgs: iterations per l2; at the end x 10")
    flag("--knn-k", type=positive, nargs="+", default=[200, 20], metavar="K", help="neighbours")

    flag("--out", help="default: runs/linear_probe-RUN-FLAGS; the same command again resumes")
    flag("--overwrite", action="store_true", help="start again instead")
    flag("--seed", type=whole, default=0, help="of held-out images, crops, classifier, --untrained")
    flag("--nproc", type=positive, default=1, help="processes to start here (or use torchrun)")
    flag("--workers", type=whole, help="loader processes of each process; default: up to 8")
    flag("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    args = p.parse_args(argv)

    check(not (args.data and args.transfer), "--data and --transfer exclude each other; drop one")
    check(args.lr is None or args.lr_sweep is None, "--lr and --lr-sweep exclude each other")
    if args.out is None:
        path = Path(args.checkpoint).resolve()
        ours = path.stem in ("last", "backbone", "backbone_target")
        args.out = f"runs/linear_probe-{path.parent.name + '-' if ours else ''}{path.stem}"
        for name, value in vars(args).items():
            if value != p.get_default(name) and name not in MAY_DIFFER:
                value = "_".join(map(str, value)) if isinstance(value, list) else value
                args.out += f"-{name}={Path(str(value)).name}".replace("=True", "")
    return args


def resolve(args, tasks):
    """What depends on the data: the protocol, and its numbers. tasks: see load_tasks()."""
    images = next(iter(tasks.values()))[1]
    transfer = args.transfer or args.data in TRANSFER
    large = images.pixels is None and len(images) >= 100_000 and not transfer
    args.protocol = args.protocol or ("lars" if large else "lbfgs")
    for name, value in PROTOCOLS[args.protocol].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    gradient = args.protocol in LR_SWEEP
    check(gradient or args.lr is args.lr_sweep is None, f"--protocol {args.protocol} has no "
          "learning rate; add --protocol lars or sgd to --lr and --lr-sweep")
    if args.lr_sweep == []:
        args.lr_sweep = LR_SWEEP[args.protocol]
    args.stores = not gradient or bool(args.cache_features or args.cache_views or transfer)

    check(not args.save_features or len(tasks) == 1 and args.stores and not args.cache_views,
          "--save-features is of the centre crops of one data set: use --protocol lbfgs or knn")
    check(not gradient or args.batch_size % world_size() == 0,
          f"--batch-size {args.batch_size} does not divide among {world_size()} processes")
    for name, (task, *_) in tasks.items():
        n, k = len(task.rest if args.lr_sweep else task.labels), args.knn_k[0]
        check(not gradient or args.batch_size <= n,
              f"--batch-size {args.batch_size}: {name} has {n} images to learn; use less")
        check(args.protocol != "knn" or k <= n and task.labels.ndim == 1, f"--knn-k {k} needs as "
              f"many training images with one class each; {name} has {n}, or several classes")


# ============================================================================== the run
def open_run(args, about):
    """Continues the probe in --out if it is this one, or starts one. Returns its results so far."""
    out = Path(args.out)
    ours, result = out / "args.json", out / "result.json"
    anew = args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    old = json.loads(ours.read_text()) if ours.exists() else about
    check("backbone" in old, f"--out {out} holds no probe, but another run; use another")
    differ = []
    for part in () if anew else ("args", "backbone"):
        for name, value in about[part].items():
            if name not in MAY_DIFFER and old[part].get(name) != value:
                differ.append(f"{name} {old[part].get(name)} there, {value} here")
    check(not differ, f"--out {out} holds another probe ({', '.join(differ)}); use another, or "
          "--overwrite")
    kept = result.exists() and not anew
    results = json.loads(result.read_text())["results"] if kept else {}
    barrier()  # all have looked

    if rank() == 0 and (anew or not ours.exists()):
        out.mkdir(parents=True, exist_ok=True)
        for path in (result, out / "log.jsonl", *out.glob("*.pt")):
            path.unlink(missing_ok=True)
        log(args, {"command": sys.argv, **about}, show=False)
        save(args, "args.json", json.dumps(about, indent=1))
    barrier()
    return results


def file_of(what, task):
    return f"{what}-{Path(task.name).name}.pt"


def load(args, name):
    path = Path(args.out, name)
    return read(path) if path.exists() else None


def save(args, name, content):
    """Rank 0 writes aside, then renames: there is the old file or the new one, never half of it.
    The lines logged since the last file are written just before, so that none is there twice."""
    if rank() == 0:
        aside = Path(args.out, name + ".tmp")
        aside.write_text(content) if isinstance(content, str) else torch.save(content, aside)
        with open(Path(args.out, "log.jsonl"), "a") as f:
            f.writelines(args.lines)
        os.replace(aside, Path(args.out, name))
    args.lines.clear()


def log(args, entry, show=True):
    """A line for log.jsonl, and on the terminal."""
    args.lines.append(json.dumps(entry) + "\n")
    if show:
        say("  " + "  ".join(f"{k} {brief(v)}" for k, v in entry.items()))


def brief(value):
    if isinstance(value, list | tuple):
        return " ".join(map(brief, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def work(args):
    """All that one process does."""
    for number in SIGNALS:  # what is done is saved: it may end anywhere
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args.device, data.Images.unreadable = join_processes(args), 0
    net, about = load_backbone(args)
    if args.export and rank() == 0:
        torch.save({k: v.cpu() for k, v in net.backbone.state_dict().items()}, args.export)
        say(f"{args.export}: {about['arch']}, {about['of']} tensors of {args.checkpoint}")
    if not args.export or args.data or args.transfer or args.protocol or args.save_features:
        try:
            probe(args, net, about)
        except data.DataError as e:  # a loader worker's comes with its traceback
            check(False, str(e).splitlines()[-1].split("DataError: ")[-1])
    if dist.is_initialized():
        dist.destroy_process_group()


def probe(args, net, backbone):
    """Measures the network on each data set, and reports."""
    args.data = args.data or (None if args.transfer else backbone["data"])
    check(args.data or args.transfer, f"{args.checkpoint} does not say on what: add --data")
    if args.download and rank() == 0:  # alone, and before the others look
        load_tasks(args, download=True)
    barrier()
    tasks, absent = load_tasks(args)
    resolve(args, tasks)
    about = {"args": vars(args), "backbone": backbone, "torch": torch.__version__}
    about, args.lines = json.loads(json.dumps(about, default=str)), []  # about: as in the file
    results = open_run(args, about)

    told = ", ".join(f"{k} {brief(v)}" for k, v in backbone.items() if v is not None)
    told = told.replace(", of ", " of ")  # loaded 60 of 60 tensors
    say(f"{args.checkpoint}, {args.encoder} encoder{', UNTRAINED' * args.untrained}: {told}\n"
        f"  protocol {args.protocol} on {'stored features' if args.stores else 'crops'}; output: "
        f"{args.out}")
    for lr in args.lr_sweep or [args.lr] if args.protocol in LR_SWEEP else ():
        say(f"  lr {lr:g} x {args.batch_size}/256 = {lr * args.batch_size / 256:g}")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for name in [name for name in tasks if name not in results]:
        results[name] = measure(args, net, *tasks[name])
        moved = [k for k, v in net.state_dict().items() if not v.equal(before[k])]
        check(not moved, f"frozen tensors have moved, so the result is void: {', '.join(moved)}")
        save(args, "result.json", json.dumps({**about, "results": results}, indent=1))
    report(args, results, absent)


def measure(args, net, task, images, test_images):
    """A data set's result, as result.json has it."""
    transfer = task.name in TRANSFER
    task.test_x = encode(args, net, test_images, transfer)
    if args.stores:
        views = range(args.cache_views) if args.cache_views else [None]
        task.x = torch.stack([encode(args, net, images, transfer, view) for view in views])
    if args.lr_sweep:
        task.held_x = encode(args, net, images[task.held], transfer)
    say(f"{task.name}: {len(images)} training images, {len(test_images)} test, {task.classes} "
        f"classes\n  features: norm {task.test_x.norm(dim=1).mean():.4g}, standard deviation per "
        f"channel {task.test_x.std(0).mean():.4g}")
    known = [x for x in (task.x, task.held_x, task.test_x) if x is not None]
    check(all(x.isfinite().all() for x in known), f"the features of {task.name} are not finite; "
          "are the network's weights, --mean and --std right?")
    if args.save_features and rank() == 0:
        save_features(args.save_features, task, images, test_images)

    votes, rule = {}, "lr search" if args.lr_sweep else "fixed"
    if args.protocol in ("knn", "lbfgs") and task.labels.ndim == 1:
        votes = knn_probe(args, task)
    if args.protocol == "knn":
        k, task.metric = args.knn_k[0], "top-1"
        found = {"value": votes[k], "chosen": {"k": k}}
    elif args.protocol == "lbfgs":
        found, rule = lbfgs_probe(args, task), "l2 search"
    elif args.stores:
        found = gradient_probe(args, task, partial(stored, args, task.x))
    else:
        found = gradient_probe(args, task, partial(fresh, args, net, images))
    return {"metric": task.metric, **found, "protocol": args.protocol, "rule": rule,
            "train": len(task.labels), "held_out": 0 if rule == "fixed" else len(task.held),
            "test": len(task.test_labels), "knn": votes}


def save_features(file, task, images, test_images):
    """Writes NumPy arrays: train_x (n, d) and test_x, float32, train_labels and test_labels,
    train_names and test_names, of files, "" where images are not files."""
    arrays = {"train_x": task.x[0].float(), "train_labels": task.labels,
              "test_x": task.test_x.float(), "test_labels": task.test_labels}
    for part, of in (("train", images), ("test", test_images)):
        paths = [b""] * len(of) if of.paths is None else of.paths
        arrays[f"{part}_names"] = np.array([os.fsdecode(path) for path in paths])
    np.savez(file, **arrays)
    say(f"  written to {file}")


def report(args, results, absent):
    for name, r in results.items():
        chosen = " ".join(f"{k} {brief(v)}" for k, v in r["chosen"].items())
        held = f", on {r['held_out']} held-out training images" if r["held_out"] else ""
        votes = "".join(f"; kNN k={k}: {v:.1%}" for k, v in r["knn"].items())
        say(f"{name}: {r['metric']} {r['value']:.1%} of {r['test']} test images; {r['protocol']}, "
            f"{chosen} ({r['rule']}{held}){votes}")
    if args.transfer:
        rule = next(iter(results.values()))["rule"]
        say(f"\n{'':12s}{'paper':>6s} {'here':>6s}   in %; {args.protocol}, {rule} (the paper: lr "
            "search)")
        for name, t in TRANSFER.items():
            here = f"{100 * results[name]['value']:.1f}" if name in results else "-"
            note = f"; {absent[name]}" if name in absent else ""
            note += "; the paper's figure is another metric" if name == "voc2007" else ""
            say(f"{t.title:12s}{t.paper:6.1f} {here:>6s}   {t.metric}{note}")
    say(f"written to {args.out}/result.json")


def main(argv=None):
    args = parse_args(argv)
    check_launch(args)
    launch(args, work)


if __name__ == "__main__":
    main()
