"""common/augment.py against torchvision, PIL and naive loops, image by image."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from common import augment as A
from common.data import HALF

RECIPES = {"V2": A.V2, "strong": A.strong(A.V2), "weak": A.weak(A.V2), "BYOL1": A.BYOL1, "BYOL2": A.BYOL2,
           "SIMCLR": A.SIMCLR, "strong SIMCLR": A.strong(A.SIMCLR)}
MEAN, STD = torch.tensor(HALF)


def images(n, size=24, seed=0):
    g = A.rng(seed, "test images")
    x = F.interpolate(torch.rand(n, 3, 4, 4, generator=g), size, mode="bicubic")  # smooth, with noise
    x = (x + 0.1 * torch.randn(n, 3, size, size, generator=g)).clamp(0, 1)
    x[-2] = (torch.rand(3, size, size, generator=g) < 0.5).float()  # primary colours
    x[-1] = x[-1, :1]  # grey
    return x


def to_pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

# ---- operations ----

by_factor = lambda name: lambda x, factor: A.OPS[name](x, (factor - 0.1) / 1.8, None)


@pytest.mark.parametrize("ours, theirs, low, high", [
    (A.brightness, TF.adjust_brightness, 0.0, 1.9), (by_factor("Brightness"), TF.adjust_brightness, 0.1, 1.9),
    (A.contrast, TF.adjust_contrast, 0.0, 1.9), (by_factor("Contrast"), TF.adjust_contrast, 0.1, 1.9),
    (A.saturation, TF.adjust_saturation, 0.0, 1.9), (by_factor("Color"), TF.adjust_saturation, 0.1, 1.9),
    (A.hue, TF.adjust_hue, -0.5, 0.5), (by_factor("Sharpness"), TF.adjust_sharpness, 0.1, 1.9),
])
def test_operations_equal_torchvision(ours, theirs, low, high):
    x, p = images(9), torch.linspace(low, high, 9)[[5, 0, 7, 2, 8, 4, 1, 3, 6]]
    for i, out in enumerate(ours(x, p)):
        torch.testing.assert_close(out, theirs(x[i], p[i].item()), atol=2e-5, rtol=0)
    assert not torch.allclose(ours(x, p)[:7], ours(x, p.flip(0))[:7], atol=1e-2)  # the parameter matters


def test_hue_by_colorsys():
    import colorsys
    levels = torch.tensor([0.0, 0.25, 1.0])
    x = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 3, 9)  # primaries, greys, black, white
    for shift in (-0.5, -0.2, 0.0, 1 / 3, 0.5):
        out = A.hue(x, torch.tensor([shift]))[0].reshape(3, -1).T
        for before, after in zip(x[0].reshape(3, -1).T.tolist(), out.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb((h + shift) % 1, s, v), abs=1e-5)


def test_blur_equals_torchvision():
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.2, 2.0, 6.0])
    for size, kernel in ((64, 23), (10, 19)):  # 19 is the widest torchvision can reflect at 10 px
        x = images(6, size)
        for i, blurred in enumerate(A.gaussian_blur(x, sigma)):
            want = TF.gaussian_blur(x[i], [kernel, kernel], [sigma[i].item()] * 2)
            torch.testing.assert_close(blurred, want, atol=1e-5, rtol=0)


def by_pil(name, image, m, sign):
    """timm's operation on a PIL image."""
    size, factor, pixels = image.size[0], 0.1 + 1.8 * m, np.array(image).astype(int)

    def affine(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=(128, 128, 128))

    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(-30 * m * sign, Image.BILINEAR, fillcolor=(128, 128, 128)),
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


@pytest.mark.parametrize("name", A.OPS)
def test_randaugment_equals_pil(name):
    """Within 2.5 of 255, as PIL rounds in between; borders, where PIL does not blend with the fill, apart."""
    x = images(8, 32)
    x[:3] = 0.2 + 0.5 * x[:3]  # so that AutoContrast has something to do
    x = (x * 255).round() / 255
    m, sign = torch.tensor([[1, 1, 0.97, 0.91, 0.85, 0.93, 1, 0.9], [1, -1, 1, -1, 1, -1, -1, 1]])
    out = A.OPS[name](x, m, sign)
    for i in range(8):
        setting = m[i].item(), sign[i].item()
        want = from_pil(by_pil(name, to_pil(x[i]), *setting))
        where = torch.ones(32, 32, dtype=torch.bool)
        if name.startswith(("Rotate", "Shear", "Translate")):
            inside = from_pil(by_pil(name, to_pil(torch.ones(3, 32, 32)), *setting))[0] > 0.9
            near = F.max_pool2d(torch.stack([inside, ~inside]).float(), 5, 1, 2)
            where = near.sum(0) < 2  # not near both
            where[[0, -1]] = where[:, [0, -1]] = False
            assert (where & inside).float().mean() > 0.3 and (where & ~inside).any()
        assert ((out[i] - want).abs()[:, where] * 255).max() < 2.5
    changed = (out - x).abs().flatten(1).amax(1) > 0.02
    assert changed.sum() >= {"Solarize": 4, "Color": 6, "AutoContrast": 3}.get(name, 7)

# ---- crops and ScaleMix ----

@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("shape, size", [((40, 56), 16), ((32, 32), 32), ((24, 20), 48)])
def test_crop_batch_equals_torchvision(shape, size, bicubic):
    x = (torch.rand(30, 3, *shape, generator=A.rng(1)) * 255).byte()
    boxes = torch.cat([A.crop_boxes(15, *shape, scale, A.rng(2)) for scale in ((0.01, 1.0), (0.9, 1.0))])
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    for i, out in enumerate(A.crop_batch(x, boxes, size, bicubic)):
        want = TF.resized_crop(x[i] / 255, *boxes[i].tolist(), [size, size], mode, antialias=True).clamp(0, 1)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize("shape", [(240, 320), (300, 170)])
def test_crop_boxes_law(shape, scale):
    n = 4000
    boxes = A.crop_boxes(n, *shape, scale, A.rng(0, "law"))
    torch.manual_seed(0)
    blank = torch.empty(1, *shape)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, scale, (3 / 4, 4 / 3)) for _ in range(n)])
    for b in (boxes, theirs):
        assert (b >= 0).all() and (b[:, :2] + b[:, 2:] <= torch.tensor(shape)).all()
    for f in (lambda t, left, h, w: h * w, lambda t, left, h, w: (w / h).log(),
              lambda t, left, h, w: t + h / 2, lambda t, left, h, w: left + w / 2):  # area, ratio, place
        ours, reference = f(*boxes.double().T), f(*theirs.double().T)
        assert kolmogorov(ours, reference) < 2.2 * math.sqrt(2 / n)  # chance exceeds it once in 8000
        assert abs(ours.mean() - reference.mean()) < 4.5 * reference.std() * math.sqrt(2 / n)


def kolmogorov(a, b):
    """The largest difference between two samples' distribution functions."""
    at = torch.cat([a, b])
    return (torch.searchsorted(a.sort()[0], at, right=True) / len(a)
            - torch.searchsorted(b.sort()[0], at, right=True) / len(b)).abs().max()


def test_crop_boxes_fall_back_on_elongated_images():
    for h, w, box in ((10, 200, [0, 93, 10, 13]), (200, 10, [93, 0, 13, 10])):
        boxes = A.crop_boxes(500, h, w, (0.2, 1.0), A.rng(0))  # no such share of the area is narrow enough
        want = RandomResizedCrop.get_params(torch.empty(1, h, w), (0.2, 1.0), (3 / 4, 4 / 3))
        assert (boxes == torch.tensor(want)).all() and list(want) == box
    boxes = A.crop_boxes(500, 10, 200, (0.01, 0.1), A.rng(0))  # now some are, and lie anywhere
    share = (boxes != torch.tensor([0, 93, 10, 13])).any(1).float().mean()
    assert share > 0.8 and boxes[:, 1].float().std() > 40


def test_scalemix_pastes_boxes():
    first, second = images(50, 17, 1), images(50, 17, 2)
    assert torch.equal(A.scalemix(first, second, torch.zeros(50, 4, dtype=torch.long)), first)
    assert torch.equal(A.scalemix(first, second, torch.tensor([[0, 17, 0, 17]]).expand(50, 4)), second)
    boxes = A.scalemix_boxes(50, 17, A.rng(3))
    want = first.clone()
    for i, (top, bottom, left, right) in enumerate(boxes.tolist()):
        want[i, :, top:bottom, left:right] = second[i, :, top:bottom, left:right]
    assert torch.equal(A.scalemix(first, second, boxes), want)
    assert not torch.equal(boxes[:, :2], boxes[:, 2:]) and len(boxes.unique(dim=0)) > 40


@pytest.mark.parametrize("size, mean", [(224, 0.318), (32, 0.299)])
def test_scalemix_law(size, mean):
    n, r = 40000, np.random.default_rng(0)
    top, bottom, left, right = boxes = A.scalemix_boxes(n, size, A.rng(0)).T
    share = (bottom - top) * (right - left) / size**2
    assert abs(share.mean() - mean) < 4 * share.std() / math.sqrt(n) + 5e-4  # the figure has three digits
    side = (size * np.sqrt(1 - r.uniform(size=n))).astype(int)  # CutMix, as published
    cy, cx = r.integers(size, size=n), r.integers(size, size=n)
    naive = np.stack([(c + s * (side // 2)).clip(0, size) for c in (cy, cx) for s in (-1, 1)], 1)
    for ours, reference in [*zip(boxes, naive.T, strict=True), (bottom - top, naive[:, 1] - naive[:, 0])]:
        assert kolmogorov(ours.double(), torch.tensor(reference).double()) < 2.2 * math.sqrt(2 / n)

# ---- draws ----

@pytest.mark.parametrize("name", RECIPES)
def test_draw_law(name):
    n, recipe = 20000, RECIPES[name]
    p = A.draw(recipe, n, A.rng(5, name))

    def close(sample, mean, std=None):
        std = math.sqrt(mean * (1 - mean)) if std is None else std
        assert abs(sample.double().mean() - mean) <= 4.5 * std / math.sqrt(len(sample))

    for key in ("flip", "jitter", "grey", "blur", "solarize"):
        close(p[key], getattr(recipe, key))
    for k, s in enumerate(recipe.strength):  # uniform: mean and second moment
        d = (p["factors"][:, k] - int(k < 3)).double() / s
        assert d.abs().max() <= 1 + 1e-5
        close(d, 0, 3**-0.5)
        close(d**2, 1 / 3, (4 / 45) ** 0.5)
    assert p["sigma"].min() >= 0.1 and p["sigma"].max() <= 2
    close(p["sigma"], 1.05, 1.9 / 12**0.5)
    for permutation in torch.cartesian_prod(*[torch.arange(4)] * 4):
        if len(set(permutation.tolist())) == 4:
            close((p["order"] == permutation).all(1), 1 / 24)
    for slot in range(2):
        for k in range(15):
            close(p["op"][:, slot] == k, 1 / 15)
        close(p["on"][:, slot], 0.5)
        close(p["sign"][:, slot] == 1, 0.5)
        close(p["magnitude"][:, slot] == 1, 0.5)
        below = 20 * (1 - p["magnitude"][:, slot])  # half normal, where not 0
        close(below[below > 0], (2 / math.pi) ** 0.5, (1 - 2 / math.pi) ** 0.5)
    close(p["op"][:, 0] == p["op"][:, 1], 1 / 15)  # with replacement
    close(p["on"].all(1), 0.25)
    close(p["flip"] & p["grey"] & p["jitter"], recipe.flip * recipe.grey * recipe.jitter)
    assert all(torch.equal(p[k], v) for k, v in A.draw(recipe, n, A.rng(5, name)).items())


def test_rng_is_a_function_of_its_key():
    keys = [(), (0,), (1,), (1, 0), (0, 1), (0, 0), (1, "views"), (1, "views", 0), (1, "views", 1),
            (1, "crops"), (1, "crops", 1, 0), (1, "crops", 1), (11,), (1, 1), (2**32,), (-1,), (2**32 + 1,)]
    draws = [torch.rand(4, generator=A.rng(*key)).tolist() for key in keys]
    assert draws == [torch.rand(4, generator=A.rng(*key)).tolist() for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)


def test_global_generators_are_left_alone():
    state = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    before = state()
    x, recipe = images(16), A.strong(A.SIMCLR)
    A.augment(x, recipe, A.draw(recipe, 16, A.rng(1)), MEAN, STD)
    A.crop_batch((x * 255).byte(), A.crop_boxes(16, 24, 24, (0.2, 1), A.rng(1)), 16)
    A.scalemix(x, x, A.scalemix_boxes(16, 24, A.rng(1)))
    assert state() == before

# ---- recipes ----

def naive(x, recipe, p):
    """One image, one row of parameters, torchvision's functional operations."""
    if p["flip"]:
        x = TF.horizontal_flip(x)
    if p["jitter"]:
        for k in p["order"].tolist():
            op = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[k]
            x = op(x, p["factors"][k].item())
    if p["grey"]:
        x = TF.rgb_to_grayscale(x, 3)
    if p["blur"]:
        x = TF.gaussian_blur(x, [23, 23], [p["sigma"].item()] * 2)
    if p["solarize"]:
        x = TF.solarize(x, 0.5)
    for slot in range(2 if recipe.randaugment else 0):
        if p["on"][slot]:  # each operation has a test of its own, above
            op = list(A.OPS.values())[p["op"][slot]]
            x = op(x[None], p["magnitude"][slot : slot + 1], p["sign"][slot : slot + 1])[0]
    return TF.normalize(x, *HALF) if recipe.normalize else x


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_equals_naive_loop_and_slices_equal_the_whole(name):
    recipe, n = RECIPES[name], 64
    x, p = images(n), A.draw(RECIPES[name], n, A.rng(7, name))
    out = A.augment(x, recipe, p, MEAN, STD)
    assert torch.equal(x, images(n))  # not changed in place
    for i in range(n):
        want = naive(x[i], recipe, {k: v[i] for k, v in p.items()})
        close = ((out[i] - want).abs() < 1e-3).float().mean()
        assert close > (0.97 if recipe.solarize or recipe.randaugment else 0.9999), i  # noise at thresholds
    for world in (1, 2, 4):
        for rank in range(world):
            mine = {k: v[rank::world] for k, v in p.items()}
            part = A.augment(x[rank::world], recipe, mine, MEAN, STD)
            torch.testing.assert_close(part, out[rank::world], atol=1e-5, rtol=0)


def test_weak_only_flips_and_simclr_is_not_normalised():
    x, recipe = images(64), A.weak(A.BYOL2)
    p = A.draw(recipe, 64, A.rng(1))
    out = A.augment(x, recipe, p, MEAN, STD) * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)
    torch.testing.assert_close(out, torch.where(p["flip"].view(-1, 1, 1, 1), x.flip(3), x), atol=1e-6, rtol=0)
    assert recipe.scale == (0.08, 1.0) and recipe.bicubic and A.weak(A.V2).scale == (0.08, 1.0)
    papers = A.V2, A.BYOL1, A.BYOL2, A.SIMCLR
    assert [(*r.scale, *r.strength, r.jitter, r.grey, r.blur, r.solarize) for r in papers] == [
        (0.2, 1, 0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5, 0), (0.08, 1, 0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 1, 0),
        (0.08, 1, 0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.1, 0.2), (0.08, 1, 0.8, 0.8, 0.8, 0.2, 0.8, 0.2, 0.5, 0)]
    assert A.augment(x, A.SIMCLR, A.draw(A.SIMCLR, 64, A.rng(1)), MEAN, STD).aminmax() == (0, 1)
