"""The blocks that all six scripts share, and what they take from common/: against plain loops."""

import importlib
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from pool import SCRIPTS, build, close, small_args, small_images, views_of
from torch import nn
from torch.nn import functional as F

from common import augment, data, knn, resnet
from common.augment import View, rng

DESIGNS = ("--multicrop-src --num-small 2 --scalemix-src --aug-src strong --mean-enc 2 "
           "--bn-groups 4")


@pytest.fixture
def script(request):
    """MoCo v2 stands for all where nothing but shared blocks is tested: they are identical."""
    return importlib.import_module(getattr(request, "param", "mocov2_asym"))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 2, 4])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_an_encoder_is_a_loop_over_bags_and_groups(
        script, on_cpu, groups, shuffled, double, monkeypatch):
    """MeanEnc: the mean of raw outputs of one joint forward; a shuffle permutes all its views as
    one pool. Small crops, in one pass: as one pass each, each with a permutation of its own, and
    without a trace in running statistics. Without BN, here 0 groups, a shuffle changes nothing."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", on_cpu, raising=False)
    first, last, seen, stats = nn.Linear(12, 6), nn.Linear(6, 5), [], []
    bn = script.BatchNorm(6, groups=groups) if groups else nn.Identity()
    backbone, head = nn.Sequential(nn.Flatten(), first), nn.Sequential(bn, nn.Tanh(), last)
    backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    a, b, *small = torch.randn(5, 8, 3, 2, 2, generator=rng(5))
    bags, generator = [[a, b], *[[s] for s in small]], rng(9)
    encoder = script.Encoder(backbone, head, small_args(script, f"--bn-groups {groups or 1}"))
    z = encoder(bags, rng(9) if shuffled else None)
    assert len(seen) == 2 and torch.equal(seen[0][0], a[0]) != shuffled

    for bag, found in zip(bags, z, strict=True):
        x, raw = torch.cat(bag), torch.zeros(8 * len(bag), 5)
        order = torch.randperm(len(x), generator=generator) if shuffled else torch.arange(len(x))
        for g in range(groups or 1):
            h = first(x.flatten(1))[order[g :: groups or 1]]
            stats.append((h.mean(0), h.var(0)))
            if groups:
                h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
            raw[order[g :: groups or 1]] = last(h.tanh())
        close(found, sum(raw.split(8)) / len(bag), 1e-9, 1e-9)
    if groups:
        mean, var = (sum(x) / groups for x in zip(*stats[:groups], strict=True))  # the large views'
        close(bn.running_mean, 0.1 * mean, 1e-9)
        close(bn.running_var, 0.9 + 0.1 * var, 1e-9)
    close(encoder.eval()([[a[:3]]])[0], encoder([[a]])[0][:3], 1e-9)


def test_autocast(script):
    """bfloat16 has 8 bits: encodings within some per cent, in float32, with finite gradients."""
    z = []
    for amp in ("off", "bf16"):
        args = small_args(script, f"--amp {amp} --bn-groups 1")  # of two images, BN leaves signs
        model = build(script, args)
        z += model.source(views_of(script, args)[0])
        z[-1].sum().backward()
        for p in model.source.parameters():
            assert p.grad.isfinite().all() and p.grad.dtype == z[-1].dtype == torch.float32
    assert 0 < (z[0] - z[1]).norm() < 0.1 * z[0].norm()


def test_no_copy_of_a_step_waits_for_the_device(script, monkeypatch):
    """As the queue of a GPU would run dry. On the CPU a copy is none; tests/bench counts waits."""
    to, args = torch.Tensor.to, small_args(script, DESIGNS)
    model = build(script, args)

    def spy(x, *more, non_blocking=False, **kwargs):
        drawing = sys._getframe(1).f_code.co_name == "crop_boxes"  # on the CPU
        assert drawing or non_blocking or not more or isinstance(more[0], torch.dtype)
        return to(x, *more, non_blocking=non_blocking, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    src, tgt, generator = views_of(script, args)
    model(src, tgt, 0.9, generator)[0].backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
@pytest.mark.parametrize("kind, limit", [(torch.float64, 1e-9), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape, layout", [
    ((24, 6), torch.contiguous_format), ((24, 6, 2, 2), torch.contiguous_format),
    ((24, 6, 2, 2), torch.channels_last)])
@pytest.mark.parametrize("affine", [True, False])
def test_synchronised_batch_norm_of_one_process_is_torchs(
        script, affine, shape, layout, kind, limit, device, monkeypatch):
    """On a GPU too, whose kernel wants all arguments. Of two and four: tests/test_processes.py."""
    kernel = torch.ops.aten.native_batch_norm_backward
    complete = lambda *a: kernel(*a) if all(x is not None for x in a) else pytest.fail("None")
    monkeypatch.setattr(torch.ops.aten, "native_batch_norm_backward", complete)
    precision, found = torch.float64 if kind == torch.float64 else torch.float32, []
    x, g = torch.randn(2, *shape, generator=rng("x")).to(device, kind)
    x, g = (t.contiguous(memory_format=layout) for t in (x, g))
    for norm in (script.SyncNorm.apply, F.batch_norm):
        stats = torch.zeros(6, dtype=precision, device=device), torch.ones(6).to(device, precision)
        params = [torch.rand(6, generator=rng(k)).to(device, precision) for k in "wb" * affine]
        leaves = [t.clone().requires_grad_() for t in (3 + 2 * x, *params)]
        y = norm(leaves[0], *stats, *(leaves[1:] or (None, None)), True, 0.1, 1e-5)
        y.backward(g)
        found.append([y.detach(), *stats, *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < limit * theirs.norm()


@pytest.mark.parametrize("size", [224, 32])
def test_resnets_are_torchvisions_but_for_the_stem_for_small_images(script, size):
    """And their BatchNorm, when it does not train, torch's. In training: tests/test_processes.py."""
    net, width = resnet.build("resnet18", size, partial(script.BatchNorm, groups=4))
    for k, x in net.named_buffers():
        if "running_" in k:
            nn.init.uniform_(x, ("var" in k) - 0.5, ("var" in k) + 0.5, generator=rng(k))
    theirs = torchvision.models.resnet18(weights=None)
    if size == 32:
        theirs.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    missing, unexpected = theirs.load_state_dict(net.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected and width == 512
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, size, size, generator=rng(0))
    close(z := net.eval()(x), theirs.eval()(x), 1e-4, 1e-5)
    assert z.std() > 0.1  # all zeros would agree
    close(net.conv1.weight.std(), (2 / (64 * net.conv1.kernel_size[0] ** 2)) ** 0.5, 0.05)


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_number_recipes_scales_and_mixing_of_each_encoders_views(script):
    kinds = {"base": lambda recipe: recipe, "weak": augment.weak, "strong": augment.strong}
    base = [augment.replace(r, blur=0.0) for r in script.augmentations(small_args(script))]
    designs = ["", "--multicrop-src", "--multicrop-tgt", "--scalemix-src", "--scalemix-tgt"]
    for aug, design in ((aug, design) for aug in kinds for design in designs):
        for side in ("src", "tgt"):
            flags = f"--aug-{side} {aug} {design} --num-small 3 --mean-enc-src 3 --mean-enc 2"
            args = small_args(script, flags)
            bags = script.plan_views(args)[side == "tgt"]
            recipe = base[side == "tgt"]
            scale = (0.14, 1.0) if "multicrop" in design else recipe.scale  # on both sides
            large = augment.replace(kinds[aug](recipe), scale=(0.08, 1) if aug == "weak" else scale)
            means = 3 if side == "src" else 2
            assert bags[0] == means * [View(large, 16, mix=design == f"--scalemix-{side}")]
            small = View(augment.replace(recipe, scale=(0.08, 0.5)), 8)  # never mixed, nor changed
            assert bags[1:] == [[small]] * (3 * (design == f"--multicrop-{side}"))
    assert small_args(script, "--asym-aug").aug_tgt == "weak"

    args = script.parse_args("--data none --recipe imagenet --multicrop-src".split())
    [large], [small], *others = script.plan_views(args)[0]
    assert others == [[small]] * 5 and len(script.plan_views(args)[1]) == 1
    assert (large.size, large.recipe.scale) == (224, (0.14, 1.0))
    assert (small.size, small.recipe.scale) == (96, (0.05, 0.14))


@pytest.mark.parametrize("n, batch", [(23, 5), (20, 5), (7, 7), (9, 1)])
def test_global_batches(n, batch):
    """Each epoch another permutation, its rest dropped; the same from any step on."""
    def batches(seed, first=0):
        last = 4 * (n // batch) + 1
        return [(k, x.tolist()) for k, x in data.global_batches(n, batch, seed, first, last)]

    epoch, steps = n // batch, batches(3)
    assert [step for step, _ in steps] == list(range(4 * epoch + 1))
    epochs = [sum([rows for _, rows in steps[e * epoch : (e + 1) * epoch]], []) for e in range(4)]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == epoch * batch and set(rows) <= set(range(n))
    assert len({tuple(rows) for rows in epochs}) == 4 and batches(4) != steps
    for first in (1, epoch, epoch + 1, 2 * epoch - 1):
        assert batches(3, first) == steps[first:]


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (7, 0.1), (7, 1.0), (500, 0.5)])
def test_the_vote_is_brute_force(k, temperature, double):
    bank, asks = (F.normalize(torch.randn(n, 4, generator=rng(n))) for n in (60, 1100))  # 2 chunks
    labels, truth = torch.arange(60) % 3, torch.arange(1100) % 3
    right = 0
    for x, label in zip(asks.numpy(), truth.tolist(), strict=True):
        cosine, votes = bank.numpy() @ x, np.zeros(3)
        for row in sorted(range(60), key=lambda i: -cosine[i])[:k]:
            votes[labels[row]] += math.exp(cosine[row] / temperature)
        right += int(votes.argmax() == label)
    assert knn.vote((bank, labels), (asks, truth), k, temperature) == right / 1100
    assert knn.vote((bank, labels), (bank, labels), 1) == 1


def test_knn_sees_whole_images_evenly_spaced(script, monkeypatch):
    net, images = build(script, small_args(script)).source.backbone, small_images(20)
    x = nn.functional.interpolate(images.pixels, 16, mode="bilinear", antialias=True)
    z = F.normalize(net.eval()((x[[0, 9, 19]].float() / 255 - 0.5) / 0.25))
    monkeypatch.setattr(knn, "BANK", 3)
    monkeypatch.setattr(knn, "QUERIES", 5)
    monkeypatch.setattr(knn, "vote", lambda bank, queries: (*bank, queries[1]))
    keys, labels, truth = knn.accuracy(net.train(), images, images, 16, 0, "cpu")
    assert all(m.training for m in net.modules())  # and in between it was not
    close(keys, z, 1e-4, 1e-5)
    assert torch.equal(labels, images.labels[[0, 9, 19]])
    assert torch.equal(truth, images.labels[[0, 4, 9, 14, 19]])


@pytest.mark.parametrize("script, flags", [("mocov2_asym", DESIGNS), ("byol_asym", "")],
                         indirect=["script"])
def test_variances_are_those_of_the_encodings(script, flags, monkeypatch, double):
    """Of an image's unit vectors in two passes, with other batch-mates each time: the unbiased
    variance, the mean over images and channels. Without labels there is no kNN."""
    args, images, steps = small_args(script, f"{flags} --seed 3"), small_images(40), []
    model, stream = build(script, args), script.data.stream

    def spy(images, plan, batches, seed, *more):
        assert (plan, seed) == (script.plan_views(args), 3)
        steps.extend(rows.tolist() for _, rows in batches)
        return stream(images, plan, batches, seed, *more)

    monkeypatch.setattr(script.data, "stream", spy)
    encoded = {"v_src": [], "v_tgt": []}
    for name, net in (("v_src", model.source), ("v_tgt", model.target)):
        net.register_forward_hook(lambda net, x, z, to=encoded[name]: to.append(z))
    with torch.no_grad():
        found = script.measure(args, model, (images, None, None), "cpu")

    assert found.keys() == encoded.keys()
    assert len(steps) == 4 and sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3])
    assert len(set(steps[0] + steps[1])) == 32 and set(steps[0]) not in map(set, steps[2:])
    for name, batches in encoded.items():
        of_image = {}
        for rows, bags in zip(steps, batches, strict=True):
            assert len(bags) == (3 if "multicrop" in flags and name == "v_src" else 1)
            for z in bags:
                for image, x in zip(rows, z.numpy(), strict=True):
                    of_image.setdefault(image, []).append(x / np.linalg.norm(x))
        values = [np.var(z, axis=0, ddof=1).mean() for z in of_image.values()]
        assert found[name] == pytest.approx(np.mean(values), rel=1e-9) and found[name] > 0
