"""The study of the paper's tables: its cells, its statistics, and that it continues where it stopped."""

import argparse
import importlib
import itertools
import json
import math
import re
import shlex
import sys

import pytest
from pool import ROOT, class_tree

sys.path.append(str(ROOT / "tests" / "study"))
study = importlib.import_module("study")


def test_cells_are_the_papers():
    """26 cells and 22 runs in Sec. 4, with the differences that it prints."""
    assert len(study.SEC4) == 26 and len({study.key(c, 0) for c in study.SEC4}) == 22
    printed = [4.1, -8.7, -4.1, 1.5, -13.0, -1.0, -14.8, 1.4, -19.0, 0.9, -3.6, 0.4, 1.4, -21.5, -1.1, 0.7, 0.2, 2.1, 1.3, -5.9, 1.7]
    # Sec. 4.4 prints -0.9 for 64.7 - 65.8: both are rounded, or a misprint; we have -1.1
    assert [c.paper_delta for c in study.SEC4 if not c.is_base] == printed
    assert [c.paper_delta for c in study.COMPOSITIONS if not c.is_base] == [4.1, 4.6, 5.5]
    assert [c.paper for c in study.TABLE2 if c.row == "BYOL" and not c.is_base] == [70.4, 69.7, 69.9]


@pytest.mark.parametrize("name", study.TABLES)
@pytest.mark.parametrize("recipe", study.RECIPES)
def test_every_cell_is_a_command_that_the_script_takes(name, recipe):
    for cell in study.TABLES[name]:
        script = importlib.import_module(cell.script)
        args = script.parse_args(study.command(cell, 3, recipe, "demo").split()[1:])
        script.check_flags(args, 1)
        assert args.seed == 3


def test_wrong_numbers_and_odd_folders(capsys):
    for flags in ("--table sec4 --jobs 0", "--table sec4 --seeds 0", "--seeds 3", "--report --rows MeanEnc", "--table sec4 --rows Mean X"):
        with pytest.raises(SystemExit):
            study.main(flags.split())
        assert re.search("0 is less than 1|give --table|--rows X: no row begins so; there are MultiCrop", capsys.readouterr().err)
    line = study.command(study.SEC4[0], 0, "micro", "my  photos")
    assert shlex.split(line)[shlex.split(line).index("--data") + 1] == "my  photos"


def test_wanted_has_each_run_once_and_seed_by_seed():
    jobs = study.wanted(study.SEC4, 3, 6)
    assert len(jobs) == len({study.key(*job) for job in jobs}) == 22 * 3 + 3
    seeds = [seed for _, seed in jobs]
    assert seeds == sorted(seeds) and seeds.count(0) == 22 and seeds[-3:] == [3, 4, 5]


def test_rows():
    cells = study.chosen(study.SEC4, ["MeanEnc", "Weaker"], argparse.ArgumentParser())
    assert {c.flags for c in cells} == {"", "--aug-src weak", "--aug-tgt weak", "--aug-src weak --aug-tgt weak", "--mean-enc 2", "--mean-enc 3",
                                        "--mean-enc-src 3", "--mean-enc-src 2 --mean-enc 2"}
    assert [c.row for c in cells if c.is_base] == ["WeakerAug ↓"]
    assert [c.row for c in study.chosen(study.SEC4, ["MeanEnc"], argparse.ArgumentParser()) if c.is_base] == ["MultiCrop ↑"]
    byol = study.chosen(study.TABLE2, ["BYOL"], argparse.ArgumentParser())
    assert len(byol) == 5 and {c.script for c in byol} == {"byol_asym"}
    assert study.chosen(study.SEC4, None, argparse.ArgumentParser()) == study.SEC4


def fake(cell, seed):
    """A run's line: its accuracies depend on flags and seed."""
    x = 50 + 10 * math.sin(len(cell.flags) * 7 + seed)
    return {"script": cell.script, "flags": cell.flags, "seed": seed, "linear": x, "knn": x / 2, "v_src": 1.0, "v_tgt": 2.0 - x / 50, "seconds": 1}


def test_differences_are_paired_by_seed():
    cells = study.COMPOSITIONS
    runs = {study.key(c, s): fake(c, s) for c in cells for s in range(3)}
    del runs[study.key(cells[0], 1)]  # no baseline of seed 1
    del runs[study.key(cells[2], 2)]
    found = study.differences(cells, runs)
    assert cells[0] not in found and [len(found[c]) for c in cells[1:]] == [2, 1, 2]
    assert found[cells[1]][1] == fake(cells[1], 2)["linear"] - fake(cells[0], 2)["linear"]
    deltas = study.deltas(cells, runs, "knn")
    groups = [[x / 2 for x in found[c]] for c in cells[1:]]
    naive = sum((x - sum(g) / len(g)) ** 2 for g in groups for x in g) / (5 - 3)
    for c, g in zip(cells[1:], groups, strict=True):
        assert deltas[c].mean == pytest.approx(sum(g) / len(g)) and deltas[c].se == pytest.approx((naive / len(g)) ** 0.5)


def test_runs_in_several_cells_count_once():
    twice = [*study.COMPOSITIONS, *study.COMPOSITIONS]
    runs = {study.key(c, s): fake(c, s) for c in twice for s in range(2)}
    assert len(study.claim(twice, runs, "own")) == 6 and not study.claim(twice, runs, "base")
    assert study.mean_ratio([{"v_base": {"v_src": 1.0, "v_tgt": v}} for v in (2.0, 8.0)], "base") == pytest.approx(4)
    one = study.deltas(study.COMPOSITIONS, runs, "linear")
    assert {c: d.se for c, d in study.deltas(twice, runs, "linear").items()} == {c: d.se for c, d in one.items()}


def test_binomial_tail_counts_coins():
    for k in range(6):
        throws = [sum(t) >= k for t in itertools.product((0, 1), repeat=5)]
        assert study.binomial_tail(k, 5) == pytest.approx(sum(throws) / len(throws))


def options(tmp_path, **changes):
    return argparse.Namespace(**{"data": "demo", "recipe": "micro", "seeds": 1, "base_seeds": 1, "jobs": 1, "budget_minutes": math.inf,
                                 "work": str(tmp_path / "work"), **changes})


def test_study_continues_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "HERE", tmp_path)
    ran = []
    monkeypatch.setattr(study, "run", lambda cell, seed, args: ran.append(study.key(cell, seed)) or fake(cell, seed))
    args, cells = options(tmp_path), study.COMPOSITIONS
    study.study(cells[:2], args)
    path = study.results_file(args)
    with open(path, "a") as f:  # killed while it wrote
        f.write('{"script": "mocov2_asym", "fl')
    study.study(cells, args)
    assert ran == [study.key(c, 0) for c in cells] and len(path.read_text().splitlines()) == 4
    study.study(cells, options(tmp_path, seeds=2, base_seeds=2, budget_minutes=0))
    assert "time is up: 4 runs are left" in capsys.readouterr().out and len(ran) == 4
    study.study(cells, options(tmp_path, seeds=2, base_seeds=2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    study.report("compositions", cells, args)
    said = capsys.readouterr().out
    assert said.count("| compositions |") == 4 and "no matplotlib, no figures" in said
    right = sum(d.mean > 0 for d in study.deltas(cells, study.read(path), "linear").values())  # the paper's are all positive
    assert f"linear probe: {right} of 3 signs agree" in said


def test_one_run(tmp_path, monkeypatch):
    """Trained, probed and recorded by the scripts' own command lines; the second time it is there."""
    monkeypatch.setitem(study.RECIPES, "micro", "--recipe demo --img-size 16 --batch-size 16 --epochs 2 --hidden 16 --queue 16 --workers 0")
    monkeypatch.setitem(study.SMALL_CROPS, "micro", "--small-size 8")
    args = options(tmp_path, data=str(class_tree(tmp_path / "images")))
    cell = next(c for c in study.SEC4 if c.flags == "--multicrop-src")
    line = study.run(cell, 1, args)
    base = study.run(study.SEC4[0], 1, args)
    folder = study.folder(cell.script, cell.flags, 1, args)
    assert {p.name for p in (tmp_path / "work").iterdir()} == {folder.name, "mocov2_asym-seed1"}
    mean = next(c for c in study.SEC4 if c.flags == "--mean-enc 2")
    v_base, v = (study.variances_on_baseline(c, 1, args) for c in (study.SEC4[0], mean))
    assert v["v_src"] == v_base["v_src"] == base["v_src"] != base["v_tgt"] and v["v_tgt"] < 0.8 * v_base["v_tgt"]
    log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert line["steps"] == 8 and line["knn"] == 100 * log[-1]["knn"] and line["v_src"] == log[-1]["v_src"] > 0
    assert 0 <= line["linear"] <= 100 and log[0]["args"]["small_size"] == 8 and log[0]["args"]["seed"] == 1
    assert line["commit"] is None or re.fullmatch("[0-9a-f]{7,}(-dirty)?", line["commit"])
    monkeypatch.setitem(study.RECIPES, "micro", "--recipe demo --img-size 7")
    with pytest.raises(SystemExit, match="this command failed, exit code 2(.|\n)*views of 7 px are too small"):
        study.run(cell, 2, args)
