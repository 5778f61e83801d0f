"""The benchmarks run, and their rivals do the same work: timing itself is not tested."""

import argparse
import importlib
import sys

import pytest
import torch
from pool import ROOT, SCRIPTS

sys.path.append(str(ROOT / "tests" / "bench"))
bench, loader, step = (importlib.import_module(name) for name in ("bench", "bench_loader", "bench_step"))
CLI = argparse.Namespace(device="cpu", batch_size=16, recipe="demo", amp="off", channels_last=False, repeats=1)


@pytest.fixture(autouse=True)
def one_thread():
    """The benchmarks set the number of threads for good."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_is_taken_apart(name):
    """One BN group, so that torch's BatchNorm and ours are the same function and the two sets of networks agree."""
    s = step.Stepper(name, "--img-size 16 --bn-groups 1", CLI)
    before = [p.clone() for p in s.model.parameters()]
    src, _, _ = s.views
    a, b = (net.source(torch.cat(src[0])) for net in (s.plain, s.grouped))
    assert torch.allclose(a, b, atol=1e-5)
    s.step()
    s.step()
    assert any(not torch.equal(p, q) for p, q in zip(before, s.model.parameters(), strict=True))
    assert set(s.seconds) == {"views", "crops", "EMA", "rest", "optimiser", "logging"} and len(s.seconds["rest"]) == 2


@pytest.mark.parametrize("mix", [False, True])
def test_the_rival_makes_the_same_views(tmp_path, mix):
    paths = bench.photographs(None, 1, (60, 80))
    views = [bench.pil_view(32, (0.2, 1.0)), bench.pil_view(32, (0.2, 1.0)), bench.pil_view(16, (0.05, 0.14))]
    got = bench.PILImages(paths, views, mix)[0]
    assert [tuple(x.shape) for x in got] == [(3, 32, 32)] * (2 - mix) + [(3, 16, 16)]
    assert all(x.dtype == torch.float32 and -2.2 < x.min() < x.max() < 2.8 for x in got)  # ImageNet's normalisation of [0, 1]


def test_measure_interleaves():
    order = []
    seconds = bench.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]
    ours, theirs = bench.compare({"theirs": [4.0, 6.0, 6.0], "ours": [2.0, 2.0, 1.0]}, 2)[:2], ["3000.00", "1000.00"]
    assert ours == theirs and bench.compare({"theirs": [4.0, 6.0, 6.0], "ours": [2.0, 2.0, 1.0]}, 2)[2:] == ["3.00", "(2.00 to 6.00)"]


def test_growth_counts_work_and_cost(capsys):
    scale = importlib.import_module("bench_scale")
    scale.growth(["images", "ms"], [10, 20, 80], [1.0, 1.5, 3.0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["20", "1500.00", "2.00", "1.50"] and lines[3].split() == ["80", "3000.00", "4.00", "2.00"]
