"""Barlow Twins with asymmetric designs, in one file.

Wang, Fan, Tian, Kihara, Chen: On the Importance of Asymmetry for Siamese Representation Learning, CVPR 2022.
Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins, ICML 2021, arXiv:2103.03230.

The source encoder f_s learns by gradient; the target encoder f_t is its clone and judges it. For images x:

    theta_t = theta_s                                            the target is a clone of the source
    z  = standardize(f_s(aug_s(x)))                              per channel, over the batch; with gradient
    z' = standardize(f_t(aug_t(x)))                              target encodings, without
    c  = z^T z' / N                                              cross-correlation of channels, (d, d)
    L  = sum_i (c_ii - 1)^2 + lambda sum_{i != j} c_ij^2;        theta_s = LARS(theta_s, dL/dtheta_s)

The paper's finding: keep the target's variance below the source's. Each design is a flag, on either encoder:
--multicrop-src --scalemix-src --asym-aug --aug-src strong --asym-bn --mean-enc 2; their opposites: --help.
--symmetrize is the original: both views through one encoder, gradient through both.

    python barlow_asym.py                                        a laptop: demo data, two minutes
    python barlow_asym.py --data cifar10 --download              one GPU: the CIFAR recipe
    torchrun --nproc_per_node=8 barlow_asym.py --data IMAGENET --scalemix-src --mean-enc 2
"""

# ============================================================================== shared: imports
import argparse
import fcntl
import inspect
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import augment, data
from common.augment import rng

# ============================================================================== method: recipes and flags
from common.lars import LARS

# imagenet is the original's, but for 100 epochs as in the paper's Table 2. small and demo are our choice.
# lr_bias: the original sums c over its 16 GPUs without passing gradients back, and then averages them, which
# leaves a 16th of the true gradient. Weights under LARS do not mind; biases and BN, at 0.0048, do.
# Here the gradient is the true one on any number of processes, and the rate 0.0048 / 16.
RECIPES = {
    "imagenet": dict(
        arch="resnet50", img_size=224, epochs=100, batch_size=2048, lr=0.2, lr_bias=0.0003, wd=1e-6,
        warmup_epochs=10, bn_groups=1, lambd=0.0051, layers=3, hidden=8192, dim=8192, knn_every=10,
        num_small=6, small_size=96, small_scale=(0.05, 0.14), large_scale=(0.14, 1.0)),
    "small": dict(
        arch="resnet18", img_size=32, epochs=200, batch_size=512, lr=1.0, lr_bias=0.0003, wd=1e-6,
        warmup_epochs=10, bn_groups=1, lambd=0.0051, layers=3, hidden=2048, dim=2048, knn_every=10,
        num_small=6, small_size=16, small_scale=(0.08, 0.5), large_scale=(0.14, 1.0)),
    "demo": dict(
        arch="tiny", img_size=32, epochs=8, batch_size=64, lr=8.0, lr_bias=0.01, wd=1e-6,
        warmup_epochs=1, bn_groups=1, lambd=0.0051, layers=2, hidden=256, dim=256, knn_every=4,
        num_small=2, small_size=16, small_scale=(0.08, 0.5), large_scale=(0.14, 1.0)),
}


def recipe(args):
    """The defaults of the flags that were not given."""
    return RECIPES[args.recipe]


def method_flags(flag):
    flag("--lr-bias", type=number(float, 0), help="learning rate of biases and BN per 256 images, as --lr")
    flag("--lambd", type=number(float, 0), help="weight lambda of the terms off the diagonal")
    flag("--layers", type=number(int, 2), help="linear layers of the projector")
    flag("--hidden", type=count, help="width of the projector's hidden layers")
    flag("--dim", type=count, help="dimension of the encodings")
    flag("--swap-aug", action="store_true", help="the source gets the recipe of the target, and the reverse")
    flag("--symmetrize", action="store_true", help="the original: one encoder, gradient through both views")


def method_checks(args, images=None):
    """What cannot work, before any work; and again when the number of images is known."""
    check_original(args)
    check(not (args.symmetrize and args.swap_aug), "--symmetrize has no sides to swap; drop --swap-aug")


def augmentations(args):
    """The recipes of source and target before AsymAug: BYOL's two, without blur on small images. Which one
    the paper gave to the source is not known; ours is the one that always blurs and never solarizes."""
    pair = augment.BYOL1, augment.BYOL2
    if args.recipe != "imagenet":
        pair = tuple(replace(one, blur=0.0) for one in pair)
    return pair[::-1] if args.swap_aug else pair


# ============================================================================== method: model and loss
class BarlowTwins(nn.Module):
    """Source and target. One forward() per step is the algorithm at the top of this file."""

    archs = ("tiny",)  # besides torchvision's resnets

    def __init__(self, args):
        super().__init__()
        grouped, synced = partial(BatchNorm, groups=args.bn_groups), partial(BatchNorm, groups=1)
        self.lambd, self.symmetrize = args.lambd, args.symmetrize
        self.shuffle = False  # without negatives, batch-mates do not give an image away

        def encoder(sync):  # AsymBN (Sec. 4.4): SyncBN in one encoder's projector; footnote 4: in all of it
            bn = synced if sync and args.bn_scope == "all" else grouped
            backbone, width = build_backbone(args, bn, zero_init=True)
            return Encoder(backbone, projector(args, width, synced if sync else grouped), args.autocast)

        def standardize(sync):  # the loss's BN: the projector's last, which has to follow MeanEnc's mean
            bn = (synced if sync else grouped)(args.dim, affine=False)
            bn.track = False  # nothing uses its running statistics
            return bn

        self.source = self.target = encoder(args.sync_bn_src)
        self.standardize_src, self.standardize_tgt = standardize(args.sync_bn_src), standardize(args.asym_bn)
        if not self.symmetrize:
            self.target = encoder(args.asym_bn)
            self.target.load_state_dict(self.source.state_dict())
            self.target.requires_grad_(False)

    def momentum(self, progress):
        """m at this share of the training: 0; each step begins by cloning the source."""
        return 0.0

    def forward(self, src, tgt, m, generator):
        """One step on this process's n of the N images.

        src, tgt: lists of bags. A bag is a list of views (n, 3, s, s) whose encodings are averaged: first the
        large views (one, or MeanEnc's), then each small crop by itself. generator: draws the shuffle, if any.
        Returns the loss of the global batch, the same on every process, and the spread of source and target
        encodings."""
        update_target(self.target, self.source, m)
        z = [encode(self.source, bag, track=i == 0) for i, bag in enumerate(src)]  # each (n, d)
        with torch.set_grad_enabled(self.symmetrize):
            k = [encode(self.target, bag, track=i == 0) for i, bag in enumerate(tgt)]
            standard_k = [self.standardize_tgt(x) for x in k]
        loss = over_crops(self.redundancy, [self.standardize_src(x) for x in z], standard_k)
        return loss, {"std_src": spread(F.normalize(z[0])), "std_tgt": spread(F.normalize(k[0]))}

    def redundancy(self, z, k):
        """How far the cross-correlation of z and k, both (n, d) and standardized, is from the identity."""
        c = SumOverProcesses.apply(z.T @ k) / (len(z) * world_size())  # (d, d), of the global batch
        on, all_squares = c.diagonal(), c.square().sum()
        return (on - 1).square().sum() + self.lambd * (all_squares - on.square().sum())

    @staticmethod
    def chance(args):
        """The loss of independent encodings: c is then 0 but for its sampling error, 1/n in the square, where
        n is the batch less one image for each group's mean (about so if one side only is in groups)."""
        d, n = args.dim, args.batch_size - args.bn_groups
        return (2 if args.multicrop_src else 1) * (d * (1 + 1 / n) + args.lambd * d * (d - 1) / n)

    @staticmethod
    def optimizer(args, model):
        """LARS. peak: the learning rate that the schedule scales, for biases and BN another."""
        params, peak_bias = list(model.source.parameters()), args.lr_bias * args.batch_size / 256
        groups = [{"params": [p for p in params if p.ndim > 1], "peak": args.peak_lr},
                  {"params": [p for p in params if p.ndim <= 1], "peak": peak_bias}]
        return LARS(groups, lr=args.peak_lr, weight_decay=args.wd)


def projector(args, width, bn):
    """Barlow Twins': wide; no BN at the end, but the loss's."""
    return mlp([width] + [args.hidden] * (args.layers - 1) + [args.dim], bn)


Method = BarlowTwins


# ============================================================================== shared: networks
class Encoder(nn.Module):
    """Backbone and projector: (n, 3, s, s) -> (n, d), in float32 whatever autocast does inside."""

    def __init__(self, backbone, projector, autocast):
        super().__init__()
        self.backbone, self.projector, self.autocast = backbone, projector, autocast

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.projector(self.backbone(x)).float()


def build_backbone(args, bn, zero_init=False):
    """A torchvision ResNet without classifier, and its features' width. Up to 64 px it has the CIFAR stem:
    a 3 x 3 convolution, no max-pool. tiny, for the demo: that stem and four blocks of 16 to 128 channels.
    zero_init: the last BN of each residual block begins at 0."""
    if args.arch == "tiny":
        net, width = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=bn), 128
        net.inplanes, net.bn1 = 16, bn(16)
        for i in range(4):
            setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, 16 * 2**i, 1, stride=2 if i else 1))
    else:
        net = torchvision.models.get_model(args.arch, weights=None, norm_layer=bn)
        width = net.fc.in_features
    if args.arch == "tiny" or args.img_size <= 64:
        net.conv1 = nn.Conv2d(3, net.bn1.num_features, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    for block in (m for m in net.modules() if zero_init and isinstance(m, BasicBlock | Bottleneck)):
        nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
    net.fc = nn.Identity()
    return net, width


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm on virtual devices, for (n, c) and (n, c, h, w). Image i of the global batch is normalised
    with the images of group i mod G, however many processes there are; G = 1 is SyncBN. State dict of
    nn.BatchNorm2d. Running statistics: means over this process's groups; sync_buffers() over processes."""

    def __init__(self, features, groups=1, affine=True):
        super().__init__(features, affine=affine)
        self.groups, self.track = groups, True

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.groups == 1 and world_size() > 1:
            return self.synchronised(x)
        g, c = max(1, self.groups // world_size()), self.num_features  # a process holds whole groups
        stats = (self.running_mean.repeat(g), self.running_var.repeat(g)) if self.track else (None, None)
        weight, bias = (None if p is None else p.repeat(g) for p in (self.weight, self.bias))
        groups_as_channels = x.reshape(len(x) // g, g * c, *x.shape[2:])
        y = F.batch_norm(groups_as_channels, *stats, weight, bias, True, self.momentum, self.eps)
        if self.track:
            self.remember(*(stat.view(g, c).mean(0) for stat in stats))
        # no view, of which the ReLU in place that follows would make a copy; BN's gradient does not need y
        return torch.ops.aten._unsafe_view(y, x.shape)

    def synchronised(self, x):
        axes, shape = [0, *range(2, x.ndim)], (1, -1) + (1,) * (x.ndim - 2)
        n = x.numel() // self.num_features * world_size()
        mean = SumOverProcesses.apply(x.float().sum(axes)) / n
        centred = x.float() - mean.view(shape)
        var = SumOverProcesses.apply(centred.square().sum(axes)) / n
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        if self.track:
            self.remember(self.running_mean.lerp(mean.detach(), self.momentum),
                          self.running_var.lerp(var.detach() * n / (n - 1), self.momentum))
        return y.to(x.dtype)

    def remember(self, mean, var):
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.add_(1)


class SumOverProcesses(torch.autograd.Function):
    """all_reduce with its gradient: a process's addend gets the gradients of all processes' losses."""

    @staticmethod
    def forward(ctx, x):
        return all_sum(x)

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad)


def all_sum(x):
    """Sum over processes, as a new tensor; without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def gather(x):
    """The global batch (N, ...), in its order, from each process's (n, ...); without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def mine():
    """The positions of the global batch that this process holds: every world-th."""
    return slice(rank(), None, world_size())


def sync_buffers(model):
    """Running statistics become means over processes. They are linear in the batches, so any time will do."""
    for bn in (m for m in model.modules() if isinstance(m, BatchNorm)):
        for stat in (bn.running_mean, bn.running_var):
            stat.copy_(all_sum(stat) / world_size())


# ============================================================================== shared: heads
def mlp(sizes, bn, last=(), bias=False, last_bias=False):
    """Linear layers of these sizes with BN and ReLU between them: (n, sizes[0]) -> (n, sizes[-1]). last:
    modules after the last one. bias: of the layers before a BN, which cancels it; last_bias: of the last."""
    layers = []
    for width, next_width in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(width, next_width, bias=bias), bn(next_width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=last_bias), *last)


# ============================================================================== shared: target update
@torch.no_grad()
def update_target(target, source, m):
    """theta_t = m theta_t + (1 - m) theta_s. Parameters only: BN statistics come from the target's batches.
    m = 0 makes the target a clone of the source as it stands before this step."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - m)


def encode(encoder, views, shuffle=None, track=True):
    """Encodes a list of views (n, 3, s, s) jointly and averages the raw outputs: (n, d). MeanEnc (Sec. 4.5)
    if they are two or more. shuffle, a generator: all processes' views are permuted as one pool, then back,
    so that an image's batch-mates in BN are not those of the source. track: BN keeps running statistics."""
    for bn in (m for m in encoder.modules() if isinstance(m, BatchNorm)):
        bn.track = track
    x = torch.cat(views)
    if shuffle is None:
        z = encoder(x)
    else:
        order = torch.randperm(len(x) * world_size(), generator=shuffle).to(x.device, non_blocking=True)
        z = gather(encoder(gather(x)[order[mine()]]))[order.argsort()[mine()]]
    return z.view(len(views), -1, z.shape[1]).mean(0)


def over_crops(loss, q, k):
    """MultiCrop's weights (Sec. 4.1). An encoder's crops are one group, the large, or two, large and small;
    in a group all weigh the same. On the source, as published: the sum over groups. On the target or on both,
    our choice: for each of the source's groups the mean over the target's."""
    def groups(crops):
        return [crops[:1], crops[1:]] if len(crops) > 1 else [crops]

    def mean(values):
        return sum(values) / len(values)

    return sum(mean([mean([loss(u, v) for u in us for v in vs]) for vs in groups(k)]) for us in groups(q))


def spread(z):
    """Standard deviation per channel of unit vectors z (n, d) over the global batch, times sqrt(d): near 1 if
    they fill the sphere, 0 if they have collapsed."""
    n, z = len(z) * world_size(), z.detach()
    centred = z - all_sum(z.sum(0)) / n
    return (all_sum(centred.square().sum(0)) / (n - 1)).sqrt().mean() * z.shape[1] ** 0.5


# ============================================================================== shared: the original methods
DESIGNS_OFF = dict(
    multicrop_src=False, multicrop_tgt=False, scalemix_src=False, scalemix_tgt=False, aug_src="base",
    aug_tgt="base", asym_aug=False, asym_bn=False, sync_bn_src=False, mean_enc=1, mean_enc_src=1)


def check_original(args):
    """--symmetrize is the method as it was before the paper: views swap sides, so no side has a design."""
    given = {name for name, off in DESIGNS_OFF.items() if getattr(args, name) != off}
    given -= {"aug_tgt"} if args.asym_aug else set()
    check(not (args.symmetrize and given),
          f"--symmetrize is the original method, without designs; drop it, or {dashed(given)}")


# ============================================================================== shared: views
@dataclass(frozen=True)
class View:
    recipe: augment.Recipe
    crop: data.Crop
    mix: bool  # ScaleMix


def plan_views(args):
    """What source and target see: for each a list of bags, the views in a bag to be averaged."""
    change = {"base": lambda recipe: recipe, "weak": augment.weak, "strong": augment.strong}
    src = args.aug_src, args.scalemix_src, args.mean_enc_src, args.multicrop_src
    tgt = args.aug_tgt, args.scalemix_tgt, args.mean_enc, args.multicrop_tgt
    plan = []
    for base, (aug, mix, n, multicrop) in zip(augmentations(args), (src, tgt), strict=True):
        recipe = change[aug](base)  # AsymAug (Sec. 4.3)
        multicropped = (args.multicrop_src or args.multicrop_tgt) and aug != "weak"
        scale = tuple(args.large_scale) if multicropped else recipe.scale
        large = View(recipe, data.Crop(args.img_size, scale, recipe.bicubic), mix)  # ScaleMix (Sec. 4.2)
        small = View(base, data.Crop(args.small_size, tuple(args.small_scale), base.bicubic), False)
        plan.append([[large] * n] + [[small]] * args.num_small * multicrop)  # MeanEnc (4.5), MultiCrop (4.1)
    return plan


def planned_crops(plan):
    """The crops that the plan needs, in order: two for a ScaleMix view."""
    return [view.crop for bags in plan for bag in bags for view in bag for _ in range(1 + view.mix)]


def make_views(plan, crops, total, generator, stats, part=None):
    """This process's crops, each (n, 3, s, s), as views, arranged as in the plan. Parameters are drawn for
    the global batch of total images, of which part is here, by default this process's share. stats: mean and
    standard deviation of the data."""
    crops, (mean, std), part = iter(crops), map(torch.tensor, stats), part or mine()

    def make(view, mix):
        params = {k: v[part] for k, v in augment.draw(view.recipe, total, generator).items()}
        first = augment.augment(next(crops), view.recipe, params, mean, std)
        if not mix:
            return first
        boxes = augment.scalemix_boxes(total, view.crop.size, generator)[part]
        return augment.scalemix(first, make(view, False), boxes)

    return [[[make(view, view.mix) for view in bag] for bag in bags] for bags in plan]


def show_views(args, plan, images):
    """A picture with a row per image: the source's views, a white column, the target's."""
    rows, edge, columns = torch.arange(min(8, len(images))), args.img_size, []
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in images.stats)
    crops, _ = next(data.stream(images, planned_crops(plan), [(0, rows)], args.seed, 0, 1, 0, "cpu"))
    sides = make_views(plan, crops, len(rows), rng(args.seed, "views", 0), images.stats, slice(None))
    for seen in sides:
        for x in sum(seen, []):
            x = (x * std + mean).clamp(0, 1)
            columns.append(F.pad(x, (0, edge - x.shape[3]) * 2, value=1.0))
        columns.append(torch.ones(len(rows), 3, edge, edge))
    tiles = torch.stack(columns[:-1], 1).flatten(0, 1)
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // edge))
    try:
        torchvision.utils.save_image(tiles, args.show_views, nrow=len(columns) - 1, pad_value=1.0)
    except (OSError, ValueError) as e:  # no such folder; no such format
        stop(f"--show-views {args.show_views}: {reason(e)}")


# ============================================================================== shared: schedules
def lr_factor(step, total, warmup):
    """The learning rate's share of its peak at step (from 0): linear from 0, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# ============================================================================== shared: flags
METHOD, FORMAT = Path(__file__).stem, 2  # FORMAT: of last.pt
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MAY_DIFFER = {"out", "overwrite", "nproc", "workers", "device", "steps", "log_every", "save_every",
              "knn_every", "show_views", "dry_run", "data_root", "download", "strict_images"}  # on resuming


def number(kind, low, high=math.inf):
    """An argparse type: a finite number in [low, high]."""
    def parse(text):
        if not low <= kind(text) <= high or kind(text) == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


count, share = number(int, 1, 2**31 - 1), number(float, 0, 1)


def make_parser():
    p = argparse.ArgumentParser(prog=f"{METHOD}.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: stop(f"{message}; --help lists the flags")
    flag = p.add_argument_group("data and recipe (defaults: the recipe's, a table in this file)").add_argument
    flag("--data", default="demo", help=f"{', '.join(data.NAMES)}, or a folder (see README)")
    flag("--data-root", default="data", metavar="DIR", help="where torchvision's data sets are, or go")
    flag("--download", action="store_true", help="let torchvision download the data set")
    flag("--strict-images", action="store_true", help="stop at an unreadable image instead of replacing it")
    flag("--recipe", choices=RECIPES, help="default: demo for demo, small for small sets, else imagenet")
    flag("--arch", help=f"any torchvision resnet, or {' '.join(Method.archs)}")
    flag("--img-size", type=count, help="pixels of the large views; up to 64, resnets get the CIFAR stem")
    flag("--epochs", type=count, help="length of training and of its schedules")
    flag("--steps", type=count, help="stop after that many, on the schedule of --epochs")
    flag("--batch-size", type=count, help="images per step, of all processes together")
    flag("--lr", type=number(float, 0), help="learning rate per 256 images; scaled by batch size / 256")
    flag("--wd", type=number(float, 0), help="weight decay")
    flag("--warmup-epochs", type=number(float, 0), help="linear warm-up of the learning rate")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything random")
    flag("--workers", type=number(int, 0, 1000), help="loader processes of each process; default: up to 8")
    flag("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps")
    flag("--bn-groups", type=count, metavar="G", help="virtual devices of BatchNorm; 1 is SyncBN")
    method_flags(p.add_argument_group("method").add_argument)
    flag = p.add_argument_group("asymmetric designs").add_argument
    for side, name in (("src", "source"), ("tgt", "target")):
        flag(f"--multicrop-{side}", action="store_true", help=f"MultiCrop on the {name} (Sec. 4.1)")
        flag(f"--scalemix-{side}", action="store_true", help=f"ScaleMix on the {name} (Sec. 4.2)")
        flag(f"--aug-{side}", choices=("base", "weak", "strong"), help=f"augmentation, {name} (Sec. 4.3)")
    flag("--asym-aug", action="store_true", help="AsymAug: --aug-tgt weak (Sec. 4.3)")
    flag("--asym-bn", action="store_true", help="AsymBN: SyncBN in the target's projector (Sec. 4.4)")
    flag("--sync-bn-src", action="store_true", help="SyncBN in the source's projector (Sec. 4.4)")
    flag("--bn-scope", choices=("projector", "all"), default="projector", help="all: backbone too (fn. 4)")
    flag("--mean-enc", type=count, default=1, metavar="N", help="MeanEnc: mean of N target views (Sec. 4.5)")
    flag("--mean-enc-src", type=count, default=1, metavar="N", help="mean of N source views (Sec. 4.5)")
    flag("--num-small", type=count, help="MultiCrop's small crops")
    flag("--small-size", type=count, help="their pixels")
    flag("--small-scale", type=share, nargs=2, metavar="S", help="their share of the area, from and to")
    flag("--large-scale", type=share, nargs=2, metavar="S", help="large crops', if not weak, with MultiCrop")
    flag = p.add_argument_group("run").add_argument
    flag("--out", metavar="DIR", help="default: runs/METHOD-DATA-FLAGS; the same command again resumes")
    flag("--overwrite", action="store_true", help="start again instead")
    flag("--nproc", type=count, default=1, help="start that many processes on this machine (or use torchrun)")
    flag("--knn-every", type=count, metavar="EPOCHS", help="kNN accuracy and the encodings' variances")
    flag("--save-every", type=count, default=1, metavar="EPOCHS", help="last.pt and the backbones")
    flag("--log-every", type=count, default=20, metavar="STEPS", help="log.jsonl and the progress line")
    flag("--show-views", metavar="FILE.png", help="draw what source and target see, and exit")
    flag("--dry-run", action="store_true", help="print sizes, steps and learning rate, and exit")
    return p


def parse_args(argv):
    p = make_parser()
    args = p.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if v != p.get_default(k)}
    empty = [k for k, v in given.items() if v == []]  # what argparse makes of --lr=--
    check(not empty, f"{dashed(empty)}: -- is no value; give one, or leave the flag out")
    multicrop, sync_bn = args.multicrop_src or args.multicrop_tgt, args.asym_bn or args.sync_bn_src
    useless = {"num_small", "small_size", "small_scale", "large_scale"} & given.keys()
    check(multicrop or not useless, f"{dashed(useless)}: no --multicrop-src or --multicrop-tgt to act on")
    check(sync_bn or args.bn_scope == "projector", "--bn-scope: no --asym-bn or --sync-bn-src to act on")
    check(not args.asym_aug or args.aug_tgt in (None, "weak"), "--asym-aug is --aug-tgt weak; drop one")
    args.aug_src, args.aug_tgt = args.aug_src or "base", args.aug_tgt or ("weak" if args.asym_aug else "base")
    by_data = "demo" if args.data == "demo" else "small" if args.data in data.NAMES else "imagenet"
    args.recipe, args.knn_asked = args.recipe or by_data, "knn_every" in given
    if args.workers is None:
        args.workers = min(8, max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc))))
    for name, value in recipe(args).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    given = {k: "_".join(map(str, v)) if isinstance(v, list) else v for k, v in given.items()}
    parts = [k if v is True else f"{k}={v}" for k, v in given.items() if k not in MAY_DIFFER | {"data"}]
    args.out = args.out or "-".join(["runs/" + METHOD, Path(args.data).resolve().name, *parts])
    return args


def check_flags(args, world):
    """What cannot work, before any work."""
    n, g = args.batch_size, args.bn_groups
    check(n % world == 0, f"--batch-size {n} does not divide among {world} processes; use {near(n, world)}")
    check(g == 1 or g % world == 0,
          f"--bn-groups {g} does not divide among {world} processes; use {near(g, world)}, or 1 (SyncBN)")
    check(n % g == 0, f"--batch-size {n} does not make {g} BN groups; use {near(n, math.lcm(g, world))}")
    check(n > g, f"--batch-size {n} leaves one image in each of {g} BN groups; use {2 * g} or more")
    check(g > 1 or not (args.asym_bn or args.sync_bn_src), "--asym-bn and --sync-bn-src change nothing with "
          "one BN group, which is SyncBN already; add --bn-groups 8, and compare with --bn-groups 8 alone")
    least = 8 if args.arch == "tiny" or args.img_size <= 64 else 32
    multicrop = args.multicrop_src or args.multicrop_tgt
    smallest = min(args.img_size, args.small_size if multicrop else args.img_size)
    check(smallest >= least, f"views of {smallest} px are too small for {args.arch}; use {least} px or more")
    known = [*Method.archs, *torchvision.models.list_models(torchvision.models, include="*resne*")]
    check(args.arch in known, f"--arch {args.arch} is unknown; use one of {' '.join(known)}")
    for low, high in (args.small_scale, args.large_scale):
        check(0 < low <= high, f"crops of {low} to {high} of the area: give two shares, the smaller first")
    (kind, _, i), local = args.device.partition(":"), int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc))
    check(args.device in ("cpu", "cuda", "mps") or kind == "cuda" and i.isdecimal(),
          f"--device {args.device} is unknown; use cpu, cuda, cuda:N or mps")
    cuda, gpus = kind == "cuda", torch.cuda.device_count()
    check(not cuda or max(local, int(i or 0) + 1) <= gpus, f"--device {args.device}, {local} process(es): "
          f"torch sees {gpus or 'no'} GPU; start fewer, or use --device cpu")
    check(kind != "mps" or torch.backends.mps.is_available() and world == 1,
          "--device mps: not available, or more than one process; use --device cpu")
    check(cuda or args.amp != "fp16", f"--amp fp16 does not work on {args.device}; use --amp bf16 or off")
    method_checks(args)


def check(good, message):
    if not good:
        stop(message)


def near(n, k):
    """The multiples of k next to n."""
    return " or ".join(str(k * m) for m in (n // k, n // k + 1) if m)


def dashed(names):
    return " ".join("--" + name.replace("_", "-") for name in sorted(names))


def stop(message, code=2):
    """Ends this process; the first of each node says why."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        speak("stderr", f"{METHOD}: {message}")
    raise SystemExit(code)


def say(message, end="\n"):
    if rank() == 0:
        speak("stdout", message, end)


def speak(stream, message, end="\n"):
    try:
        print(message, end=end, file=getattr(sys, stream), flush=True)
    except OSError:  # nobody reads, or the disk is full: log.jsonl has the numbers
        setattr(sys, stream, open(os.devnull, "w"))


# ============================================================================== shared: training
def global_batches(n, batch, seed, first, last):
    """(step, rows of the global batch), first <= step < last: a permutation per epoch, its rest dropped."""
    for step in range(first, last):
        epoch, i = divmod(step, n // batch)
        if step == first or i == 0:
            order = torch.randperm(n, generator=rng(seed, "order", epoch))
        yield step, order[i * batch : (i + 1) * batch]


def train(args, run, model, optimizer, scaler, images, bank, queries, device):
    plan, batch, epoch = plan_views(args), args.batch_size, len(images) // args.batch_size
    total, warmup, net = args.epochs * epoch, args.warmup_epochs * epoch, model
    last = min(total, args.steps or total)
    if world_size() > 1:  # buffers are ours to synchronise; torch 2.14 renamed the switch
        switches = inspect.signature(DistributedDataParallel.__init__).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in switches else "broadcast_buffers"
        net = DistributedDataParallel(model, **{switch: False})
    if run.step == 0:
        run.log({"step": 0, "epoch": 0, **measure(args, run, model, plan, images, bank, queries, device)})
    batches = global_batches(len(images), batch, args.seed, run.step, last)
    crops_of = partial(data.stream, images, planned_crops(plan))
    stream = crops_of(batches, args.seed, rank(), world_size(), args.workers, device)
    clock, waited, since, scale = time.time(), 0.0, run.step, scaler.get_scale()
    for step in range(run.step, last):
        asked = time.time()
        crops, unreadable = next(stream)
        waited, run.bad = waited + time.time() - asked, run.bad + len(unreadable)
        report(args, unreadable)
        generator = rng(args.seed, "views", step)
        src, tgt = make_views(plan, crops, batch, generator, images.stats)
        factor, m = lr_factor(step, total, warmup), model.momentum(step / total)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 if group.get("constant") else factor)
        loss, spreads = net(src, tgt, m, generator)
        optimizer.zero_grad()
        scaler.scale(loss).backward()

        done, ends_epoch = step + 1, (step + 1) % epoch == 0
        logs = done <= 10 or done % args.log_every == 0 or ends_epoch or done == last
        if logs:  # the only steps that wait for the device
            scaler.unscale_(optimizer)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads).item()  # if not finite, fp16's scaler skips the step
            entry = {"step": done, "epoch": done / epoch, "loss": (all_sum(loss) / world_size()).item(),
                     "chance": Method.chance(args), "lr": args.peak_lr * factor, "m": m,
                     **{k: v.item() for k, v in spreads.items()},
                     "grad_norm": norm if math.isfinite(norm) else None, "mem_gb": memory(device)}
            check(math.isfinite(entry["loss"]) and (math.isfinite(norm) or scaler.is_enabled()),
                  f"step {done}: loss {entry['loss']}, norm of the gradient {norm}; --lr too big? fp16 (try "
                  "bf16)? last.pt is as before")
        scaler.step(optimizer)
        scaler.update()
        run.skipped, scale = run.skipped + (scaler.get_scale() < scale), scaler.get_scale()
        check(scale > 1e-3, f"step {done}: fp16 skips all steps, as gradients overflow at any scale; use "
              "--amp bf16, or a smaller --lr. last.pt is as before")
        run.step, signalled = done, run.signalled()
        if logs:
            seconds, clock = time.time() - clock, time.time()
            entry |= {"img_s": (done - since) * batch / seconds, "data_frac": waited / seconds,
                      "eta_s": (last - done) * seconds / (done - since), "skipped": run.skipped}
            waited, since = 0.0, done
            if min(entry["std_src"], entry["std_tgt"]) < 0.1:
                say(f"warning: the encodings have nearly collapsed (std {entry['std_src']:.3f} and "
                    f"{entry['std_tgt']:.3f}; healthy: near 1); is --lr too large, or the batch too small?")
            if ends_epoch and done // epoch % args.knn_every == 0 or done == last:
                entry |= measure(args, run, model, plan, images, bank, queries, device)
                clock = time.time()
            run.log(entry | {"bad_images": all_sum(torch.tensor(run.bad)).item()})
        if ends_epoch and done // epoch % args.save_every == 0 or done == last or signalled:
            run.save(model, optimizer, scaler)
        if signalled:
            name = signal.Signals(signalled).name
            stop(f"{name}: saved step {done}; the same command continues", 128 + signalled)


def report(args, unreadable):
    for path in unreadable:
        then = "stopped (--strict-images)" if args.strict_images else "replaced by the next"
        speak("stderr", f"{METHOD}: unreadable image, {then}: {path}")
    if unreadable and args.strict_images:
        raise SystemExit(2)


def memory(device):
    """This process's peak in GB: on the GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ============================================================================== shared: kNN monitor
BANK, QUERIES, TWICE = 10_000, 2_000, 512  # images that answer and that ask, evenly spaced; encoded twice


@torch.no_grad()
def measure(args, run, model, plan, images, bank, queries, device):
    """v_src and v_tgt; with labels, the kNN accuracy of the source's backbone."""
    result = variances(args, model, plan, images, device)
    if bank is not None:
        sync_buffers(model)
        model.eval()
        sets = []
        for images, most in ((bank, BANK), (queries, QUERIES)):
            few = images[torch.linspace(0, len(images) - 1, min(most, len(images))).long()]
            sets.append(features(args, run, model.source.backbone, few, device))
        result["knn"] = knn(*sets)
        model.train()
    return result


def features(args, run, backbone, images, device):
    """Features (len(images), c) of unit length and labels, the images shared out among the processes."""
    rows = torch.arange(math.ceil(len(images) / world_size()) * world_size()) % len(images)
    mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in images.stats)
    ours, encoded, read = rows[mine()], [], []
    for x, really in data.centres(images, ours, args.img_size, args.workers, device):
        encoded.append(F.normalize(backbone((x - mean) / std)))
        read.append(really)
    encoded, read = torch.cat(encoded), torch.cat(read)
    filled = torch.arange(len(rows))[mine()] >= len(images)  # another process reports these
    wrong = ours[(ours != read) & ~filled]
    run.bad += len(wrong)
    report(args, [os.fsdecode(images.paths[row]) for row in wrong.tolist()])
    return tuple(gather(x.to(device))[: len(images)] for x in (encoded, images.labels[read]))


def knn(bank, queries, k=200, temperature=0.1):
    """Share of queries whose class wins the vote of the k nearest in the bank, with weights
    exp(cosine / temperature). bank and queries: unit vectors (n, c) and labels (n,)."""
    (keys, labels), right = bank, 0
    for x, truth in zip(*(t.split(1000) for t in queries), strict=True):
        cosine, row = (x @ keys.T).topk(min(k, len(keys)))
        votes = torch.zeros(len(x), int(labels.max()) + 1, device=x.device)
        votes.scatter_add_(1, labels[row], (cosine / temperature).exp())
        right += (votes.argmax(1) == truth).sum().item()
    return right / len(queries[1])


def variances(args, model, plan, images, device):
    """The paper's intra-image variance per dimension (Sec. 3), live: both encoders, as configured (views, BN,
    MeanEnc), encode images twice, among other batch-mates each time. Unbiased variance of an image's unit
    vectors, small crops included; mean over images."""
    n = args.batch_size
    total = min(math.ceil(TWICE / n), len(images) // n) * n
    chosen = torch.randperm(len(images), generator=rng(args.seed, "twice"))[:total]
    mates = [torch.randperm(total, generator=rng(args.seed, "mates", t)) for t in range(2)]
    places = [(t, order[i : i + n]) for t, order in enumerate(mates) for i in range(0, total, n)]
    steps = [(f"variance {i}", chosen[place]) for i, (_, place) in enumerate(places)]
    crops_of = partial(data.stream, images, planned_crops(plan))
    stream, seen = crops_of(steps, args.seed, rank(), world_size(), args.workers, device), {}
    for (t, place), (name, _), (crops, _) in zip(places, steps, stream, strict=True):
        generator = rng(args.seed, "views", name)
        sides = make_views(plan, crops, n, generator, images.stats)
        for v, encoder, bags in zip(("v_src", "v_tgt"), (model.source, model.target), sides, strict=True):
            shuffle = generator if model.shuffle and encoder is model.target else None
            z = [F.normalize(encode(encoder, bag, shuffle, track=False)) for bag in bags]
            z = gather(torch.stack(z, 1))  # (N, views, d)
            seen.setdefault((v, t), z.new_empty(total, *z.shape[1:]))[place.to(device)] = z
    return {v: torch.cat([seen[v, 0], seen[v, 1]], 1).var(1).mean().item() for v in ("v_src", "v_tgt")}


# ============================================================================== shared: checkpoint
class Run:
    """A run's folder: args.json, log.jsonl, last.pt, the backbones, a copy of this script. Rank 0 writes."""

    def __init__(self, args, about, bad):
        self.out, self.step, self.signal, self.launcher = Path(args.out), 0, 0, os.getppid()
        self.lock, self.bad, self.skipped = None, bad, 0  # bad images met here; steps that fp16 skipped
        self.about = json.loads(json.dumps(about))  # tuples become lists, as they do in the file

    def open(self, args, model, optimizer, scaler):
        """Continues the run that is there, if its arguments are these; starts one if none is there."""
        ours, last, log = (self.out / name for name in ("args.json", "last.pt", "log.jsonl"))
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
            restarted = all_sum(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))) > 0
            if rank() == 0 and args.overwrite and not restarted:
                for path in (ours, last, log):
                    path.unlink(missing_ok=True)
            all_sum(torch.zeros(1))  # wait for rank 0
            state = torch.load(last, map_location="cpu", weights_only=True) if last.exists() else None
            old = state or (json.loads(ours.read_text()) if ours.exists() else self.about)
            found = state.get("format") if state else FORMAT
            check(found == FORMAT, f"{last} has format {found}, not {FORMAT}; use the version that wrote it")
            pairs = [(k, old[k], self.about[k]) for k in ("method", "images", "file_names", "mean", "std")]
            for k in sorted(self.about["args"].keys() - MAY_DIFFER):
                pairs.append((dashed([k]), old["args"].get(k), self.about["args"][k]))
            lines = log.read_text().splitlines() if state and log.exists() else []
            self.step = state["step"] if state else 0
            lines = [x for x in lines if x.endswith("}") and json.loads(x).get("step", 0) <= self.step]
            seen = gather(torch.tensor([[self.step, self.about["images"]]])).unique(dim=0)  # waits for all
            check(len(seen) == 1, "the processes find different runs or data, (step, images): "
                  f"{seen.tolist()}; --out and --data must be folders that all nodes share")
            differ = ", ".join(f"{k} {a} there, {b} here" for k, a, b in pairs if a != b)
            check(not differ, f"--out {self.out} holds another run ({differ}); use another, or --overwrite")
            if state:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                if state["scaler"] and scaler.is_enabled():  # --device may have switched fp16 off or on
                    scaler.load_state_dict(state["scaler"])
                self.bad, self.skipped = 0 if rank() else state["bad_images"], state["skipped"]
                check(finite(model, optimizer), f"{last} holds values that are not finite; use --overwrite")
        except Exception as e:  # a truncated or foreign file raises nearly anything
            if lost(e):
                raise
            stop(f"--out {self.out} cannot be used ({reason(e)}); use another, or --overwrite")
        lines = lines or [json.dumps({"command": sys.argv, **self.about})]
        self.write(log, lambda path: path.write_text("\n".join(lines) + "\n"))
        self.write(ours, lambda path: path.write_text(json.dumps(self.about, indent=1)))
        if Path(__file__).resolve().parent != self.out.resolve():
            self.write(self.out / Path(__file__).name, partial(shutil.copy, __file__))

    def save(self, model, optimizer, scaler):
        sync_buffers(model)
        check(finite(model, optimizer), f"the weights, or the optimizer's state, are not finite at step "
              f"{self.step}: --lr too big? last.pt is as before")
        state = {"format": FORMAT, **self.about, "step": self.step, "model": model.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "bad_images": all_sum(torch.tensor(self.bad)).item(), "skipped": self.skipped}
        for name, encoder in (("backbone", model.source), ("backbone_target", model.target)):
            weights = {k: v.cpu() for k, v in encoder.backbone.state_dict().items()}
            self.write(self.out / f"{name}.pth", partial(torch.save, weights))
        self.write(self.out / "last.pt", partial(torch.save, state))  # the last: then all is there

    def write(self, path, how, aside=".tmp"):
        """Rank 0 writes aside, then renames: a reader finds the old file or the new one, never a part of it.
        If it cannot, all processes stop."""
        error, part = "", path.with_name(path.name + aside)
        if rank() == 0:
            try:
                how(part)
                with open(part, "rb") as f:  # on the disk before it has its name, if the power fails
                    os.fsync(f.fileno())
                os.replace(part, path)
            except (OSError, RuntimeError) as e:
                if lost(e):  # torch says so wherever this process happens to be
                    raise
                error = reason(e)
        if all_sum(torch.tensor(len(error))):
            stop(f"cannot write {path} ({error}); make room, or use another --out. last.pt is intact", 1)

    def log(self, entry):
        """A line to log.jsonl, and one to the terminal, where it is updated in place."""
        text = "epoch {epoch:.2f}  step {step}".format(**entry)
        if "loss" in entry:
            text += "  loss {loss:.3f} / chance {chance:.3f}  std {std_src:.2f} {std_tgt:.2f}".format(**entry)
            minutes, s = divmod(int(entry["eta_s"]), 60)
            text += f"  {entry['img_s']:.0f} img/s  eta {minutes // 60:02d}:{minutes % 60:02d}:{s:02d}"
        if "v_src" in entry:
            text += "\n  v_src {v_src:.2e}  v_tgt {v_tgt:.2e}".format(**entry)
            text += f"  v_tgt/v_src {entry['v_tgt'] / max(entry['v_src'], 1e-12):.2f}"
            text += f"  kNN {entry['knn']:.3f}" if "knn" in entry else ""

        def append(path):
            with open(path, "a") as f:
                f.write(json.dumps(entry) + "\n")

        self.write(self.out / "log.jsonl", append, aside="")
        screen = sys.stdout.isatty()
        say(f"\r{text:100s}" if screen else text, end="" if screen and "v_src" not in entry else "\n")

    def signalled(self):
        """The number of a signal to any process, or SIGTERM for a dead launcher, or 0; for all the same."""
        if not dist.is_initialized():
            return self.signal
        mine = int(signal.SIGTERM) if os.getppid() != self.launcher else self.signal
        dist.all_reduce(number := torch.tensor(mine), dist.ReduceOp.MAX)
        return number.item()


def finite(model, optimizer):
    moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return all(x.isfinite().all() for x in [*model.state_dict().values(), *moments])


def lost(e):
    """Whether an exception says that another process is gone; ConnectionError: a loader's, with a batch."""
    words = ("gloo", "NCCL", "DataLoader worker (")
    return isinstance(e, ConnectionError) or isinstance(e, RuntimeError) and any(w in str(e) for w in words)


def reason(e):
    """An exception in one line, without torch's advice on how to load what it refuses."""
    return f"{type(e).__name__}: {e}".splitlines()[0].split(". ")[0]


# ============================================================================== shared: launch
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def listen(handler):
    """Sets the handler of SIGNALS, but for SIGHUP under nohup; returns those before."""
    def answer(number, frame):
        if os.getpid() == ours:
            handler(number, frame)
        elif number == signal.SIGTERM:  # in a loader worker, before begin_worker()
            signal.alarm(30)

    ours, nohup = os.getpid(), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return {s: signal.signal(s, answer) for s in SIGNALS if s != signal.SIGHUP or not nohup}


def spawn(argv, nproc, child):
    """--nproc: what torchrun --nproc_per_node does, without its restarts. child: what each process runs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.start_processes(child, (argv, nproc, port), nproc, join=False)

    def pass_on(number, frame):  # the children save and exit; this process waits for them
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    listen(pass_on)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as e:
        if e.exit_code < 0:  # it could not speak, and the others may have been ended before they could
            print(f"{Path(sys.argv[0]).stem}: process {e.error_index} died ({e.signal_name}); the same "
                  "command continues", file=sys.stderr, flush=True)
        raise SystemExit(e.exit_code if e.exit_code > 0 else 128 - e.exit_code) from None


def child(index, argv, nproc, port):
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(max(1, CORES // nproc))
    mp.set_start_method(None, force=True)  # loader workers start as ever; spawned, each would import torch
    code = 0
    try:
        guard(parse_args(argv))
    except SystemExit as e:
        code = e.code
    raise SystemExit(code)  # now the frames, and with them the loader's workers, are gone: no wait for them


def join_processes(args):
    """Joins the processes of a launcher, if there is one; returns this process's device."""
    device = torch.device(args.device)
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        store, r, world = next(rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it holds what dead processes wrote
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=r, world_size=world)
    return device


# ============================================================================== shared: main
def guard(args):
    """work(), and one line instead of a traceback where it ends by no fault of the program."""
    try:
        work(args)
    except data.DataError as e:  # a loader worker's comes with its traceback
        e.__traceback__ = None  # whose frames hold the workers: the exit would wait for them
        stop(str(e).splitlines()[-1].split("DataError: ")[-1])
    except KeyboardInterrupt:  # before train() listens to signals
        raise SystemExit(128 + signal.SIGINT) from None
    except (RuntimeError, ConnectionError) as e:
        why = [line.split("RuntimeError: ")[-1] for line in str(e).splitlines() if "allocate" in line]
        if not why and not lost(e):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of dead workers again
        e.__traceback__ = None
        stop(f"out of memory ({why[0]}); use a smaller --batch-size or --img-size" if why else
             f"lost another process ({reason(e)}); the same command continues from last.pt", 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def work(args):
    """All that one process does."""
    device, flags = join_processes(args), {k: v for k, v in vars(args).items() if k != "knn_asked"}
    if args.download and rank() == 0:  # alone, and before the others look
        data.load(args.data, args.data_root, download=True)
    all_sum(torch.zeros(1))
    images, bank, queries = data.load(args.data, args.data_root)
    if not augmentations(args)[0].normalize:
        for split in (images, bank, queries):
            if split is not None:
                split.stats = data.RAW
    bad = {*images.bad, *(queries.bad if queries else ())}  # all processes have found them:
    bad = sorted(bad) if rank() == 0 else ()  # name and count them once
    report(args, bad)
    n, batch, groups, world = len(images), args.batch_size, args.bn_groups, world_size()
    most = n // math.lcm(groups, world) * math.lcm(groups, world)
    check(batch <= n, f"--batch-size {batch} is more than the {n} images; "
          + (f"use {most} or less" if most > groups else "use more images, or fewer --bn-groups"))
    check(args.warmup_epochs < args.epochs, f"--warmup-epochs {args.warmup_epochs} is no less than --epochs")
    check(bank is not None or not args.knn_asked, f"--knn-every: {args.data} has no labels; leave it out")
    method_checks(args, n)
    amp, args.peak_lr = args.amp, args.lr * batch / 256
    if amp == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if bf16 else "fp16" if device.type == "cuda" else "off"
    args.autocast = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    torch.manual_seed(args.seed)
    model = Method(args).to(device)
    optimizer = Method.optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    size = lambda tensors: sum(t.numel() for t in tensors) / 1e6
    backbone, heads, steps = size(model.source.backbone.parameters()), size(model.parameters()), n // batch
    say(f"{METHOD}, {args.recipe} recipe: {args.data}, {n} images, {len(images.classes) or 'no'} classes\n"
        f"  {args.arch}, {backbone:.2f} M parameters; all encoders and heads {heads:.2f} M; buffers "
        f"{4 * size(model.buffers()):.2f} MB; {device}, autocast {amp}, seed {args.seed}\n"
        f"  {args.epochs} epochs of {steps} steps, {args.epochs * steps} in all; batch {batch} = {world} x "
        f"{batch // world} in {groups} BN group(s); lr {args.lr} x {batch}/256 = {args.peak_lr:.4g}\n"
        f"  loss at chance level {Method.chance(args):.3f}; output: {args.out}")
    if args.show_views and rank() == 0:
        show_views(args, plan_views(args), images)
    if args.show_views or args.dry_run:
        return
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    run = Run(args, {"method": METHOD, "args": flags, "mean": images.stats[0], "std": images.stats[1],
                     "images": n, "file_names": images.names, "chance": Method.chance(args),
                     "versions": versions}, len(bad))
    run.open(args, model, optimizer, scaler)
    if run.step:
        more = run.step < min(args.epochs * steps, args.steps or math.inf)
        say(f"  resuming at step {run.step}" if more else "  complete; --overwrite repeats it")
    before = listen(lambda number, frame: setattr(run, "signal", number))
    try:
        train(args, run, model, optimizer, scaler, images, bank, queries, device)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        if run.lock is not None:
            os.close(run.lock)


def main(argv=None):
    args = parse_args(argv)
    check(args.nproc == 1 or "RANK" not in os.environ, "--nproc and torchrun exclude each other; drop one")
    check_flags(args, int(os.environ.get("WORLD_SIZE", args.nproc)))
    return spawn(argv, args.nproc, child) if args.nproc > 1 else guard(args)


if __name__ == "__main__":
    main()
