"""What disturbs a run: signals, deaths, broken files and images, numbers that are not finite,
changed code. MoCo v2 stands for all six where the code is shared."""

import importlib
import itertools
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import drill
import pool as helper
import pytest
import torch
from drill import EPOCH, Command
from pool import ROOT, SCRIPTS, SMALL, class_tree, free_port, log_lines, saved

from common import data

SCRIPT = "mocov2_asym"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return drill.Place(tmp_path_factory.mktemp("faults"), SCRIPT)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("images"), 64)


@pytest.fixture
def script():
    return importlib.import_module(SCRIPT)


def argv(tree, out, flags="", method=SCRIPT):
    return (f"--data {tree} --out {out} {SMALL} {SCRIPTS[method]} --epochs 3 --warmup-epochs 0 "
            f"--knn-every 0 {flags}").split()


def refusal(script, line, capsys):
    """What a command that must not work says: one line, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        script.main(line)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("kind, said", [("DataError", ""), ("LoaderError", f"{SCRIPT}: why\n")])
def test_wrong_data_end_in_one_line_from_whom_they_met(script, capsys, monkeypatch, kind, said):
    """All processes meet the first; the second may be one's alone, and this is not the first."""
    def work(args):
        raise getattr(data, kind)("where\nwhy")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("sys.argv", [f"{SCRIPT}.py"])
    with pytest.raises(SystemExit) as e:
        script.guarded(work, None)
    assert e.value.code == 2 and capsys.readouterr().err == said


# ---- signals and deaths ----


@pytest.mark.parametrize("how", ["fork", "pair"])
@pytest.mark.parametrize("number", drill.SIGNALS)
def test_a_signal_finishes_the_step_saves_and_exits(place, script, how, number, monkeypatch):
    """In the middle of step 6, to all processes, loader workers too; or to the second of two."""
    def hit(step, *args, lr_factor=script.lr_factor):
        if step == 5 and how == "fork":
            os.killpg(0, number)
        if step == 5 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), number)
        return lr_factor(step, *args)

    out = place.new()
    with monkeypatch.context() as patch:
        patch.setattr(script, "lr_factor", hit)
        command = Command(place, out, how)
        assert command.wait() == 128 + number, command.said()
    assert drill.sound(out) == 6 == drill.last_step(out)
    assert command.said().count("saved step 6") == 1 and "Traceback" not in command.said()
    place.continues(out, how)


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_an_epoch(place, script, monkeypatch):
    """A moment: a step begins, a file is half written, is about to get its name, has it. First at
    two that lie in the first and the second epoch; then at the nth of the nth attempt, until one
    gets through."""
    out, flags, step = place.new(), "--epochs 2 --workers 0", 0
    lr_factor, save, replace = script.lr_factor, torch.save, os.replace
    for last in itertools.chain([5, 18], itertools.count(1)):
        moments = itertools.count(1)

        def moment(undo=lambda: None, last=last, moments=moments):
            if next(moments) == last:
                undo()
                os.kill(os.getpid(), signal.SIGKILL)

        def half(content, path, moment=moment):
            save(content, path)
            moment(lambda: os.truncate(path, os.path.getsize(path) // 2))

        with monkeypatch.context() as patch:
            patch.setattr(script, "lr_factor", lambda *a, moment=moment: moment() or lr_factor(*a))
            patch.setattr(torch, "save", half)
            patch.setattr(os, "replace",
                          lambda a, b, moment=moment: (moment(), replace(a, b), moment()))
            code = (command := Command(place, out, "fork", flags)).wait()
        before, step = step, drill.sound(out)
        assert before <= step and drill.last_step(out) - step <= EPOCH
        assert last != 18 or (step, drill.last_step(out)) == (4, 6), "other moments than before"
        if code == 0:
            break
        assert code == -signal.SIGKILL, command.said()
        if (out / "log.jsonl").exists():
            with open(out / "log.jsonl", "a") as log:
                log.write('{"step": 9, "epo')  # as a kill in the middle of a line leaves it
    assert 10 < last < 18 and step == 2 * EPOCH
    place.continues(out, "fork", flags)  # which does nothing but compare


@pytest.mark.parametrize("how", ["--nproc 2", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_launchers_have_the_losses_of_one_process_and_pass_signals_on(place, how):
    flags = "--epochs 100 --asym-bn"
    command = Command(place, place.new(), how, flags)
    place.complete(expected := place.new(), "fork", f"{flags} --steps 2")
    command.until(2)
    os.kill(command.process.pid, signal.SIGTERM)
    code = command.wait(25)  # torchrun would kill after 30 seconds
    said, step = command.said(), drill.sound(command.out)
    assert code == (1 if how == "torchrun" else 128 + signal.SIGTERM), said
    assert said.count(f"saved step {step}") == said.count(" step 1  loss") == 1  # of one process
    losses, ours = ([x["loss"] for x in log_lines(out)] for out in (expected, command.out))
    assert len(losses) == 2 and ours[:2] == pytest.approx(losses, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", drill.FAULTS, ids=str)
def test_drill(place, fault):
    fault[0](place, *fault[1:])


def test_processes_that_torchrun_restarts_do_not_meet_the_dead(place, monkeypatch):
    """Its store outlives them and holds their addresses."""
    out, port = place.new(), free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for restarts, flags in enumerate(("--epochs 2 --steps 3", "--epochs 2")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        said = place.complete(out, "pair", flags)
    assert "resuming at step 3" in said and store.num_keys() > 4
    monkeypatch.undo()
    place.continues(out, "pair")


def test_overwrite_acts_once_if_torchrun_restarts(script, tree, tmp_path, monkeypatch, capsys):
    script.main(argv(tree, tmp_path, "--steps 2"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    script.main(argv(tree, tmp_path, "--steps 3 --overwrite"))
    assert "resuming at step 2" in capsys.readouterr().out
    monkeypatch.undo()
    script.main(argv(tree, tmp_path, "--steps 3 --overwrite"))
    assert "resuming" not in capsys.readouterr().out and saved(tmp_path)["step"] == 3


# ---- the run's folder ----


def test_another_run_is_refused_with_the_difference(script, tree, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    script.main(argv(tree, out, "--steps 2"))
    before = {p: p.read_bytes() for p in out.iterdir()}
    said = refusal(script, argv(tree, out, "--seed 3 --mean-enc 2"), capsys)
    assert "seed 0 there, 3 here" in said and "mean_enc 1 there, 2 here" in said
    assert said.count("there") == 2 and "--overwrite" in said
    other = class_tree(tmp_path / "other", 48)
    assert "images 64 there, 48 here" in refusal(script, argv(other, out, "--steps 2"), capsys)

    monkeypatch.chdir(tree.parent)  # the same images by another path, and flags that may differ
    script.main(argv(tree.name, out, "--steps 2 --log-every 3 --save-every 2"))
    said = capsys.readouterr().out
    assert "complete" in said and f"begun with --data {tree}" in said
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("content", [b"no checkpoint", b"", None])
def test_a_broken_last_pt_is_a_line(script, tree, tmp_path, capsys, content):
    script.main(argv(tree, tmp_path, "--steps 2"))
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:5000] if content is None else content)
    assert f"{last} cannot be read" in refusal(script, argv(tree, tmp_path), capsys)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("flags", ["", "--init last.pt"])
def test_code_in_a_file_is_not_run(script, tree, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    line = argv(tree, "run" if flags else ".", flags)
    torch.save({"step": 1, "args": Bomb()}, "last.pt")
    assert "last.pt" in refusal(script, line, capsys)
    Path("last.pt").write_bytes(pickle.dumps(Bomb()))
    assert "last.pt" in refusal(script, line, capsys)
    assert not Path("exploded").exists()
    pickle.loads(Path("last.pt").read_bytes())  # as if it were trusted
    assert Path("exploded").exists()


@pytest.mark.parametrize("changed", [f"{SCRIPT}.py", "common/data.py"])
def test_changed_code_says_so_and_goes_on(script, tree, tmp_path, capsys, monkeypatch, changed):
    (tmp_path / "common").mkdir()
    for path in (ROOT / f"{SCRIPT}.py", *(ROOT / "common").glob("*.py")):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(script, "__file__", str(tmp_path / f"{SCRIPT}.py"))
    monkeypatch.setattr(data, "__file__", str(tmp_path / "common" / "data.py"))
    out, begun = tmp_path / "run", (tmp_path / f"{SCRIPT}.py").read_bytes()
    note = f"note: {SCRIPT}.py or common/ changed since {out} began"
    for steps in (2, 3, 4, 5):
        script.main(argv(tree, out, f"--steps {steps}"))
        assert (note in capsys.readouterr().out) == (steps > 3)
        if steps == 3:
            with open(tmp_path / changed, "a") as file:
                file.write("# a thought\n")
    assert saved(out)["step"] == 5 and (out / f"{SCRIPT}.py").read_bytes() == begun


def test_weights_that_do_not_fit_are_named(script, tree, tmp_path, capsys):
    script.main(argv(tree, tmp_path, "--steps 2"))
    state = saved(tmp_path)
    state["model"]["surplus"] = state["model"].pop("source.backbone.conv1.weight")
    torch.save(state, tmp_path / "last.pt")
    said = refusal(script, argv(tree, tmp_path), capsys)
    assert "surplus" in said and "source.backbone.conv1.weight" in said


def test_init_starts_both_backbones_from_a_file(script, tree, tmp_path, capsys, monkeypatch):
    script.main(argv(tree, tmp_path / "a", "--steps 2"))
    weights = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True)
    torch.save({**weights, "fc.weight": torch.ones(2, 2)}, tmp_path / "torchvision.pth")
    del weights["conv1.weight"]
    torch.save(weights, tmp_path / "part.pth")
    line = lambda name: argv(tree, tmp_path / "b", f"--init {tmp_path / name}")
    assert "conv1.weight" in refusal(script, line("part.pth"), capsys)
    assert "cannot be read" in refusal(script, line("nothing.pth"), capsys)

    seen = []
    monkeypatch.setattr(script, "train", lambda args, about, model, *_: seen.append(model))
    for name in ("a/backbone.pth", "torchvision.pth"):
        script.main(line(name))
        for encoder in (seen[-1].source, seen[-1].target):
            found = encoder.backbone.state_dict()
            assert all(torch.equal(found[k], weights[k]) for k in weights)


# ---- what a hacker may forget, and switches ----


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_new_parameter_is_trained_or_named(method, tree, tmp_path, capsys, monkeypatch):
    script = importlib.import_module(method)

    class Hacked(script.Method):
        def __init__(self, args):
            super().__init__(args)
            self.extra = torch.nn.Parameter(torch.ones(2, 2))

    args = helper.small_args(script)
    model = Hacked(args)
    optimizer = script.Method.optimizer(args, model)
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p is model.extra for p in groups) == 1
    script.check_groups(model, optimizer)

    Hacked.optimizer = lambda args, model: torch.optim.SGD(model.source.parameters(), lr=0.1)
    monkeypatch.setattr(script, "Method", Hacked)
    said = refusal(script, argv(tree, tmp_path, method=method), capsys)
    assert "optimizer: extra" in said and "source" not in said and "target" not in said


def test_knn_every_0_measures_nothing(script, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *args: 1 / 0)
    script.main(argv(tree, tmp_path))
    assert log_lines(tmp_path)[-1]["step"] == 12


def test_a_log_line_has_the_promised_fields(script, tree, tmp_path):
    script.main(argv(tree, tmp_path, "--steps 2 --knn-every 1"))
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["command"] and first["method"] == SCRIPT and first["torch"] == torch.__version__
    fields = set("step epoch loss chance lr m std_src std_tgt grad_norm img_s data_frac mem_gb "
                 "eta_s bad_images".split())
    lines = log_lines(tmp_path, drop=())
    assert fields == lines[1].keys() and fields | {"knn", "v_src", "v_tgt"} == lines[2].keys()


# ---- numbers ----


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_what_is_not_finite_stops_the_run(script, tree, tmp_path, capsys, monkeypatch, where):
    script.main(argv(tree, tmp_path, "--steps 4"))
    before = (tmp_path / "last.pt").read_bytes()

    def bad(*args, over_crops=script.over_crops):
        loss = over_crops(*args)
        if where == "gradient":
            loss.register_hook(lambda grad: grad * torch.inf)
        return loss * torch.nan if where == "loss" else loss

    def ruined(args, about, step, model, optimizer, save=script.save):
        model.target.projector[0].weight.data[0, 0] = torch.inf
        save(args, about, step, model, optimizer)

    monkeypatch.setattr(script, "over_crops", bad)
    if where == "weight":
        monkeypatch.setattr(script, "save", ruined)
    said = refusal(script, argv(tree, tmp_path), capsys)
    assert "--lr" in said and "last.pt is as before" in said
    assert (tmp_path / "last.pt").read_bytes() == before
    assert log_lines(tmp_path)[-1]["step"] == (8 if where == "weight" else 4)  # at once


@pytest.mark.parametrize("side", ["std_src", "std_tgt"])
def test_collapse_is_reported(script, side, tmp_path, capsys):
    args = script.parse_args(["--out", str(tmp_path)])
    for value, warned in ((0.05, True), (0.2, False)):
        script.log(args, {"std_src": 1.0, "std_tgt": 1.0, side: value})
        assert ("nearly collapsed" in capsys.readouterr().out) == warned


# ---- images ----


@pytest.mark.parametrize("sizes, workers", [((24,), 0), ((20, 24), 0), ((20, 24), 1)])
def test_unreadable_images_are_named_counted_and_replaced(
        script, sizes, workers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.Images, "unreadable", 0)
    images = class_tree(tmp_path / "images", 64, sizes)
    broken, after = images / "class1" / "001.png", images / "class1" / "004.png"
    whole, found = broken.read_bytes(), []
    broken.write_bytes(whole[:60])
    flags = f"--epochs 1 --workers {workers}"
    script.main(argv(images, tmp_path / "broken", flags))
    said = capsys.readouterr().err
    assert said.count(f"{broken} (") == said.count("\n") > 0 and "Error" in said
    assert log_lines(tmp_path / "broken")[-1]["bad_images"] == said.count("\n")

    broken.write_bytes(after.read_bytes())  # the next one in its place
    script.main(argv(images, tmp_path / "copied", flags))
    for name in ("broken", "copied"):
        found.append([line["loss"] for line in log_lines(tmp_path / name)])
    assert found[0] == found[1] and not capsys.readouterr().err
