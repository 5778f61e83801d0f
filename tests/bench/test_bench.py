"""The benchmarks run, and their rivals do the same work; timing itself is not tested. And a step
dispatches no more operations than it did: what costs time on a GPU, counted on a CPU."""

import argparse

import bench
import bench_scale
import bench_step
import pytest
import torch
from pool import SCRIPTS

CLI = argparse.Namespace(device="cpu", batch_size=16, recipe="demo", amp="off", channels_last=False, repeats=1)
DESIGNS = "--multicrop-src --scalemix-src --aug-src strong --asym-aug --mean-enc 2"
MOST = {"": (950, 1550), DESIGNS: (2900, 3700)}  # operations of the views, and of the step


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


@pytest.mark.parametrize("name", SCRIPTS)
def test_operations_of_a_step(name):
    for flags, most in MOST.items():
        found = bench_step.Stepper(name, f"--img-size 16 --small-size 8 {flags}", CLI).operations()
        assert found[0] <= most[0] and found[1] <= most[1], (flags, found)


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
