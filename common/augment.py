"""Augmentations, on batches: what an image goes through between the crop and the network.

Images are a float tensor (n, 3, h, w) in [0, 1]. Operations take one parameter per image, drawn on
the CPU for the *global* batch by a generator that depends on seed and step alone; a process uses
its slice. So a run does not depend on the number of processes; resuming needs no random state.

    recipe = strong(V2)                          # what may happen, with which probability
    params = draw(recipe, 256, rng(seed, step))  # what happens to each image of the global batch
    augment(x, {k: v[rank::world] for k, v in params.items()}, mean, std)  # in place

Order: flip, jitter (its parts in an order of the image's own), grey, blur, solarize, RandAugment,
normalize. The papers' codes flip first or last; it commutes with all but RandAugment, which the
paper's code has last. Each operation equals torchvision's functional form (tests/test_augment.py
gives the tolerances). What the papers' codes do otherwise: docs/designs.md, choices 11 to 14.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF


def rng(*key):
    """A CPU generator that is a function of the key alone, integers and strings: (seed, step)."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch uses 32 bits

# ---- recipes ----

@dataclass(frozen=True)
class Recipe:
    """One encoder's augmentation: probabilities per image."""

    scale: tuple = (0.2, 1.0)  # the crop's share of the image's area
    bicubic: bool = False  # the crop's interpolation; bilinear otherwise
    flip: float = 0.5
    jitter: float = 0.8
    strength: tuple = (0.4, 0.4, 0.4, 0.1)  # of the jitter: brightness, contrast, saturation, hue
    grey: float = 0.2
    blur: float = 0.5  # sigma uniform in [0.1, 2] pixels
    pil_blur: bool = False  # PIL's three box blurs, not a Gaussian's samples
    solarize: float = 0.0  # inverts what is above 0.5
    randaugment: bool = False
    normalize: bool = True  # SimCLR's images stay in [0, 1]; such a run has mean 0 and std 1


V2 = Recipe(pil_blur=True)  # MoCo v2, SimSiam: both views
BYOL1 = Recipe(scale=(0.08, 1.0), bicubic=True, strength=(0.4, 0.4, 0.2, 0.1), blur=1.0)
BYOL2 = replace(BYOL1, blur=0.1, solarize=0.2)  # BYOL, Barlow Twins: views 1 and 2
SIMCLR = Recipe(scale=(0.08, 1.0), bicubic=True, strength=(0.8, 0.8, 0.8, 0.2), normalize=False)


def strong(recipe):
    """StrongerAug (Sec. 4.3): then RandAugment, timm's rand-m10-n2-mstd0.5 as in the paper."""
    return replace(recipe, randaugment=True)


def weak(recipe):
    """WeakerAug (Sec. 4.3): crop and flip alone; the scale is that of the paper's code."""
    return replace(recipe, scale=(0.08, 1.0), jitter=0.0, grey=0.0, blur=0.0, solarize=0.0,
                   randaugment=False)


def draw(recipe, n, generator):
    """Parameters for n images, CPU tensors with n rows; as many draws for any recipe."""
    u = torch.rand(n, 10, generator=generator)
    jitter = torch.tensor(recipe.strength) * (2 * torch.rand(n, 4, generator=generator) - 1)

    return {
        "flip": u[:, 0] < recipe.flip,
        "jitter": u[:, 1] < recipe.jitter,
        "factors": torch.cat([(1 + jitter[:, :3]).clamp_min(0), jitter[:, 3:]], 1),  # hue: shift
        "order": torch.rand(n, 4, generator=generator).argsort(1),
        "grey": u[:, 2] < recipe.grey,
        "blur": u[:, 3] < recipe.blur,
        "sigma": 0.1 + 1.9 * u[:, 4],
        "pil_blur": torch.full((n,), recipe.pil_blur),
        "solarize": u[:, 5] < recipe.solarize,
        # RandAugment: two operations, with replacement, each applied half the time
        "op": torch.randint(len(OPS), (n, 2), generator=generator),
        "on": (u[:, 6:8] < 0.5) & recipe.randaugment,
        "magnitude": (1 + 0.05 * torch.randn(n, 2, generator=generator)).clamp(0, 1),
        "sign": (u[:, 8:10] < 0.5) * 2.0 - 1,
    }


def augment(x, params, mean, std):
    """Does to images (n, 3, s, s) in [0, 1], in place, what n rows of draw()'s parameters say. A
    GPU takes all at once, a CPU what its cache holds. mean, std: (3,)."""
    todo = list(operations(params, x.shape[3]))
    some = len(x) if x.device.type != "cpu" else max(1, 2**20 // x[0].numel())
    for i in range(0, len(x), some):
        for op, mask, *settings in todo:
            rows = mask[i : i + some].nonzero().squeeze(1) + i  # on the CPU: no GPU waits
            if len(rows):
                there = rows.to(x.device, non_blocking=True)
                settings = [s[rows].to(x, non_blocking=True) for s in settings]
                x.index_copy_(0, there, op(x.index_select(0, there), *settings))

    mean, std = (s.to(x, non_blocking=True).view(3, 1, 1) for s in (mean, std))
    return x.sub_(mean).div_(std)


def operations(p, size):
    """In their order: an operation, the images (n,) that it is for, and its settings (n, ...)."""
    yield lambda x: x.flip(3), p["flip"]

    # The jitter's parts stand in four slots. Hue, the dearest, comes once, for all images: before
    # it the slots that precede an image's hue, then the others.
    order, hue_slot = p["order"], (p["order"] == 3).int().argmax(1)
    settings = torch.stack([p["factors"].gather(1, order), order == 1, order == 2], 2)
    for slot in range(3):
        yield adjust, p["jitter"] & (slot < hue_slot), settings[:, slot]
    yield hue, p["jitter"], p["factors"][:, 3]
    for slot in range(1, 4):
        yield adjust, p["jitter"] & (slot > hue_slot), settings[:, slot]

    yield lambda x: TF.rgb_to_grayscale(x, 3), p["grey"]
    if p["blur"].any():
        yield blur, p["blur"], blur_kernels(p["sigma"], p["pil_blur"], size)
    yield lambda x: TF.solarize(x, 0.5), p["solarize"]

    for slot in range(2 if p["on"].any() else 0):
        m, found = p["magnitude"][:, slot], {}
        for k, (op, settings) in enumerate(OPS.values()):
            mask = p["on"][:, slot] & (p["op"][:, slot] == k)
            values = map(torch.as_tensor, settings(m, m * p["sign"][:, slot]))
            new = torch.stack(torch.broadcast_tensors(*values), 1)
            others, old = found.get(op, (mask, new))  # some have one function
            found[op] = others | mask, torch.where(mask[:, None], new, old)
        yield from ((op, mask, settings[..., None, None]) for op, (mask, settings) in found.items())

# ---- photometric operations: images (n, 3, h, w) in [0, 1], which they may overwrite ----

def blend(x, other, factor):
    """factor x + (1 - factor) other, in [0, 1]."""
    return x.sub_(other).mul_(factor).add_(other).clamp_(0, 1)


def adjust(x, settings):
    """Brightness, contrast or saturation: blends with black, the mean grey or the grey image.
    settings (n, 3): the factor, and the shares of the latter two."""
    factor, mean, own = settings.view(-1, 3, 1, 1, 1).unbind(1)
    grey = TF.rgb_to_grayscale(x)
    return blend(x, own * grey + mean * grey.mean((1, 2, 3), keepdim=True), factor)


def hue(x, shift):
    """Turns the hue by shift in [-0.5, 0.5] of the colour circle."""
    r, g, b = x.unbind(1)
    top, low = x.amax(1), x.amin(1)
    c = torch.where(top > low, top - low, 1)

    red_or_green = torch.where(top == g, 2 + (b - r) / c, 4 + (r - g) / c)
    sixth = torch.where(top == r, (g - b) / c, red_or_green)
    h = (sixth + 6 * shift.view(-1, 1, 1)) % 6  # red at 0, green at 2, blue at 4
    share = torch.stack([(h - 3).abs() - 1, 2 - (h - 2).abs(), 2 - (h - 4).abs()], 1).clamp_(0, 1)
    return share.mul_((top - low)[:, None]).add_(low[:, None])


def blur_kernels(sigma, pil, size, radius=11):
    """Kernels (n, taps) of standard deviation sigma (n,), in pixels, for images of this size. pil
    (n,): of three boxes, whose deviation is sigma below 0.5 too; else a Gaussian's samples."""
    reach = min(radius, size - 1)  # no longer than reflection allows
    taps, sigma = torch.arange(-reach, reach + 1), sigma[:, None]
    # a box of variance v: 2 l + 1 ones, and at both ends what v asks for (Gwosdek et al. 2011)
    v = sigma**2 / 3
    l = (((12 * v + 1).sqrt() - 1) / 2).floor()
    end = (2 * l + 1) * (3 * v - l * (l + 1)) / (6 * ((l + 1) ** 2 - v))
    box = (l + end + 1 - taps.abs()).clamp(0, 1)
    twice = F.conv1d(box[None], box[:, None], padding=reach, groups=len(box))
    boxes = F.conv1d(twice, box[:, None], padding=reach, groups=len(box))[0]
    kernels = torch.where(pil[:, None], boxes, (-0.5 * (taps / sigma) ** 2).exp())
    return kernels / kernels.sum(1, keepdim=True)


def blur(x, kernels):
    """Columns, then rows, by each image's own kernel (n, taps), with reflected borders."""
    n, c, h, w = x.shape
    reach = kernels.shape[1] // 2
    kernels = kernels.repeat_interleave(c, 0)[:, None]  # (n c, 1, taps): groups
    x = F.pad(x, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    x = F.conv2d(x, kernels[..., None], groups=n * c)
    return F.conv2d(x, kernels[:, :, None], groups=n * c).view(n, c, h, w)

# ---- RandAugment's fifteen operations ----

def affine(x, matrix, fill=128 / 255):
    """Samples x at (an image's 2 x 3 matrix) (x, y, 1), coordinates in [-1, 1]; fill outside."""
    grid = F.affine_grid(matrix.view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x - fill, grid, align_corners=False) + fill


def sharpen(x, factor):
    """Blends with PIL's SMOOTH: means of 3 x 3 pixels, five times the middle; not at the border."""
    kernel = x.new_full((3, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1] = 5 / 13
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] += F.conv2d(x, kernel, groups=3) - x[:, :, 1:-1, 1:-1]
    return blend(x, smooth.clamp_(0, 1), factor)


OPS = {  # the function, and its settings at magnitude m and s = m times sign, both (n,)
    "AutoContrast": (lambda x, m: TF.autocontrast(x), lambda m, s: [m]),
    "Equalize": (lambda x, m: TF.equalize((x * 255).round().byte()).to(x.dtype) / 255,
                 lambda m, s: [m]),
    "Invert": (lambda x, m: 1 - x, lambda m, s: [m]),
    "Rotate": (affine, lambda m, s: [(a := math.radians(30) * s).cos(), a.sin(), 0,
                                     -a.sin(), a.cos(), 0]),
    "Posterize": (lambda x, step: (x * 255).round().div(step).floor() * step / 255,
                  lambda m, s: [2.0 ** (8 - (4 * m).floor())]),  # keeps 4 bits at m = 1, else 3
    "Solarize": (lambda x, low: torch.where(x * 255 >= low, 1 - x, x),
                 lambda m, s: [(256 * m).floor() - 0.5]),  # between two levels; none at m = 1
    "SolarizeAdd": (lambda x, more: torch.where(x * 255 < 127.5, (x + more).clamp_max(1), x),
                    lambda m, s: [(110 * m).floor() / 255]),
    "Color": (adjust, lambda m, s: [0.1 + 1.8 * m, 0, 1]),
    "Contrast": (adjust, lambda m, s: [0.1 + 1.8 * m, 1, 0]),
    "Brightness": (adjust, lambda m, s: [0.1 + 1.8 * m, 0, 0]),
    "Sharpness": (sharpen, lambda m, s: [0.1 + 1.8 * m]),
    "ShearX": (affine, lambda m, s: [1, 0.3 * s, 0.3 * s, 0, 1, 0]),  # about the upper left corner,
    "ShearY": (affine, lambda m, s: [1, 0, 0, 0.3 * s, 1, 0.3 * s]),  # as PIL's
    "TranslateXRel": (affine, lambda m, s: [1, 0, 0.9 * s, 0, 1, 0]),  # to 0.45 of the image
    "TranslateYRel": (affine, lambda m, s: [1, 0, 0, 0, 1, 0.9 * s]),
}

# ---- crops and ScaleMix ----

def crop_boxes(n, height, width, scale, generator):
    """RandomResizedCrop's law: boxes (n, 4) of top, left, height, width in pixels. Share of the
    area uniform in scale (two numbers, or a row of two for each box), ratio log-uniform in
    [3/4, 4/3], ten tries, then the largest central box of an allowed ratio."""
    u = torch.rand(n, 22, generator=generator)
    image = torch.tensor([[height], [width]])

    scale = torch.tensor(scale, dtype=torch.double).view(-1, 2)
    low, range_ = scale[:, :1], scale.diff(dim=1)  # 1 - 0.2 in float is not the nearest to 0.8
    area = height * width * (low.to(u) + range_.to(u) * u[:, :10])
    ratio = ((2 * u[:, 10:20] - 1) * math.log(4 / 3)).exp()
    tries = torch.stack([area / ratio, area * ratio]).sqrt().round().long()  # (2, n, 10)
    fits = ((tries > 0) & (tries <= image[:, None])).all(0)
    first = tries[:, torch.arange(n), fits.int().argmax(1)]

    tall, wide = round(width * 4 / 3), round(height * 4 / 3)
    central = torch.tensor([[min(height, tall)], [min(width, wide)]])
    none = ~fits.any(1)
    size = torch.where(none, central, first)  # (2, n): heights, widths
    room = image - size
    corner = torch.where(none, room // 2, (u[:, 20:].T * (room + 1)).long())
    return torch.cat([corner, size]).T


def crop_batch(images, boxes, size, bicubic=False):
    """Crops uint8 images (n, 3, H, W) to boxes (n, 4), resizes with antialiasing: float
    (n, 3, size, size) in [0, 1]. Resizing is linear in rows and in columns, so a batch of crops is
    two products with matrices."""

    def matrix(length, start, extent):  # (n, size, length): weights of pixels in the crop's pixels
        pixel = torch.arange(length, device=images.device) + 0.5 - start
        centre = torch.arange(size, device=images.device).view(-1, 1) + 0.5
        d = ((pixel - centre * extent / size) / (extent / size).clamp_min(1)).abs()
        if bicubic:  # the cubic kernel with a = -0.5
            near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
            w = torch.where(d < 1, near, far) * (d < 2)
        else:
            w = (1 - d).clamp_min(0)
        w = w * ((pixel > 0) & (pixel < extent))
        return w / w.sum(2, keepdim=True)

    boxes = boxes.to(images.device, non_blocking=True)
    top, left, height, width = boxes.view(-1, 4, 1, 1).unbind(1)
    rows, cols = matrix(images.shape[2], top, height), matrix(images.shape[3], left, width)
    x = images.to(torch.get_default_dtype()).flatten(1, 2)
    x = (x @ cols.transpose(1, 2)).div_(255).unflatten(1, (3, -1))  # columns first
    return (rows[:, None] @ x).clamp_(0, 1)


def scalemix_boxes(n, size, generator):
    """CutMix's law (Sec. 4.2): boxes (n, 4) of top, bottom, left, right. Sides size sqrt(1 - u), u
    and the centre uniform, cut at the border, which leaves 0.32 of the area on average."""
    half = (size * (1 - torch.rand(n, generator=generator)).sqrt()).long() // 2
    y, x = torch.randint(size, (2, n), generator=generator)
    return torch.stack([y - half, y + half, x - half, x + half], 1).clamp(0, size)


def scalemix(first, second, boxes):
    """ScaleMix (Sec. 4.2) of views (n, 3, s, s): second inside the boxes (n, 4), else first."""
    boxes = boxes.to(first.device, non_blocking=True).view(-1, 4, 1, 1)
    top, bottom, left, right = boxes.unbind(1)
    y = torch.arange(first.shape[2], device=first.device).view(1, -1, 1)
    x = torch.arange(first.shape[3], device=first.device).view(1, 1, -1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return torch.where(inside[:, None], second, first)

# ---- views: what an encoder sees of an image ----

@dataclass(frozen=True)
class View:
    """A random crop by a recipe, resized to size x size pixels; mix: ScaleMix of two of them."""

    recipe: Recipe
    size: int
    mix: bool = False


def crops_of(plan):
    """The crops that a plan needs, in order: a View for each, two for a ScaleMix view. A plan has
    two sides (source, target), a side is a list of bags, a bag a list of Views."""
    crops = []
    for view in sum(sum(plan, []), []):
        crops += [view, view] if view.mix else [view]
    return crops


def make_views(plan, crops, total, generator, stats, part):
    """Crops (n, 3, s, s), those of crops_of(plan), as views arranged as in the plan. They are the
    slice part of a global batch of total images. stats: the data's mean and std."""
    boxes, draws, views = [], {}, {}
    for view in sum(sum(plan, []), []):
        draws.setdefault(view.size, []).append(draw(view.recipe, total, generator))
        if view.mix:
            boxes.append(scalemix_boxes(total, view.size, generator)[part])
            draws[view.size].append(draw(view.recipe, total, generator))

    for size, several in draws.items():  # in one batch: a GPU starts each operation once
        x = torch.cat([x for x in crops if x.shape[3] == size])
        params = {k: torch.cat([p[k][part] for p in several]) for k in several[0]}
        views[size] = iter(augment(x, params, *map(torch.tensor, stats)).chunk(len(several)))

    def take(view):
        x = next(views[view.size])
        return scalemix(x, next(views[view.size]), boxes.pop(0)) if view.mix else x

    return [[[take(view) for view in bag] for bag in bags] for bags in plan]
