"""A run is a function of its flags and its seed: not of the number of processes, not of interruptions."""

import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pool as helper
import pytest
import torch
import torch.multiprocessing as mp
from pool import ROOT, SCRIPTS, Pool, class_tree, close, free_port, in_group, log_lines, part, saved, tensors
from torch import nn

from common import data
from common.augment import rng

# float32 sums in another order differ in the last of 24 bits (6e-8), and training multiplies differences.
# With eight images in a BN group and this learning rate they stay near 3e-6 for some steps, but where a ReLU
# flips: then gradients, and what starts at 0 and moves with them, differ by one per cent. With two images in
# a group (outputs of nearly +1 and -1), or ten times the rate, five steps make much more of them. A gradient,
# shuffle or group that is wrong shows by a tenth or more.
RTOL, FLIP = 1e-3, 0.03
SMALL = helper.SMALL.replace("--batch-size 16 --bn-groups 8", "--batch-size 32 --bn-groups 4 --warmup-epochs 0.5")
RATES = {"mocov2_asym": 0.003, "simsiam_asym": 0.003}  # with SGD; with LARS, whose steps follow the weights' norms:
LARS_RATE = 3.0
PREFERRED = "--multicrop-src --num-small 2 --scalemix-src --asym-aug --aug-src strong --asym-bn --mean-enc 2"
OTHER = ("--multicrop-src --multicrop-tgt --num-small 1 --scalemix-src --scalemix-tgt --aug-src weak "
         "--aug-tgt strong --sync-bn-src --mean-enc 2 --mean-enc-src 2")


@pytest.fixture(scope="session")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture
def method(request):
    """MoCo v2, which stands for all where nothing but shared blocks is tested: they are byte-identical."""
    return getattr(request, "param", "mocov2_asym")


each = pytest.mark.parametrize("method", SCRIPTS, indirect=True)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("images"), 96)  # 96 images of one size: decoded once


@pytest.fixture(scope="session")
def mixed_tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("mixed"), 96, sizes=(20, 24, 31))  # decoded at each step


def argv(method, tree, out, flags=""):
    small = SMALL if "multicrop" in flags else SMALL.replace("--small-size 8 ", "")
    small += f" --lr {0.003 if 'vit' in flags else RATES.get(method, LARS_RATE)}"
    return f"--data {tree} --out {out} {small} {SCRIPTS[method]} --epochs 3 --knn-every 2 {flags}"


def run(pool, world, method, tree, out, flags="", exits=0):
    codes = pool.run(world, helper.train, method, argv(method, tree, out, flags))
    assert codes == [exits] * world, pool.stderr
    return out


def same_logs(a, b, exact=False):
    a, b = log_lines(a), log_lines(b)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            rel = FLIP if k == "grad_norm" else RTOL
            loose = 0.12 if k == "knn" else 1e-6  # one of nine queries
            assert x[k] == (y[k] if exact else pytest.approx(y[k], rel=rel, abs=loose)), (x["step"], k)


def alike(x, y, flips):
    """Relative to the tensor's norm: true zeros (gradients of biases before BN) have no relative error."""
    x, y = x.double(), y.double()
    return (x - y).norm() <= (FLIP if flips else RTOL) * x.norm() + 1e-6


def with_gradient(name, x):
    """What of a tensor the loss depends on. Attention does not change if all keys shift, nor BN if all features do; so the
    keys' and the last LayerNorm's bias have no gradient but rounding, of which Adam makes whole steps."""
    return x.chunk(3)[::2] if name.endswith("in_proj_bias") else () if name.endswith("encoder.ln.bias") else (x,)


def begins_at_0(name, method):
    """Biases, and in BYOL and SimCLR the last BatchNorm's weight of each residual block."""
    return "bias" in name or (name.endswith("bn2.weight") and method in ("byol_asym", "simclr_asym"))


def same_state(a, b, exact=False):
    method, a, b = saved(a)["method"], tensors(saved(a)), tensors(saved(b))
    assert a.keys() == b.keys() and len(a) > 100
    for k, x in a.items():
        if not k.startswith("/args"):
            assert not exact or torch.equal(x, b[k]), k
            for ours, theirs in zip(with_gradient(k, x), with_gradient(k, b[k]), strict=True):
                assert exact or alike(ours, theirs, "optimizer" in k or begins_at_0(k, method)), k


# ---- the number of processes ----


def features_of_a_folder(folder):
    """kNN's features of raw pixels, their labels, and how many images this process found unreadable."""
    script, run = importlib.import_module("mocov2_asym"), SimpleNamespace(bad=0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    z, labels = script.features(helper.small_args(script), run, net, data.scan(folder), "cpu")
    return z, labels, run.bad


def test_an_unreadable_image_of_knn_is_counted_once_and_replaced_alike(pool, tmp_path):
    """33 images do not divide by 2: the last round is filled up with the first, which cannot be read."""
    images = class_tree(tmp_path, 33, (20, 24, 31))
    (images / "class0" / "000.png").write_bytes(b"")
    (one,) = pool.run(1, features_of_a_folder, str(images))
    two = pool.run(2, in_group, features_of_a_folder, str(images))
    assert one[2] == 1 and sum(bad for *_, bad in two) == 1
    for z, labels, _ in two:
        assert torch.equal(labels, one[1]) and len(z) == 33
        close(z, one[0])


def agree(pool, worlds, method, tree, tmp_path, flags):
    """An epoch and a third. Buffers and queue are in last.pt with the weights and the optimiser's."""
    outs = [run(pool, w, method, tree, tmp_path / str(w), f"{flags} --steps 4") for w in worlds]
    assert [line["step"] for line in log_lines(outs[0])] == list(range(5))
    assert len({round(line["loss"], 4) for line in log_lines(outs[0])[1:]}) == 4
    for out in outs[1:]:
        same_logs(outs[0], out)
        same_state(outs[0], out)
        for name in ("backbone.pth", "backbone_target.pth"):
            a, b = (torch.load(o / name, weights_only=True) for o in (outs[0], out))
            assert a.keys() == b.keys()
            assert all(alike(x, y, begins_at_0(k, method)) for k in a
                       for x, y in zip(with_gradient(k, a[k]), with_gradient(k, b[k]), strict=True))


@pytest.mark.parametrize("flags", ["", PREFERRED, OTHER, "--vanilla-head", "--asym-bn --sync-bn-src --bn-scope all"])
def test_runs_of_1_2_and_4_processes_agree(pool, method, tree, mixed_tree, tmp_path, flags):
    agree(pool, (1, 2, 4), method, mixed_tree if flags == PREFERRED else tree, tmp_path, flags)


@pytest.mark.parametrize("method", [m for m in SCRIPTS if m != "mocov2_asym"])
@pytest.mark.parametrize("flags", [PREFERRED, OTHER, "--symmetrize --bn-groups 1", "--bn-groups 1 --multicrop-src "
                                   "--num-small 1 --scalemix-src --mean-enc 2"])
def test_runs_of_1_and_2_processes_agree_for_each_method(pool, method, tree, tmp_path, flags):
    agree(pool, (1, 2), method, tree, tmp_path, flags)


@pytest.mark.parametrize("flags", ["--symmetrize --bn-groups 1", "--negatives all"])
def test_simclrs_gathers_pass_the_right_gradient(pool, tree, tmp_path, flags):
    agree(pool, (1, 2, 4), "simclr_asym", tree, tmp_path, flags)


def test_a_vit_on_1_and_2_processes_agrees(pool, tree, tmp_path):
    agree(pool, (1, 2), "mocov3_asym", tree, tmp_path, f"--arch vit_tiny --bn-groups 1 {PREFERRED.replace('--asym-bn', '')}")


def bn_job(method, x, weights, groups):
    """Output, gradients and statistics of a BatchNorm for this process's rows; the loss is a mean."""
    script = importlib.import_module(method)
    torch.manual_seed(0)
    bn = script.BatchNorm(x.shape[1], groups=groups)
    nn.init.uniform_(bn.weight), nn.init.uniform_(bn.bias)
    x = part(x).clone().requires_grad_()
    y = bn(x)
    (y.square() * part(weights)).mean().backward()
    script.sync_buffers(bn)
    return y.detach(), x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var


@pytest.mark.parametrize("shape", [(16, 3), (16, 3, 4, 2)])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_batch_norm_does_not_see_the_processes(pool, method, groups, shape):
    """Against nn.BatchNorm on the whole batch. Gradients as DDP has them: the mean over processes of those of
    each process's mean loss is that of the mean loss; for a process's own x, it is world times that."""
    x, weights = 2 + 3 * torch.randn(shape, generator=rng(1)), torch.rand(shape, generator=rng(2))
    (y, gx, *rest), = pool.run(1, bn_job, method, x, weights, groups)
    if groups == 1:
        torch.manual_seed(0)
        bn, z = (nn.BatchNorm1d if x.ndim == 2 else nn.BatchNorm2d)(3), x.clone().requires_grad_()
        nn.init.uniform_(bn.weight), nn.init.uniform_(bn.bias)
        out = bn(z)
        (out.square() * weights).mean().backward()
        for ours, theirs in zip((y, gx, *rest), (out, z.grad, bn.weight.grad, bn.bias.grad, bn.running_mean,
                                                 bn.running_var), strict=True):
            close(ours, theirs, 1e-4, 1e-6)
    for world in (2, 4):
        parts = pool.run(world, in_group, bn_job, method, x, weights, groups)
        together = [torch.stack(t, 1).flatten(0, 1) for t in list(zip(*parts, strict=True))[:2]]
        close(together[0], y, 1e-4, 1e-5)
        close(together[1] / world, gx, 1e-4, 1e-6)
        for i, expected in enumerate(rest):
            values = [p[2 + i] for p in parts]
            close(sum(values) / world, expected, 1e-4, 1e-5)
            assert i < 2 or all(torch.equal(v, values[0]) for v in values)  # statistics: everywhere


def collectives_job(method, x):
    script = importlib.import_module(method)
    p = part(x).clone().requires_grad_()
    total = script.SumOverProcesses.apply(p.sum(0))
    (total.square().sum() / script.world_size()).backward()
    assert torch.equal(x[script.mine()], part(x))
    assert not script.gather(p).requires_grad and not script.all_sum(p).requires_grad
    kept = p.detach().clone()
    return script.gather(p), script.all_sum(p.detach()), total.detach(), p.grad, torch.equal(kept, p)


def test_gather_and_sums(pool, method):
    x = torch.randn(8, 3, 2, generator=rng(3)).transpose(1, 2)  # not contiguous
    grad = 2 * x.sum(0).expand(8, 2, 3)  # of the sum over processes of what each calls its loss
    for world in (1, 2, 4):
        results = pool.run(world, in_group, collectives_job, method, x)
        for r, (everything, sums, total, g, kept) in enumerate(results):
            assert torch.equal(everything, x) and kept  # the global batch in its order, everywhere
            close(sums, sum(x[i::world] for i in range(world)), 1e-5, 1e-6)
            close(total, x.sum(0), 1e-5, 1e-5)
            close(g, grad[r::world], 1e-5, 1e-5)


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


@pytest.fixture(scope="module")
def whole(pool, tree, tmp_path_factory):
    """An uninterrupted run of one process for each method."""
    outs = {}

    def get(method):
        if method not in outs:
            outs[method] = run(pool, 1, method, tree, tmp_path_factory.mktemp("whole"), PREFERRED)
        return outs[method]

    return get


@each
def test_a_run_interrupted_twice_is_the_uninterrupted_one_bit_for_bit(pool, method, tree, whole, tmp_path):
    """Epochs have 3 steps: one stop within the first, by a signal; one within the second, by --steps."""
    line = argv(method, tree, tmp_path, PREFERRED)
    assert pool.run(1, train_until, method, line, 1, None) == [128 + signal.SIGTERM]
    assert saved(tmp_path)["step"] == 2 and log_lines(tmp_path)[-1]["step"] == 2
    run(pool, 1, method, tree, tmp_path, f"{PREFERRED} --steps 5")
    assert saved(tmp_path)["step"] == 5
    run(pool, 1, method, tree, tmp_path, PREFERRED)
    same_state(whole(method), tmp_path, exact=True)
    ours, theirs = log_lines(tmp_path), log_lines(whole(method))
    assert [x["step"] for x in ours] == [x["step"] for x in theirs] == list(range(10))
    assert all(ours[5].pop(k) is not None for k in ("v_src", "v_tgt", "knn"))  # --steps measures at its end
    assert ours == theirs


def test_a_run_that_died_continues_from_what_it_saved(pool, method, tree, whole, tmp_path, monkeypatch):
    """Steps logged after the last save, and half a line, give way to those that are done again."""
    script = importlib.import_module(method)
    with monkeypatch.context() as patch:
        f = script.lr_factor
        patch.setattr(script, "lr_factor", lambda step, *a: f(step, *a) if step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script.main(argv(method, tree, tmp_path, PREFERRED).split())
    assert saved(tmp_path)["step"] == 3 and log_lines(tmp_path)[-1]["step"] == 5
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 6, "epo')
    run(pool, 1, method, tree, tmp_path, PREFERRED)
    same_state(whole(method), tmp_path, exact=True)
    same_logs(whole(method), tmp_path, exact=True)


def test_a_run_continues_on_two_processes_and_back_on_one(pool, method, tree, whole, tmp_path):
    """Of two processes, one gets the signal: both stop after the same step."""
    line = argv(method, tree, tmp_path, PREFERRED)
    assert pool.run(1, train_until, method, line, 1, None) == [128 + signal.SIGTERM]
    assert pool.run(2, train_until, method, line, 3, 0) == [128 + signal.SIGTERM] * 2
    assert saved(tmp_path)["step"] == 4
    run(pool, 1, method, tree, tmp_path, PREFERRED)
    same_logs(whole(method), tmp_path)
    same_state(whole(method), tmp_path)


def test_each_step_draws_its_own_views(method, tree, tmp_path, monkeypatch):
    script, seeds = importlib.import_module(method), []
    make_views = script.make_views
    spy = lambda plan, crops, n, generator, stats: (seeds.append(generator.initial_seed())
                                                    or make_views(plan, crops, n, generator, stats))
    monkeypatch.setattr(script, "make_views", spy)
    script.main(argv(method, tree, tmp_path, "--steps 5").split())
    assert [seeds.count(rng(0, "views", step).initial_seed()) for step in range(5)] == [1] * 5


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def refusal(method, line, capsys):
    with pytest.raises(SystemExit) as e:
        importlib.import_module(method).main(line.split())
    assert e.value.code == 2
    return capsys.readouterr().err


def test_the_same_command_again(method, tree, tmp_path, capsys):
    """Does nothing once the run is complete; refuses other arguments; starts again with --overwrite."""
    main, steps = importlib.import_module(method).main, "--steps 1"
    main(argv(method, tree, tmp_path, steps).split())
    done, first = contents(tmp_path), tensors(saved(tmp_path))
    main(argv(method, tree, tmp_path, steps).split())
    assert "complete" in capsys.readouterr().out and contents(tmp_path) == done
    for flags, named in (("--wd 0.01", ["--wd", "0.0005 there", "0.01 here"]),
                         ("--asym-bn", ["--asym-bn", "False there"]),
                         ("--seed 3 --mean-enc 2", ["--seed 0 there, 3 here", "--mean-enc 1 there, 2 here"])):
        error = refusal(method, argv(method, tree, tmp_path, f"{steps} {flags}"), capsys)
        assert all(word in error for word in [*named, "--overwrite"])
        assert error.count("there") == flags.count("--")
        assert contents(tmp_path) == done
    main(argv(method, tree, tmp_path, f"{steps} --log-every 3 --save-every 2 --workers 2").split())
    main(argv(method, tree, tmp_path, f"{steps} --overwrite --seed 3").split())
    again = tensors(saved(tmp_path))
    assert json.loads((tmp_path / "args.json").read_text())["args"]["seed"] == 3
    assert [line["step"] for line in log_lines(tmp_path)] == [0, 1]
    assert any(not torch.equal(x, again[k]) for k, x in first.items() if "model" in k)
    for bad in ((tmp_path / "last.pt").read_bytes()[:5000], b"no checkpoint"):
        (tmp_path / "last.pt").write_bytes(bad)
        before = contents(tmp_path)
        error = refusal(method, argv(method, tree, tmp_path, f"{steps} --seed 3"), capsys)
        assert str(tmp_path) in error and "cannot be used" in error and "--overwrite" in error
        assert "Traceback" not in error and contents(tmp_path) == before
    main(argv(method, tree, tmp_path, f"{steps} --seed 3 --overwrite").split())
    resumed = tensors(saved(tmp_path))
    assert all(torch.equal(x, again[k]) for k, x in resumed.items())


# ---- real commands ----


def loaders_method(method):
    """How loader workers are started in a child of --nproc, here itself one that was spawned."""
    script, found = importlib.import_module(method), []
    guard, script.guard = script.guard, lambda args: found.append(mp.get_start_method())
    method, threads = mp.get_start_method(), torch.get_num_threads()
    try:
        script.child(0, "--data demo".split(), 1, free_port())
    except SystemExit as e:
        assert not e.code
    finally:
        script.guard = guard  # and all else as it was, since this process has other jobs to do
        mp.set_start_method(method, force=True)
        torch.set_num_threads(threads)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return found


def test_children_of_nproc_start_loader_workers_as_one_process_does(pool):
    assert pool.run(1, loaders_method, "mocov2_asym") == [[multiprocessing.get_all_start_methods()[0]]]


def command(method, line, *launcher):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    strict = [] if launcher else ["-W", "error"]  # torchrun's own warnings are not ours
    words = [sys.executable, *strict, *launcher, str(ROOT / f"{method}.py"), *line.split()]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                            env=environment, start_new_session=True)


def printed(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, re.findall(r"step (\d+)  loss ([\d.]+)", out)


def test_nproc_and_torchrun_print_the_losses_of_one_process(pool, method, tree, tmp_path):
    flags = "--steps 2 --asym-bn"
    outs = [tmp_path / name for name in ("one", "nproc", "torchrun")]
    a = command(method, argv(method, tree, outs[1], f"{flags} --nproc 2"))
    torchrun = "-m torch.distributed.run --nproc_per_node=2 --master_addr 127.0.0.1 --master_port".split()
    b = command(method, argv(method, tree, outs[2], flags), *torchrun, str(free_port()))
    run(pool, 1, method, tree, outs[0], flags)
    for (text, lines), out in zip((printed(a), printed(b)), outs[1:], strict=True):
        assert len(lines) == 2 and text.count("loss at chance") == 1  # one process prints
        assert "batch 32 = 2 x 16" in text
        for (step, loss), line in zip(lines, log_lines(outs[0])[1:], strict=True):
            assert int(step) == line["step"] and float(loss) == pytest.approx(line["loss"], abs=6e-4)
        same_logs(outs[0], out)


def test_a_real_sigterm_saves_and_the_same_command_continues(pool, method, mixed_tree, tmp_path):
    """To the whole process group, as a scheduler sends it: the loader's workers must not die of it."""
    flags = "--epochs 400 --knn-every 400 --save-every 400 --workers 1"
    process = command(method, argv(method, mixed_tree, tmp_path / "a", flags))
    log, end = tmp_path / "a" / "log.jsonl", time.time() + 60
    while not (log.exists() and '"step": 5,' in log.read_text()):
        assert process.poll() is None and time.time() < end
        time.sleep(0.02)
    second = command(method, argv(method, mixed_tree, tmp_path / "a", flags))
    assert "is in use by another process" in second.communicate(timeout=60)[1] and second.returncode == 2
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    step = saved(tmp_path / "a")["step"]
    assert process.returncode == 128 + signal.SIGTERM and 5 <= step < 1200
    assert f"SIGTERM: saved step {step}" in err and "Traceback" not in err
    for out in ("a", "b"):
        run(pool, 1, method, mixed_tree, tmp_path / out, f"{flags.replace('--workers 1', '')} --steps {step + 3}")
    same_state(tmp_path / "a", tmp_path / "b", exact=True)
    same_logs(tmp_path / "a", tmp_path / "b", exact=True)
