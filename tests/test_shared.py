"""The blocks that all scripts share: batch norm, networks, views, the order of images, kNN and variances."""

import importlib
import math
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from pool import ROOT, SCRIPTS, build, close, small_args, small_images, tensors, views_of
from torch import nn
from torch.overrides import TorchFunctionMode

from common import augment, data
from common.augment import rng

KINDS = {"base": lambda r: r, "weak": augment.weak, "strong": augment.strong}


@pytest.fixture
def script(request):
    """MoCo v2, which stands for all where nothing but shared blocks is tested: they are byte-identical."""
    return importlib.import_module(getattr(request, "param", "mocov2_asym"))


each = pytest.mark.parametrize("script", SCRIPTS, indirect=True)


class Copies(TorchFunctionMode):
    """Where tensors are copied from the CPU in a way that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to and any(isinstance(a, torch.device | torch.Tensor) for a in args[1:]) and not kwargs.get("non_blocking"):
            self.waits += [x for x in traceback.extract_stack() if Path(x.filename).parent in (ROOT, ROOT / "common")][-1:]
        return function(*args, **kwargs)


@pytest.mark.parametrize("flags", ["", "--multicrop-src --num-small 2 --scalemix-src --aug-src strong --mean-enc 2"])
def test_no_copy_of_a_step_waits_for_the_device(script, flags):
    """Which a GPU's queue would run dry by. On the CPU all copies are none; where there is a GPU, bench_step.py counts waits."""
    args = small_args(script, flags)
    model = build(script, args)
    with Copies() as copies:
        src, tgt, generator = views_of(script, args)
        model(src, tgt, 0.9, generator)[0].backward()
    assert not copies.waits


# ---- batch norm ----


def plain_bn(like, x, **kwargs):
    """An nn.BatchNorm with the parameters and statistics of another."""
    bn = (nn.BatchNorm1d if x.ndim == 2 else nn.BatchNorm2d)(x.shape[1], affine=like.affine, **kwargs)
    bn.load_state_dict(like.state_dict())
    return bn


def some_bn(script, groups, affine=True):
    bn = script.BatchNorm(5, groups=groups, affine=affine)
    for i, p in enumerate([*bn.parameters(), bn.running_mean, bn.running_var]):
        nn.init.uniform_(p, 0.5, 1.5, generator=rng(i))
    return bn


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 2), (12, 5, 1, 1)])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_batch_norm_is_a_loop_over_groups(script, groups, shape, affine):
    x = (2 + 3 * torch.randn(shape, generator=rng(1))).requires_grad_()
    weights = torch.randn(shape, generator=rng(2))
    bn = some_bn(script, groups, affine)
    loops = [plain_bn(bn, x) for _ in range(groups)]
    parts = [loops[g](x[g::groups]) for g in range(groups)]  # image i in group i mod G
    expected = torch.stack([parts[i % groups][i // groups] for i in range(12)])
    parameters = [p for loop in loops for p in loop.parameters()]
    theirs = torch.autograd.grad((expected * weights).sum(), [x, *parameters])
    y = bn(x)
    ours = torch.autograd.grad((y * weights).sum(), [x, *bn.parameters()])
    close(y, expected, 1e-4, 1e-5)
    close(ours[0], theirs[0], 1e-3, 1e-5)
    for i in range(2 * affine):
        close(ours[1 + i], sum(theirs[1 + i :: 2]), 1e-4, 1e-5)
    close(bn.running_mean, torch.stack([loop.running_mean for loop in loops]).mean(0))
    close(bn.running_var, torch.stack([loop.running_var for loop in loops]).mean(0))
    assert bn.num_batches_tracked.item() == 1


def test_batch_norm_in_eval_mode_and_without_tracking(script):
    x = torch.randn(12, 5, 3, 3, generator=rng(3))
    for affine in (True, False):
        bn = some_bn(script, 4, affine)
        before = {k: v.clone() for k, v in bn.state_dict().items()}
        bn.track = False
        bn(x)
        assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())
        bn.track = True
        y = bn.eval()(x)
        close(y, plain_bn(bn, x).eval()(x), 1e-5, 1e-6)
        assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())
        bn.train()(x)
        assert not any(torch.equal(v, before[k]) for k, v in bn.named_buffers())


def test_batch_norms_state_dict_is_torchs(script):
    for affine in (True, False):
        ours, theirs = script.BatchNorm(5, groups=2, affine=affine), nn.BatchNorm2d(5, affine=affine)
        describe = lambda bn: {k: (v.shape, v.dtype) for k, v in bn.state_dict().items()}
        assert describe(ours) == describe(theirs) and isinstance(ours, nn.BatchNorm2d)
        assert (ours.eps, ours.momentum) == (theirs.eps, theirs.momentum)


@each
def test_autocast(script):
    """bfloat16 has 8 bits: encodings within some per cent, in float32, with finite gradients."""
    z = {}
    for amp in ("off", "bf16"):
        args = small_args(script, f"--amp {amp} --bn-groups 1")  # of two images, BN leaves signs
        model = build(script, args)
        src, _, _ = views_of(script, args)
        for training in (True, False):
            z[amp, training] = model.source.train(training)(src[0][0])
        z[amp, True].sum().backward()
        grads = [p.grad for p in model.source.parameters() if p.requires_grad]
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)
    for training in (True, False):
        ours, theirs = z["bf16", training], z["off", training]
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


# ---- backbone ----


def test_backbones_load_into_torchvisions(script):
    args = small_args(script, "--arch resnet18 --img-size 224")
    net, width = script.build_backbone(args, script.BatchNorm)
    theirs = torchvision.models.resnet18(weights=None)
    missing, unexpected = theirs.load_state_dict(net.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected and width == 512
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64, generator=rng(0))
    close(net.eval()(x), theirs.eval()(x), 1e-4, 1e-5)


@pytest.mark.parametrize("flags, stem, width", [
    ("--arch resnet18 --img-size 32", 64, 512), ("--arch tiny", 16, 128),
    ("--arch tiny --img-size 224", 16, 128)])
def test_the_stem_for_small_images(script, flags, stem, width):
    net, w = script.build_backbone(small_args(script, flags), script.BatchNorm)
    conv = net.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.out_channels) == ((3, 3), (1, 1), (1, 1), stem)
    assert isinstance(net.maxpool, nn.Identity) and w == width
    assert net(torch.randn(4, 3, 16, 16)).shape == (4, width)
    bns = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert bns and all(isinstance(m, script.BatchNorm) for m in bns)


# ---- who sees what ----

COUNTS = [  # flags, large views of source and target, small crops of each
    ("", 1, 1, 0, 0), ("--mean-enc 3", 1, 3, 0, 0), ("--mean-enc-src 2", 2, 1, 0, 0),
    ("--multicrop-src", 1, 1, 6, 0), ("--multicrop-tgt --num-small 2", 1, 1, 0, 2),
    ("--multicrop-src --multicrop-tgt --num-small 3", 1, 1, 3, 3),
    ("--multicrop-src --mean-enc 2 --mean-enc-src 3", 3, 2, 6, 0),
    ("--scalemix-src --scalemix-tgt", 1, 1, 0, 0)]


@pytest.mark.parametrize("flags, large_src, large_tgt, small_src, small_tgt", COUNTS)
def test_how_many_views_each_encoder_sees(script, flags, large_src, large_tgt, small_src, small_tgt):
    args = small_args(script, flags)
    plan, (src, tgt, _) = script.plan_views(args), views_of(script, args)
    counts = (large_src, small_src), (large_tgt, small_tgt)
    for bags, seen, (n_large, n_small) in zip(plan, (src, tgt), counts, strict=True):
        assert [len(bag) for bag in bags] == [len(bag) for bag in seen] == [n_large] + [1] * n_small
        shapes = [tuple(x.shape) for bag in seen for x in bag]
        assert shapes == [(16, 3, 16, 16)] * n_large + [(16, 3, 8, 8)] * n_small
        assert [v.crop.size for bag in bags for v in bag] == [16] * n_large + [8] * n_small
    every = [x for bag in src + tgt for x in bag if x.shape[3] == 16]
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])
    mixed = 2 if "scalemix" in flags else 0
    assert len(script.planned_crops(plan)) == len([v for bags in plan for bag in bags for v in bag]) + mixed


@each
def test_recipes_scales_and_mixing_of_each_encoder(script):
    base = script.augmentations(small_args(script))
    for aug_src in KINDS:
        for aug_tgt in KINDS:
            for crops in ("", "--multicrop-src", "--multicrop-tgt", "--scalemix-src", "--scalemix-tgt"):
                args = small_args(script, f"--aug-src {aug_src} --aug-tgt {aug_tgt} {crops}")
                sides = zip(("src", "tgt"), (aug_src, aug_tgt), script.plan_views(args), base, strict=True)
                for side, aug, bags, recipe in sides:
                    large, wanted = bags[0][0], KINDS[aug](recipe)
                    assert large.recipe == wanted and large.crop.bicubic == wanted.bicubic
                    multicrop = (0.14, 1.0) if "multicrop" in crops else recipe.scale  # on both sides
                    assert large.crop.scale == ((0.08, 1.0) if aug == "weak" else multicrop)
                    assert large.mix == (crops == f"--scalemix-{side}")
                    for (small,) in bags[1:]:  # small crops keep the base recipe, and are never mixed
                        assert small == script.View(recipe, data.Crop(8, (0.08, 0.5), recipe.bicubic), False)
    imagenet = script.parse_args("--data none --recipe imagenet --multicrop-src".split())
    (large,), (small,), *_ = script.plan_views(imagenet)[0]
    assert (large.crop.size, large.crop.scale) == (224, (0.14, 1.0))
    assert (small.crop.size, small.crop.scale) == (96, (0.05, 0.14))
    flags = "--asym-aug", "--aug-tgt weak", ""
    asym_aug, weak, base = (script.plan_views(small_args(script, f)) for f in flags)
    assert asym_aug == weak != base


@each
def test_views_equal_those_made_by_hand(script):
    """A ScaleMix view, then a plain one: the same draws in the same order, the same masks."""
    args, images, n = small_args(script, "--scalemix-src --aug-src strong"), small_images(), 16
    src, tgt, _ = views_of(script, args, images=images)
    recipes = augment.strong(script.augmentations(args)[0]), script.augmentations(args)[1]
    scales = recipes[0].scale, recipes[0].scale, recipes[1].scale
    boxes_rng, draws = rng(0, "crops", 0), rng(0, "views", 0)
    boxes = [augment.crop_boxes(n, 24, 24, scale, boxes_rng) for scale in scales]
    crops = [augment.crop_batch(images.pixels[:n], b, 16, recipes[0].bicubic) for b in boxes]
    mean, std = map(torch.tensor, images.stats)
    look = lambda x, recipe, params: augment.augment(x, recipe, params, mean, std)
    first = look(crops[0], recipes[0], augment.draw(recipes[0], n, draws))
    masks = augment.scalemix_boxes(n, 16, draws)
    second = look(crops[1], recipes[0], augment.draw(recipes[0], n, draws))
    for i, (top, bottom, left, right) in enumerate(masks.tolist()):
        first[i, :, top:bottom, left:right] = second[i, :, top:bottom, left:right]
    assert torch.equal(src[0][0], first)
    assert torch.equal(tgt[0][0], look(crops[2], recipes[1], augment.draw(recipes[1], n, draws)))


# ---- schedule and order of images ----


@pytest.mark.parametrize("total, warmup", [(10, 0), (10, 4), (7, 2.5), (1, 0)])
def test_lr_factor(script, total, warmup):
    f = [script.lr_factor(step, total, warmup) for step in range(total + 1)]
    for step, factor in enumerate(f):
        cosine = (1 + math.cos((step - warmup) / (total - warmup) * math.pi)) / 2
        assert factor == pytest.approx(step / warmup if step < warmup else cosine)
    assert f[0] == (0 if warmup else 1) and f[-1] == pytest.approx(0, abs=1e-12) and max(f) <= 1
    assert script.lr_factor(4, 10, 4) == 1


@pytest.mark.parametrize("n, batch", [(23, 5), (20, 5), (7, 7), (9, 1)])
def test_global_batches(script, n, batch):
    epoch = n // batch
    steps = list(script.global_batches(n, batch, 3, 0, 4 * epoch + 1))
    assert [step for step, _ in steps] == list(range(4 * epoch + 1))
    epochs = [torch.cat([rows for _, rows in steps[e * epoch : (e + 1) * epoch]]).tolist() for e in range(4)]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == epoch * batch and set(rows) <= set(range(n))
    assert len({tuple(rows) for rows in epochs}) == 4  # a new permutation each epoch
    for first in (1, epoch, epoch + 1, 2 * epoch - 1):
        later = list(script.global_batches(n, batch, 3, first, 4 * epoch + 1))
        assert all(a == c and torch.equal(b, d) for (a, b), (c, d) in zip(later, steps[first:], strict=True))
    other_seed = script.global_batches(n, batch, 4, 0, epoch)
    assert not all(torch.equal(b, d) for (_, b), (_, d) in zip(steps, other_seed, strict=False))


# ---- kNN and variances ----


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (7, 0.1), (7, 1.0), (500, 0.5)])
def test_knn_is_brute_force(script, k, temperature):
    unit = lambda n: nn.functional.normalize(torch.randn(n, 4, generator=rng(n)))
    bank, asks = unit(60), unit(1100)  # more than one chunk of queries
    labels, truth = torch.arange(60) % 3, torch.arange(1100) % 3
    right = 0
    for x, label in zip(asks.double().numpy(), truth.tolist(), strict=True):
        cosine = bank.double().numpy() @ x
        votes = np.zeros(3)
        for row in sorted(range(60), key=lambda i: -cosine[i])[:k]:
            votes[labels[row]] += math.exp(cosine[row] / temperature)
        right += int(votes.argmax() == label)
    assert script.knn((bank, labels), (asks, truth), k, temperature) == right / 1100
    assert 0.2 < right / 1100 < 0.5
    assert script.knn((bank, labels), (bank, labels), 1) == 1


@each
@pytest.mark.parametrize("flags", ["", "--multicrop-src --num-small 2 --mean-enc 2 --bn-groups 4"])
def test_variances_are_those_of_the_encodings(script, flags, monkeypatch):
    """Naively: of the unit vectors of an image's views, seen twice; unbiased; mean over images, channels."""
    args, images = small_args(script, flags), small_images(40)
    model, seen, encode = build(script, args), {"v_src": [], "v_tgt": []}, script.encode

    def spy(encoder, views, *a, **kw):
        z = encode(encoder, views, *a, **kw)
        seen["v_src" if encoder is model.source else "v_tgt"].append(z.detach().double().numpy())
        return z

    monkeypatch.setattr(script, "encode", spy)
    with torch.no_grad():
        found = script.variances(args, model, script.plan_views(args), images, "cpu")
    chosen = torch.randperm(40, generator=rng(args.seed, "twice"))[:32]  # two batches of 16
    mates = [torch.randperm(32, generator=rng(args.seed, "mates", t)) for t in range(2)]  # other mates the second time
    encoded = torch.cat([chosen[order] for order in mates]).view(4, 16).tolist()  # by step
    for name, bags in (("v_src", 1 + args.num_small * args.multicrop_src), ("v_tgt", 1)):
        calls, of_image = seen[name], {}
        assert len(calls) == 4 * bags
        for number, z in enumerate(calls):
            for row, image in enumerate(encoded[number // bags]):
                of_image.setdefault(image, []).append(z[row] / np.linalg.norm(z[row]))
        values = [np.var(z, axis=0, ddof=1).mean() for z in of_image.values()]
        assert len(values) == 32 and {len(z) for z in of_image.values()} == {2 * bags}
        assert found[name] == pytest.approx(np.mean(values), rel=1e-4) and found[name] > 0


@each
def test_source_and_target_vary_alike_where_nothing_sets_them_apart(script):
    """The target is a copy at the start; that it alone is shuffled must not show, since all meet new batch-mates."""
    args, images = small_args(script), small_images(512)
    with torch.no_grad():
        v = script.variances(args, build(script, args), script.plan_views(args), images, "cpu")
    assert v["v_tgt"] / v["v_src"] == pytest.approx(1, abs=0.1)


def test_the_variance_follows_the_views(script):
    """More averaging on the target, less variance; equal views of one's own, without batch-mates, none."""
    images = small_images(48)
    v = {}
    for flags in ("--bn-groups 1", "--bn-groups 1 --mean-enc 4"):
        args = small_args(script, flags)
        with torch.no_grad():
            found = script.variances(args, build(script, args), script.plan_views(args), images, "cpu")
        v[flags] = found["v_tgt"]
    assert v["--bn-groups 1 --mean-enc 4"] < 0.8 * v["--bn-groups 1"]
    flat = small_images(48)
    flat.pixels = flat.pixels[:, :, :1, :1].expand(-1, -1, 24, 24)  # one colour per image: crops are alike
    args = small_args(script, "--bn-groups 1 --aug-src weak --aug-tgt weak")
    with torch.no_grad():
        none = script.variances(args, build(script, args).eval(), script.plan_views(args), flat, "cpu")
    assert none["v_src"] == pytest.approx(0, abs=1e-8) and none["v_tgt"] == pytest.approx(0, abs=1e-8)


@each
@pytest.mark.parametrize("labelled", [True, False])
def test_measuring_changes_nothing(script, labelled):
    args, images = small_args(script, "--multicrop-src --num-small 2 --mean-enc 2"), small_images(40)
    model = build(script, args)
    for number in range(2):
        src, tgt, generator = views_of(script, args, number)
        model(src, tgt, 0.9, generator)
    before = {k: v.clone() for k, v in tensors(model.state_dict()).items()}
    modes = [m.training for m in model.modules()]
    bank, queries = (images, images[torch.arange(10)]) if labelled else (None, None)
    result = script.measure(args, SimpleNamespace(bad=0), model, script.plan_views(args), images, bank, queries, "cpu")
    assert set(result) == {"v_src", "v_tgt"} | ({"knn"} if labelled else set())
    assert all(torch.equal(v, before[k]) for k, v in tensors(model.state_dict()).items())
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    again = script.measure(args, SimpleNamespace(bad=0), model, script.plan_views(args), images, bank, queries, "cpu")
    assert again == result


def global_generator_after_measuring(script, labelled):
    args, images = small_args(script), small_images(32)
    model = build(script, args)
    before = torch.get_rng_state()
    bank = images if labelled else None
    script.measure(args, SimpleNamespace(bad=0), model, script.plan_views(args), images, bank, bank, "cpu")
    return torch.equal(torch.get_rng_state(), before)


def test_variances_leave_the_global_generator_alone(script):
    assert global_generator_after_measuring(script, labelled=False)


def test_knn_leaves_the_global_generator_alone(script):
    assert global_generator_after_measuring(script, labelled=True)


def test_features_are_those_of_the_whole_image_in_eval_mode(script):
    args, images = small_args(script), small_images(20)
    net = build(script, args).source.backbone.eval()
    with torch.no_grad():
        x = nn.functional.interpolate(images.pixels, 16, mode="bilinear", antialias=True).float() / 255
        z = net((x - 0.5) / 0.25)
        features, labels = script.features(args, SimpleNamespace(bad=0), net, images, "cpu")
        close(features, z / z.norm(dim=1, keepdim=True), 1e-4, 1e-5)
        assert torch.equal(labels, images.labels)
