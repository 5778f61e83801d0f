"""common/augment.py against torchvision, PIL and naive loops, image by image."""

import colorsys
import itertools
import math
import random
from functools import partial

import numpy as np
import pool
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from common import augment as A
from common.data import HALF

RECIPES = {"V2": A.V2, "strong": A.strong(A.V2), "weak": A.weak(A.V2), "BYOL1": A.BYOL1,
           "BYOL2": A.BYOL2, "SIMCLR": A.SIMCLR, "strong SIMCLR": A.strong(A.SIMCLR)}

pytestmark = pytest.mark.usefixtures("double")
close = partial(pool.close, rtol=0, atol=1e-9)


def images(n, size=24, seed=0):
    g = A.rng(seed, "test images")
    x = F.interpolate(torch.rand(n, 3, 4, 4, generator=g), size, mode="bicubic")  # smooth, noisy
    x = (x + 0.1 * torch.randn(n, 3, size, size, generator=g)).clamp(0, 1)
    x[-2] = 1.0 * (torch.rand(3, size, size, generator=g) < 0.5)  # primary colours
    x[-1] = x[-1, :1]  # grey
    return x


# ---- operations ----

def test_blur_equals_torchvision():
    sigma, pil = torch.tensor([0.1, 0.3, 0.7, 1.2, 2.0, 6.0]), torch.zeros(6, dtype=torch.bool)
    for size, kernel in ((64, 23), (10, 19)):  # 19 is the widest torchvision can reflect at 10 px
        x = images(6, size)
        for i, blurred in enumerate(A.blur(x.clone(), A.blur_kernels(sigma, pil, size))):
            close(blurred, TF.gaussian_blur(x[i], [kernel, kernel], [sigma[i].item()] * 2))


def test_blur_equals_pil():
    """Within 3 of 255, as PIL rounds six times; not at the borders, where it does not reflect."""
    sigma = torch.tensor([0.1, 0.2, 0.3, 0.45, 0.6, 0.9, 1.3, 1.7, 2.0])
    x = 1.0 * (torch.rand(9, 3, 32, 32, generator=A.rng(3)) < 0.5)  # steps everywhere
    kernels = A.blur_kernels(sigma, torch.ones(9, dtype=torch.bool), 32)
    close((kernels * torch.arange(-11, 12) ** 2).sum(1).sqrt(), sigma)  # PIL's aim: the deviation
    for i, blurred in enumerate(A.blur(x.clone(), kernels)):
        pixels = (x[i] * 255).byte().permute(1, 2, 0).numpy()
        want = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma[i].item()))
        want = torch.from_numpy(np.array(want)).permute(2, 0, 1)
        assert (255 * blurred - want).abs()[:, 6:-6, 6:-6].max() < 3


def by_name(x, name, m, sign):
    """RandAugment's operation of that name, and nothing else, on images (n, 3, s, s)."""
    p = {k: torch.zeros_like(v) for k, v in A.draw(A.V2, len(x), A.rng(0)).items()}
    p["on"][:, 1], p["op"][:, 1] = True, list(A.OPS).index(name)
    p["magnitude"][:, 1], p["sign"][:, 1] = m, sign
    return A.augment(x.clone(), p, torch.zeros(3), torch.ones(3))


def by_pil(name, pixels, m, sign):
    """timm's operation on an image, by PIL."""
    image = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    size, factor, pixels = image.size[0], 0.1 + 1.8 * m, np.array(image).astype(int)
    grey = {"fillcolor": (128, 128, 128)}

    def affine(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, **grey)

    out = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(-30 * m * sign, Image.BILINEAR, **grey),
        "Posterize": lambda: ImageOps.posterize(image, int(4 * m)),
        "Solarize": lambda: ImageOps.solarize(image, int(256 * m)),
        "SolarizeAdd": lambda: np.where(pixels < 128, pixels + int(110 * m), pixels).clip(0, 255),
        "Color": lambda: TF.adjust_saturation(image, factor),
        "Contrast": lambda: TF.adjust_contrast(image, factor),
        "Brightness": lambda: TF.adjust_brightness(image, factor),
        "Sharpness": lambda: TF.adjust_sharpness(image, factor),
        "ShearX": lambda: affine(1, 0.3 * m * sign, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, 0.3 * m * sign, 1, 0),
        "TranslateXRel": lambda: affine(1, 0, 0.45 * m * sign * size, 0, 1, 0),
        "TranslateYRel": lambda: affine(1, 0, 0, 0, 1, 0.45 * m * sign * size),
    }[name]()
    return torch.from_numpy(np.array(out)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("name", A.OPS)
def test_randaugment_equals_pil(name):
    """Within 2.5 of 255, as PIL rounds; not at borders, where it does not blend with the fill."""
    x = images(8, 32)
    x[:3] = 0.2 + 0.5 * x[:3]  # so that AutoContrast has something to do
    x = (x * 255).round() / 255
    m = torch.tensor([1, 1, 0.97, 0.91, 0.85, 0.93, 1, 0.9])
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1, -1, 1])
    out = by_name(x, name, m, sign)
    for i in range(8):
        setting = m[i].item(), sign[i].item()
        where = torch.ones(32, 32, dtype=torch.bool)
        if name.startswith(("Rotate", "Shear", "Translate")):
            inside = by_pil(name, torch.ones(3, 32, 32), *setting)[0] > 0.9
            near = F.max_pool2d(1.0 * torch.stack([inside, ~inside]), 5, 1, 2)
            where = near.sum(0) < 2  # not near both
            where[[0, -1]] = where[:, [0, -1]] = False
            assert (where & inside).sum() > 300 and (where & ~inside).any()
        assert ((out[i] - by_pil(name, x[i], *setting)).abs()[:, where] * 255).max() < 2.5
    changed = (out - x).abs().flatten(1).amax(1) > 0.02
    assert changed.sum() >= {"Solarize": 4, "Color": 6, "AutoContrast": 3}.get(name, 7)


@pytest.mark.parametrize("name", ["Equalize", "Posterize", "Solarize", "SolarizeAdd"])
def test_rounding_decides_no_level(name):
    """Level k is k / 255 on a CPU, and k times 1 / 255 on a GPU."""
    levels = torch.arange(256.0).view(1, 1, 16, 16).repeat(64, 3, 1, 1)
    m, sign = torch.linspace(0.75, 1, 64), torch.ones(64)
    close(*(by_name(x, name, m, sign) for x in (levels / 255, levels * (1 / 255))))


# ---- crops and ScaleMix ----

@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("shape, size", [((40, 56), 16), ((32, 32), 32), ((24, 20), 48)])
def test_crop_batch_equals_torchvision(shape, size, bicubic):
    x = (torch.rand(30, 3, *shape, generator=A.rng(1)) * 255).byte()
    boxes = A.crop_boxes(30, *shape, [[0.01, 1.0]] * 15 + [[0.9, 1.0]] * 15, A.rng(2))
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    for i, out in enumerate(A.crop_batch(x, boxes, size, bicubic)):
        want = TF.resized_crop(x[i] / 255, *boxes[i].tolist(), [size, size], mode, antialias=True)
        close(out, want.clamp(0, 1))


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize("shape", [(240, 320), (300, 170), (10, 200)])  # the last: none fits
def test_crop_boxes_law(shape, scale):
    n = 4000
    boxes = A.crop_boxes(n, *shape, scale, A.rng(0, "law"))
    torch.manual_seed(0)
    blank, ratio = torch.empty(1, *shape), (3 / 4, 4 / 3)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(n)])
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(shape)).all()
    for f in (lambda t, left, h, w: h * w, lambda t, left, h, w: (w / h).log(),
              lambda t, left, h, w: t + h / 2, lambda t, left, h, w: left + w / 2):
        ours, reference = f(*boxes.double().T), f(*theirs.double().T)  # area, ratio, place
        assert kolmogorov(ours, reference) < 2.2 * math.sqrt(2 / n)  # chance: once in 8000


def kolmogorov(a, b):
    """The largest difference between two samples' distribution functions."""
    at = torch.cat([a, b])
    below = [torch.searchsorted(x.sort()[0], at, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max()


def test_scalemix_law_and_pasting():
    n, size, r = 40000, 32, np.random.default_rng(0)
    boxes = A.scalemix_boxes(n, size, A.rng(0))
    side = (size * np.sqrt(1 - r.uniform(size=n))).astype(int)  # CutMix, as published
    cy, cx = r.integers(size, size=n), r.integers(size, size=n)
    edges = [(c + s * (side // 2)).clip(0, size) for c in (cy, cx) for s in (-1, 1)]
    naive = torch.tensor(np.stack(edges, 1))
    area = lambda b: (b[:, 1] - b[:, 0]) * (b[:, 3] - b[:, 2])
    for ours, reference in zip([*boxes.T, area(boxes)], [*naive.T, area(naive)], strict=True):
        assert kolmogorov(ours.double(), reference.double()) < 2.2 * math.sqrt(2 / n)

    first, second = images(50, size, 1), images(50, size, 2)
    want = first.clone()
    for i, (top, bottom, left, right) in enumerate(boxes[:50].tolist()):
        want[i, :, top:bottom, left:right] = second[i, :, top:bottom, left:right]
    assert torch.equal(A.scalemix(first, second, boxes[:50]), want)


# ---- draws ----

@pytest.mark.parametrize("name", RECIPES)
def test_draw_law(name):
    n, recipe = 20000, RECIPES[name]
    p = A.draw(recipe, n, A.rng(5, name))

    def near(sample, mean, std=None):
        std = math.sqrt(mean * (1 - mean)) if std is None else std
        assert abs(sample.double().mean() - mean) <= 4.5 * std / math.sqrt(len(sample))

    def uniform(sample, low, high):
        assert low <= sample.min() and sample.max() <= high
        share = (sample - low) / (high - low)
        near(share, 1 / 2, (1 / 12) ** 0.5)
        near(share**2, 1 / 3, (4 / 45) ** 0.5)

    for key in ("flip", "jitter", "grey", "blur", "solarize"):
        near(p[key], getattr(recipe, key))
    near(p["flip"] & p["grey"] & p["jitter"], recipe.flip * recipe.grey * recipe.jitter)
    for k, s in enumerate(recipe.strength):
        uniform(p["factors"][:, k] - int(k < 3), -s - 1e-9, s + 1e-9)
    uniform(p["sigma"], 0.1, 2)
    for order in itertools.permutations(range(4)):
        near((p["order"] == torch.tensor(order)).all(1), 1 / 24)
    for k in range(15):
        near(p["op"].flatten() == k, 1 / 15)
    near(p["on"].flatten(), 0.5 * recipe.randaugment)
    near(p["sign"].flatten() == 1, 0.5)
    below = 20 * (1 - p["magnitude"].flatten())  # half normal, where not 0
    near(below == 0, 0.5)
    near(below[below > 0], (2 / math.pi) ** 0.5, (1 - 2 / math.pi) ** 0.5)
    near(p["op"][:, 0] == p["op"][:, 1], 1 / 15)  # with replacement
    near(p["on"].all(1), 0.25 * recipe.randaugment)
    assert (p["pil_blur"] == recipe.pil_blur).all()


def test_rng_is_a_function_of_its_key():
    keys = [(), (0,), (1,), (11,), (1, 1), (1, 0), (0, 1), (1, "views"), (1, "views", 0),
            (1, "crops", 1, 0), (1, "crops", 1), (2**32,), (-1,), (2**32 + 1,)]
    first, again = ([A.rng(*key).initial_seed() for key in keys] for _ in range(2))
    assert first == again and len(set(first)) == len(keys)


# ---- recipes and views ----

def turn_hue(image, shift):
    """Pixel by pixel; torchvision's is exact to 1e-6 only."""
    h, s, v = np.vectorize(colorsys.rgb_to_hsv)(*image.numpy())
    turned = np.vectorize(colorsys.hsv_to_rgb)((h + shift) % 1, s, v)
    return torch.from_numpy(np.stack(turned))


def naive(x, p):
    """One image, one row of parameters, torchvision's functional operations."""
    if p["flip"]:
        x = TF.horizontal_flip(x)
    if p["jitter"]:
        for k in p["order"].tolist():
            op = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, turn_hue)[k]
            x = op(x, p["factors"][k].item())
    if p["grey"]:
        x = TF.rgb_to_grayscale(x, 3)
    if p["blur"]:
        kernels = A.blur_kernels(p["sigma"][None], p["pil_blur"][None], x.shape[2])  # tested above
        x = A.blur(x[None].clone(), kernels)[0]
    if p["solarize"]:
        x = TF.solarize(x, 0.5)
    for slot in range(2):
        if p["on"][slot]:  # each operation has a test of its own, above
            name = list(A.OPS)[p["op"][slot]]
            x = by_name(x[None], name, p["magnitude"][slot], p["sign"][slot])[0]
    return TF.normalize(x, *HALF)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_equals_naive_loop(name):
    n, stats = 64, torch.tensor(HALF)
    x, p = images(n), A.draw(RECIPES[name], n, A.rng(7, name))
    out = A.augment(x.clone(), p, *stats)
    for i in range(n):
        close(out[i], naive(x[i], {k: v[i] for k, v in p.items()}))

    p = {k: v.float() if v.is_floating_point() else v for k, v in p.items()}
    single = A.augment(x.float(), p, *stats.float())
    wrong = ((single - out).abs() > 1e-3).double().mean()  # where rounding crosses a threshold
    assert single.dtype == torch.float32 and wrong < 0.01


def test_views_are_arranged_as_planned_and_do_not_depend_on_processes():
    state = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    before, n = state(), 8
    large, mixed, small = A.View(A.V2, 16), A.View(A.strong(A.BYOL1), 16, True), A.View(A.V2, 8)
    plan = [[[large, large], [small]], [[mixed]]]
    needed = A.crops_of(plan)
    assert needed == [large, large, small, mixed, mixed]
    crops = [images(n, view.size, seed) for seed, view in enumerate(needed)]

    generator, want = A.rng(1), []
    for view, x in zip(needed, crops, strict=True):
        if len(want) == 4:
            boxes = A.scalemix_boxes(n, 16, generator)
        params = A.draw(view.recipe, n, generator)
        want.append(A.augment(x.clone(), params, *torch.tensor(HALF)))
    want[3:] = [A.scalemix(want[3], want[4], boxes)]
    for rank, world in ((0, 1), (0, 2), (3, 4)):
        part = slice(rank, None, world)
        src, tgt = A.make_views(plan, [x[part] for x in crops], n, A.rng(1), HALF, part)
        assert [len(bag) for bag in src + tgt] == [2, 1, 1]
        for got, x in zip(sum(src + tgt, []), want, strict=True):
            close(got, x[part])
    assert state() == before  # global generators are left alone
