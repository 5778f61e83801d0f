"""The number of processes changes nothing, nor does an interruption. Whole runs are compared in float64, where rounding
decides nothing: what is equal is equal to 1e-9 on every machine."""

import importlib
import os
import re
import signal
import subprocess
import sys

import pool as helper
import pytest
import torch
import torch.nn.functional as F
from pool import ROOT, SCRIPTS, Pool, class_tree, free_port, in_group, log_lines, part, saved, tensors

from common.augment import rng

SMALL = helper.SMALL.replace("--batch-size 16 --bn-groups 8", "--batch-size 32 --bn-groups 4 --warmup-epochs 0.5")
PREFERRED = "--multicrop-src --num-small 2 --scalemix-src --asym-aug --aug-src strong --asym-bn --mean-enc 2"
OTHER = ("--multicrop-src --multicrop-tgt --num-small 1 --scalemix-src --scalemix-tgt --aug-src weak "
         "--aug-tgt strong --sync-bn-src --mean-enc 2 --mean-enc-src 2")
CUT = f"{PREFERRED} --epochs 2"
SYNC = "--bn-groups 1 --multicrop-src --num-small 2 --scalemix-src --mean-enc 2"


@pytest.fixture(scope="session")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("images"), 96)  # of one size: decoded once


@pytest.fixture(scope="session")
def mixed_tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("mixed"), 96, sizes=(20, 24, 31))  # decoded at each step


def argv(method, tree, out, flags=""):
    return f"--data {tree} --out {out} {SMALL} {SCRIPTS[method]} --epochs 3 --knn-every 2 {flags}"


def run(pool, world, method, tree, out, flags="", dtype=torch.float64):
    codes = pool.run(world, helper.train, method, argv(method, tree, out, flags), dtype=dtype)
    assert codes == [0] * world, pool.stderr
    return out


def same_logs(a, b):
    a, b = log_lines(a), log_lines(b)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-9, abs=1e-12), x["step"]


def same_state(a, b, exact=False):
    """Weights, buffers, queue and the optimiser's state."""
    a, b = tensors(saved(a)), tensors(saved(b))
    assert a.keys() == b.keys() and len(a) > 100
    for k, x in a.items():
        if not k.startswith("/args"):
            x, y = x.double(), b[k].double()
            limit = 0 if exact else 1e-9 * x.norm().item() + 1e-12
            assert (x - y).norm() <= limit, k


# ---- the number of processes ----


def cases():
    """(method, numbers of processes, flags): the quick ones, then those marked slow."""
    for flags in ("", PREFERRED, OTHER, "--vanilla-head", "--asym-bn --sync-bn-src --bn-scope all"):
        yield pytest.param("mocov2_asym", (1, 2, 4) if flags == PREFERRED else (1, 2), flags)
    for method in list(SCRIPTS)[1:]:
        yield pytest.param(method, (1, 2), PREFERRED)
        yield pytest.param(method, (1, 2), SYNC)
    yield pytest.param("mocov3_asym", (1, 2), "--arch vit_tiny --multicrop-src --num-small 2 --mean-enc 2")
    for method in SCRIPTS:
        yield pytest.param(method, (1, 2, 4), PREFERRED, marks=pytest.mark.slow)
        yield pytest.param(method, (1, 2, 4), OTHER, marks=pytest.mark.slow)
        yield pytest.param(method, (1, 2, 4), SYNC, marks=pytest.mark.slow)
        if method != "mocov2_asym":
            yield pytest.param(method, (1, 2, 4), "--symmetrize --bn-groups 1", marks=pytest.mark.slow)
    yield pytest.param("simclr_asym", (1, 2), "--negatives all", marks=pytest.mark.slow)


@pytest.mark.parametrize("method, worlds, flags", list(cases()))
def test_runs_of_1_2_and_4_processes_agree(pool, method, worlds, flags, tree, mixed_tree, tmp_path):
    """Two steps; MoCo v2 measures kNN and variances too, in blocks that all scripts share."""
    images = mixed_tree if flags == PREFERRED and method == "mocov2_asym" else tree
    short = "--steps 2" if method == "mocov2_asym" else "--steps 2 --knn-every 0"
    outs = [run(pool, w, method, images, tmp_path / str(w), f"{flags} {short}") for w in worlds]
    assert len({line["loss"] for line in log_lines(outs[0]) if "loss" in line}) == 2  # it moves
    for out in outs[1:]:
        same_logs(outs[0], out)
        same_state(outs[0], out)


def test_float32_too(pool, tree, tmp_path):
    a, b = (run(pool, w, "byol_asym", tree, tmp_path / str(w), f"{SYNC} --steps 1", torch.float32) for w in (1, 2))
    assert log_lines(a)[1]["loss"] == pytest.approx(log_lines(b)[1]["loss"], rel=1e-4)


def norm_job(groups, parts, shape, affine):
    """This process's outputs and gradients of a BatchNorm, of 24 images in all, and its running statistics."""
    script = importlib.import_module("byol_asym")
    bn = script.BatchNorm(shape[0], groups, affine)
    bn.parts = parts
    x = torch.randn(24, parts, *shape, generator=rng("x")) * 2 + 1
    x = part(x).flatten(0, 1).requires_grad_()
    if affine:
        bn.weight.data.copy_(torch.randn(shape[0], generator=rng("w")))
        bn.bias.data.copy_(torch.randn(shape[0], generator=rng("b")))
    y = bn(x)
    (y * part(torch.randn(24, parts, *shape, generator=rng("g"))).flatten(0, 1)).sum().backward()
    script.sync_buffers(bn)
    grads = [script.all_sum(p.grad) for p in bn.parameters()]
    return y.detach(), x.grad, grads, bn.running_mean, bn.running_var


def naive_norm(groups, parts, shape, affine):
    """The same by a loop over groups and parts, each with PyTorch's own BatchNorm."""
    x = (torch.randn(24, parts, *shape, generator=rng("x")) * 2 + 1).requires_grad_()
    w = torch.randn(shape[0], generator=rng("w")).requires_grad_() if affine else None
    b = torch.randn(shape[0], generator=rng("b")).requires_grad_() if affine else None
    y, means, variances = torch.zeros_like(x), [], []
    for g in range(groups):
        for k in range(parts):
            mean, var = torch.zeros(shape[0]), torch.ones(shape[0])
            rows = torch.zeros_like(x)
            rows[g::groups, k] = F.batch_norm(x[g::groups, k], mean, var, w, b, True)
            y = y + rows
            means.append(mean)
            variances.append(var)
    (y * torch.randn(24, parts, *shape, generator=rng("g"))).sum().backward()
    grads = [w.grad, b.grad] if affine else []
    return y.detach(), x.grad, grads, torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("parts, shape, affine", [(1, (3,), True), (1, (3, 4, 2), False), (3, (2, 3, 3), True)])
def test_batch_norm_is_a_loop_over_groups_on_any_number_of_processes(pool, groups, parts, shape, affine):
    torch.set_default_dtype(torch.float64)
    try:
        y, dx, grads, mean, var = naive_norm(groups, parts, shape, affine)
    finally:
        torch.set_default_dtype(torch.float32)
    for world in (1, 2, 4):
        for r, ours in enumerate(pool.run(world, in_group, norm_job, groups, parts, shape, affine, dtype=torch.float64)):
            assert torch.allclose(ours[0], y[r::world].flatten(0, 1), 1e-9, 1e-9)
            assert torch.allclose(ours[1], dx[r::world].flatten(0, 1), 1e-9, 1e-9)
            for a, b in zip(ours[2], grads, strict=True):
                assert torch.allclose(a, b, 1e-9, 1e-9)
            if parts == 1:
                assert torch.allclose(ours[3], mean, 1e-9) and torch.allclose(ours[4], var, 1e-9)


def collectives_job(x):
    script = importlib.import_module("simclr_asym")
    mine = part(x).clone().requires_grad_()
    kept = mine.detach().clone()
    script.gather_with_gradient(mine).sum(0).square().sum().backward()  # what each process calls its loss
    return script.gather(mine.detach()), script.all_sum(mine.detach().sum(0)), mine.grad, torch.equal(mine, kept)


def test_gather_and_sums(pool):
    x = torch.randn(8, 3, 2, generator=rng(3), dtype=torch.double).flatten(1)
    for world in (1, 2, 4):
        for r, (everything, total, grad, kept) in enumerate(pool.run(world, in_group, collectives_job, x)):
            assert torch.equal(everything, x) and kept  # the global batch in its order, everywhere
            assert torch.allclose(total, x.sum(0))
            assert torch.allclose(grad, world * 2 * x.sum(0).expand(8, -1)[r::world])


# ---- resuming ----


def train_until(method, line, step, deaf):
    """A run in which a process (of two, the other than deaf) gets SIGTERM in the middle of a step."""
    script, me = importlib.import_module(method), int(os.environ.get("RANK", 0))
    lr_factor = script.lr_factor

    def hit(at, *args):
        if at == step and me != deaf:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_factor(at, *args)

    script.lr_factor = hit
    try:
        return helper.train(method, line)
    finally:
        script.lr_factor = lr_factor


@pytest.mark.parametrize("method", ["mocov2_asym", "barlow_asym"])
def test_a_run_interrupted_twice_is_the_uninterrupted_one_bit_for_bit(pool, method, tree, tmp_path):
    """Epochs have 3 steps: one stop within the first, by a signal; one within the second, by --steps."""
    whole = run(pool, 1, method, tree, tmp_path / "whole", CUT)
    line = argv(method, tree, tmp_path / "cut", CUT)
    assert pool.run(1, train_until, method, line, 1, None, dtype=torch.float64) == [128 + signal.SIGTERM]
    assert saved(tmp_path / "cut")["step"] == 2 and log_lines(tmp_path / "cut")[-1]["step"] == 2
    run(pool, 1, method, tree, tmp_path / "cut", f"{CUT} --steps 5")
    run(pool, 1, method, tree, tmp_path / "cut", CUT)
    same_state(whole, tmp_path / "cut", exact=True)
    ours, theirs = log_lines(tmp_path / "cut"), log_lines(whole)
    assert all(ours[5].pop(k) is not None for k in ("v_src", "v_tgt", "knn"))  # --steps measures at its end
    assert ours == theirs


def test_a_run_continues_on_two_processes_and_back_on_one(pool, tree, tmp_path):
    """Of two processes, one gets the signal: both stop after the same step."""
    whole = run(pool, 1, "mocov2_asym", tree, tmp_path / "whole", PREFERRED)
    line = argv("mocov2_asym", tree, tmp_path / "cut", PREFERRED)
    stop = 128 + signal.SIGTERM
    assert pool.run(1, train_until, "mocov2_asym", line, 1, None, dtype=torch.float64) == [stop]
    assert pool.run(2, train_until, "mocov2_asym", line, 3, 0, dtype=torch.float64) == [stop, stop]
    assert saved(tmp_path / "cut")["step"] == 4
    run(pool, 1, "mocov2_asym", tree, tmp_path / "cut", PREFERRED)
    same_logs(whole, tmp_path / "cut")
    same_state(whole, tmp_path / "cut")


def dropping(method, line):
    """A run whose source drops features, with the global generator."""
    script = importlib.import_module(method)
    over_crops = script.over_crops
    script.over_crops = lambda loss, z_src, z_tgt: over_crops(loss, [F.dropout(z) for z in z_src], z_tgt)
    try:
        return helper.train(method, line)
    finally:
        script.over_crops = over_crops


def test_dropout_resumes_exactly(pool, tree, tmp_path):
    line = argv("byol_asym", tree, tmp_path / "whole", "--steps 5")
    assert pool.run(1, dropping, "byol_asym", line) == [0]
    for steps in (2, 5):
        line = argv("byol_asym", tree, tmp_path / "cut", f"--steps {steps}")
        assert pool.run(1, dropping, "byol_asym", line) == [0]
    same_state(tmp_path / "whole", tmp_path / "cut", exact=True)


# ---- real commands ----


def command(line, *launcher):
    words = [sys.executable, *launcher, str(ROOT / "mocov2_asym.py"), *line.split()]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_nproc_and_torchrun_print_the_losses_of_one_process(pool, tree, tmp_path):
    flags = "--steps 2 --asym-bn --knn-every 0"
    outs = [tmp_path / name for name in ("one", "nproc", "torchrun")]
    torchrun = f"-m torch.distributed.run --nproc_per_node=2 --master_addr 127.0.0.1 --master_port {free_port()}".split()
    processes = [command(argv("mocov2_asym", tree, outs[1], f"{flags} --nproc 2")),
                 command(argv("mocov2_asym", tree, outs[2], flags), *torchrun)]
    run(pool, 1, "mocov2_asym", tree, outs[0], flags, torch.float32)
    expected = [line["loss"] for line in log_lines(outs[0])]
    for process in processes:
        text, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        losses = [float(loss) for loss in re.findall(r"step \d+  loss ([\d.]+)", text)]
        assert losses == pytest.approx(expected, abs=1e-3) and len(losses) == 2  # one process prints
