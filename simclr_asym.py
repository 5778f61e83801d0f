"""SimCLR with asymmetric designs, in one file.

Wang, Fan, Tian, Kihara, Chen: On the Importance of Asymmetry for Siamese Representation Learning,
CVPR 2022. Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning, ICML 2020.

The source encoder f_s learns by gradient; the target encoder f_t is its clone and judges it:

    theta_t = theta_s                                        the target is a clone of the source
    z_src = f_s(aug_s(x))                                    source encodings, with gradient
    z_tgt = f_t(aug_t(x))                                    target encodings, without
    L = mean of -log(exp(s_ii/tau) / sum_j exp(s_ij/tau));   s_ij = cos(z_src_i, z_tgt_j)
    theta_s = LARS(theta_s, dL/dtheta_s)                     j: the batch

The paper's finding: keep the target's variance below the source's. Each design is a flag, on either
encoder: --multicrop-src --scalemix-src --asym-aug --aug-src strong --asym-bn --mean-enc 2.
--symmetrize is the original: one encoder, gradient through both views.

    python simclr_asym.py                                    a laptop: demo data, two minutes
    python simclr_asym.py --data cifar10 --download          one GPU: the CIFAR recipe
    torchrun --nproc_per_node=8 simclr_asym.py --data IMAGENET --epochs 200 --scalemix-src
"""

# ============================================================================== shared: imports
import json
import math
import os
import signal
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import augment, data, knn, resnet
from common.augment import View, rng
from common.distributed import all_sum, barrier, check_launch, gather, mine, rank, say, world_size
from common.flags import amount, check, code_digest, fraction, given_flags, parser, positive, whole

# ============================================================================== method: recipes
from common.lars import LARS

# imagenet is the original's for 100 epochs, with its paper's decay. small and demo are our choice.
ARCHS = dict.fromkeys(resnet.ARCHS, {})  # for each, its own rows of RECIPES: none
RECIPES = {
    # flag           imagenet     small        demo         meaning
    "arch":          ("resnet50", "resnet18",  "tiny",      "any torchvision resnet, or tiny"),
    "img_size":      (224,        32,          32,          "pixels; up to 64: the CIFAR stem"),
    "epochs":        (100,        200,         8,           "length of training and schedules"),
    "batch_size":    (4096,       512,         64,          "images per step, of all processes"),
    "lr":            (0.3,        1.0,         8.0,         "learning rate per 256 images"),
    "wd":            (1e-6,       1e-6,        1e-6,        "weight decay"),
    "warmup_epochs": (10.0,       10.0,        1.0,         "linear warm-up of the learning rate"),
    "bn_groups":     (1,          1,           1,           "virtual devices of BN; 1 is SyncBN"),
    "temperature":   (0.1,        0.5,         0.2,         "temperature tau of InfoNCE"),
    "layers":        (2,          2,           2,           "linear layers of the projector"),
    "hidden":        (2048,       512,         256,         "width of the hidden layers"),
    "dim":           (128,        128,         128,         "dimension of the encodings"),
    "num_small":     (6,          6,           2,           "MultiCrop's small crops"),
    "small_size":    (96,         16,          16,          "their pixels"),
    "small_scale":   ((.05, .14), (.08, .5),   (.08, .5),   "their share of the image's area"),
    "large_scale":   ((.14, 1.0), (.14, 1.0),  (.14, 1.0),  "the large views', beside small ones"),
}


def method_flags(flag):
    flag("--negatives", choices=("targets", "all"), default="targets", help="all: sources' too")
    flag("--symmetrize", action="store_true", help="the original, as said above")


def method_checks(args):
    """What cannot work, before any work."""
    check(args.temperature > 0, f"--temperature {args.temperature}: give more than 0")
    check_original(args)


def augmentations(args):
    """SimCLR's recipe for source and target; its images stay in [0, 1], without normalisation. On
    small images half the jitter, and plan_views() takes the blur from them."""
    small = replace(augment.SIMCLR, strength=(0.4, 0.4, 0.4, 0.1))
    both = augment.SIMCLR if args.recipe == "imagenet" else small
    return both, both


# ============================================================================== method: model
class SimCLR(nn.Module):
    """Source and target. One forward() is a step of the algorithm above."""

    def __init__(self, args):
        super().__init__()
        self.symmetrize, self.temperature = args.symmetrize, args.temperature
        self.sources_too = args.symmetrize or args.negatives == "all"
        self.shuffle = args.bn_groups > 1  # else BN's groups would tell where the positive is
        norm = lambda sync: partial(BatchNorm, groups=1 if sync else args.bn_groups)

        def encoder(sync):  # AsymBN (Sec. 4.4): SyncBN in one projector; footnote 4: everywhere
            bn_body = norm(sync and args.bn_scope == "all")
            backbone, width = resnet.build(args.arch, args.img_size, bn_body, zero_init=True)
            return Encoder(backbone, projector(args, width, norm(sync)), args)

        self.source = self.target = encoder(args.sync_bn_src)
        if not self.symmetrize:
            self.target = encoder(args.asym_bn)
            self.target.load_state_dict(self.source.state_dict())
            self.target.requires_grad_(False)

    def momentum(self, progress):
        """m at this share of the training: 0; each step begins by cloning the source."""
        return 0.0

    def forward(self, src, tgt, m, generator):
        """One step on this process's n of the N images. src, tgt: bags of views, see plan_views().
        m: the target's momentum. generator: the same on all processes. Returns the loss, of which
        the mean over processes is minimised, and the spread of the encodings."""
        shuffle = generator if self.shuffle else None
        if self.symmetrize:  # a batch of 2 N, each view the other's target, 2 N - 2 negatives
            a, b = self.source.encode([*src[0], *tgt[0]], parts=1, shuffle=shuffle, track=True)
            return self.info_nce(a, b) + self.info_nce(b, a), spread(a, b)

        update_target(self.target, self.source, m)
        z_src = self.source(src)  # (n, d) for each bag
        with torch.no_grad():
            z_tgt = self.target(tgt, shuffle)

        loss = over_crops(self.info_nce, z_src, z_tgt)
        return loss, spread(z_src[0], z_tgt[0])

    def info_nce(self, z_src, z_tgt):
        """Cross-entropy of an image's own target among the global batch's. z_src and z_tgt: (n, d).
        If sources count too, other images' z_src are negatives as well, with gradient to them."""
        z_src, z_tgt = F.normalize(z_src), gather(F.normalize(z_tgt))  # (n, d), (N, d)
        own = torch.arange(len(z_tgt), device=z_tgt.device)[mine()]
        logits = z_src @ z_tgt.T  # (n, N)
        if self.sources_too:
            others = z_src @ gather(z_src).T  # (n, N), and none is its own negative:
            logits = torch.cat([logits, others.scatter(1, own[:, None], -math.inf)], 1)
        return F.cross_entropy(logits / self.temperature, own)

    def chance(self, args):
        """The loss of encodings that tell nothing. Change it with the loss."""
        terms = 2 if args.multicrop_src or args.symmetrize else 1
        return terms * math.log(2 * args.batch_size - 1 if self.sources_too else args.batch_size)

    def optimizer(self, args):
        """LARS. peak: the learning rate that the schedule scales."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": params, "peak": args.peak_lr}]
        return LARS(groups, lr=args.peak_lr, weight_decay=args.wd, classic=True)  # its own momentum


def projector(args, width, bn):
    """SimCLR's: at the end a BN with scale, without shift."""
    last = bn(args.dim)
    last.bias.requires_grad_(False)
    return mlp([width] + [args.hidden] * (args.layers - 1) + [args.dim], bn, last=[last])


Method = SimCLR


# ============================================================================== shared: networks
class Encoder(nn.Module):
    """Backbone and projector; --amp bf16: under autocast. Encodings have default precision."""

    def __init__(self, backbone, projector, args):
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.bf16, self.groups = args.amp == "bf16", args.bn_groups

    def forward(self, bags, shuffle=None, track=True):
        """The mean encoding (n, d), not normalised, of each bag's views (n, 3, s, s): a list. The
        first bag holds the large views, encoded jointly: if several, MeanEnc (Sec. 4.5). Each other
        bag holds a small crop (MultiCrop, Sec. 4.1); they go through in one pass. shuffle: None, or
        a generator of other batch-mates for BN. track: large views move running statistics."""
        large, *small = bags
        encodings = [self.encode(large, 1, shuffle, track).mean(0)]
        if small:
            encodings += self.encode(sum(small, []), len(small), shuffle, track=False).unbind()
        return encodings

    def encode(self, views, parts, shuffle, track):
        """Encodings (v, n, d) of v views (n, 3, s, s). parts: BN sees so many parts, each apart."""
        x = torch.cat(views)  # view k of image i at k n + i
        x = x.bfloat16() if self.bf16 else x  # as autocast would later: half the bytes to gather
        if shuffle is not None:  # among the images of all processes, each part by itself
            size = len(x) * world_size() // parts
            orders = [k * size + torch.randperm(size, generator=shuffle) for k in range(parts)]
            order = torch.cat(orders).to(x.device, non_blocking=True)
            x = gather(x)[order[mine()]]

        groups = max(1, self.groups // world_size()) if self.training and x.is_cpu else 1
        x = x.unflatten(0, (parts, -1, groups)).transpose(0, 2).flatten(0, 2)  # see BatchNorm
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions are faster so
        BatchNorm.parts, BatchNorm.track, BatchNorm.grouped = parts, track, groups > 1
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            z = self.projector(self.backbone(x)).to(torch.get_default_dtype())
        BatchNorm.parts, BatchNorm.track, BatchNorm.grouped = 1, True, False
        z = z.unflatten(0, (groups, -1, parts)).transpose(0, 2).flatten(0, 2)  # and back

        if shuffle is not None:
            z = gather(z)[order.argsort()[mine()]]  # argsort inverts a permutation
        return z.unflatten(0, (len(views), -1))


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm on virtual devices, for (n, c) and (n, c, h, w). Image i of the global batch is
    normalised with those of group i mod G, on any number of processes: of 8 images with G = 4, the
    first of two processes holds 0 2 4 6, in groups 0 4 and 2 6. G = 1 is SyncBN; within an encoder
    G is its own or 1. Rows are (n, groups here, parts): few kernels; or, if grouped, (groups here,
    n, parts): fast on CPUs, channels stay last. Parts have statistics of their own. Running
    statistics are means over groups; sync_buffers() takes the mean over processes."""
    parts, track, grouped = 1, True, False  # in the pass at hand: Encoder.encode() sets them

    def __init__(self, features, groups=1, affine=True):
        super().__init__(features, affine=affine)
        self.groups = groups

    def forward(self, x):
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if not self.training:
            return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)

        norm = SyncNorm.apply if self.groups == 1 and world_size() > 1 else F.batch_norm
        momentum = self.momentum if self.track else 0.0
        parts, groups = self.parts, max(1, self.groups // world_size())  # groups here
        if not self.grouped:  # rows (n, groups, parts): a group is no more than a part
            parts, groups = groups * parts, 1
        if parts == groups == 1:
            return norm(x, mean, var, weight, bias, True, momentum, self.eps)

        means, variances = mean.repeat(groups, parts), var.repeat(groups, parts)
        weight, bias = (t.repeat(parts) if self.affine else None for t in (weight, bias))
        parts_as_channels = x.reshape(len(x) // parts, -1, *x.shape[2:])  # (n, parts c, ...)
        rows = parts_as_channels.chunk(groups) if groups > 1 else [parts_as_channels]
        each = zip(rows, means, variances, strict=True)
        normed = [norm(r, m, v, weight, bias, True, momentum, self.eps) for r, m, v in each]
        if self.track:
            mean.copy_(means.view(-1, len(mean)).mean(0))
            var.copy_(variances.view(-1, len(var)).mean(0))
        y = torch.cat(normed) if groups > 1 else normed[0]
        return torch.ops.aten._unsafe_view(y, x.shape)  # autograd copies a view for ReLU in place


class SyncNorm(torch.autograd.Function):
    """F.batch_norm over the x of all processes, equally many from each. One exchange forward, one
    backward, for which x and two statistics are kept. nn.SyncBatchNorm does not run on CPUs."""

    @staticmethod
    def forward(ctx, x, running_mean, running_var, weight, bias, training, momentum, eps):
        # for its statistics alone; a weight and bias of float32 make them float32 if x is bf16
        one, zero = torch.ones_like(running_mean), torch.zeros_like(running_mean)
        _, mean, invstd = torch.native_batch_norm(x, one, zero, None, None, True, 0.0, eps)
        means, variances = gather(torch.stack([mean, invstd**-2 - eps])[None]).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + means.var(0, correction=0)

        ctx.n, ctx.eps = x.numel() // x.shape[1] * world_size(), eps
        ctx.save_for_backward(x, one if weight is None else weight, mean, var)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * ctx.n / (ctx.n - 1), momentum)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, var = ctx.saved_tensors
        invstd = (var + ctx.eps).rsqrt()
        # a GPU's kernel wants a weight, and the statistics twice
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, mean, invstd, False, ctx.eps, [True, True, True])

        # That held mean and var constant: dx = weight invstd dy. As they move with x, it is
        # weight invstd (dy - mean(dy) - x' mean(dy x')), x' = (x - mean) invstd, means over all.
        constant, slope = all_sum(torch.stack([dbias, dweight * invstd])) * weight * invstd / ctx.n
        shape = 1, -1, *[1] * (x.ndim - 2)
        dx = torch.addcmul(dx, x, slope.to(x.dtype).view(shape), value=-1)
        dx -= (constant - slope * mean).to(x.dtype).view(shape)
        if not ctx.needs_input_grad[3]:  # without weight and bias
            dweight = dbias = None
        return dx, None, None, dweight, dbias, None, None, None


def sync_buffers(model):
    """Makes running statistics means over processes; linear in the batches, so any time will do."""
    for name, buffer in model.named_buffers():
        if "running_" in name:  # mean or var
            buffer.copy_(all_sum(buffer) / world_size())


# ============================================================================== shared: heads
def mlp(sizes, bn, last=(), bias=False, last_bias=False):
    """Linear layers of these sizes with BN and ReLU between them: (n, sizes[0]) -> (n, sizes[-1]).
    last: modules at the end. bias: of layers before BN, which cancels it; last_bias: the last's."""
    layers = []
    for width, next_width in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(width, next_width, bias=bias), bn(next_width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=last_bias), *last)


# ============================================================================== shared: a step
def plan_views(args):
    """What source and target see: for each a list of bags, a bag being views whose encodings are
    averaged. The first bag holds the large views: one, or MeanEnc's. Each small crop is a bag."""
    change = {"base": lambda recipe: recipe, "weak": augment.weak, "strong": augment.strong}
    src = args.aug_src, args.scalemix_src, args.mean_enc_src, args.multicrop_src
    tgt = args.aug_tgt, args.scalemix_tgt, args.mean_enc, args.multicrop_tgt
    plan = []
    for base, (aug, mix, n, multicrop) in zip(augmentations(args), (src, tgt), strict=True):
        if args.recipe != "imagenet":  # small images are not blurred
            base = replace(base, blur=0.0)
        recipe = change[aug](base)  # AsymAug (Sec. 4.3)
        if (args.multicrop_src or args.multicrop_tgt) and aug != "weak":  # weak() sets its own
            recipe = replace(recipe, scale=tuple(args.large_scale))
        bags = [[View(recipe, args.img_size, mix)] * n]  # ScaleMix (Sec. 4.2), MeanEnc (Sec. 4.5)
        if multicrop:  # MultiCrop (Sec. 4.1); AsymAug leaves its small crops alone
            small = replace(base, scale=tuple(args.small_scale))
            bags += [[View(small, args.small_size)]] * args.num_small
        plan.append(bags)
    return plan


@torch.no_grad()
def update_target(target, source, m):
    """theta_t = m theta_t + (1 - m) theta_s; m = 0: a clone. BN statistics are the target's own."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - m)


def over_crops(loss, z_src, z_tgt):
    """The loss over all pairs of bags. MultiCrop (Sec. 4.1): small crops together count as much as
    large views. For the source the sum, as published; for the target the mean, our choice."""
    def weights(z):
        large, *small = z
        return [1.0] + [1 / len(small) for _ in small]

    total = 0
    for w_src, u in zip(weights(z_src), z_src, strict=True):
        for w_tgt, v in zip(weights(z_tgt), z_tgt, strict=True):
            total = total + w_src * w_tgt / sum(weights(z_tgt)) * loss(u, v)
    return total


def spread(z_src, z_tgt):
    """Standard deviation per channel of encodings (n, d), as unit vectors, over the global batch,
    times sqrt(d): near 1 if they fill the sphere, 0 if they have collapsed."""
    z = F.normalize(torch.stack([z_src, z_tgt]).detach(), dim=2)
    n, d = z.shape[1] * world_size(), z.shape[2]
    mean, square = all_sum(torch.stack([z.sum(1), z.square().sum(1)])) / n  # one exchange for all
    std = ((square - mean.square()).clamp(min=0) * n / (n - 1)).sqrt().mean(1) * d**0.5
    return {"std_src": std[0], "std_tgt": std[1]}


def lr_factor(step, total, warmup):
    """The rate's share of its peak at step (from 0): linear from 0, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# ============================================================================== shared: original
def check_original(args):
    """--symmetrize is the method before the paper: views swap sides, so no side has a design."""
    off = {"aug_src": "base", "aug_tgt": "base", "mean_enc": 1, "mean_enc_src": 1,
           "multicrop_src": False, "multicrop_tgt": False, "scalemix_src": False,
           "scalemix_tgt": False, "asym_bn": False, "sync_bn_src": False}
    given = [name.replace("_", "-") for name in off if getattr(args, name) != off[name]]
    check(not args.symmetrize or not given,
          f"--symmetrize is the original, without designs; drop it, or --{' --'.join(given)}")


# ============================================================================== shared: flags
METHOD = Path(__file__).stem
MAY_DIFFER = {  # between a run and its continuation
    "code", "data", "data_root", "device", "download", "dry_run", "knn_every", "log_every", "nproc",
    "out", "overwrite", "save_every", "show_views", "steps", "torch", "workers"}
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1  # finish the step, save and exit


def parse_args(argv=None):
    p = parser(f"{METHOD}.py", __doc__)
    flag = p.add_argument_group("recipe (defaults of imagenet, small and demo)").add_argument
    flag("--recipe", choices=("imagenet", "small", "demo"), help="default: by the images' size")
    for name, (*defaults, meaning) in RECIPES.items():
        kind = {int: positive, float: amount, tuple: fraction, str: str}[type(defaults[0])]
        flag("--" + name.replace("_", "-"), type=kind, nargs=2 if kind is fraction else None,
             metavar="X", help=f"{meaning} ({', '.join(map(str, defaults))})")
    method_flags(flag)

    flag = p.add_argument_group("asymmetric designs").add_argument
    for side, name in (("src", "source"), ("tgt", "target")):
        flag(f"--multicrop-{side}", action="store_true", help=f"MultiCrop, {name} (Sec. 4.1)")
        flag(f"--scalemix-{side}", action="store_true", help=f"ScaleMix, {name} (Sec. 4.2)")
        flag(f"--aug-{side}", choices=("base", "weak", "strong"), default="base",
             help=f"augmentation, {name} (Sec. 4.3)")
    flag("--asym-aug", dest="aug_tgt", action="store_const", const="weak", help="--aug-tgt weak")
    flag("--asym-bn", action="store_true", help="SyncBN in the target's projector (Sec. 4.4)")
    flag("--sync-bn-src", action="store_true", help="SyncBN in the source's projector")
    flag("--bn-scope", choices=("projector", "all"), default="projector", help="(footnote 4)")
    flag("--mean-enc", type=positive, default=1, help="mean of so many target views (Sec. 4.5)")
    flag("--mean-enc-src", type=positive, default=1, help="mean of so many source views")

    flag = p.add_argument_group("data and run").add_argument
    flag("--data", default="demo", help=f"{', '.join(data.NAMES)}, FILE.npz, or a folder")
    flag("--data-root", default="data", help="where torchvision's data sets are, or go")
    flag("--download", action="store_true", help="let torchvision download the data set")
    flag("--init", metavar="FILE", help="start the backbone from weights in torchvision's names")
    flag("--out", help="default: runs/METHOD-DATA-FLAGS; the same command again resumes")
    flag("--overwrite", action="store_true", help="start again instead")
    flag("--steps", type=positive, help="stop after that many, on the schedule of --epochs")
    flag("--seed", type=whole, default=0, help="of everything random")
    flag("--nproc", type=positive, default=1, help="processes to start here (or use torchrun)")
    flag("--workers", type=whole, help="loader processes of each process; default: up to 8")
    flag("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    flag("--amp", choices=("auto", "off", "bf16"), default="auto", help="mixed precision")
    flag("--knn-every", type=whole, default=10, metavar="EPOCHS", help="kNN, variances; 0: never")
    flag("--save-every", type=positive, default=1, metavar="EPOCHS", help="last.pt, backbone.pth")
    flag("--log-every", type=positive, default=20, metavar="STEPS", help="log.jsonl, terminal")
    flag("--show-views", metavar="FILE.png", help="draw what source and target see, and exit")
    flag("--dry-run", action="store_true", help="print sizes, steps and learning rate, and exit")
    args = p.parse_args(argv)

    if args.out is None:  # before the recipe's defaults: it names the flags that were given
        args.out = f"runs/{METHOD}-{Path(args.data).resolve().name}"
        args.out += given_flags(args, p, MAY_DIFFER)
    if args.recipe is None:
        small = data.image_size(args.data) <= 64
        args.recipe = "demo" if args.data == "demo" else "small" if small else "imagenet"
    column = ("imagenet", "small", "demo").index(args.recipe)
    for name, row in (RECIPES | ARCHS.get(args.arch, {})).items():
        if getattr(args, name) is None:
            setattr(args, name, row[column])
    args.peak_lr = args.lr * args.batch_size / 256
    return args


def check_flags(args):
    """What cannot work, before any work."""
    check_launch(args)
    world, n, g = int(os.environ.get("WORLD_SIZE", args.nproc)), args.batch_size, args.bn_groups
    unit = math.lcm(g, world)
    near = [str(k * unit) for k in (n // unit, n // unit + 1) if k * unit > g]
    check(g == 1 or g % world == 0,
          f"--bn-groups {g} is no multiple of {world}, the processes; use {world}, or 1 (SyncBN)")
    check(n % unit == 0 and n > g, f"--batch-size {n} is no multiple of {unit} (processes, BN "
          f"groups) with two images to a group; use {' or '.join(near)}")
    check(g > 1 or not (args.asym_bn or args.sync_bn_src), "--asym-bn and --sync-bn-src need "
          "several BN groups; add --bn-groups 8 to both runs you compare")
    check(args.warmup_epochs < args.epochs,
          f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
    for low, high in (args.small_scale, args.large_scale):
        check(0 < low <= high, f"crops of {low} to {high} of the area: give FROM and TO")
    check(args.arch in ARCHS, f"--arch {args.arch} is unknown; use one of {' '.join(ARCHS)}")
    method_checks(args)


# ============================================================================== shared: training
def train(args, about, model, sets, device):
    per_epoch = len(sets[0]) // args.batch_size  # steps, as total, warmup and last
    total, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    last = min(total, args.steps or total)
    optimizer = model.optimizer(args)
    grouped = {p for group in optimizer.param_groups for p in group["params"]}
    left = [k for k, p in model.named_parameters() if p.requires_grad and p not in grouped]
    check(not left, f"in no group of the optimizer: {', '.join(left)}; see Method.optimizer()")

    first, signals = resume(args, about, model, optimizer), []
    for signum in SIGNALS:
        signal.signal(signum, lambda signum, frame: signals.append(signum))
    if first >= last:
        say("  complete; --overwrite repeats it")
    if first == 0 and args.knn_every:
        log(args, {"step": 0, "epoch": 0.0, **measure(args, model, sets, device)})

    net = model
    if world_size() > 1:
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # sync_buffers() is enough; as an argument it is deprecated
        warnings.filterwarnings("ignore", "Grad strides")  # 1 x 1 convolutions': harmless
    batches = data.global_batches(len(sets[0]), args.batch_size, args.seed, first, last)
    since, waited, logged = time.time(), 0.0, first
    asked = since

    # keep no other reference to the stream: every exit would wait for its workers
    for step, ((src, tgt), generator) in enumerate(data.stream(
            sets[0], plan_views(args), batches, args.seed, mine(), args.workers, device), first):
        waited += time.time() - asked
        torch.manual_seed(rng(args.seed, "step", step, rank()).initial_seed())  # for dropout, say
        factor, m = lr_factor(step, total, warmup), model.momentum(step / total)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 if group.get("constant") else factor)

        loss, spreads = net(src, tgt, m, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        epochs, rest = divmod(done, per_epoch)
        stop = gather(torch.tensor([max(signals, default=0)])).max().item()  # for all, if for one
        if done <= 10 or done % args.log_every == 0 or rest == 0 or done == last:
            now = numbers(model, loss, spreads)  # waits for the device: only then ask the clock
            seconds, steps = time.time() - since, done - logged
            entry = {"step": done, "epoch": done / per_epoch, "chance": model.chance(args), "m": m,
                     "lr": args.peak_lr * factor, **now, "img_s": steps * args.batch_size / seconds,
                     "data_frac": waited / seconds, "eta_s": (last - done) * seconds / steps}
            if args.knn_every and (done == last or rest == 0 and epochs % args.knn_every == 0):
                entry |= measure(args, model, sets, device)
            log(args, entry)
            since, waited, logged = time.time(), 0.0, done
        if done == last or stop or rest == 0 and epochs % args.save_every == 0:
            save(args, about, done, model, optimizer)
        if stop:
            say(f"saved step {done}; the same command continues")
            raise SystemExit(128 + stop)
        asked = time.time()


# ============================================================================== shared: monitor
def numbers(model, loss, spreads):
    """What a step says of itself; only steps that log wait for the device."""
    loss = (all_sum(loss.detach()) / world_size()).item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()  # clips nothing
    check(math.isfinite(loss) and math.isfinite(norm), f"the loss is {loss}, the gradient's norm "
          f"{norm}; is --lr too large? last.pt is as before")
    return {"loss": loss, "grad_norm": norm, **{k: v.item() for k, v in spreads.items()}}


@torch.no_grad()
def measure(args, model, sets, device):
    """The paper's claim, live: v_src and v_tgt. With labels, kNN on the source's backbone."""
    images, bank, queries = sets
    result = variances(args, model, images, device)
    if bank is not None:
        sync_buffers(model)
        net, size = model.source.backbone, args.img_size
        if rank() == 0:  # the others wait at the next exchange
            result["knn"] = knn.accuracy(net, bank, queries, size, args.workers, device)
    return result


def variances(args, model, images, device):
    """The paper's intra-image variance per dimension (Sec. 3): both encoders, as configured (views,
    BN, MeanEnc), encode whole batches, of 512 images or more, twice, with other batch-mates each
    time. Unbiased variance of an image's unit vectors, small crops included; mean over images."""
    n = args.batch_size
    total = min(math.ceil(512 / n), len(images) // n) * n
    chosen = torch.randperm(len(images), generator=rng(args.seed, "twice"))[:total]
    order = torch.cat([torch.randperm(total, generator=rng(args.seed, "mates", t)) for t in (0, 1)])
    batches = [(f"variance {i}", rows) for i, rows in enumerate(chosen[order].split(n))]

    z_src, z_tgt = [], []  # for each batch, this process's (., views, d)
    for (src, tgt), generator in data.stream(
            images, plan_views(args), batches, args.seed, mine(), args.workers, device):
        z_src.append(torch.stack(model.source(src, track=False), 1))
        shuffle = generator if model.shuffle else None
        z_tgt.append(torch.stack(model.target(tgt, shuffle, track=False), 1))

    def variance(z):
        z = gather(F.normalize(torch.cat(z), dim=2))[order.argsort(stable=True)]  # i at 2i, 2i + 1
        return z.unflatten(0, (total, 2)).flatten(1, 2).var(1).mean().item()

    return {"v_src": variance(z_src), "v_tgt": variance(z_tgt)}


def log(args, entry):
    """A line in log.jsonl, and its chief numbers on the terminal."""
    entry["mem_gb"] = torch.cuda.max_memory_allocated() / 1e9
    entry["bad_images"] = all_sum(torch.tensor(data.Images.unreadable)).item()
    if rank() == 0:
        with open(Path(args.out, "log.jsonl"), "a") as f:
            f.write(json.dumps(entry) + "\n")

    shown = "epoch step loss chance std_src std_tgt img_s eta_s v_src v_tgt knn".split()
    say("  ".join(f"{name} {entry[name]:.4g}" for name in shown if name in entry))
    if min(entry.get("std_src", 1), entry.get("std_tgt", 1)) < 0.1:
        say("warning: the encodings have nearly collapsed (a healthy std is near 1)")


# ============================================================================== shared: the run
def resume(args, about, model, optimizer):
    """Continues the run in --out if its arguments are these, or starts one; returns its step."""
    out, script = Path(args.out), Path(__file__)
    last, lines, step = out / "last.pt", out / "log.jsonl", 0
    check(not out.exists() or out.is_dir(), f"--out {out} is no folder; use another")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    kept = [json.dumps({"command": sys.argv, **about})]
    if last.exists() and (restarted or not args.overwrite):
        state = load(last)
        old, step = state["args"], state["step"]
        differ = [f"{k} {old.get(k)} there, {v} here" for k, v in about.items()
                  if k not in MAY_DIFFER and old.get(k) != v]
        check(not differ, f"--out {out} holds another run ({', '.join(differ)}); use another, or "
              "--overwrite")
        if old["code"] != about["code"]:
            say(f"note: {script.name} or common/ changed since {out} began; --overwrite: anew")
            about["code"] = old["code"]
        fit(model, state["model"], last)
        optimizer.load_state_dict(state["optimizer"])
        kept = [x for x in lines.read_text().splitlines() if x.endswith("}")]  # no half line
        kept = [x for x in kept if json.loads(x).get("step", 0) <= step]
        say(f"  resuming at step {step}, begun with --data {old['data']}")
    barrier()  # all have looked

    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not step:
            last.unlink(missing_ok=True)
            Path(out, "args.json").write_text(json.dumps(about, indent=1))
            Path(out, script.name).write_bytes(script.read_bytes())
        lines.with_suffix(".tmp").write_text("\n".join(kept) + "\n")
        os.replace(lines.with_suffix(".tmp"), lines)
    return step


def save(args, about, step, model, optimizer):
    """Writes the backbones, then last.pt, with all that the next step needs."""
    sync_buffers(model)
    weights = model.state_dict()
    check(all(x.isfinite().all() for x in weights.values()),
          f"the weights are not finite at step {step}; is --lr too large? last.pt is as before")
    files = {"backbone.pth": model.source.backbone.state_dict(),
             "backbone_target.pth": model.target.backbone.state_dict(),
             "last.pt": {"args": about, "step": step, "model": weights,
                         "optimizer": optimizer.state_dict()}}
    if rank() == 0:
        for name, content in files.items():
            path = Path(args.out, name)
            torch.save(content, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # never half a file
    barrier()


def load(path):
    """A file of torch.save, as a dict; nothing in it is executed."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # a truncated or foreign file raises nearly anything
        why = " ".join(str(e).split()).rpartition("error: ")[2].partition(". ")[0]
        check(False, f"{path} cannot be read ({type(e).__name__}: {why}); is it whole? If it holds "
              "more than tensors, and you trust it: load it with weights_only=False and save its "
              "state_dict")


def fit(module, weights, path):
    try:
        module.load_state_dict(weights)
    except RuntimeError as e:  # it names the keys
        check(False, f"{path} does not fit: {' '.join(str(e).split()):.800}")


# ============================================================================== shared: launch
def launch(args, work):
    """work(args), here or in --nproc processes, as torchrun would start them, without restarts."""
    if args.nproc == 1:
        return guarded(work, args)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.spawn(child, (work, args, store.port), args.nproc, join=False)

    def pass_on(signum, frame):  # they save and exit, and this process waits
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    for signum in SIGNALS:
        signal.signal(signum, pass_on)
    try:
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as e:  # it has said why; below 0: a signal
        raise SystemExit(e.exit_code if e.exit_code > 0 else 128 - e.exit_code) from None


def child(index, work, args, port):
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(args.nproc),
                   "LOCAL_WORLD_SIZE": str(args.nproc), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(max(1, torch.get_num_threads() // args.nproc))
    guarded(work, args)


def guarded(work, args):
    """work(args); wrong data end in one line."""
    try:
        return work(args)
    except data.DataError as e:
        check(False, e)


def join_processes(args):
    """Joins the processes of torchrun or launch(), if there are; returns this one's device."""
    device, backend = torch.device(args.device), "gloo"
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" now means this one
            backend = "cpu:gloo,cuda:nccl"
        # a new store for each restart by torchrun: the old one has killed processes' ports
        store, r, n = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=r, world_size=n)
    return device


def work(args):
    """All that one process does."""
    device = join_processes(args)
    if args.download and rank() == 0:  # alone, and before the others look
        data.load(args.data, args.data_root, download=True)
    barrier()
    sets = data.load(args.data, args.data_root, normalize=augmentations(args)[0].normalize)
    images, n, batch = sets[0], len(sets[0]), args.batch_size
    check(batch <= n, f"--batch-size {batch} is more than the {n} images of {args.data}; use less")

    about = {"method": METHOD, "format": 3, "code": code_digest(__file__), "images": n,
             "names": images.names, "mean": images.stats[0], "std": images.stats[1],
             "torch": torch.__version__, **vars(args)}
    about = json.loads(json.dumps(about))  # tuples become lists, as they do in the file
    if args.amp == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "off"

    torch.manual_seed(args.seed)
    model = Method(args).to(device)
    if args.init:
        weights = {k: v for k, v in load(args.init).items() if not k.startswith(("fc.", "heads."))}
        for encoder in (model.source, model.target):
            fit(encoder.backbone, weights, f"--init {args.init} (see linear_probe.py --export)")

    millions = lambda tensors: f"{sum(t.numel() for t in tensors) / 1e6:.2f} M"
    say(f"{METHOD}, {args.recipe} recipe; {args.data}, {n} images; {args.arch}, {device}, amp "
        f"{args.amp}\n  a backbone has {millions(model.source.backbone.parameters())} parameters, "
        f"all {millions(model.parameters())}; {millions(model.buffers())} numbers in buffers\n"
        f"  {args.epochs} epochs of {n // batch} steps; lr {args.lr} x {batch}/256 = "
        f"{args.peak_lr:.4g}; chance {model.chance(args):.3f}; output: {args.out}")
    if args.show_views and rank() == 0:
        data.show_views(args.show_views, images, plan_views(args), args.seed)
    if not (args.show_views or args.dry_run):
        train(args, about, model, sets, device)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    args = guarded(parse_args, argv)
    check_flags(args)
    launch(args, work)


if __name__ == "__main__":
    main()
