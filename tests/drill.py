"""Runs in processes of their own, for tests/test_faults.py to signal and to kill; and whether the
same command then ends with the weights, the optimiser's state and the log of an undisturbed run."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from pool import ROOT, SCRIPTS, SMALL, class_tree, free_port, log_lines, same_state, saved

import mocov2_asym

EPOCH = 4  # steps
FLAGS = SMALL.replace("16 --bn-groups 8 --workers 0", "8 --bn-groups 4 --workers 1")
FLAGS += f" {SCRIPTS['mocov2_asym']} --knn-every 0 --log-every 1 --warmup-epochs 0"
TORCHRUN = ("-m torch.distributed.run --nproc_per_node 2 --max-restarts 3 --master_addr 127.0.0.1 "
            "--master_port {port} --signals_to_handle SIGTERM,SIGINT,SIGUSR1")
SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


class Command(multiprocessing.get_context("fork").Process):
    """A run in a session of its own. how: "fork", a script's main() in a fork of this process, as
    good as a new interpreter for what comes after the imports; or "--nproc 2"; or "torchrun"."""

    def __init__(self, place, out, how="fork", flags="--epochs 2"):
        super().__init__()
        self.out, self.how, self.file = Path(out), how, Path(f"{out}.{time.time_ns()}.txt")
        line = f"{ROOT}/mocov2_asym.py --data {place.images} --out {out} {FLAGS} {flags}"
        if how == "torchrun":
            line = f"{TORCHRUN.format(port=free_port())} {line}"
        self.words = (f"{line} {how}" if how == "--nproc 2" else line).split()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, from Python 3.12 on
            self.start()

    def run(self):
        """What the fork does."""
        torch.set_num_threads(1)  # OpenMP's other threads did not come along, and would be waited for
        os.setsid()
        file = open(self.file, "w")
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.how != "fork":
            os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            os.execv(sys.executable, [sys.executable, *self.words])

        sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
        sys.argv, code = self.words, 0
        try:
            mocov2_asym.main()
        except SystemExit as e:
            code = e.code
        sys.exit(code)  # when what the script held is gone, as a new interpreter does

    def said(self):
        return self.file.read_text()

    def wait(self, timeout=300):
        """The exit code. Fails if the command hangs, or leaves processes behind."""
        end = time.time() + timeout
        self.join(timeout)
        assert self.exitcode is not None, "it hangs"
        with contextlib.suppress(ProcessLookupError):
            while time.time() < end + 60:
                os.killpg(self.pid, 0)
                time.sleep(0.02)
            raise AssertionError("it left processes behind")
        return self.exitcode

    def until(self, step, timeout=300):
        """Waits for a step in the log; fails if the command ends before."""
        end = time.time() + timeout
        while last_step(self.out) < step:
            assert self.exitcode is None and time.time() < end, self.said()[-3000:]
            time.sleep(0.01)

    def children(self):
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]


class Place:
    """A folder with images of several sizes, which workers decode at each step, and runs."""

    def __init__(self, folder):
        self.folder, self.number, self.wholes = Path(folder), 0, {}
        self.images = class_tree(self.folder / "images", 8 * EPOCH, sizes=(20, 24, 31))

    def new(self):
        self.number += 1
        return self.folder / f"run{self.number}"

    def complete(self, out, how="fork", flags="--epochs 2"):
        """Runs a command to its end."""
        command = Command(self, out, how, flags)
        assert command.wait() == 0, command.said()[-3000:]

    def continues(self, out, how="fork", flags="--epochs 2"):
        """The same command again, to the end: then all is, bit for bit, as if nothing had happened.
        But running statistics of several processes are equal up to rounding."""
        self.complete(out, how, flags)
        several = how != "fork"
        if (several, flags) not in self.wholes:
            self.wholes[several, flags] = self.new()
            self.complete(self.wholes[several, flags], "--nproc 2" if several else "fork", flags)
        assert log_lines(out) == log_lines(self.wholes[several, flags])
        same_state(out, self.wholes[several, flags], running=1e-5 * several)


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
