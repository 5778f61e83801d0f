"""What disturbs a run: signals, deaths, broken files and images, numbers that are not finite, changed code."""

import importlib
import json
import pickle
import signal
import sys
from pathlib import Path

import drill
import pool as helper
import pytest
import torch
from pool import ROOT, SCRIPTS, SMALL, class_tree, log_lines, saved, tensors

from common import data

SCRIPT = "mocov2_asym"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return drill.Place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("images"), 64)


@pytest.fixture
def script():
    return importlib.import_module(SCRIPT)


def argv(tree, out, flags="", method=SCRIPT):
    return f"--data {tree} --out {out} {SMALL} {SCRIPTS[method]} --epochs 3 --warmup-epochs 0 --knn-every 0 {flags}".split()


def refusal(script, line, capsys):
    """What a command that must not work says: one line, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        script.main(line)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1, said
    return said


# ---- signals and deaths; the long forms are slow ----

QUICK = [("python", signal.SIGTERM), ("--nproc 2", signal.SIGUSR1)]
SLOW = [(a, n) for a in drill.LAUNCHERS for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if (a, n) not in QUICK]


@pytest.mark.parametrize("launcher, number", QUICK + [pytest.param(*x, marks=pytest.mark.slow) for x in SLOW])
def test_a_signal_finishes_the_step_saves_and_exits(place, launcher, number, tmp_path):
    drill.signalled(place, tmp_path, launcher, number)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", drill.LAUNCHERS)
def test_kill_9_loses_no_more_than_save_every(place, launcher, tmp_path):
    assert drill.killed(place, tmp_path, launcher) > 0


@pytest.mark.slow
def test_torchrun_restarts_a_dead_process(place, tmp_path):
    drill.restarted(place, tmp_path)


def test_a_run_killed_while_it_writes_keeps_the_old_checkpoint(script, tree, tmp_path, monkeypatch):
    script.main(argv(tree, tmp_path / "cut", "--steps 4"))
    torch_save, written = torch.save, []

    def dying_save(content, path):
        written.append(path)
        if Path(path).name == "last.pt.tmp":
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        torch_save(content, path)

    monkeypatch.setattr(torch, "save", dying_save)
    with pytest.raises(KeyboardInterrupt):
        script.main(argv(tree, tmp_path / "cut"))
    monkeypatch.undo()
    assert written and saved(tmp_path / "cut")["step"] == 4 and log_lines(tmp_path / "cut")[-1]["step"] == 8
    with open(tmp_path / "cut" / "log.jsonl", "a") as log:
        log.write('{"step": 9, "epo')  # as a kill in mid-write leaves it
    script.main(argv(tree, tmp_path / "cut"))
    script.main(argv(tree, tmp_path / "whole"))
    a, b = tensors(saved(tmp_path / "whole")), tensors(saved(tmp_path / "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith("/args"))
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "cut")


def test_overwrite_does_not_act_again_when_torchrun_restarts(script, tree, tmp_path, monkeypatch, capsys):
    script.main(argv(tree, tmp_path, "--steps 2"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    script.main(argv(tree, tmp_path, "--steps 3 --overwrite"))
    assert "resuming at step 2" in capsys.readouterr().out
    monkeypatch.undo()
    script.main(argv(tree, tmp_path, "--steps 3 --overwrite"))
    assert "resuming" not in capsys.readouterr().out


# ---- the run's folder ----


def test_other_arguments_are_refused_with_the_difference_and_others_may_differ(script, tree, tmp_path, capsys, monkeypatch):
    script.main(argv(tree, tmp_path, "--steps 2"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    said = refusal(script, argv(tree, tmp_path, "--seed 3 --mean-enc 2"), capsys)
    assert "seed 0 there, 3 here" in said and "mean_enc 1 there, 2 here" in said and "--overwrite" in said
    assert said.count("there") == 2 and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.chdir(tree.parent)  # the same images by another path
    script.main(argv(tree.name, tmp_path, "--steps 2 --log-every 3 --save-every 2"))
    assert "complete" in capsys.readouterr().out
    other = class_tree(tmp_path / "other", 48)
    assert "images 64 there, 48 here" in refusal(script, argv(other, tmp_path, "--steps 2"), capsys)


@pytest.mark.parametrize("content", [b"no checkpoint", b"", None])
def test_a_broken_last_pt_is_a_line(script, tree, tmp_path, capsys, content):
    script.main(argv(tree, tmp_path, "--steps 2"))
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:5000] if content is None else content)
    assert str(last) in refusal(script, argv(tree, tmp_path), capsys)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_code_in_a_file_is_not_run(script, tree, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, flags in (("last.pt", ""), ("weights.pth", "--init weights.pth")):
        torch.save({"step": 1, "args": Bomb()}, name)
        assert name in refusal(script, argv(tree, tmp_path, flags), capsys)
        Path(name).unlink()
    Path("last.pt").write_bytes(pickle.dumps(Bomb()))
    refusal(script, argv(tree, tmp_path), capsys)
    assert not Path("exploded").exists()


def test_changed_code_is_announced_and_goes_on(script, tree, tmp_path, capsys):
    script.main(argv(tree, tmp_path, "--steps 2"))
    copy = tmp_path / f"{SCRIPT}.py"
    assert copy.read_bytes() == Path(ROOT, f"{SCRIPT}.py").read_bytes()
    script.main(argv(tree, tmp_path, "--steps 3"))
    assert "note:" not in capsys.readouterr().out
    state = saved(tmp_path)
    torch.save({**state, "args": {**state["args"], "code": "as if other files had begun it"}}, tmp_path / "last.pt")
    for steps in (4, 5):
        script.main(argv(tree, tmp_path, f"--steps {steps}"))
        assert f"{SCRIPT}.py or common/ is not the code that began {tmp_path}" in capsys.readouterr().out
    assert saved(tmp_path)["step"] == 5


def test_weights_that_do_not_fit_are_named(script, tree, tmp_path, capsys):
    script.main(argv(tree, tmp_path, "--steps 2"))
    state = saved(tmp_path)
    state["model"]["surplus"] = state["model"].pop("source.backbone.conv1.weight")
    torch.save(state, tmp_path / "last.pt")
    said = refusal(script, argv(tree, tmp_path), capsys)
    assert "surplus" in said and "source.backbone.conv1.weight" in said


def test_init_starts_both_backbones_from_a_file(script, tree, tmp_path, capsys, monkeypatch):
    script.main(argv(tree, tmp_path / "a", "--steps 2"))
    weights = torch.load(tmp_path / "a" / "backbone.pth")
    torch.save({**weights, "fc.weight": torch.ones(2, 2)}, tmp_path / "torchvision.pth")
    seen = []
    monkeypatch.setattr(script, "train", lambda args, about, model, sets, device: seen.append(model))
    script.main(argv(tree, tmp_path / "b", f"--init {tmp_path}/torchvision.pth"))
    for encoder in (seen[0].source, seen[0].target):
        assert all(torch.equal(v, weights[k]) for k, v in encoder.backbone.state_dict().items())
    torch.save({k: v for k, v in weights.items() if k != "conv1.weight"}, tmp_path / "part.pth")
    assert "conv1.weight" in refusal(script, argv(tree, tmp_path / "c", f"--init {tmp_path}/part.pth"), capsys)
    assert "cannot be read" in refusal(script, argv(tree, tmp_path / "c", "--init nothing.pth"), capsys)


# ---- what a hacker may forget, and switches ----


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_new_parameter_is_trained_or_an_error_that_names_it(method, tree, tmp_path, capsys, monkeypatch):
    script = importlib.import_module(method)

    class Hacked(script.Method):
        def __init__(self, args):
            super().__init__(args)
            self.extra = torch.nn.Linear(2, 2)

    args = helper.small_args(script)
    model, optimizer = Hacked(args), script.Method.optimizer
    script.check_groups(model, optimizer(args, model))
    grouped = [p for group in optimizer(args, model).param_groups for p in group["params"]]
    assert any(p is model.extra.weight for p in grouped)

    Hacked.optimizer = staticmethod(lambda args, model: optimizer(args, script.Method(args)))
    monkeypatch.setattr(script, "Method", Hacked)
    monkeypatch.setattr(script, "check_groups", lambda model, _, check=script.check_groups: check(
        model, torch.optim.SGD(model.source.parameters(), lr=1.0)))
    assert "extra.weight, extra.bias" in refusal(script, argv(tree, tmp_path, method=method), capsys)


def test_knn_every_0_measures_nothing(script, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *args: 1 / 0)
    script.main(argv(tree, tmp_path))
    assert log_lines(tmp_path)[-1]["step"] == 12 and all("v_src" not in line for line in log_lines(tmp_path))


# ---- numbers ----


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_what_is_not_finite_stops_the_run_and_leaves_last_pt(script, tree, tmp_path, capsys, monkeypatch, where):
    script.main(argv(tree, tmp_path, "--steps 4"))
    before = (tmp_path / "last.pt").read_bytes()
    over_crops = script.over_crops
    if where == "weight":
        monkeypatch.setattr(script, "save", lambda args, about, step, model, optimizer, save=script.save: (
            model.source.projector[0].weight.data.fill_(float("inf")), save(args, about, step, model, optimizer)))
    else:
        factor = float("nan") if where == "loss" else 1.0

        def bad(*args):
            loss = over_crops(*args) * factor
            if where == "gradient":
                loss.register_hook(lambda grad: grad * float("inf"))
            return loss

        monkeypatch.setattr(script, "over_crops", bad)
    said = refusal(script, argv(tree, tmp_path), capsys)
    assert "--lr" in said and "last.pt is as before" in said and (tmp_path / "last.pt").read_bytes() == before


def test_collapse_is_reported(script, tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "spread", lambda z: torch.tensor(0.05))
    script.main(argv(tree, tmp_path, "--steps 1"))
    assert "nearly collapsed" in capsys.readouterr().out


# ---- images ----


@pytest.mark.parametrize("sizes, workers", [((24,), 0), ((20, 24), 0), ((20, 24), 1)])
def test_unreadable_images_are_named_counted_and_replaced(script, sizes, workers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.Images, "unreadable", 0)
    images = class_tree(tmp_path / "images", 64, sizes)
    broken = images / "class1" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    script.main(argv(images, tmp_path / "run", f"--epochs 1 --workers {workers}"))
    said = capsys.readouterr().err
    assert str(broken) in said and "Error" in said
    assert log_lines(tmp_path / "run")[-1]["bad_images"] == said.count(str(broken)) > 0


def test_nothing_readable_is_a_line(script, tmp_path, capsys):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    assert "readable" in refusal(script, argv(tmp_path, tmp_path / "run"), capsys) or sys.platform == "win32"


def test_a_log_line_has_the_promised_fields(script, tree, tmp_path):
    script.main(argv(tree, tmp_path, "--steps 2 --knn-every 1"))
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["command"] and first["method"] == SCRIPT and first["torch"] == torch.__version__
    fields = set("step epoch loss chance lr m std_src std_tgt grad_norm img_s data_frac mem_gb eta_s bad_images".split())
    lines = log_lines(tmp_path, drop=())
    assert fields == lines[1].keys() and fields | {"knn", "v_src", "v_tgt"} == lines[2].keys()
