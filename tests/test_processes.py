"""The number of processes changes nothing, nor does an interruption: whole runs, in float64."""

import importlib
import os
import signal
from unittest import mock

import pool as helper
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import SCRIPTS, class_tree, log_lines, same_state, saved

from common.augment import rng

SMALL = helper.SMALL.replace("--bn-groups 8", "--bn-groups 4 --warmup-epochs 0.5 --epochs 2")
PREFERRED = ("--multicrop-src --num-small 2 --scalemix-src --asym-aug --aug-src strong --asym-bn "
             "--mean-enc 2")
OTHER = ("--multicrop-src --multicrop-tgt --num-small 1 --scalemix-src --scalemix-tgt "
         "--aug-src weak --aug-tgt strong --sync-bn-src --mean-enc 2 --mean-enc-src 2")
SYNC = "--bn-groups 1 --multicrop-src --num-small 2 --scalemix-src --mean-enc 2"
ORIGINAL = "--bn-groups 1 --symmetrize"
QUIET, MEASURED = " --knn-every 0", " --knn-every 1"
TERMINATED = 128 + signal.SIGTERM


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("images"), 48)  # of one size: decoded once


@pytest.fixture(scope="session")
def mixed_tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("mixed"), 48, sizes=(20, 24, 31))  # at each step


def argv(method, tree, out, flags):
    return f"--data {tree} --out {out} {SMALL} {SCRIPTS[method]} {flags}"


def run(pool, world, *line):
    ends = pool.run(world, helper.call, line[0], argv(*line), dtype=torch.float64)
    assert ends == [(0, "")] * world, ends


def same(a, b):
    same_state(a, b, 1e-9, 1e-9)
    for x, y in zip(log_lines(a), log_lines(b), strict=True):
        assert x == pytest.approx(y, rel=1e-9, abs=1e-12), x["step"]


METHODS = list(SCRIPTS)
QUICK = [("mocov2_asym", (1, 2), PREFERRED + MEASURED),
         ("mocov2_asym", (1, 4), OTHER + QUIET),
         ("mocov2_asym", (1, 2), "--asym-bn --sync-bn-src --bn-scope all" + QUIET),
         ("barlow_asym", (1, 4), SYNC + QUIET),
         ("simclr_asym", (1, 2), "--symmetrize" + QUIET)]  # gradients through gather and shuffle
QUICK += [(m, (1, 2), PREFERRED + QUIET) for m in METHODS[1:]]
SLOW = [(m, (1, 2, 4), flags) for m in METHODS
        for flags in (PREFERRED + MEASURED, OTHER + QUIET, SYNC + QUIET, QUIET)]
SLOW += [(m, (1, 2, 4), ORIGINAL + QUIET) for m in METHODS[1:]]
SLOW += [("simclr_asym", (1, 2, 4), "--negatives all" + QUIET),
         ("mocov2_asym", (1, 2, 4), "--vanilla-head" + QUIET),
         ("mocov3_asym", (1, 2, 4), "--arch vit_tiny --multicrop-src --mean-enc 2" + QUIET)]


@pytest.mark.parametrize("method, worlds, flags", QUICK + [
    pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_runs_of_1_2_and_4_processes_agree(
        pool, method, worlds, flags, tree, mixed_tree, tmp_path):
    images = mixed_tree if MEASURED in flags else tree
    for world in worlds:
        run(pool, world, method, images, tmp_path / str(world), f"{flags} --steps 2")
    losses = [line["loss"] for line in log_lines(tmp_path / "1") if "loss" in line]
    assert len(set(losses)) == 2  # it moves
    for world in worlds[1:]:
        same(tmp_path / "1", tmp_path / str(world))


def norm_inputs(parts, shape, affine):
    """x (24, parts, *shape), weight and bias or None, and the gradient of the loss to y."""
    x = 3 + 2 * torch.randn(24, parts, *shape, generator=rng("x"))
    w, b = torch.randn(2, shape[0], generator=rng("w")) if affine else (None, None)
    return x, w, b, torch.randn(24, parts, *shape, generator=rng("g"))


def norm_job(groups, parts, shape, affine, grouped):
    """This process's outputs and gradients of a BatchNorm, and its running statistics."""
    script = importlib.import_module("byol_asym")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    mine = slice(int(os.environ.get("RANK", 0)), None, int(os.environ.get("WORLD_SIZE", 1)))
    x, w, b, g = norm_inputs(parts, shape, affine)
    bn = script.BatchNorm(shape[0], groups, affine)
    bn.parts, bn.grouped, here = parts, grouped, max(1, groups // script.world_size())
    order = torch.arange(24 // script.world_size() * parts)
    order = order.view(-1, here if grouped else 1, parts).transpose(0, 1).flatten()
    if affine:
        bn.load_state_dict({"weight": w, "bias": b}, strict=False)
    x = x[mine].flatten(0, 1).requires_grad_()
    y = bn(x[order])[order.argsort()]
    (y * g[mine].flatten(0, 1)).sum().backward()
    script.sync_buffers(bn)
    return y.detach(), x.grad, [bn.running_mean, bn.running_var,
                                *(script.all_sum(p.grad) for p in bn.parameters())]


def naive_norm(groups, parts, shape, affine):
    """The same for the whole batch, by a loop over groups and parts, with PyTorch's own."""
    x, w, b, g = norm_inputs(parts, shape, affine)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    y, means, variances = torch.zeros_like(x), [], []
    for i in range(groups):
        for k in range(parts):
            means.append(torch.zeros(shape[0]))
            variances.append(torch.ones(shape[0]))
            rows = torch.zeros_like(x)
            rows[i::groups, k] = F.batch_norm(
                x[i::groups, k], means[-1], variances[-1], w, b, training=True)
            y = y + rows
    (y * g).sum().backward()
    statistics = [torch.stack(t).mean(0) for t in (means, variances)]
    return y.detach(), x.grad, statistics + [t.grad for t in leaves[1:]]


@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("shape, affine", [((3,), True), ((3, 4, 2), True), ((2, 1, 1), False)])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_batch_norm_is_a_loop_over_groups(pool, grouped, groups, parts, shape, affine):
    (y, dx, rest), = pool.run(1, naive_norm, groups, parts, shape, affine, dtype=torch.float64)
    for world in (1, 2, 4):
        results = pool.run(
            world, norm_job, groups, parts, shape, affine, grouped, dtype=torch.float64)
        for r, ours in enumerate(results):
            expected = [t[r::world].flatten(0, 1) for t in (y, dx)] + rest
            for a, b in zip([*ours[:2], *ours[2]], expected, strict=True):
                assert torch.allclose(a, b, 1e-9, 1e-9)


def disturbed(method, line, stop=None, deaf=None, dropout=0.0):
    """A run with dropout, as someone may add it, in which a process (of two, the other than deaf)
    gets SIGTERM in the middle of a step. Its exit code, and the global generator's seeds."""
    script, me, seeds = importlib.import_module(method), int(os.environ.get("RANK", 0)), []

    def hit(step, *args, lr_factor=script.lr_factor):
        if step == stop and me != deaf:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_factor(step, *args)

    def dropping(loss, z_src, z_tgt, over_crops=script.over_crops):
        seeds.append(torch.initial_seed())
        return over_crops(loss, [F.dropout(z, dropout) for z in z_src], z_tgt)

    with mock.patch.multiple(script, lr_factor=hit, over_crops=dropping):
        return helper.call(method, line)[0], seeds


@pytest.mark.parametrize("method, flags", [
    ("mocov2_asym", PREFERRED + MEASURED),
    pytest.param("barlow_asym", OTHER + QUIET, marks=pytest.mark.slow),
    pytest.param("simsiam_asym", PREFERRED + MEASURED, marks=pytest.mark.slow),
    pytest.param("mocov3_asym", "--arch vit_tiny --mean-enc 2" + QUIET, marks=pytest.mark.slow)])
def test_a_run_interrupted_twice_is_the_uninterrupted_one_bit_for_bit(
        pool, method, flags, mixed_tree, tmp_path):
    """In the first epoch, by a signal; in the second, by --steps, which measures once more: that
    changes nothing. Dropout draws from the global generator, of which nothing is saved."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out, steps, stop, code in ((whole, 6, None, 0), (cut, 6, 1, TERMINATED),
                                   (cut, 5, None, 0), (cut, 6, None, 0)):
        line = argv(method, mixed_tree, out, f"{flags} --steps {steps}")
        [(ended, _)] = pool.run(1, disturbed, method, line, stop, None, 0.5)
        assert ended == code
        assert saved(out)["step"] == log_lines(out)[-1]["step"] == (steps if stop is None else 2)
    same_state(whole, cut)
    ours, theirs = log_lines(cut), log_lines(whole)
    for k in ("v_src", "v_tgt", "knn") if MEASURED in flags else ():
        del ours[5][k]
    assert ours == theirs


def test_a_run_continues_on_two_processes_and_back_on_one(pool, tree, tmp_path):
    """Of two processes, one gets the signal: both stop after the same step. Each has a seed of its
    own for each step, from which dropout, say, draws."""
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", PREFERRED + QUIET
    run(pool, 1, "mocov2_asym", tree, whole, flags)
    line, seeds = argv("mocov2_asym", tree, cut, flags), []
    for world, stop, deaf, code in ((1, 1, None, TERMINATED), (2, 3, 0, TERMINATED),
                                    (1, None, None, 0)):
        ends = pool.run(world, disturbed, "mocov2_asym", line, stop, deaf, dtype=torch.float64)
        assert [ended for ended, _ in ends] == [code] * world
        seeds += sum([drawn for _, drawn in ends], [])
        assert saved(cut)["step"] == (6 if stop is None else stop + 1)
    same(whole, cut)
    assert len(set(seeds)) == len(seeds) == 2 + 2 * 2 + 2
