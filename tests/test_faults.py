"""What disturbs a run: signals, deaths, broken files and images, numbers that are not finite,
changed code. MoCo v2 stands for all six where the code is shared."""

import itertools
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import drill
import pytest
import torch
from drill import EPOCH, Command
from pool import ROOT, SCRIPTS, SMALL, Bomb, class_tree, log_lines, refusal, saved

import mocov2_asym as script
from common import data, flags

SCRIPT = "mocov2_asym"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return drill.Place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return class_tree(tmp_path_factory.mktemp("images"), 64)


def argv(tree, out, flags=""):
    return (f"--data {tree} --out {out} {SMALL} {SCRIPTS[SCRIPT]} --epochs 3 --warmup-epochs 0 "
            f"--knn-every 0 {flags}").split()


@pytest.mark.parametrize("local_rank, said", [("0", f"{SCRIPT}: why\n"), ("1", "")])
def test_wrong_data_end_in_one_line_once_a_node(capsys, monkeypatch, local_rank, said):
    def work(args):
        raise data.DataError("why")

    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("sys.argv", [f"{SCRIPT}.py"])
    with pytest.raises(SystemExit) as e:
        script.guarded(work, None)
    assert e.value.code == 2 and capsys.readouterr().err == said


def test_images_per_second_count_the_time_that_the_device_takes(tree, tmp_path, monkeypatch):
    """numbers() waits for it."""
    def slow(*args, numbers=script.numbers):
        time.sleep(0.1)
        return numbers(*args)

    monkeypatch.setattr(script, "numbers", slow)
    script.main(argv(tree, tmp_path, "--steps 2"))
    assert all(0 < line["img_s"] <= 16 / 0.1 for line in log_lines(tmp_path, drop=()))


# ---- signals and deaths ----

@pytest.mark.parametrize("number", drill.SIGNALS)
def test_a_signal_finishes_the_step_saves_and_exits(place, number, monkeypatch):
    """In the middle of step 6, to loader workers too. One of two: tests/test_processes.py."""
    def hit(step, *args, lr_factor=script.lr_factor):
        if step == 5:
            os.killpg(0, number)
        return lr_factor(step, *args)

    out = place.new()
    with monkeypatch.context() as patch:
        patch.setattr(script, "lr_factor", hit)
        command = Command(place, out)
        assert command.wait() == 128 + number, command.said()
    assert drill.sound(out) == 6 == drill.last_step(out)
    assert command.said().count("saved step 6") == 1 and "Traceback" not in command.said()
    place.continues(out)


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_an_epoch(place, monkeypatch):
    """A moment: a step begins, a file is half written, is about to get its name, has it. First one
    in each epoch; then at the nth of the nth attempt, until one gets through."""
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


HIT = [(how, number) for how in ("--nproc 2", "torchrun") for number in drill.SIGNALS]


@pytest.mark.parametrize("how, number", [
    HIT[0], *[pytest.param(*case, marks=pytest.mark.slow) for case in HIT[1:]]])
def test_launchers_have_the_losses_of_one_process_and_pass_signals_on(place, how, number):
    """Ctrl-C goes to all processes of a terminal, the others to the launcher."""
    flags = "--epochs 100 --asym-bn"
    command = Command(place, place.new(), how, flags)
    place.complete(expected := place.new(), "fork", f"{flags} --steps 2")
    command.until(2)
    (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
    code = command.wait(25)  # torchrun would kill after 30 seconds
    said, step = command.said(), drill.sound(command.out)
    assert code == (1 if how == "torchrun" else 128 + number), said
    assert how == "torchrun" or not re.search("Traceback|Warning", said), said
    assert said.count(f"saved step {step}") == said.count(" step 1  loss") == 1  # of one process
    losses, ours = ([x["loss"] for x in log_lines(out)] for out in (expected, command.out))
    assert len(losses) == 2 and ours[:2] == pytest.approx(losses, abs=1e-3)


@pytest.mark.slow
def test_torchrun_restarts_all_processes_when_one_dies(place):
    """They do not meet the dead, whose addresses its store holds. Needs Linux (/proc)."""
    out, flags = place.new(), "--epochs 9"
    command = Command(place, out, "torchrun", flags)
    for child, step in enumerate((6, 26)):
        command.until(step)
        os.kill(command.children()[child], signal.SIGKILL)
    assert command.wait() == 0, command.said()[-3000:]
    assert command.said().count("resuming at step") == 2, command.said()[-3000:]
    place.continues(out, "torchrun", flags)


def test_overwrite_acts_once_if_torchrun_restarts(tree, tmp_path, monkeypatch, capsys):
    script.main(argv(tree, tmp_path, "--steps 2"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    script.main(argv(tree, tmp_path, "--steps 3 --overwrite"))
    assert "resuming at step 2" in capsys.readouterr().out
    monkeypatch.undo()
    script.main(argv(tree, tmp_path, "--steps 3 --overwrite"))
    assert "resuming" not in capsys.readouterr().out and saved(tmp_path)["step"] == 3


# ---- the run's folder ----

def test_another_run_is_refused_with_the_difference(tree, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    script.main(argv(tree, out, "--steps 2"))
    before = {p: p.read_bytes() for p in out.iterdir()}
    said = refusal(SCRIPT, argv(tree, out, "--seed 3 --mean-enc 2"))
    assert "seed 0 there, 3 here" in said and "mean_enc 1 there, 2 here" in said
    assert said.count("there") == 2 and "--overwrite" in said
    other = class_tree(tmp_path / "other", 48)
    assert "images 64 there, 48 here" in refusal(SCRIPT, argv(other, out, "--steps 2"))

    monkeypatch.chdir(tree.parent)  # the same images by another path, and flags that may differ
    script.main(argv(tree.name, out, "--steps 2 --log-every 3 --save-every 2"))
    said = capsys.readouterr().out
    assert "complete" in said and f"begun with --data {tree}" in said
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("flags", ["", "--init last.pt"])
def test_a_file_that_cannot_be_used_is_a_line_and_its_code_is_not_run(
        tree, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    script.main(argv(tree, ".", "--steps 2"))
    line, last, state = argv(tree, "run" if flags else ".", flags), Path("last.pt"), saved(".")
    torch.save({"step": 1, "args": Bomb()}, "bomb.pt")
    for content in (b"no checkpoint", b"", last.read_bytes()[:5000],
                    Path("bomb.pt").read_bytes(), pickle.dumps(Bomb())):
        last.write_bytes(content)
        assert "last.pt cannot be read" in refusal(SCRIPT, line)
    assert not Path("exploded").exists()
    pickle.loads(last.read_bytes())  # as if it were trusted
    assert Path("exploded").exists()

    state["model"]["surplus"] = state["model"].pop("source.backbone.conv1.weight")
    torch.save(state, last)
    said = refusal(SCRIPT, argv(tree, "."))
    assert "surplus" in said and "source.backbone.conv1.weight" in said


@pytest.mark.parametrize("changed", [f"{SCRIPT}.py", "common/data.py"])
def test_changed_code_says_so_and_goes_on(tree, tmp_path, capsys, monkeypatch, changed):
    (tmp_path / "common").mkdir()
    for path in (ROOT / f"{SCRIPT}.py", *(ROOT / "common").glob("*.py")):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(script, "__file__", str(tmp_path / f"{SCRIPT}.py"))
    monkeypatch.setattr(flags, "__file__", str(tmp_path / "common" / "flags.py"))
    monkeypatch.setattr(script, "measure", lambda *args: 1 / 0)  # --knn-every 0 measures nothing
    out, begun = tmp_path / "run", (tmp_path / f"{SCRIPT}.py").read_bytes()
    note = f"note: {SCRIPT}.py or common/ changed since {out} began"
    for steps in (2, 3, 4, 5):
        script.main(argv(tree, out, f"--steps {steps}"))
        assert (note in capsys.readouterr().out) == (steps > 3)
        if steps == 3:
            with open(tmp_path / changed, "a") as file:
                file.write("# a thought\n")
    assert saved(out)["step"] == 5 and (out / f"{SCRIPT}.py").read_bytes() == begun


def test_init_starts_both_backbones_from_a_file(tree, tmp_path, monkeypatch):
    script.main(argv(tree, tmp_path / "a", "--steps 2"))
    weights, seen = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True), []
    torch.save({**weights, "fc.weight": torch.ones(2, 2)}, tmp_path / "torchvision.pth")
    monkeypatch.setattr(script, "train", lambda args, about, model, *_: seen.append(model))
    for name in ("a/backbone.pth", "torchvision.pth"):
        script.main(argv(tree, tmp_path / "b", f"--init {tmp_path / name}"))
        for encoder in (seen[-1].source, seen[-1].target):
            found = encoder.backbone.state_dict()
            assert all(torch.equal(found[k], weights[k]) for k in weights)


# ---- numbers ----

@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_what_is_not_finite_stops_the_run(tree, tmp_path, monkeypatch, where):
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
    said = refusal(SCRIPT, argv(tree, tmp_path))
    assert "--lr" in said and "last.pt is as before" in said
    assert (tmp_path / "last.pt").read_bytes() == before
    assert log_lines(tmp_path)[-1]["step"] == (8 if where == "weight" else 4)  # at once


def test_collapse_and_unreadable_images_are_reported(tmp_path, capsys, monkeypatch):
    """These are named, counted and replaced in tests/test_data.py."""
    args = script.parse_args(["--out", str(tmp_path)])
    monkeypatch.setattr(data.Images, "unreadable", 7)
    for side, value in itertools.product(("std_src", "std_tgt"), (0.05, 0.2)):
        script.log(args, {"std_src": 1.0, "std_tgt": 1.0, side: value})
        assert ("nearly collapsed" in capsys.readouterr().out) == (value < 0.1)
    assert log_lines(tmp_path)[-1]["bad_images"] == 7
