"""MoCo v2: loss, queue, weights of the crops, heads, target, shuffle, every switch. Against plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import build, close, small_args, small_images, views_of
from torch import nn

import mocov2_asym as M
from common.augment import rng

PREFERRED = "--multicrop-src --num-small 2 --scalemix-src --asym-aug --aug-src strong --asym-bn --mean-enc 2"
OTHER = ("--multicrop-tgt --num-small 2 --scalemix-tgt --aug-src weak --aug-tgt strong --sync-bn-src "
         "--mean-enc-src 2")


def model_of(flags=""):
    args = small_args(M, flags)
    return args, build(M, args)


def step(flags="", model=None, m=0.9, number=0):
    args, model = (small_args(M, flags), model) if model else model_of(flags)
    src, tgt, generator = views_of(M, args, number)
    loss, spreads = model(src, tgt, m, generator)
    return model, loss, spreads


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def units(n, d, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


# ---- loss and queue ----


@pytest.mark.parametrize("n, d, size, tau", [(5, 8, 7, 0.2), (3, 16, 3000, 0.07), (4, 8, 1, 1.0)])
def test_info_nce_is_the_plain_loop(n, d, size, tau):
    _, model = model_of(f"--temperature {tau}")
    q, k, keys = units(n, d, 1), units(n, d, 2), units(size, d, 3)
    losses = []
    for i in range(n):
        q64, logits = q[i].double().numpy(), []
        for key in [k[i], *keys]:
            logits.append(float(np.dot(q64, key.double().numpy())) / tau)
        top = max(logits)
        losses.append(top + math.log(sum(math.exp(x - top) for x in logits)) - logits[0])
    assert model.info_nce(q, k, keys).item() == pytest.approx(np.mean(losses), rel=1e-5)
    alike = units(1, d).expand(size, d)
    assert model.info_nce(alike[:1], alike[:1], alike).item() == pytest.approx(math.log(1 + size), rel=1e-5)


@pytest.mark.parametrize("size, batch", [(12, 4), (10, 4), (7, 5), (5, 5), (5, 8), (3, 10), (1, 4)])
def test_queue_is_first_in_first_out(size, batch):
    _, model = model_of(f"--queue {size}")
    expected = model.queue.tolist()  # oldest first
    for i in range(7):
        keys = units(batch, 16, i)
        model.enqueue(keys)
        expected = (expected + keys.tolist())[-size:]
        ptr = model.queue_ptr.item()
        assert model.queue.tolist()[ptr:] + model.queue.tolist()[:ptr] == expected


@pytest.mark.parametrize("flags", ["", "--mean-enc 3", "--multicrop-src --multicrop-tgt --num-small 2"])
def test_a_step_enqueues_the_mean_of_the_large_views_once_and_after_the_loss(flags, monkeypatch):
    args, model = model_of(flags)
    close(model.queue.norm(dim=1), torch.ones(40))
    old, seen, encoded = model.queue.clone(), [], []
    info_nce, encode = model.info_nce, M.encode

    def spy_loss(q, k, queue):
        seen.append((k, queue.clone()))
        return info_nce(q, k, queue)

    def spy_encode(encoder, *a, **kw):
        z = encode(encoder, *a, **kw)
        encoded.extend([z] * (encoder is model.target))
        return z

    model.info_nce = spy_loss
    monkeypatch.setattr(M, "encode", spy_encode)
    src, tgt, generator = views_of(M, args)
    assert len(tgt[0]) == args.mean_enc
    model(src, tgt, 0.9, generator)
    keys = F.normalize(encoded[0])
    assert torch.equal(model.queue[:16], keys) and torch.equal(model.queue[16:], old[16:])
    assert model.queue_ptr.item() == 16  # small crops are not enqueued
    close(model.queue.norm(dim=1), torch.ones(40))
    assert all(torch.equal(queue, old) for _, queue in seen)  # so no image's own key is a negative
    assert len(seen) == (9 if "tgt" in flags else 1) and torch.equal(seen[0][0], keys)


def test_multicrop_weights_are_those_of_the_spec():
    pair = lambda u, v: torch.tensor(10.0 * u + v)  # tells which crops met
    L, s = 1.0, [2.0, 3.0, 5.0]
    mean = lambda us, vs: np.mean([10 * u + v for u in us for v in vs])
    assert M.over_crops(pair, [L], [L]) == 11
    assert M.over_crops(pair, [L, *s], [L]).item() == pytest.approx(11 + mean(s, [L]))  # the published loss
    assert M.over_crops(pair, [L], [L, *s]).item() == pytest.approx((11 + mean([L], s)) / 2)
    both = (11 + mean([L], s) + mean(s, [L]) + mean(s, s)) / 2
    assert M.over_crops(pair, [L, *s], [L, *s]).item() == pytest.approx(both)


def test_chance_is_the_loss_of_constant_encodings():
    for flags in ("", "--multicrop-src", "--multicrop-tgt", "--multicrop-src --multicrop-tgt", "--queue 9"):
        args, model = model_of(flags)
        small_src, small_tgt = (args.num_small * on for on in (args.multicrop_src, args.multicrop_tgt))
        z = units(1, 16).expand(4, 16)
        same = lambda u, v, k=args.queue: model.info_nce(u, v, z[:1].expand(k, 16))  # noqa: B023
        loss = M.over_crops(same, [z] * (1 + small_src), [z] * (1 + small_tgt))
        assert M.MoCoV2.chance(args) == pytest.approx(loss.item(), rel=1e-5)


# ---- networks ----


def test_projectors():
    kinds = lambda flags: [type(x) for x in model_of(flags)[1].source.projector]
    assert kinds("") == [nn.Linear, M.BatchNorm, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert kinds("--vanilla-head") == [nn.Linear, nn.ReLU, nn.Linear]
    for flags, shapes in (("", [(32, 128), (32, 32), (16, 32)]), ("--vanilla-head", [(32, 128), (16, 32)])):
        linear = [x for x in model_of(flags)[1].target.projector if isinstance(x, nn.Linear)]
        assert [tuple(x.weight.shape) for x in linear] == shapes and all(x.bias is not None for x in linear)


@pytest.mark.parametrize("flag, side, other", [("--asym-bn", "target", "source"),
                                               ("--sync-bn-src", "source", "target")])
def test_asym_bn_synchronises_one_bn_of_one_encoder(flag, side, other):
    groups = lambda net: [m.groups for m in net.modules() if isinstance(m, M.BatchNorm)]
    _, model = model_of(flag)
    assert groups(getattr(model, side).projector) == [1]
    assert set(groups(getattr(model, side).backbone)) == set(groups(getattr(model, other))) == {8}
    _, model = model_of(f"{flag} --bn-scope all")
    assert set(groups(getattr(model, side))) == {1} and set(groups(getattr(model, other))) == {8}
    for flags in ("", flag, f"{flag} --bn-scope all"):  # no plain BN anywhere, and the same initial weights
        _, another = model_of(flags)
        bns = [m for m in another.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(type(m) is M.BatchNorm for m in bns)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), another.parameters(), strict=True))


# ---- source and target ----


@pytest.mark.parametrize("flags", ["", PREFERRED, OTHER])
def test_the_gradient_reaches_the_source_and_nothing_else(flags):
    model, loss, _ = step(flags)
    loss.backward()
    assert loss.ndim == 0 and all(p.grad is not None and p.grad.any() for p in model.source.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    assert not model.queue.requires_grad and "queue" in dict(model.named_buffers())
    assert model.target.training and model.source.training
    groups = M.MoCoV2.optimizer(small_args(M), model).param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in model.source.parameters()}


@pytest.mark.parametrize("m", [0.0, 0.3, 0.99, 1.0])
def test_the_target_follows_the_source_of_before_the_step(m):
    args, model = model_of()
    for p in model.source.parameters():  # else target and source start equal
        p.data += 0.1 * torch.randn(p.shape, generator=rng(1, str(p.shape)))
    optimizer = M.MoCoV2.optimizer(args, model)
    for number in range(2):
        source, target = state(model.source), state(model.target)
        _, loss, _ = step(model=model, m=m, number=number)
        for k, p in model.target.named_parameters():
            close(p, m * target[k].double() + (1 - m) * source[k].double())
            assert m or torch.equal(p, source[k])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.momentum(0.0) == model.momentum(1.0) == args.ema


def stats(net):
    return {k: v.clone() for k, v in net.named_buffers() if "running" in k or "tracked" in k}


def test_running_statistics_are_those_of_each_encoders_own_large_views():
    large = "--large-scale 0.2 1 --num-small 2"
    for flags in ("", f"--multicrop-src {large}", f"--multicrop-src --multicrop-tgt {large}"):
        (args, model), (_, fresh) = model_of(flags), model_of(flags)
        for number in range(2):  # a first step cannot tell whether EMA takes the buffers too
            src, tgt, generator = views_of(M, args, number)
            fresh.source(torch.cat(src[0]))  # what BN sees if it sees the large views alone
            fresh.target(torch.cat(tgt[0])[torch.randperm(16, generator=generator)])
            src, tgt, generator = views_of(M, args, number)
            model(src, tgt, 0.9, generator)
        assert all(v.item() == 2 for k, v in stats(model).items() if "tracked" in k)
        for net in ("source", "target"):
            there, here = stats(getattr(model, net)), stats(getattr(fresh, net))
            assert all(torch.equal(there[k], here[k]) for k in there), (flags, net)
        assert not torch.equal(stats(model.source)["backbone.bn1.running_mean"],
                               stats(model.target)["backbone.bn1.running_mean"])


def test_mean_enc_is_the_mean_of_raw_outputs_of_one_joint_forward():
    _, model = model_of()
    a, b = torch.randn(2, 16, 3, 16, 16, generator=rng(3))
    assert torch.equal(M.encode(model.source, [a]), model.source(a))  # n = 1 is the baseline, bit for bit
    joint = model.source(torch.cat([a, b]))
    close(M.encode(model.source, [a, b]), torch.stack([(joint[i] + joint[16 + i]) / 2 for i in range(16)]))
    apart = (model.source(a) + model.source(b)) / 2  # BN would differ
    assert (apart - M.encode(model.source, [a, b])).abs().max() > 1e-3
    for flags in ("--mean-enc 2", "--mean-enc-src 2"):  # and the loss sees the mean, normalised
        args, model = model_of(flags)
        seen = []
        model.info_nce = lambda q, k, queue, seen=seen: seen.append((q, k)) or q.sum()
        src, tgt, generator = views_of(M, args)
        model(src, tgt, 0.9, generator)
        assert len(src[0]) == args.mean_enc_src and len(tgt[0]) == args.mean_enc
        z = M.encode(model.source, src[0])
        close(seen[0][0], z / z.norm(dim=1, keepdim=True), 1e-4, 1e-5)


# ---- shuffle ----


def test_without_batch_norm_the_shuffle_changes_nothing():
    net, views = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), list(torch.randn(2, 8, 3, 2, 2))
    seen = []
    net.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    plain, shuffled = M.encode(net, views), M.encode(net, views, rng(0))
    close(plain, shuffled)
    first, second = (x.flatten(1).tolist() for x in seen)
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_shuffled_target_equals_a_loop_over_groups(groups):
    bn = M.BatchNorm(6, groups=groups)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), bn, nn.ReLU(), nn.Linear(6, 5))
    views = list(torch.randn(2, 8, 3, 2, 2, generator=rng(5)))
    order = torch.randperm(16, generator=rng(9)).tolist()  # the two views of all images are one pool
    hidden = net[1](torch.cat(views).flatten(1)).detach().double()
    raw = torch.zeros(16, 5)
    for g in range(groups):
        members = order[g::groups]  # places g, g + G, ... of the shuffled batch
        h = hidden[members]
        h = ((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()).clamp_min(0)
        raw[members] = net[4](h.float()).detach()
    close(M.encode(net, views, rng(9)), (raw[:8] + raw[8:]) / 2, 1e-4, 1e-5)


def test_spread():
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    assert M.spread(axes).item() == pytest.approx(np.std(axes.numpy(), axis=0, ddof=1).mean() * 2)
    assert M.spread(units(4000, 64)).item() == pytest.approx(1, abs=0.02)
    assert M.spread(units(1, 8).expand(9, 8)).item() == pytest.approx(0, abs=1e-6)
    model, _, spreads = step()
    assert 0 < spreads["std_src"] <= 1.1 and 0 < spreads["std_tgt"] <= 1.1


# ---- switches ----

TARGET_ONLY = ["--scalemix-tgt", "--asym-aug", "--aug-tgt strong", "--asym-bn", "--asym-bn --bn-scope all",
               "--mean-enc 2"]
SOURCE_ONLY = ["--aug-src weak", "--aug-src strong", "--sync-bn-src", "--sync-bn-src --bn-scope all"]
OTHERS = ["--scalemix-src", "--mean-enc-src 2", "--mean-enc 3", "--vanilla-head", "--bn-groups 4", "--seed 1",
          "--temperature 0.3", "--queue 39", "--dim 17", "--hidden 33", "--multicrop-tgt --num-small 2",
          "--multicrop-src --num-small 2", "--multicrop-src --num-small 3",
          "--multicrop-src --num-small 2 --small-size 12",
          "--multicrop-src --num-small 2 --large-scale 0.5 1",
          "--multicrop-src --num-small 2 --small-scale 0.3 0.4",
          "--multicrop-src --multicrop-tgt --num-small 2"]


def first_step(flags):
    torch.manual_seed(0)
    _, loss, spreads = step(flags)
    return loss.item(), spreads["std_src"].item(), spreads["std_tgt"].item()


def test_switches_are_inert_when_off():
    explicit = ("--aug-src base --aug-tgt base --mean-enc 1 --mean-enc-src 1 --bn-scope projector --ema 0.99 "
                "--temperature 0.1 --seed 0 --wd 5e-4 --lr 0.03 --epochs 200 --amp off --bn-groups 8")
    assert first_step("") == first_step(explicit) == first_step("")
    assert first_step("--asym-aug") == first_step("--aug-tgt weak")


def test_every_switch_acts_and_on_its_own_side():
    base, found = first_step(""), {}
    for flags in TARGET_ONLY + SOURCE_ONLY + OTHERS:
        found[flags] = first_step(flags)
    losses = [base[0]] + [loss for loss, _, _ in found.values()]
    assert len(set(losses)) == len(losses) and np.isfinite(losses).all()
    for flags in TARGET_ONLY:  # the source's encodings of the first step are untouched
        assert found[flags][1] == base[1] and found[flags][2] != base[2], flags
    for flags in SOURCE_ONLY:
        assert found[flags][2] == base[2] and found[flags][1] != base[1], flags


# ---- optimiser ----


def test_sgd_and_schedule_are_the_plain_formulas():
    args, model = model_of("--lr 0.4 --wd 0.01")
    optimizer = M.MoCoV2.optimizer(args, model)
    assert optimizer.param_groups[0]["peak"] == pytest.approx(0.4 * 16 / 256)
    names = dict(model.source.named_parameters())
    p, v = {k: w.detach().double() for k, w in names.items()}, {k: 0.0 for k in names}
    for i in range(3):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (i + 1)
        for k, w in names.items():
            w.grad = torch.randn(w.shape, generator=rng(i, k))
            v[k] = 0.9 * v[k] + (w.grad.double() + 0.01 * p[k])  # decay on everything, BN and biases too
            p[k] = p[k] - 0.025 * (i + 1) * v[k]
        optimizer.step()
    assert all(torch.allclose(w.double(), p[k], atol=1e-6) for k, w in names.items())


def test_a_nearly_trivial_task_is_learnt():
    """Thirty steps on one batch lower the loss: signs, normalisation and the update work together."""
    args, model = model_of("--lr 1 --queue 64")
    optimizer, losses = M.MoCoV2.optimizer(args, model), []
    images = small_images(16)
    for _ in range(30):
        src, tgt, generator = views_of(M, args, 0, images)
        model.queue.copy_(units(64, 16, 4))
        loss, _ = model(src, tgt, 0.99, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
