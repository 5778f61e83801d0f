"""Real processes and real signals: what ends a run. After each fault the same command continues,
and must end with the weights, the optimiser's state and the log of an undisturbed run.

    python tests/drill.py

tests/test_faults.py has the same faults in short, and these as slow tests. Needs Linux (/proc).
"""

import importlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from pool import ROOT, SCRIPTS, SMALL, class_tree, free_port, log_lines, same_state, saved  # noqa

EPOCH = 4  # steps
FLAGS = SMALL.replace("16 --bn-groups 8 --workers 0", "8 --bn-groups 4 --workers 1")
FLAGS += " --knn-every 0 --log-every 1 --warmup-epochs 0"
TORCHRUN = ("-m torch.distributed.run --nproc_per_node 2 --max-restarts 3 --master_addr 127.0.0.1 "
            "--master_port {port} --signals_to_handle SIGTERM,SIGINT,SIGUSR1")
LAUNCHERS = "python", "--nproc 2", "torchrun"
SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


class Fork(multiprocessing.get_context("fork").Process):
    """A script's main() in a fork of this process, as good as a new interpreter for what comes
    after the imports. pair: in two forks of the fork, which is then the least of launchers and
    ends with the exit code of the first that fails."""

    def __init__(self, words, file, pair):
        super().__init__(target=self.body, args=(words, file, pair))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, from Python 3.12 on
            self.start()

    def body(self, words, file, pair):
        torch.set_num_threads(1)  # OpenMP's other threads did not come along, and would be waited for
        os.setsid()
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
        sys.argv = words
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if pair and (codes := self.launch()):
            sys.exit(next((code if code > 0 else 128 - code for code in codes if code), 0))
        code = 0
        try:
            importlib.import_module(Path(words[0]).stem).main()
        except SystemExit as e:
            code = e.code
        sys.exit(code)  # when what the script held is gone, as a new interpreter does

    def launch(self):
        """The exit codes of two forks; in these, None."""
        os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        for rank in ("0", "1"):
            if not os.fork():
                os.environ.update(RANK=rank, LOCAL_RANK=rank)
                return None
        return [os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(2)]

    def wait(self, timeout):
        self.join(timeout)
        assert self.exitcode is not None, "it hangs"
        return self.exitcode

    def poll(self):
        return self.exitcode


class Command:
    """A run in a session of its own. how: fork, pair (two forks), or one of LAUNCHERS."""

    def __init__(self, place, out, how="fork", flags="--epochs 2"):
        script = str(ROOT / f"{place.script}.py")
        line = f"--data {place.images} --out {out} {FLAGS} {SCRIPTS[place.script]} {flags}"
        self.out, self.how, self.file = Path(out), how, Path(f"{out}.{time.time_ns()}.txt")
        with open(self.file, "w") as file:
            if how in ("fork", "pair"):
                self.process = Fork([script, *line.split()], file, how == "pair")
                return
            launcher = TORCHRUN.format(port=free_port()).split() if how == "torchrun" else []
            words = [sys.executable, *launcher, script, *line.split()]
            words += how.split() if how == "--nproc 2" else []
            env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=env,
                                            cwd=ROOT, start_new_session=True)

    def said(self):
        return self.file.read_text()

    def wait(self, timeout=300):
        """The exit code. Fails if the command hangs, or leaves processes behind."""
        code, end = self.process.wait(timeout), time.time() + 60
        while time.time() < end:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return code
            time.sleep(0.02)
        raise AssertionError("it left processes behind")

    def until(self, step, timeout=300):
        """Waits for a step in the log; fails if the command ends before."""
        end = time.time() + timeout
        while last_step(self.out) < step:
            assert self.process.poll() is None and time.time() < end, self.said()[-3000:]
            time.sleep(0.01)

    def children(self):
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def kill(self):
        """kill -9 to all; torchrun's children have sessions of their own."""
        for pid in [*(self.children() if self.how == "torchrun" else ()), self.process.pid]:
            os.killpg(pid, signal.SIGKILL)
        self.wait()


class Place:
    """A folder with images of several sizes, which workers decode at each step, and runs."""

    def __init__(self, folder, script="mocov2_asym"):
        self.folder, self.script, self.number, self.wholes = Path(folder), script, 0, {}
        self.images = class_tree(self.folder / "images", 8 * EPOCH, sizes=(20, 24, 31))

    def new(self):
        self.number += 1
        return self.folder / f"run{self.number}"

    def complete(self, out, how="fork", flags="--epochs 2"):
        """Runs a command to its end, and returns what it said."""
        command = Command(self, out, how, flags)
        assert command.wait() == 0, command.said()[-3000:]
        return command.said()

    def continues(self, out, how="fork", flags="--epochs 2"):
        """The same command again, to the end: then all is, bit for bit, as if nothing had happened.
        But running statistics of several processes are equal up to rounding."""
        self.complete(out, how, flags)
        world = 1 if how in ("fork", "python") else 2
        if (world, flags) not in self.wholes:
            self.wholes[world, flags] = self.new()
            self.complete(self.wholes[world, flags], ("fork", "pair")[world - 1], flags)
        assert log_lines(out) == log_lines(self.wholes[world, flags])
        same_state(out, self.wholes[world, flags], running=1e-5 * (world > 1))


def last_step(out):
    """The last whole line's step in log.jsonl, as found while the run goes on; or 0."""
    try:
        log = Path(out, "log.jsonl").read_text()
        return int(re.findall(r'\n\{"step": (\d+),.*\}(?=\n)', log)[-1])
    except (OSError, IndexError):
        return 0


def sound(out):
    """last.pt and the backbones are absent or whole, at any time; the step of last.pt, or 0."""
    for path in Path(out).glob("*.pth"):
        torch.load(path, weights_only=True)
    return saved(out)["step"] if Path(out, "last.pt").exists() else 0


# ---- faults: each takes a place and a launcher ----


def signalled(place, how, number):
    """Ctrl-C goes to all processes of a terminal, the others to the launcher."""
    out, flags = place.new(), "--epochs 25"
    command = Command(place, out, how, flags)
    command.until(6)
    (os.killpg if number == signal.SIGINT else os.kill)(command.process.pid, number)
    code, step = command.wait(), sound(out)
    assert 6 <= step == last_step(out) < 25 * EPOCH, command.said()[-3000:]
    assert f"saved step {step}" in command.said(), command.said()[-3000:]
    assert code == 1 if how == "torchrun" else code == 128 + number, (code, command.said())
    assert how == "torchrun" or "Traceback" not in command.said(), command.said()
    place.continues(out, how, flags)


def killed(place, how, kills, seed=0):
    """kill -9 at random moments: no more is lost than --save-every, and last.pt always loads."""
    dice, out, flags, step = random.Random(seed), place.new(), f"--epochs {2 * kills + 2}", 0
    for _ in range(kills):
        command = Command(place, out, how, flags)
        command.until(step + dice.randrange(1, 2 * EPOCH))
        time.sleep(0.1 * dice.random())
        command.kill()
        logged, before, step = last_step(out), step, sound(out)
        assert step >= before and step > logged - 1 - EPOCH, (before, step, logged)
    place.continues(out, how, flags)


def restarted(place, how):
    """torchrun starts all processes again when one dies."""
    out, flags = place.new(), "--epochs 25"
    command = Command(place, out, how, flags)
    for child, step in enumerate((6, 26)):
        command.until(step)
        os.kill(command.children()[child], signal.SIGKILL)
    assert command.wait() == 0, command.said()[-3000:]
    assert command.said().count("resuming at step") == 2, command.said()[-3000:]
    place.continues(out, how, flags)


FAULTS = [(signalled, how, number) for how in LAUNCHERS for number in SIGNALS]
FAULTS += [(killed, "fork", 20), (killed, "--nproc 2", 5), (killed, "torchrun", 5)]
FAULTS += [(restarted, "torchrun")]


if __name__ == "__main__":
    test = f"{ROOT}/tests/test_faults.py::test_drill"
    raise SystemExit(subprocess.call([sys.executable, "-m", "pytest", "-m", "slow", "-v", test]))
