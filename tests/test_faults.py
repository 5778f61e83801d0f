"""What disturbs a run, in short; drill.py has long forms. Runs in forks are real processes with real signals; the others
are in this process. After each fault the same command continues, bit for bit like an undisturbed run."""

import fcntl
import gc
import importlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import drill
import pool as helper
import pytest
import torch
from drill import EPOCH, Command, Mount, complete, last_step, same, shared_memory, sound, tracebacks
from PIL import Image
from pool import SCRIPTS, class_tree, log_lines, saved

if sys.platform != "linux":
    pytest.skip("these tests look into /proc", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of a machine with one core
TWO = "--epochs 2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return drill.Place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module", autouse=True)
def no_measurements():
    """They are half of a run as short as these, and drill.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SCRIPTS:
            patch.setattr(importlib.import_module(name), "measure", lambda *args: {"v_src": 1.0, "v_tgt": 1.0, "knn": 0.5})
        yield


@pytest.fixture
def script():
    """MoCo v2 stands for all, as what is tested here is in shared blocks."""
    return importlib.import_module("mocov2_asym")


@pytest.fixture
def whole(place):
    """An undisturbed run."""
    return place.whole(TWO)


def run(script, line, capsys):
    """A run in this process: its exit code and what it said to stderr, which is a line if the code is not 0."""
    capsys.readouterr()
    code = helper.train(script.METHOD, line)
    said = capsys.readouterr().err
    assert code in (0, None) or "Traceback" not in said
    return code or 0, said


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


# ---- signals, and processes that die ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_kill9(place, name):
    first = name == "mocov2_asym"
    drill.kill9(place, 2 if first else 1, name, slow=0, more="" if first else "--workers 0")


@pytest.mark.parametrize("number", [1, 2])
def test_kill_while_writing_a_checkpoint(place, number, monkeypatch):
    """At the first or second save of a run; drill.py does not choose the moment."""
    out, save, seen = place.new(), torch.save, []

    def killed(state, path):
        save(state, path)
        seen.extend([path] * (path.name == "last.pt.tmp"))
        if len(seen) == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)  # in the forks of this process too
        assert Command(place.line(out, f"{TWO} --workers 0")).wait() == -signal.SIGKILL
    assert (out / "last.pt.tmp").exists() and (out / "last.pt").exists() == (number == 2)
    sound(out)
    complete(place.line(out, TWO))
    same(out, place.whole(TWO))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_exits(place, number):
    """The whole group gets it, as from a terminal; loader workers must not answer. More in drill.py."""
    out, start = place.new(), time.time()
    command = Command(place.line(out, TWO))
    assert command.until(lambda: last_step(out) >= 2), command.said()
    os.killpg(command.process.pid, number)
    assert command.wait() == 128 + number and 2 <= saved(out)["step"] == last_step(out) < 2 * EPOCH
    assert command.said().count(f"{number.name}: saved step {last_step(out)}") == 1
    assert "Traceback" not in command.said() and time.time() - start < 25  # loader workers that do not end take 30 s
    if number == signal.SIGINT:
        complete(place.line(out, TWO))
        same(out, place.whole(TWO))


def test_nohup_is_respected(script, monkeypatch):
    before = [signal.getsignal(s) for s in script.SIGNALS]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        found = script.listen(lambda *_: None)
        assert signal.SIGHUP not in found and len(found) == 3 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for s, handler in zip(script.SIGNALS, before, strict=True):
            signal.signal(s, handler)


def test_a_worker_is_not_forked_while_a_thread_works():
    """What such a thread may hold, a forked worker would wait for."""
    data, x = importlib.import_module("common.data"), torch.randn(2500, 2500)
    began, ended = threading.Event(), []

    def work():
        began.set()
        x @ x  # some half a second without the interpreter's lock
        ended.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    data.wait_for_threads(30)
    returned = time.monotonic()
    thread.join()
    assert ended[0] < returned + 0.05, "it did not wait"
    start = time.monotonic()
    data.wait_for_threads(30)
    assert time.monotonic() < start + 5


def test_a_terminal_that_closes_saves(place):
    """As when a connection is lost: SIGHUP, and no place to write to. In a pseudo-terminal of its own."""
    out, (master, slave) = place.new(), os.openpty()
    words = [sys.executable, str(drill.ROOT / "mocov2_asym.py"), *place.line(out, "--epochs 40 --workers 0").split()]
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: last_step(out) < 3 and os.read(master, 1000), False)])
    reader.start()
    reader.join(120)
    os.close(master)
    assert process.wait(120) == 128 + signal.SIGHUP
    assert 3 <= saved(out)["step"] == last_step(out) < 40 * EPOCH


def test_a_loader_worker_that_is_ended_before_it_began_ends(script):
    """It has the handlers of the process that forked it, which would take SIGTERM and go on."""
    taken = []
    before = script.listen(lambda number, frame: taken.append(number))
    try:
        if not (pid := os.fork()):
            os.kill(os.getpid(), signal.SIGINT)
            early = signal.alarm(0)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0 if not early and signal.alarm(0) and not taken else 1)
        assert os.waitpid(pid, 0)[1] == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [signal.SIGTERM]
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_a_run_goes_on_when_nobody_reads_what_it_says(place, script, whole, monkeypatch):
    out = place.new()
    full = open("/dev/full", "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert helper.train(script.METHOD, place.line(out, f"{TWO} --workers 0", script.METHOD)) == 0
        sys.stdout.close()  # that which replaced it
    with suppress(OSError):  # of what is still to be written
        full.close()
    same(out, whole)


def test_a_process_that_is_lost_before_the_first_step_is_no_reason_to_overwrite(place, script, capsys, monkeypatch):
    def gone(x):
        raise RuntimeError("[third_party/gloo/transport/tcp/pair.cc:553] Read error: Connection reset by peer")

    monkeypatch.setattr(script, "gather", gone)
    code, said = run(script, place.line(place.new(), TWO, script.METHOD), capsys)
    assert code == 1 and "lost another process" in said and "--overwrite" not in said and said.count("\n") == 1


def test_a_signal_to_one_of_two_processes(place):
    """Both stop after the same step."""
    out = place.new()
    command = Command(place.line(out, TWO), "pair")
    assert command.until(lambda: last_step(out) >= 2), command.said()
    os.kill(command.trainers()[1], signal.SIGUSR1)
    assert command.wait() == 128 + signal.SIGUSR1 and 2 <= saved(out)["step"] == last_step(out)
    assert command.said().count(f"SIGUSR1: saved step {last_step(out)}") == 1
    assert "Traceback" not in command.said()
    complete(place.line(out, TWO), "pair")
    same(out, place.whole(TWO, "pair"), 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_of_two_processes_says_so_in_a_line(place, rank):
    out = place.new()
    command = Command(place.line(out, TWO), "pair")
    assert command.until(lambda: last_step(out) >= EPOCH), command.said()
    os.kill(command.trainers()[rank], signal.SIGKILL)
    assert command.wait() == 128 + signal.SIGKILL
    sound(out)
    assert not tracebacks(command.said()) and ("lost another process" in command.said()) == (rank == 1)  # rank 0 speaks
    if rank:
        complete(place.line(out, TWO), "pair")
        same(out, place.whole(TWO, "pair"), 2)


def test_processes_whose_launcher_died_save_and_end(place):
    drill.launcher(place, 1, hows=("pair",))


def test_a_restart_by_torchrun_does_not_meet_the_dead(place):
    """Its agent's store outlives the processes, and holds the addresses of those before."""
    out, port = place.new(), helper.free_port()
    agent = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    env = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for count, steps in ((0, 3), (1, 99)):
        line = place.line(out, f"{TWO} --workers 0 --steps {steps}")
        complete(line, "pair", env={**env, "TORCHELASTIC_RESTART_COUNT": str(count)}, timeout=120)
    assert agent.num_keys() > 4
    same(out, place.whole(TWO, "pair"), 2)


def test_overwrite_does_not_act_again_when_torchrun_restarts(place, script, whole, capsys, monkeypatch):
    out = place.new()
    line = place.line(out, f"{TWO} --workers 0 --overwrite")
    assert run(script, f"{line} --steps 3", capsys)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(script, line, capsys)[0] == 0
    same(out, whole)


# ---- disks ----


def test_a_loader_worker_that_dies_with_a_batch_is_a_line(place, script, capsys, monkeypatch):
    """Its socket is gone; which of torch's errors comes depends on the moment, and drill.py waits for them."""
    def gone(*args):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(script.data, "stream", gone)
    code, said = run(script, place.line(place.new(), TWO, script.METHOD), capsys)
    assert code == 1 and said.count("\n") == 1 and "lost another process (ConnectionResetError" in said


@pytest.mark.parametrize("how", ["fork", "pair"])
def test_no_room_for_a_checkpoint(place, how):
    """A limit to the size of files stands for a full disk; drill.py fills one."""
    out, whole = place.new(), place.whole(TWO, how)
    most = (whole / "last.pt").stat().st_size
    said = complete(place.line(out, TWO), how, 1, limit=most // 2)
    assert said.count("cannot write") == 1 and "last.pt" in said and "Traceback" not in said, said
    assert not (out / "last.pt").exists() and (out / "backbone.pth").exists()
    if how == "pair":
        return
    complete(place.line(out, f"{TWO} --steps {EPOCH}"), how)
    before = (out / "last.pt").read_bytes()
    said = complete(place.line(out, TWO), how, 1, limit=most // 2)
    assert "cannot write" in said and (out / "last.pt").read_bytes() == before
    complete(place.line(out, TWO), how)
    same(out, whole)


def test_no_room_for_the_log(place):
    out = place.new()
    complete(place.line(out, f"{TWO} --steps {EPOCH}"))
    first, rest = (out / "log.jsonl").read_text().split("\n", 1)
    (out / "log.jsonl").write_text(first[:-1] + f', "long": "{"x" * 98_000}"}}\n{rest}')
    said = complete(place.line(out, TWO), code=1, limit=len(first) + 98_000 + len(rest) + 600)  # more than the script's copy
    assert said.count("cannot write") == 1 and "log.jsonl" in said and "Traceback" not in said, said
    complete(place.line(out, TWO))
    same(out, place.whole(TWO))


def test_a_file_is_on_the_disk_before_it_has_its_name(place, script, capsys, monkeypatch):
    """A test cannot cut the power; it can see the order of the calls."""
    calls, fsync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append((str(a), b.name)), move(a, b)))
    out = place.new()
    assert run(script, place.line(out, "--steps 1 --workers 0", script.METHOD), capsys)[0] == 0
    for name in ("last.pt", "backbone.pth", "log.jsonl"):
        at = calls.index((f"{out / name}.tmp", name))
        assert calls[at - 1] == f"{out / name}.tmp"
    assert [c for c in calls if c in (str(out / "log.jsonl"), f"{out / 'last.pt'}.tmp")][-1].endswith("last.pt.tmp")


def test_folders_that_cannot_be_written(place, script, capsys):
    (place.folder / "file").touch()
    code, said = run(script, place.line(place.folder / "file" / "run", TWO, script.METHOD), capsys)
    assert code == 2 and said.count("\n") == 1 and "Not a directory" in said
    try:
        mount = Mount(place.new(), "1m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a read-only file system could not be mounted here")
    with mount:
        mount("-o", "remount,ro")
        code, said = run(script, place.line(mount.folder / "run", TWO, script.METHOD), capsys)
        assert code == 2 and said.count("\n") == 1 and "Read-only" in said


# ---- images ----


def hostile(folder, mixed):
    """Images of many kinds; returns the names of those that cannot be read."""
    class_tree(folder, 32, (24, 31) if mixed else (24,))
    first = folder / "class0" / "000.png"
    with Image.open(first) as image:
        image = image.copy()
    image.convert("L").save(folder / "class0" / "grey.png")
    image.convert("CMYK").save(folder / "class0" / "cmyk.jpg")
    image.save(folder / "class1" / "a b\u00fc\u65e5 .png")
    image.quantize(8).save(folder / "class1" / "moves.gif", save_all=True, append_images=[image.rotate(90).quantize(8)])
    Image.fromarray(helper.np.asarray(image.convert("L"), dtype=helper.np.uint16) * 257).save(folder / "class1" / "deep.png")
    (folder / "class0" / ".ipynb_checkpoints").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("class0/.ipynb_checkpoints/000-checkpoint.png", ".hidden/000.png", "class0/._000.png"):
        (folder / name).write_bytes(first.read_bytes())
    (folder / "class2" / "circle").symlink_to(folder)
    os.mkfifo(folder / "class2" / "pipe.png")
    (folder / "class2" / "dangling.png").symlink_to("nowhere")
    (folder / "class2" / "empty.jpg").touch()
    (folder / "class2" / "text.png").write_text("no image")
    (folder / "class2" / "cut.png").write_bytes(first.read_bytes()[:-300])
    Image.new("L", (300, 300)).save(folder / "class2" / "bomb.png")
    return {f"class2/{name}" for name in ("pipe.png", "dangling.png", "empty.jpg", "text.png", "cut.png", "bomb.png")}


@pytest.mark.parametrize("mixed", [False, True])
def test_hostile_images(script, mixed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40000)
    bad = hostile(tmp_path / "images", mixed)
    line = f"--data {tmp_path}/images {drill.GROUPED} {SCRIPTS[script.METHOD]} --epochs 4 --log-every 3 --out {tmp_path}"
    code, said = run(script, f"{line}/a", capsys)
    named = [w.split("images/")[1] for w in said.splitlines() if "unreadable image, replaced" in w]
    images = json.loads((tmp_path / "a" / "args.json").read_text())["images"]
    assert code == 0 and set(named) <= bad and images == 32 + 5 + len(bad)  # the hidden ones are not there
    assert log_lines(tmp_path / "a")[-1]["step"] == 4 * (images // 8)
    counts = [x["bad_images"] for x in log_lines(tmp_path / "a")[1:]]
    if mixed:  # met in the epochs, each at most once in each
        assert counts == sorted(counts) and len(bad) < counts[-1] == len(named) <= 4 * len(bad)
    else:  # found at the start
        assert set(named) == bad and counts == [len(bad)] * len(counts)
    for steps in (3, 5, 99):
        assert run(script, f"{line}/b --steps {steps}", capsys)[0] == 0
    assert [x["bad_images"] for x in log_lines(tmp_path / "b")[1:]] == counts  # over restarts too
    a, b = (saved(tmp_path / name)["model"] for name in "ab")
    assert all(torch.equal(x, a[k]) for k, x in b.items())
    code, said = run(script, f"{line}/c --strict-images", capsys)
    assert code == 2 and "unreadable image, stopped (--strict-images)" in said and "class2/" in said


def at_step(monkeypatch, script, step, act):
    """act() at the beginning of a step."""
    lr_factor = script.lr_factor
    monkeypatch.setattr(script, "lr_factor", lambda at, *a: (act() if at == step else None, lr_factor(at, *a))[1])


def test_a_folder_that_changes_during_the_run(script, tmp_path, capsys, monkeypatch):
    images = class_tree(tmp_path / "images", 32, (20, 24))
    line = f"--data {images} {drill.GROUPED} {SCRIPTS[script.METHOD]} --epochs 4 --out {tmp_path}/run"
    gone = images / "class0" / "003.png"
    with monkeypatch.context() as patch:
        at_step(patch, script, 1, gone.unlink)
        code, said = run(script, f"{line} --steps 6", capsys)
    assert code == 0 and str(gone) in said and log_lines(tmp_path / "run")[-1]["bad_images"] == said.count(str(gone)) >= 1
    code, said = run(script, line, capsys)  # which now sees one image less
    assert code == 2 and "images 32 there, 31 here" in said and ", file_names " in said
    with monkeypatch.context() as patch:
        at_step(patch, script, 1, lambda: images.rename(tmp_path / "elsewhere"))
        code, said = run(script, f"{line} --overwrite --workers 1", capsys)
    assert code == 2 and said.splitlines()[-1].startswith(f"{script.METHOD}: no readable image among")


def test_images_that_changed_their_class_are_other_data(script, tmp_path, capsys):
    """The files are as many as before, and in another order."""
    images = class_tree(tmp_path / "images", 32, (20, 24))
    line = f"--data {images} {drill.GROUPED} {SCRIPTS[script.METHOD]} --out {tmp_path}/run"
    assert run(script, f"{line} --steps 2", capsys)[0] == 0
    (images / "class0" / "003.png").rename(images / "class2" / "003.png")
    code, said = run(script, line, capsys)
    assert code == 2 and "file_names " in said and "images 3" not in said
    (images / "class2" / "003.png").rename(images / "class0" / "003.png")
    assert run(script, f"{line} --steps 3", capsys)[0] == 0 and log_lines(tmp_path / "run")[-1]["step"] == 3


# ---- checkpoints ----


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_checkpoints(place, script, whole, capsys, tmp_path):
    """Each is refused in a line that names the folder, and the folder stays as it was."""
    out, evidence = place.new(), tmp_path / "executed"
    line = place.line(out, f"{TWO} --workers 0", script.METHOD)
    assert run(script, f"{line} --steps 2", capsys)[0] == 0
    good = contents(out)

    def changed(change):
        state = saved(out)
        change(state)
        return state

    def nan(state, *keys):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]].view(-1)[-1] = math.nan

    weight = next(k for k, v in saved(out)["model"].items() if v.ndim == 4)
    moment = next(k for k, v in saved(out)["optimizer"]["state"][0].items() if torch.is_tensor(v) and v.ndim)
    for file, what, words in (
        ("last.pt", good["last.pt"][:5000], "cannot be used"), ("last.pt", b"", "cannot be used"),
        ("last.pt", b"\x80\x02}" + bytes(99), "cannot be used"), ("last.pt", pickle.dumps(Code(evidence)), "cannot be used"),
        ("last.pt", {"format": Code(evidence)}, "cannot be used"), ("last.pt", ["a list"], "cannot be used"),
        ("last.pt", {"model": {}}, "has format None"), ("last.pt", changed(lambda s: s.update(format=1)), "has format 1, not 2"),
        ("last.pt", changed(lambda s: s.pop("format")), "has format None, not 2"),
        ("last.pt", changed(lambda s: nan(s, "model", weight)), "not finite"),
        ("last.pt", changed(lambda s: nan(s, "optimizer", "state", 0, moment)), "not finite"),
        ("last.pt", changed(lambda s: s["model"].pop(weight)), "cannot be used"),
        ("last.pt", changed(lambda s: s.update(method="other")), "method other there"),
        ("last.pt", changed(lambda s: s["args"].update(wd=7.0)), "--wd 7.0 there"),
        ("log.jsonl", b"\xff\xfe{}\n", "cannot be used"), ("log.jsonl", b"x}\n", "cannot be used"),
    ):
        path = out / file
        path.write_bytes(what) if isinstance(what, bytes) else torch.save(what, path)
        before = contents(out)
        code, said = run(script, line, capsys)
        assert code == 2 and said.count("\n") == 1 and words in said and str(out) in said, (what, said)
        assert contents(out) == before and not evidence.exists()
        path.write_bytes(good[file])
    (out / "args.json").unlink()  # last.pt knows the arguments too
    assert "--wd" in run(script, f"{line} --wd 7", capsys)[1]
    (out / "args.json").write_text("no longer looked at")
    assert run(script, line, capsys)[0] == 0
    same(out, whole)


# ---- numbers ----


def test_non_finite_losses_gradients_and_weights(place, script, whole, capsys, monkeypatch):
    """Each stops the run, and last.pt stays as it was after the first epoch."""
    out = place.new()
    line = place.line(out, f"{TWO} --workers 0", script.METHOD)
    assert run(script, f"{line} --steps {EPOCH}", capsys)[0] == 0
    before = (out / "last.pt").read_bytes()
    forward, optimizer, models = script.Method.forward, script.Method.optimizer, []

    def loss_nan(self, *a):
        loss, spreads = forward(self, *a)
        return loss * math.nan, spreads

    def gradient_nan(self, *a):
        loss, spreads = forward(self, *a)
        loss.register_hook(lambda g: g * math.inf)
        return loss, spreads

    def remember(args, model):
        models.append((model, optimizer(args, model)))
        return models[-1][1]

    def spoil_weights():
        next(models[-1][0].parameters()).data.view(-1)[0] = math.inf

    def spoil_moments():
        next(v for v in models[-1][1].state[next(iter(models[-1][1].state))].values() if torch.is_tensor(v)).fill_(math.inf)

    for name, new, flags, words in ((("forward", loss_nan, "", "loss nan")), ("forward", gradient_nan, "", "norm of the gradient"),
                                    ("optimizer", spoil_weights, "", "loss nan"), ("optimizer", spoil_moments, "", "not finite")):
        with monkeypatch.context() as patch:
            if name == "forward":
                patch.setattr(script.Method, name, new)
            else:
                patch.setattr(script.Method, name, staticmethod(remember))
                at_step(patch, script, 2 * EPOCH - 1, new)
            code, said = run(script, line + flags, capsys)
        assert code == 2 and said.count("\n") == 1 and words in said and "last.pt is as before" in said, (new, said)
        assert (out / "last.pt").read_bytes() == before
    assert run(script, line, capsys)[0] == 0
    same(out, whole)


def test_steps_that_fp16_skips_are_counted(place, script, capsys, monkeypatch):
    """With a scale so large that gradients overflow until it has been halved often enough; on the CPU, in float32."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu", init_scale=2.0**126))
    line = f"{TWO} --workers 0 --epochs 4"
    outs = [place.new() for _ in range(2)]
    assert run(script, place.line(outs[0], line, script.METHOD), capsys)[0] == 0
    skipped = [x["skipped"] for x in log_lines(outs[0])[1:]]
    assert 1 < skipped[-1] < len(skipped) and skipped[0] == 1  # each halves the scale; larger gradients may come later
    assert all(b - a in (0, 1) for a, b in zip(skipped, skipped[1:], strict=False))
    assert saved(outs[0])["scaler"]["scale"] == 2.0 ** (126 - skipped[-1])
    for steps in (3, 99):
        assert run(script, place.line(outs[1], f"{line} --steps {steps}", script.METHOD), capsys)[0] == 0
    same(*outs)


def test_fp16_that_skips_all_steps_stops(place, script, capsys, monkeypatch):
    forward, scaler, out = script.Method.forward, torch.amp.GradScaler, place.new()

    def overflowing(self, *a):
        loss, spreads = forward(self, *a)
        loss.register_hook(lambda g: g * math.inf)
        return loss, spreads

    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu", init_scale=1.0))
    monkeypatch.setattr(script.Method, "forward", overflowing)
    code, said = run(script, place.line(out, "--epochs 4 --workers 0", script.METHOD), capsys)
    assert code == 2 and said.count("\n") == 1 and "step 10: fp16 skips all steps" in said  # 2**-10 is less than 0.001
    assert [x["grad_norm"] for x in log_lines(out)[1:]] == [None] * 9 and "NaN" not in (out / "log.jsonl").read_text()


def test_collapse_is_reported(place, script, capsys, monkeypatch):
    monkeypatch.setattr(script, "spread", lambda z: torch.tensor(0.05))
    script.main(place.line(place.new(), "--steps 2 --workers 0", script.METHOD).split())
    assert capsys.readouterr().out.count("warning: the encodings have nearly collapsed (std 0.050") == 2


# ---- resources, and what is printed ----


def test_every_way_out_releases_everything(place, script, tmp_path, capsys, monkeypatch):
    """Loader workers and file descriptors, after the end, a stop, a signal, a bad image and a folder that vanished."""
    images = class_tree(tmp_path / "images", 32, (20, 24))
    line = f"--data {images} {drill.GROUPED} {SCRIPTS[script.METHOD]} --epochs 2 --workers 1 --out {tmp_path}"

    def held():
        gc.collect()
        children = [p for p in os.listdir("/proc") if p.isdigit() and parent(p) == str(os.getpid())]
        return sorted(children), len(os.listdir("/proc/self/fd"))

    def parent(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            return None

    run(script, f"{line}/0", capsys)  # opens what stays open, such as multiprocessing's
    before, segments = held(), shared_memory()
    for number, (code, act) in enumerate(((0, lambda: None), (143, lambda: os.kill(os.getpid(), signal.SIGTERM)),
                                          (2, (images / "class1" / "001.png").unlink),
                                          (2, lambda: images.rename(tmp_path / "elsewhere")))):
        with monkeypatch.context() as patch:
            at_step(patch, script, 1, act)
            assert run(script, f"{line}/{number + 1} --epochs 4 --strict-images", capsys)[0] == code
        assert held() == before, number
    assert shared_memory() <= segments


def test_days_to_go_are_hours(script, tmp_path, capsys):
    run = script.Run(helper.small_args(script, f"--out {tmp_path}"), {}, 0)
    run.log({"step": 1, "epoch": 0.0, "loss": 1.0, "chance": 1.0, "std_src": 1.0, "std_tgt": 1.0, "img_s": 1.0, "eta_s": 100_000.9})
    assert "eta 27:46:40" in capsys.readouterr().out


# ---- the probe, and the variance of encodings ----


@pytest.fixture(scope="module")
def checkpoint(place):
    return place.whole(TWO) / "last.pt"


PROBE = "--protocol sgd --lr 0.3 --batch-size 8 --epochs 3 --device cpu"


def probe_line(place, checkpoint, out, more=PROBE):
    return f"{checkpoint} --data {place.images} --out {out} --workers 1 {more}"


def probed(out):
    """The result of a probe, its log without times and the weights it keeps."""
    lines = log_lines(out)
    result = json.loads((out / "result.json").read_text())["results"]
    assert not list(out.glob("*.tmp"))
    return result, lines, {k: v.tolist() for p in sorted(out.glob("*.pt")) for k, v in drill.tensors(torch.load(p)).items()}


@pytest.fixture(scope="module")
def probe_whole(place, checkpoint):
    out = place.new()
    complete(probe_line(place, checkpoint, out), script="linear_probe")
    assert [x["epoch"] for x in log_lines(out)] == [1, 2, 3]
    return probed(out)


def epoch_of(out):
    return len((out / "log.jsonl").read_text().splitlines()) - 1 if (out / "log.jsonl").exists() else -1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_probe_that_is_stopped_continues(place, checkpoint, probe_whole, number):
    """The group gets the signal, as from a terminal, except kill -9. The log has each epoch once."""
    out = place.new()
    command = Command(probe_line(place, checkpoint, out), script="linear_probe")
    assert command.until(lambda: epoch_of(out) >= 1), command.said()
    (os.kill if number == signal.SIGKILL else os.killpg)(command.process.pid, number)
    assert command.wait() == (-number if number == signal.SIGKILL else 128 + number), command.said()
    assert not (out / "result.json").exists()
    if number != signal.SIGKILL:  # whose orphaned loader worker may complain
        assert command.said().count(f"{number.name}: stopped; the same command continues") == 1 and "Traceback" not in command.said()
    with open(out / "log.jsonl", "a") as log:
        log.write('{"data": "half a li')
    complete(probe_line(place, checkpoint, out), script="linear_probe")
    assert probed(out) == probe_whole


def test_a_probe_killed_between_log_and_checkpoint(place, checkpoint, probe_whole, monkeypatch):
    """The epoch that is done again is not logged twice; no half-written file has a name that counts."""
    out, save = place.new(), torch.save

    def killed(state, path):
        save(state, path)
        if state.get("step", 0) > 6:  # the second save
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        assert Command(probe_line(place, checkpoint, out), script="linear_probe").wait() == -signal.SIGKILL
    assert epoch_of(out) >= 2 and list(out.glob("final*.tmp"))
    complete(probe_line(place, checkpoint, out), script="linear_probe")
    assert probed(out) == probe_whole


def test_a_probe_whose_search_is_killed_logs_each_l2_once(place, checkpoint):
    lines = [probe_line(place, checkpoint, place.new(), "--protocol lbfgs --knn-k 5 --max-iter 20 --device cpu") for _ in range(2)]
    outs = [Path(line.split()[4]) for line in lines]
    complete(lines[0], script="linear_probe")
    command = Command(lines[1], script="linear_probe")
    assert command.until(lambda: epoch_of(outs[1]) >= 3), command.said()
    command.process.kill()
    assert command.wait() == -signal.SIGKILL and not (outs[1] / "result.json").exists()
    complete(lines[1], script="linear_probe")
    assert len(log_lines(outs[0])) == 45 and probed(outs[0]) == probed(outs[1])


@pytest.mark.parametrize("fault", ["log.jsonl", "final"])
def test_no_room_for_a_probe(place, checkpoint, probe_whole, fault):
    """A limit to the size of files stands for a full disk."""
    out, more = place.new(), f"{PROBE} --workers 0"
    if fault == "final":  # of the folder's files, the largest
        complete(probe_line(place, checkpoint, out, f"{more} --epochs 3"), script="linear_probe")
        limit = next(out.glob("final*")).stat().st_size - 100
        assert all(p.stat().st_size < limit for p in out.iterdir() if p.name[:5] != "final")
        out = place.new()
    else:
        limit = 1000
    said = complete(probe_line(place, checkpoint, out, more), code=1, limit=limit, script="linear_probe")
    assert said.count("cannot write") == 1 and fault in said and "Traceback" not in said, said
    complete(probe_line(place, checkpoint, out), script="linear_probe")
    assert probed(out) == probe_whole


def test_a_probe_that_cannot_write_or_read(place, checkpoint, probe_whole, capsys, tmp_path):
    def refused(line, code=2):
        capsys.readouterr()
        assert helper.train("linear_probe", line) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("linear_probe: "), said
        return said

    (tmp_path / "file").touch()
    assert "Not a directory" in refused(probe_line(place, checkpoint, tmp_path / "file" / "out"))
    out = tmp_path / "out"
    complete(probe_line(place, checkpoint, out), script="linear_probe")
    (out / "result.json").unlink()
    kept = next(out.glob("final-*.pt"))
    state = torch.load(kept, weights_only=True)
    heads, optimizer = state["heads"], state["optimizer"]
    moments = {i: {k: v * math.nan for k, v in moment.items()} for i, moment in optimizer["state"].items()}
    for bad in (kept.read_bytes()[:700], b"", pickle.dumps(Code(tmp_path / "executed")), {"weight": heads["0.weight"]}, [1],
                {**state, "step": 10**6}, {**state, "step": "x"}, {**state, "heads": {k: v * math.nan for k, v in heads.items()}},
                {**state, "heads": {}}, {**state, "optimizer": {**optimizer, "state": moments}}):
        kept.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, kept)
        assert "remove it" in refused(probe_line(place, checkpoint, out)) and not (tmp_path / "executed").exists(), bad
    kept.unlink()
    complete(probe_line(place, checkpoint, out), script="linear_probe")
    assert probed(out) == probe_whole
    cut = tmp_path / "last.pt"
    for bad in (checkpoint.read_bytes()[:5000], b"", pickle.dumps(Code(tmp_path / "executed"))):
        cut.write_bytes(bad)
        refused(probe_line(place, cut, tmp_path / "other"))
        assert not (tmp_path / "executed").exists() and not (tmp_path / "other").exists()


def test_the_probes_other_process_says_so_in_a_line(place, checkpoint, probe_whole):
    out = place.new()
    command = Command(probe_line(place, checkpoint, out), "pair", script="linear_probe")
    assert command.until(lambda: epoch_of(out) >= 1), command.said()
    os.kill(command.trainers()[1], signal.SIGKILL)
    assert command.wait() == 128 + signal.SIGKILL
    assert "lost another process" in command.said() and not tracebacks(command.said()), command.said()
    complete(probe_line(place, checkpoint, out), script="linear_probe")
    result, lines, _ = probed(out)
    assert [x["epoch"] for x in lines] == [1, 2, 3] and result.keys() == probe_whole[0].keys()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_measurement_of_variance_that_is_stopped_leaves_nothing_half_done(place, checkpoint, tmp_path, number):
    outs = [tmp_path / f"{name}.json" for name in "ab"]
    line = f"{checkpoint} --data {place.images}/class0 --device cpu --views 4 --designs baseline,scalemix,strong --workers 1 --out"
    complete(f"{line} {outs[0]}", script="variance_ref")
    before = checkpoint.read_bytes()
    command = Command(f"{line} {outs[1]}", script="variance_ref")
    assert command.until(lambda: "baseline  " in command.said()), command.said()
    os.kill(command.process.pid, number)
    assert command.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert not outs[1].exists() and "Traceback" not in command.said() and checkpoint.read_bytes() == before
    complete(f"{line} {outs[1]}", script="variance_ref")
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_no_room_for_a_measurement_of_variance(place, checkpoint, tmp_path):
    out = tmp_path / "v.json"
    line = f"{checkpoint} --data {place.images}/class0 --device cpu --views 2 --designs baseline,strong,weak --workers 0 --out {out}"
    complete(line, script="variance_ref")
    before = out.read_bytes()
    said = complete(line, code=1, limit=len(before) - 50, script="variance_ref")
    assert f"--out {out} cannot be written" in said and "Traceback" not in said and out.read_bytes() == before
