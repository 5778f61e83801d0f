"""What ends a run, with real processes and real signals: after each fault the same command continues, and must end with
the weights, optimiser and log of an undisturbed run, bit for bit (running statistics of two processes: to rounding).

    python tests/drill.py [--script byol_asym]       prints a table, fault | launcher | tries | outcome

Faults: SIGTERM, SIGUSR1 and Ctrl-C finish the step, save and exit with 128 + the signal's number (torchrun itself exits with
1 then); kill -9 at random moments loses at most --save-every; a process that dies under torchrun is restarted.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from pool import ROOT, SCRIPTS, SMALL, class_tree, free_port, log_lines, saved, tensors  # noqa: E402

STEPS, EPOCH = 16, 4
QUICK = (f"{SMALL.replace('--batch-size 16', '--batch-size 8').replace('--workers 0', '--workers 1')} --epochs {STEPS // EPOCH} "
         "--bn-groups 4 --knn-every 0 --log-every 1 --warmup-epochs 0")
LAUNCHERS = {"python": ([], []), "--nproc 2": ([], ["--nproc", "2"]),
             "torchrun": ("-m torch.distributed.run --nproc_per_node 2 --max-restarts {restarts} --master_port {port}".split(), [])}


class Place:
    """A folder with images of several sizes, which workers decode at each step, and an undisturbed run."""

    def __init__(self, folder, script="mocov2_asym"):
        self.folder, self.script, self.wholes = Path(folder), script, {}
        self.images = class_tree(self.folder / "images", 8 * EPOCH, sizes=(20, 24, 31))

    def start(self, out, launcher="python", restarts=0):
        before, after = LAUNCHERS[launcher]
        before = [word.format(restarts=restarts, port=free_port()) for word in before]
        line = f"--data {self.images} --out {out} {QUICK} {SCRIPTS[self.script]}"
        words = [sys.executable, *before, str(ROOT / f"{self.script}.py"), *line.split(), *after]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)

    def whole(self, launcher):
        world = 1 if launcher == "python" else 2
        if world not in self.wholes:
            out = self.folder / f"whole{world}"
            text, code = finish(self.start(out, launcher))
            assert code == 0, text
            self.wholes[world] = out
        return self.wholes[world]

    def complete(self, out, launcher):
        """The same command again, to the end; then all is as if nothing had happened."""
        text, code = finish(self.start(out, launcher))
        assert code == 0, text
        a, b = tensors(saved(self.whole(launcher))), tensors(saved(out))
        assert a.keys() == b.keys() and saved(out)["step"] == STEPS
        for k in a:  # running statistics are averaged over processes at each save, and so rounded at other times
            close = torch.allclose(a[k].double(), b[k].double(), 1e-4, 1e-6) if "running_" in k else torch.equal(a[k], b[k])
            assert close or k.startswith("/args"), k
        assert log_lines(self.whole(launcher)) == log_lines(out)


def finish(process, seconds=240):
    text, _ = process.communicate(timeout=seconds)
    return text, process.returncode


def step_of(out):
    """The last step in the log, or -1."""
    try:
        return json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-1]).get("step", 0)
    except (OSError, ValueError, IndexError):
        return -1


def await_step(process, out, step, seconds=120):
    end = time.time() + seconds
    while step_of(out) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < end, "no progress"
        time.sleep(0.02)


def signalled(place, out, launcher, number):
    """A signal to the launcher, or, as a terminal and schedulers do, to all of its processes."""
    process = place.start(out, launcher)
    await_step(process, out, 6)
    if launcher == "--nproc 2":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    text, code = finish(process)
    assert code == (128 + number if launcher != "torchrun" else 1) or launcher == "torchrun" and code != 0, (code, text)
    assert 6 <= saved(out)["step"] < STEPS and f"saved step {saved(out)['step']}" in text, text
    place.complete(out, launcher)


def killed(place, out, launcher, seed=0):
    """kill -9 to all processes at random moments, until a run gets through; last.pt loads at any time."""
    generator, kills, before = random.Random(seed), 0, 0
    while True:
        process = place.start(out, launcher)
        try:
            process.communicate(timeout=generator.uniform(5, 12))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            logged = step_of(out)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        step = saved(out)["step"] if (Path(out) / "last.pt").exists() else 0
        assert step >= max(before, logged // EPOCH * EPOCH - EPOCH), "more than --save-every is lost"
        before = step
        assert kills < 60
    place.complete(out, launcher)
    return kills


def restarted(place, out):
    """torchrun starts all processes again when one dies."""
    process = place.start(out, "torchrun", restarts=2)
    await_step(process, out, 6)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    text, code = finish(process)
    assert code == 0 and "resuming at step 4" in text, text
    place.complete(out, "torchrun")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--script", choices=SCRIPTS, default="mocov2_asym")
    place = Place(tempfile.mkdtemp(), p.parse_args().script)
    jobs = [(f"{n.name}", launcher, lambda out, a=launcher, n=n: signalled(place, out, a, n))
            for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) for launcher in LAUNCHERS]
    jobs += [("kill -9", launcher, lambda out, a=launcher: killed(place, out, a)) for launcher in LAUNCHERS]
    jobs += [("a dead process", "torchrun --max-restarts 2", lambda out: restarted(place, out))]
    for i, (fault, launcher, job) in enumerate(jobs):
        try:
            kills = job(place.folder / str(i))
            outcome = "continued, bit-equal" + (f" after {kills} kills" if kills else "")
        except AssertionError as e:
            outcome = f"FAILED: {str(e)[-300:]}"
        print(f"| {fault} | {launcher} | {outcome} |", flush=True)
    shutil.rmtree(place.folder)


if __name__ == "__main__":
    main()
