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

import hashlib  # noqa: I001 (the last import is shorter this way)
import importlib
import json
import math
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import VisionTransformer
from torchvision.transforms import Normalize

from common import data, knn, resnet
from common.augment import V2, View, rng, weak
from common.distributed import all_sum, barrier, check_launch, gather, mine, rank, say, world_size
from common.flags import amount, check, code_digest, fraction, given_flags, parser, positive, whole
from common.lars import LARS
from common.transfer import METRICS, TRANSFER
from mocov2_asym import SIGNALS, fit, join_processes, launch, load, lr_factor

# ============================================================================== protocols
PROTOCOLS = {  # lr: per 256 images. Epochs and schedule of sgd are our choice, the paper is silent
    "lars": {"lr": 0.1, "batch_size": 4096, "epochs": 90},
    "sgd": {"lr": 120.0, "batch_size": 256, "epochs": 100},
    "lbfgs": {},
    "knn": {},
}
LR_SWEEP = {"lars": [0.02, 0.05, 0.1, 0.2, 0.5], "sgd": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]}
L2_SWEEP = torch.logspace(5, -6, 45, dtype=torch.float64).tolist()  # SimCLR's, the strongest first


def gradient_probe(args, net, task):
    """lars and sgd: the result, what was chosen, and the score of each lr."""
    scores = train(args, net, task, "search", args.lr_sweep) if args.lr_sweep else {}
    lr = max(scores, key=scores.get, default=args.lr)
    value, rule = train(args, net, task, "final", [lr])[lr], "lr search" if scores else "fixed"
    return {"value": value, "chosen": {"lr": lr}, "rule": rule, "scores": scores}


def train(args, net, task, stage, lrs):
    """Trains one classifier per learning rate, all on the same features. In the stage "search" the
    held-out images judge, which are left out; in "final" the test images. Returns lr -> result of
    the last epoch."""
    rows, x, labels = torch.arange(len(task.labels)), task.test_x, task.test_labels
    if stage == "search":
        rows, x, labels = task.rest, task.held_x, task.labels[task.held]
    x, per_epoch = x.to(args.device), len(rows) // args.batch_size  # steps

    heads = nn.ModuleList(classifier(x.shape[1], task.classes, args.seed) for _ in lrs)
    groups = [{"params": list(head.parameters())} for head in heads.to(args.device)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if args.protocol == "lars":  # the bias has a trust ratio too, as in the paper's code
        optimizer = LARS(groups, lr=0.0, momentum=0.9, adapt_1d=True)
    first, file = 0, Path(args.out, f"{stage}-{task.name}.pt")
    if file.exists():
        state = load(file)
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]

    for epoch in range(first, args.epochs):
        span = epoch * per_epoch, (epoch + 1) * per_epoch
        batches = data.global_batches(len(rows), args.batch_size, args.seed, *span)
        steps, summed = [(step, rows[i]) for step, i in batches], 0
        for (step, batch), z in zip(steps, features_of(args, net, task, steps), strict=True):
            right = task.labels[batch[mine()]].to(args.device)
            loss = torch.stack([losses(head(z), right).mean() for head in heads])
            optimizer.zero_grad()
            loss.sum().backward()  # each classifier gets the gradient of its own loss
            factor = lr_factor(step, args.epochs * per_epoch, 0)
            for lr, group in zip(lrs, optimizer.param_groups, strict=True):
                group["lr"] = lr * args.batch_size / 256 * factor
                for p in group["params"]:
                    p.grad = all_sum(p.grad) / world_size()
            optimizer.step()
            summed = summed + loss.detach()

        finite = all(p.isfinite().all() for p in heads.parameters())
        check(finite or len(lrs) > 1, f"weights that are not finite, after epoch {epoch + 1}: try "
              f"a tenth of --lr {lrs[0]}")
        mean = (all_sum(summed) / world_size() / per_epoch).tolist()
        log(args, {"data": task.name, "stage": stage, "epoch": epoch + 1, "lr": lrs, "loss": mean,
                   task.metric: [grade(task, head, x, labels) for head in heads]},
            show=(epoch + 1) % max(1, args.epochs // 10) == 0)
        save(args, file.name, {"epoch": epoch + 1, "heads": heads.state_dict(),
                               "optimizer": optimizer.state_dict()})
    return {lr: grade(task, head, x, labels) for lr, head in zip(lrs, heads, strict=True)}


def classifier(width, classes, seed):
    """Weights from N(0, 0.01), bias 0."""
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=rng(seed, "classifier"))
    nn.init.zeros_(head.bias)
    return head


def losses(logits, labels):
    """A loss per image, (n,). Labels (n,): cross-entropy. Labels (n, c) of 1, 0, or -1, which does
    not count: a logistic loss for each class (one-vs-rest), summed."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    target, counts = labels.clamp_min(0).to(logits), (labels >= 0).to(logits)
    return F.binary_cross_entropy_with_logits(logits, target, counts, reduction="none").sum(1)


@torch.no_grad()
def grade(task, head, x, labels):
    return METRICS[task.metric](head(x).cpu(), labels.cpu())


def lbfgs_probe(args, task):
    """l2 by the held-out images; then a fit on all training images, begun at the chosen one."""
    device = "cpu" if args.device.type == "mps" else args.device  # mps has no float64
    x, labels = task.x.to(device).double(), task.labels.to(device)
    fitted, fits, scores = None, {}, {}
    for l2 in L2_SWEEP:
        fitted = fit_l2(x[task.rest], labels[task.rest], task.classes, l2, fitted, args.max_iter)
        fits[l2], scores[l2] = fitted, grade(task, fitted.predict, x[task.held], labels[task.held])

    l2 = max(scores, key=scores.get)  # the strongest of equals
    final = fit_l2(x, labels, task.classes, l2, fits[l2], 10 * args.max_iter)
    if not (final.solved and fits[l2].solved):
        say(f"warning: the fit at l2 {l2:.2g} did not converge; raise --max-iter {args.max_iter}")
    value = grade(task, final.predict, task.test_x.to(device).double(), task.test_labels)
    return {"value": value, "chosen": {"l2": l2}, "rule": "l2 search", "scores": scores}


def fit_l2(x, labels, classes, l2, start=None, most=1000):
    """Minimises f = sum of losses + l2/2 |w|^2 over w (c, d) and b (c,), which has no penalty.

    x: float64 (n, d). start: the fit to begin at. Returns w, b, predict, iterations, and whether it
    is solved: as f is l2-strongly convex in w, it is at most |gradient|^2 / (2 l2) above its
    minimum, which is to be less than f / 10,000. With weak l2 that is what bounds w's error; with
    strong l2 another bound on the gradient does, 1e-5 of f at the start."""
    mean = x.mean(0)  # taken off x, which b makes up for, and a scale s, which w does: for speed
    s = ((x - mean).square().mean() + l2 / len(x)).sqrt()
    z, w, b = (x - mean) / s, x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    if start:
        w, b = start.w * s, start.b + start.w @ mean
    w.requires_grad_()
    b.requires_grad_()
    optimizer = torch.optim.LBFGS([w, b], max_iter=5, tolerance_grad=0, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def objective(unit):
        optimizer.zero_grad()
        value = (losses(z @ w.T + b, labels).sum() + l2 / 2 * (w / s).square().sum()) / unit
        value.backward()
        return value

    first, solved, iterations = objective(1).item(), False, 0
    while not solved and iterations < most:
        optimizer.step(lambda: objective(first))  # the line search wants values near 1
        value, gradient = objective(first).item(), nn.utils.get_total_norm([w.grad, b.grad]).item()
        solved = gradient < min(1e-5, math.sqrt(2e-4 * l2 * value / first) / s.item())
        iterations = optimizer.state[w]["n_iter"]
    w, b = w.detach() / s, b.detach() - w.detach() / s @ mean
    return SimpleNamespace(w=w, b=b, predict=lambda x: x @ w.T + b, iterations=iterations,
                           solved=solved)


def knn_probe(args, task):
    """k -> top-1, for each k of --knn-k that the training images allow."""
    bank = F.normalize(task.x.to(args.device)), task.labels.to(args.device)
    queries = F.normalize(task.test_x.to(args.device)), task.test_labels.to(args.device)
    return {k: knn.vote(bank, queries, k) for k in args.knn_k if k <= len(task.labels)}


# ============================================================================== data sets
def load_tasks(args, download=False):
    """name -> load_task(), of --data or --transfer; and name -> why it is absent."""
    if args.data:
        task = load_task(args, args.data, download)
        return {task.name: task}, {}
    tasks, absent = {}, {}
    for name in TRANSFER if "all" in args.transfer else args.transfer:
        try:
            tasks[name] = load_task(args, name, download)
        except (OSError, RuntimeError, ValueError, KeyError, ImportError, data.DataError) as e:
            absent[name] = (f"{name} is not in {args.data_root}/ ({str(e).splitlines()[0]}): see "
                            "docs/linear_probe.md, Data of Table 4")
    check(tasks, "; ".join(absent.values()))
    return tasks, absent


def load_task(args, name, download=False):
    """A data set to classify: images to learn from and to test on, and their labels, (n,), or
    (n, c) of 1, 0, -1; held and rest are the rows of those held out to choose and of the others.
    measure() adds features: x (n, d), or None for fresh crops, test_x, held_x."""
    target, root = TRANSFER[name] if args.transfer else None, args.data_root
    if target and target.load:
        train, *val, test = target.load(root, download)
    else:
        place = f"{root}/{name}" if target and name not in data.NAMES else name
        train, *val, test = data.load(place, root, download)[1:]
    if train is None or len(train.classes) < 2 or len(train) < 10:
        raise data.DataError(f"{name} has no labels to learn, or less than ten images; give a "
                             "folder with train/CLASS/ and val/CLASS/")

    n = len(train)
    held_out = target.held_out if target and target.held_out < n / 2 else n // 10
    held = torch.randperm(n, generator=rng(args.seed, "held out"))[:held_out]
    if val:  # chosen on val, then trained on train and val
        train = replace(train, paths=np.concatenate([train.paths, val[0].paths]),
                        labels=torch.cat([train.labels, val[0].labels]))
        held = torch.arange(n, len(train))
    rest = torch.ones(len(train), dtype=torch.bool).index_fill(0, held, False).nonzero()[:, 0]
    name = os.path.basename(os.path.abspath(name))  # of ".", say
    return SimpleNamespace(name=name, metric=target.metric if target else "top-1", images=train,
                           labels=train.labels, classes=len(train.classes), held=held, rest=rest,
                           test_images=test, test_labels=test.labels, x=None)


# ============================================================================== features
def encode(args, net, images):
    """Features (n, d) of n images' centre crops, shared out among the processes. The crops are
    those of the scripts' kNN: resize to 256, crop 224, up to 64 px all of the square, bilinear.
    Transfer, as BYOL: all of the square, bicubic."""
    rows = torch.arange(math.ceil(len(images) / world_size()) * world_size()) % len(images)
    how = {"share": 1, "bicubic": True} if args.transfer else {}
    crops = data.centres(images, rows[mine()], args.size, args.workers, args.device, **how)
    parts = [net(x).cpu() for x in crops]
    refuse_unreadable()
    return gather(torch.cat(parts))[: len(images)]


def features_of(args, net, task, steps):
    """Yields, for each (step, rows of the global batch), the features (n, d) of this process's
    rows: stored ones, or those of new random crops and flips."""
    if task.x is not None:
        for _, rows in steps:
            yield task.x[rows[mine()]].to(args.device)
        return

    images, plan = replace(task.images, stats=data.RAW), [[[View(weak(V2), args.size)]], []]
    for ([[x]], _), _ in data.stream(
            images, plan, steps, args.seed, mine(), args.workers, args.device):
        refuse_unreadable()
        parts = [net(part) for part in x.split(256)]  # a batch of 4096 would fill a small GPU
        yield torch.cat(parts)


def refuse_unreadable():
    """Stops all processes if one has replaced an image, by the next: that has another label."""
    bad = all_sum(torch.tensor(data.Images.unreadable)).item()
    check(not bad, f"{bad} unreadable image(s); repair or remove them")


# ============================================================================== checkpoints
MARK = re.compile(  # a backbone has one: a ResNet, nn.Sequential(*resnet.children()), a ViT
    r"(.*\.)?((layer4|7)\.0\.conv1\.weight|(conv_proj|patch_embed\.proj)\.weight)")
TARGET = re.compile(r"(^|[._])(momentum|teacher|target|ema|k)[._]")  # in the names of a target
HEADS = ("fc.", "head.", "heads.", "classifier.", "linear.", "projector.", "projection_head.",
         "predictor.", "prototypes.", "queue")
RENAME = {  # nn.Sequential's, timm's ViTs' and torchvision's old names -> torchvision's
    r"^0\.": "conv1.", r"^1\.": "bn1.", r"^4\.": "layer1.", r"^5\.": "layer2.",
    r"^6\.": "layer3.", r"^7\.": "layer4.",
    r"^cls_token$": "class_token", r"^pos_embed$": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj", r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.", r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".self_attention.in_proj_", r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.(fc|linear_)1\.": ".mlp.0.", r"\.mlp\.(fc|linear_)2\.": ".mlp.3.",
}


def load_backbone(args):
    """The frozen network of a checkpoint, images (n, 3, s, s) in [0, 1] -> features (n, d), and a
    dict about it; args.size is then s. Of a run: whatever network its own script builds. Of other
    files: the architecture whose tensors fit; 224 px, or 32 with the 3 x 3 convolution of CIFAR's
    stem, a ViT's size by its positions; ImageNet's normalisation."""
    path, run, names = Path(args.checkpoint), {}, ""
    files = {"source": "backbone.pth", "target": "backbone_target.pth"}
    path = path / files[args.encoder] if path.is_dir() else path
    check(path.is_file(), f"{path}: no such file; give the folder of a run, or a checkpoint")
    state, beside = load(path), path.with_name("args.json")
    if state.keys() >= {"args", "step", "model"} and "method" in state["args"]:  # last.pt
        run, names = state["args"], f"{args.encoder}.backbone."
        model = state["model"].items()
        state = {k.removeprefix(names): v for k, v in model if k.startswith(names)}
    elif path.name in files.values() and beside.exists():
        check(path.name == files[args.encoder], f"{path} is not the {args.encoder}'s; give the "
              "run's folder, or the other --encoder")
        run = json.loads(beside.read_text())
    torch.manual_seed(args.seed)
    if run:
        net, arch, size = of_run(args, run, path), run["arch"], run["img_size"]
    else:
        names, state = find_backbone(state, args.encoder, path)
        net, arch, size = of_others(args, state)
    if not args.untrained:
        fit(net, state, f"{path} (its {names}*; nearest is {arch})")

    mean = args.mean or run.get("mean", data.IMAGENET[0])
    std = args.std or run.get("std", data.IMAGENET[1])
    size = args.size = args.img_size or size
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values()))
    net = nn.Sequential(Normalize(mean, std), net).requires_grad_(False).eval()
    width = net(torch.zeros(1, 3, size, size)).shape[1]
    return net.to(args.device), {
        "names": f"{names}*", "arch": arch, "tensors": len(state), "dim": width, "size": size,
        "mean": mean, "std": std, "weights": digest.hexdigest()[:16], "trained_on": run.get("data")}


def flatten(found, prefix=""):
    """Yields the tensors of nested dicts, with their names joined by dots."""
    for name, x in found.items():
        if isinstance(x, dict):
            yield from flatten(x, f"{prefix}{name}.")
        elif torch.is_tensor(x):
            yield f"{prefix}{name}", x


def of_run(args, run, path):
    """The backbone that the script of a run builds from run, its args.json."""
    method = str(run.get("method"))
    script = Path(__file__).parent / f"{method}.py"
    check(method.isidentifier() and script.is_file() and run.get("format") == 3, f"{path} is of "
          f"another version of these scripts, or {script.name} is not beside linear_probe.py; put "
          "it there, or copy backbone.pth elsewhere, and give args.json's --mean --std --img-size")
    module = importlib.import_module(method)
    if run.get("code") != code_digest(script):
        say(f"note: {script.name} or common/ changed since {path} was trained")
    return getattr(module.Method(SimpleNamespace(**run)), args.encoder).backbone


def find_backbone(found, encoder, path):
    """What stands before the names of the encoder's backbone in a file, and its tensors, without
    heads, in torchvision's names."""
    flat, prefixes = dict(flatten(found)), {}
    for name, x in flat.items():
        if match := MARK.fullmatch(name):
            prefixes.setdefault(x.data_ptr(), match[1] or "")  # shared by modules: once
    held = list(prefixes.values())
    check(held, f"{path} holds no backbone, but {', '.join([*flat, *map(str, found)][:4])}; give a "
          "run's folder, or a file with a ResNet or ViT in torchvision's or timm's names")
    prefix = [p for p in held if bool(TARGET.search(p)) == (encoder == "target")]
    check(len(prefix) == 1, f"{path} holds {len(prefix)} backbones for --encoder {encoder}, of "
          f"{', '.join(f'{p}*' for p in held)}; choose the other encoder, or keep only one")

    state = {k.removeprefix(prefix[0]): v for k, v in flat.items() if k.startswith(prefix[0])}
    state = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    for pattern, name in RENAME.items():
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    solo = "backbone." in prefix[0] and any(k.endswith("classifier.weight") for k in flat)
    check(not solo or "conv1.weight" not in state or state["conv1.weight"].shape[-1] != 3,
          f"{path}: solo-learn pads a 3 x 3 first convolution by 2, others by 1, and the file does "
          "not tell; if by 1, take its classifier out")
    return prefix[0], state


def of_others(args, state):
    """The network whose tensors fit state's, or nearly; its name; pixels."""
    if "encoder.pos_embedding" in state:  # a ViT: tensors tell all but the heads
        dim, _, patch, _ = state["conv_proj.weight"].shape
        positions = state["encoder.pos_embedding"]
        size = math.isqrt(positions.shape[1] - 1) * patch
        check(args.img_size in (None, size), f"--img-size {args.img_size}: the positions of "
              f"{args.checkpoint} are for {size} px; leave it out")
        check(not args.untrained, f"--untrained: {args.checkpoint} does not say how it began; give "
              "a run's folder")
        fixed = not positions[:, 0].any()  # MoCo v3's, whose small ViTs have slimmer heads
        head = 32 if fixed and dim in (96, 384) else 64
        check(dim <= 1024 and dim % head == 0, f"{args.checkpoint}: a ViT of width {dim}; up to "
              "1024, and of multiples of 64, it is known how many heads there are")
        layers = sum(name.endswith(".ln_1.weight") for name in state)
        net = VisionTransformer(size, patch, layers, dim // head, dim, 4 * dim)
        net.heads = nn.Identity()
        return net, f"vit-{layers}x{dim}/{patch}", size

    def shapes(tensors):  # without BN's counters of batches, which some files lack
        return {(k, v.shape) for k, v in tensors.items() if not k.endswith("batches_tracked")}

    small = "conv1.weight" in state and state["conv1.weight"].shape[-1] == 3
    size = 32 if small else 224
    build = lambda arch: resnet.build(arch, size, nn.BatchNorm2d)[0]
    with torch.device("meta"):
        differ = {arch: shapes(build(arch).state_dict()) ^ shapes(state) for arch in resnet.ARCHS}
    arch = min(differ, key=lambda arch: len(differ[arch]))
    return build(arch), arch, size


# ============================================================================== flags
MAY_DIFFER = {  # between a probe and its continuation
    "checkpoint", "data", "data_root", "device", "download", "export", "names", "nproc", "out",
    "overwrite", "save_features", "torch", "workers"}


def parse_args(argv=None):
    p = parser("linear_probe.py", __doc__)
    flag = p.add_argument
    flag("checkpoint", help="the folder of a run, its last.pt or backbone.pth, or a published file")
    flag("--encoder", choices=("source", "target"), default="source", help="which of the two")
    flag("--untrained", action="store_true", help="the network as initialised, to compare with")
    flag("--mean", type=float, nargs=3, help="of the normalisation; default: the run's, ImageNet's")
    flag("--std", type=fraction, nargs=3, help="likewise")
    flag("--img-size", type=positive, help="pixels; default: the run's, or by the weights")
    flag("--export", metavar="FILE", help="write the backbone in torchvision's names, and exit")
    flag("--save-features", metavar="FILE.npz", help="write features, labels and file names")

    flag("--data", help=f"{', '.join(data.NAMES)}, FILE.npz or a folder; default: the run's")
    flag("--transfer", nargs="+", choices=["all", *TRANSFER], metavar="NAME",
         help=f"rows of Table 4, beside the paper's results: all, or of {', '.join(TRANSFER)}")
    flag("--data-root", default="data", metavar="DIR", help="where data sets are, or go")
    flag("--download", action="store_true", help="let torchvision download data sets")

    flag("--protocol", choices=PROTOCOLS, help="default: lars for 100,000 files and more, or lbfgs")
    flag("--lr", type=amount, help="lars, sgd: per 256 images; scaled by batch size / 256")
    flag("--lr-sweep", type=amount, nargs="*", metavar="LR", help="choose; default: LR_SWEEP")
    flag("--batch-size", type=positive, help="lars, sgd: images per step, of all processes")
    flag("--epochs", type=positive, help="lars, sgd: length of training")
    flag("--cache-features", action="store_true", help="lars, sgd: on features of centre crops")
    flag("--max-iter", type=positive, default=200, help="lbfgs: iterations per l2; at the end x 10")
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
        parts = [path.parent.name, path.stem] if path.is_file() else [path.name]
        args.out = "-".join(["runs/linear_probe", *parts]) + given_flags(args, p, MAY_DIFFER)
    return args


def resolve(args, tasks):
    """What depends on the data: the protocol, and its numbers."""
    images = next(iter(tasks.values())).images
    large = images.pixels is None and len(images) >= 100_000 and not args.transfer
    args.protocol = args.protocol or ("lars" if large else "lbfgs")
    given = {name: value for name, value in vars(args).items() if value is not None}
    vars(args).update(PROTOCOLS[args.protocol] | given)
    gradient = args.protocol in LR_SWEEP
    check(gradient or args.lr is args.lr_sweep is None, f"--protocol {args.protocol} has no "
          "learning rate; add --protocol lars or sgd to --lr and --lr-sweep")
    if args.lr_sweep == []:
        args.lr_sweep = LR_SWEEP[args.protocol]
    args.stores = not gradient or args.cache_features or bool(args.transfer)

    check(not args.save_features or len(tasks) == 1 and args.stores,
          "--save-features is of the centre crops of one data set: use --protocol lbfgs or knn")
    check(not gradient or args.batch_size % world_size() == 0,
          f"--batch-size {args.batch_size} is no multiple of {world_size()}, the processes")
    for name, task in tasks.items():
        n, k = len(task.rest if args.lr_sweep else task.labels), args.knn_k[0]
        check(not gradient or args.batch_size <= n,
              f"--batch-size {args.batch_size}: {name} has {n} images to learn; use less")
        check(args.protocol != "knn" or k <= n and task.labels.ndim == 1, f"--knn-k {k} needs as "
              f"many training images with one class each; {name} has {n}, or several classes")


# ============================================================================== the run
def work(args):
    """All that one process does."""
    for number in SIGNALS:  # what is done is saved: it may end anywhere
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args.device, data.Images.unreadable = join_processes(args), 0
    net, backbone = load_backbone(args)
    if not args.export:
        probe(args, net, backbone)
    elif rank() == 0:
        torch.save({k: v.cpu() for k, v in net[1].state_dict().items()}, args.export)
        say(f"{args.export}, of {args.checkpoint}: {listed(backbone)}")
    if dist.is_initialized():
        dist.destroy_process_group()


def probe(args, net, backbone):
    """Measures the network on each data set, and reports."""
    args.data = args.data or (None if args.transfer else backbone["trained_on"])
    check(args.data or args.transfer, f"{args.checkpoint} does not say on what: add --data")
    if args.download and rank() == 0:  # alone, and before the others look
        load_tasks(args, download=True)
    barrier()
    tasks, absent = load_tasks(args)
    refuse_unreadable()
    resolve(args, tasks)
    seen = {f"images of {name}": [t.images.names, t.test_images.names] for name, t in tasks.items()}
    about = {**vars(args), **backbone, **seen, "torch": torch.__version__}
    about = json.loads(json.dumps(about, default=str))  # as in the file
    results = open_run(args, about)

    say(f"{args.checkpoint}, {args.encoder} encoder{', UNTRAINED' * args.untrained}: "
        f"{listed(backbone)}\n  protocol {args.protocol} on "
        f"{'stored features' if args.stores else 'crops'}; output: {args.out}")
    for lr in args.lr_sweep or [args.lr] if args.protocol in LR_SWEEP else ():
        say(f"  lr {lr:g} x {args.batch_size}/256 = {lr * args.batch_size / 256:g}")
    for name in [name for name in tasks if name not in results or args.save_features]:
        results[name] = measure(args, net, tasks[name])
        save(args, "result.json", json.dumps({**about, "results": results}, indent=1))
    report(args, results, absent)


def measure(args, net, task):
    """A data set's result, as result.json has it."""
    task.test_x = encode(args, net, task.test_images)
    if args.stores:
        task.x = encode(args, net, task.images)
    if args.lr_sweep:
        task.held_x = encode(args, net, task.images[task.held])
    say(f"{task.name}: {len(task.labels)} training images, {len(task.test_labels)} test, "
        f"{task.classes} classes\n  features: norm {task.test_x.norm(dim=1).mean():.4g}, standard "
        f"deviation per channel {task.test_x.std(0).mean():.4g}")
    good = all(x is None or x.isfinite().all() for x in (task.x, task.test_x))
    check(good and task.test_x.std(0).any(), f"the features of {task.name} are not finite, or all "
          "the same; are the weights, --mean and --std right?")
    if args.save_features and rank() == 0:
        save_features(args.save_features, task)

    votes = {}
    if args.protocol not in LR_SWEEP and task.labels.ndim == 1:
        votes = knn_probe(args, task)
    if args.protocol == "knn":
        k, task.metric = args.knn_k[0], "top-1"
        found = {"value": votes[k], "chosen": {"k": k}, "rule": "fixed"}
    elif args.protocol == "lbfgs":
        found = lbfgs_probe(args, task)
    else:
        found = gradient_probe(args, net, task)
    held_out = len(task.held) if "search" in found["rule"] else 0
    return {"metric": task.metric, **found, "protocol": args.protocol, "train": len(task.labels),
            "held_out": held_out, "test": len(task.test_labels), "knn": votes}


def save_features(file, task):
    """Writes NumPy arrays: train_x (n, d) and test_x, float32, train_labels and test_labels,
    train_names and test_names, of files, "" where images are not files."""
    arrays = {"train_x": task.x.float(), "train_labels": task.labels,
              "test_x": task.test_x.float(), "test_labels": task.test_labels}
    for part, images in (("train_names", task.images), ("test_names", task.test_images)):
        paths = [b""] * len(images) if images.paths is None else images.paths
        arrays[part] = [os.fsdecode(path) for path in paths]
    with open(file, "wb") as f:  # NumPy would add .npz
        np.savez(f, **arrays)
    say(f"  written to {file}")


def report(args, results, absent):
    """A line for each data set; of Table 4, the table."""
    for name, r in results.items():
        held = f", on {r['held_out']} held-out training images" if r["held_out"] else ""
        votes = "".join(f"; kNN k={k}: {v:.1%}" for k, v in r["knn"].items())
        say(f"{name}: {r['metric']} {r['value']:.1%} of {r['test']} test images; {r['protocol']}, "
            f"{listed(r['chosen'])} ({r['rule']}{held}){votes}")
    if args.transfer:
        say(f"\n{'':12s} paper   here   in %; {args.protocol}, {r['rule']} (the paper: lr search)")
        for name, t in TRANSFER.items():
            here = f"{100 * results[name]['value']:.1f}" if name in results else "-"
            note = "; the paper's is probably another" if name == "voc2007" else ""
            note += f"; {absent[name]}" if name in absent else ""
            say(f"{t.title:12s}{t.paper:6.1f} {here:>6s}   {t.metric}{note}")


def open_run(args, about):
    """Continues the probe in --out if it is this one, or starts one. Returns its results so far."""
    out, file = Path(args.out), Path(args.out, "result.json")
    check(not (out / "args.json").exists(), f"--out {out} holds no probe, but a run; use another")
    old = json.loads(file.read_text()) if file.exists() and not args.overwrite else {}
    differ = [f"{name} {old[name]} there, {value} here" for name, value in about.items()
              if name not in MAY_DIFFER and old.get(name, value) != value]
    check(not differ, f"--out {out} holds another probe ({', '.join(differ)}); use another, or "
          "--overwrite")
    about |= {k: v for k, v in old.items() if k.startswith("images of ")}  # of other sets, too
    barrier()  # all have looked

    if rank() == 0 and not old:
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / "log.jsonl", *out.glob("search-*.pt"), *out.glob("final-*.pt")):
            path.unlink(missing_ok=True)
        save(args, "result.json", json.dumps({**about, "results": {}}, indent=1))
        log(args, {"command": sys.argv, **about}, show=False)
    return old.get("results", {})


def save(args, name, content):
    """Rank 0 writes aside, then renames: there is the old file or the new one, never half of it."""
    aside = Path(args.out, name + ".tmp")
    if rank() == 0:
        aside.write_text(content) if isinstance(content, str) else torch.save(content, aside)
        os.replace(aside, Path(args.out, name))


def log(args, entry, show=True):
    """A line in log.jsonl, and on the terminal."""
    if rank() == 0:
        with open(Path(args.out, "log.jsonl"), "a") as f:
            f.write(json.dumps(entry) + "\n")
    if show:
        say("  " + listed(entry))


def listed(entry):
    """Names and values of a dict, in a line."""
    def brief(value):
        values = value if isinstance(value, list | tuple) else [value]
        return " ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in values)

    return "  ".join(f"{k} {brief(v)}" for k, v in entry.items() if v is not None)


def main(argv=None):
    args = parse_args(argv)
    check_launch(args)
    launch(args, work)


if __name__ == "__main__":
    main()
