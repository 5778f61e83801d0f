"""The benchmarks run, and their rivals do the same work; timing itself is not tested. And what a
step asks of a GPU stays within bounds."""

import argparse

import bench
import bench_launches
import bench_scale
import bench_step
import pytest
import torch
from pool import SCRIPTS

CLI = argparse.Namespace(device="cpu", batch_size=16, recipe="demo", amp="off", repeats=1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_is_taken_apart(name):
    """One BN group, so that torch's BatchNorm and ours are the same function and the two sets of networks agree."""
    s = bench_step.Stepper(name, "--img-size 16 --bn-groups 1", CLI)
    before = [p.clone() for p in s.model.parameters()]
    src, _, _ = s.views
    a, b = (net.source(src)[0] for net in (s.plain, s.grouped))
    assert torch.allclose(a, b, atol=1e-5)
    s.step()
    s.step()
    assert any(not torch.equal(p, q) for p, q in zip(before, s.model.parameters(), strict=True))
    assert set(s.seconds) == {"views", "crops", "EMA", "rest", "optimiser", "logging"} and len(s.seconds["rest"]) == 2


@pytest.mark.parametrize("name, design, views, ratio, exchanges", [
    ("mocov2_asym", "", 160, 2.3, 5), ("mocov2_asym", "--multicrop-src", 320, 2.7, 5),
    ("mocov2_asym", bench_launches.ALL_ON, 560, 3.4, 6), ("byol_asym", "", 165, 5.5, 47)])
def test_what_a_step_asks_of_a_gpu(name, design, views, ratio, exchanges):
    """Launches for the views, and in all as a multiple of the networks' own; exchanges; bytes. It
    waits in the logging only. Tiny networks, eight processes of 32 images."""
    flags = f"--arch tiny --img-size 64 --small-size 48 {SCRIPTS[name]} {design}"
    step, plain, logging = bench_launches.count(name, flags, 8)
    assert step.launches["views"] <= views and step.exchanges <= exchanges
    assert step.launches.total() <= ratio * plain.launches.total()
    assert step.gigabytes() <= 1.1 * plain.gigabytes()
    assert logging and not step.waits


@pytest.mark.parametrize("mix", [False, True])
def test_the_rival_makes_the_same_views(mix):
    paths = bench.photographs(None, 1, (60, 80))
    views = [bench.pil_view(32, (0.2, 1.0)), bench.pil_view(32, (0.2, 1.0)), bench.pil_view(16, (0.05, 0.14))]
    got = bench.PILImages(paths, views, mix)[0]
    assert [tuple(x.shape) for x in got] == [(3, 32, 32)] * (2 - mix) + [(3, 16, 16)]
    assert all(x.dtype == torch.float32 and -2.2 < x.min() < x.max() < 2.8 for x in got)  # ImageNet's normalisation of [0, 1]


def test_measure_interleaves():
    order = []
    seconds = bench.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]
    assert bench.compare({"theirs": [4.0, 6.0, 6.0], "ours": [2.0, 2.0, 1.0]}, 2) == ["3000.00", "1000.00", "3.00", "(2.00 to 6.00)"]


def test_growth_counts_work_and_cost(capsys):
    bench_scale.growth(["images", "ms"], [10, 20, 80], [1.0, 1.5, 3.0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["20", "1500.00", "2.00", "1.50"] and lines[3].split() == ["80", "3000.00", "4.00", "2.00"]
