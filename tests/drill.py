"""Long drills of what ends or disturbs a run: real processes, real signals, real full disks. Run by hand:

    python tests/drill.py                        all of them, about an hour on one core
    python tests/drill.py kill9 disk-full        some; a number after a colon sets the tries: kill9:60
    python tests/drill.py --log FILE ...         appends the outcomes to FILE, one JSON object per line

Prints a table, fault | tries | outcome. After each fault the same command continues, and the run must end with the
weights, the optimiser's state and the log of an undisturbed run, bit for bit; last.pt must load at any time, no
process may be left, and the exit code must tell what happened. tests/test_faults.py has short forms of these.
Needs Linux (/proc); the drills of full and read-only file systems need root, to mount small ones.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from pool import ROOT, SCRIPTS, SMALL, class_tree, free_port, log_lines, saved, tensors  # noqa: E402

SCRIPT = "mocov2_asym"
EPOCH = 4  # steps, of 8 of the 32 images
GROUPED = SMALL.replace("--small-size 8 ", "").replace("16 --bn-groups 8", "8 --bn-groups 4") + " --warmup-epochs 0.5"
QUICK = f"{GROUPED} --knn-every 100 --log-every 1 --workers 1"  # a loader's worker, and each step in the log
TORCHRUN = "-m torch.distributed.run --nproc_per_node 2 --master_addr 127.0.0.1 --master_port {port}"


# ---- commands, and what they leave ----


class Fork(multiprocessing.get_context("fork").Process):
    """A script's main() in a fork of this process, which has imported torch: as good as a new interpreter for what comes after
    the imports, and five seconds faster. In a session of its own, with the interface of subprocess.Popen."""

    def __init__(self, words, text, env, pair, limit):
        super().__init__(target=self.body, args=(words, text, env, pair, limit))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, from Python 3.12 on
            self.start()

    def body(self, words, text, env, pair, limit):
        os.setsid()
        for stream in (1, 2):
            os.dup2(text.fileno(), stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        os.environ.update(env)
        sys.argv = words
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if pair:
            self.launch()
        code = 0
        try:
            importlib.import_module(Path(words[0]).stem).main()
        except SystemExit as e:
            code = e.code
        sys.exit(code)  # when what the script held is gone, as a new interpreter does

    def launch(self):
        """The least of launchers: two forks, which return from here; it ends with the exit code of the first that fails."""
        ranks = []
        os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        for r in range(2):
            if not (pid := os.fork()):
                os.environ.update(RANK=str(r), LOCAL_RANK=str(r))
                return
            ranks.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in ranks]
        sys.exit(next((code if code > 0 else 128 - code for code in codes if code), 0))

    def poll(self):
        return self.exitcode

    returncode = property(poll)

    def wait(self, timeout):
        self.join(timeout)
        assert self.exitcode is not None, "it hangs"
        return self.exitcode


class Command:
    """A command in a session of its own. Its processes, and theirs, are known by that, or by a mark in their environment.
    how: fork, python (one process each), pair (two forks), nproc, torchrun (two processes) or the words of another
    launcher. limit: bytes that a file may have, for forks. program: instead of all that, a program and its arguments."""

    def __init__(self, line, how="fork", script=SCRIPT, env=(), limit=None, program=None):
        self.mark, self.text = uuid.uuid4().hex, ""
        self.file = Path(tempfile.gettempdir(), f"drill-{self.mark}.txt")
        if how == "nproc":
            line += " --nproc 2"
        launcher = TORCHRUN if how == "torchrun" else "" if how in ("fork", "pair", "python", "nproc") else how
        launcher = launcher.format(port=free_port())
        words = [*launcher.split(), str(ROOT / f"{script}.py"), *line.split()]
        env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DRILL": self.mark, **dict(env)}
        with open(self.file, "w") as text:
            if how in ("fork", "pair"):
                self.process = Fork(words, text, env, how == "pair", limit)
            else:
                self.process = subprocess.Popen(program or [sys.executable, *words], stdout=text, stderr=subprocess.STDOUT, cwd=ROOT,
                                                env={**os.environ, **env}, start_new_session=True)

    def everyone(self):
        """The living processes of this command, by id: (id of the parent, command line)."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit():
                    state, parent, _, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                    marked = f"DRILL={self.mark}" in (entry / "environ").read_text(errors="replace")
                    if (marked or int(session) == self.process.pid) and state not in "ZX":
                        found[int(entry.name)] = int(parent), (entry / "cmdline").read_text()
            except OSError:  # it ended just now
                continue
        return found

    def trainers(self):
        """The ids of the training processes, in order of rank as they were started."""
        everyone = self.everyone()
        children = [p for p, (parent, *_) in everyone.items() if parent == self.process.pid]
        children = [p for p in children if "resource_tracker" not in everyone[p][1]]
        return sorted(children) or [self.process.pid]

    def wait(self, timeout=600):
        """The exit code. Fails if the command hangs, or leaves a process behind."""
        try:
            code = self.process.wait(timeout)
            end = time.time() + 60  # a process that still measures, on a busy machine
            while (left := self.everyone()) and time.time() < end:
                time.sleep(0.1)
            assert not left, f"left behind: {left}"
            return code
        finally:
            for pid in self.everyone():
                os.kill(pid, signal.SIGKILL)
            self.text = self.said()
            self.file.unlink(missing_ok=True)

    def until(self, condition, timeout=600):
        """Waits for the condition; False if the command ended before."""
        end = time.time() + timeout
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.time() > end:
                self.process.kill()
                self.wait()
                raise AssertionError(f"no progress: {self.said()[-2000:]}")
            time.sleep(0.01)
        return True

    def said(self):
        return self.file.read_text() if self.file.exists() else self.text


def tracebacks(said):
    """Whether there is one, but for a complaint of a loader worker whose process was killed while it took a batch."""
    return re.search(r"Traceback .*\n(?!.*resource_sharer)", said)


def last_step(out):
    """The last whole line's step in log.jsonl, as another process finds it while the run goes on."""
    try:
        return int(re.findall(r'\n\{"step": (\d+),.*\}(?=\n)', (out / "log.jsonl").read_text())[-1])
    except (OSError, IndexError):
        return -1


def complete(line, how="fork", code=0, script=SCRIPT, timeout=600, **options):
    """Runs a command to its end, and returns what it said."""
    command = Command(line, how, script, **options)
    found = command.wait(timeout)
    assert found == code, f"exit code {found}, not {code}: {command.said()[-3000:]}"
    return command.said()


def sound(out):
    """Whatever happened, last.pt is absent or whole."""
    if (out / "last.pt").exists():
        state = saved(out)
        assert all(x.isfinite().all() for x in tensors(state["model"]).values()) and state["step"] <= last_step(out)


def same(a, b, processes=1):
    """Two runs left the same: weights, optimiser and log bit for bit, each step once, nothing half-written. Of several
    processes, running statistics become means over them when they are saved: then, these only, up to rounding."""
    lines = [log_lines(out) for out in (a, b)]
    assert [x["step"] for x in lines[0]] == list(range(len(lines[0]))), [x["step"] for x in lines[0]]
    for line in lines[0][1:-1] + lines[1][1:-1]:  # a part of a run that ends by --steps has measured these then
        for k in ("v_src", "v_tgt", "knn"):
            line.pop(k, None)
    if processes > 1:  # the last line's, of running statistics: one of the three images that ask may change its mind
        assert abs(lines[0][-1].pop("knn") - lines[1][-1].pop("knn")) < 0.4
    assert repr(lines[0]) == repr(lines[1])  # nan is nan

    def equal(k, x, y):
        return torch.allclose(x, y, 1e-5, 1e-6) if processes > 1 and "running_" in k else torch.equal(x, y)

    whole = [saved(out) for out in (a, b)]
    states = [{k: x for k, x in tensors(state).items() if not k.startswith("/args")} for state in whole]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    for k, x in states[0].items():
        assert equal(k, x, states[1][k]), k
    for name in ("backbone.pth", "backbone_target.pth"):
        x, y = (torch.load(out / name, weights_only=True) for out in (a, b))
        assert x.keys() == y.keys() and all(equal(k, x[k], y[k]) for k in x), name
        encoder = "target" if "target" in name else "source"
        assert all(torch.equal(v, whole[0]["model"][f"{encoder}.backbone.{k}"]) for k, v in x.items())
    assert not list(a.glob("*.tmp"))


def shared_memory():
    """Names of torch's segments in /dev/shm whose process is dead."""
    names = [re.match(r"torch_(\d+)_.*", p.name) for p in Path("/dev/shm").glob("torch_*")]
    return {m[0] for m in names if m and not Path(f"/proc/{m[1]}").exists()}


class Place:
    """A folder for a drill: images, undisturbed runs to compare with, and new folders for disturbed ones."""

    def __init__(self, folder):
        self.folder, self.images, self.wholes, self.number = folder, class_tree(folder / "images", 32, (20, 24, 31)), {}, 0

    def new(self):
        self.number += 1
        return self.folder / f"run{self.number}"

    def line(self, out, flags="", script=SCRIPT):
        return f"--data {self.images} --out {out} {QUICK} {SCRIPTS[script]} {flags}"

    def whole(self, flags, how="fork", script=SCRIPT):
        """The folder of an undisturbed run with these flags."""
        key = flags, how, script
        if key not in self.wholes:
            self.wholes[key] = self.new()
            complete(self.line(self.wholes[key], flags, script), how, script=script)
        return self.wholes[key]


# ---- drills: each takes a place and the number of tries, and says what came of them; an exception is a failure ----


def kill9(place, tries, script=SCRIPT, seed=0, slow=0.1, more=""):
    """`kill -9` at random moments until the run is complete"""  # those that come before its first step: of a new python
    dice, out, flags = random.Random(seed), place.new(), f"--epochs {2 + 2 * tries} {more}"  # long enough for all
    kills = early = 0
    while True:
        starting = kills < tries and dice.random() < slow
        command = Command(place.line(out, flags, script), "python" if starting else "fork", script)
        if kills < tries:
            if starting:
                time.sleep(10 * dice.random())
            else:
                step = last_step(out) + dice.randrange(2 * EPOCH)
                command.until(lambda step=step: last_step(out) >= step)
                time.sleep(0.1 * dice.random())
            if command.process.poll() is None:
                command.process.kill()
                kills, early = kills + 1, early + starting
                assert command.wait() == -signal.SIGKILL
                sound(out)
                continue
        assert command.wait() == 0, command.said()[-3000:]
        break
    same(out, place.whole(flags, script=script))
    return f"{kills} kills, {early} of them while starting; {last_step(out)} steps, weights and log bit for bit"


def kill_writing(place, tries, seed=0):
    """`kill -9` while a checkpoint is being written"""
    dice, flags, parts = random.Random(seed), "--epochs 5 --hidden 1024", 0  # 20 MB
    for _ in range(tries):
        out = place.new()
        aside, some = out / "last.pt.tmp", dice.random() * 2e7
        command = Command(place.line(out, flags))
        epoch = dice.randrange(3)
        command.until(lambda out=out, epoch=epoch: last_step(out) >= epoch * EPOCH)
        while command.process.poll() is None:
            try:
                if aside.stat().st_size >= some:
                    command.process.kill()
            except OSError:
                continue
        assert command.wait() in (0, -signal.SIGKILL)
        parts += aside.exists()
        if (out / "last.pt").exists():
            sound(out)
        complete(place.line(out, flags))
        same(out, place.whole(flags))
    assert parts, "none was hit"
    return f"{parts} of {tries} left a part aside; last.pt was always whole; all continued bit for bit"


def signals(place, tries, hows=("python", "nproc", "torchrun"), numbers=(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)):
    """SIGTERM, SIGUSR1, Ctrl-C, SIGHUP (a closed terminal) under python, --nproc 2, torchrun"""
    flags, codes, dice = "--epochs 5", {}, random.Random(1)
    for _ in range(tries):
        for how in hows:
            for number in numbers:
                out = place.new()
                launcher = f"{TORCHRUN} --signals_to_handle SIGTERM,SIGINT,SIGUSR1,SIGHUP" if how == "torchrun" else how
                command = Command(place.line(out, flags), launcher)
                at = dice.randrange(1, 3 * EPOCH)
                assert command.until(lambda out=out, at=at: last_step(out) >= at), command.said()
                if number in (signal.SIGINT, signal.SIGHUP):
                    os.killpg(command.process.pid, number)  # as a terminal does
                else:
                    os.kill(command.process.pid, number)
                code = command.wait()
                sound(out)
                assert at <= saved(out)["step"] == last_step(out), "it stopped without saving"
                assert f"{number.name}: saved step {last_step(out)}" in command.said(), command.said()
                assert how == "torchrun" or "Traceback" not in command.said(), command.said()
                assert how == "torchrun" or code == 128 + number, code
                codes.setdefault(how, {})[number.name] = code
                complete(place.line(out, flags), how)
                same(out, place.whole(flags, "fork" if how == "python" else "nproc"), 1 if how == "python" else 2)
    said = "; ".join(f"{how} {', '.join(map(str, found.values()))}" for how, found in codes.items())
    return f"all saved and continued bit for bit; exit codes: {said}"


def worker(place, tries, flags="--epochs 5"):
    """`kill -9` of one of two processes under torchrun --max-restarts, --nproc 2"""
    dice, said = random.Random(2), set()
    for number in range(tries):
        for how in ("nproc", f"{TORCHRUN} --max-restarts 3"):
            out, at = place.new(), dice.randrange(1, 3 * EPOCH)
            command = Command(place.line(out, flags), how)
            assert command.until(lambda out=out, at=at: last_step(out) >= at), command.said()
            os.kill(command.trainers()[number % 2], signal.SIGKILL)
            code = command.wait()
            sound(out)
            if how == "nproc":
                assert code == 128 + signal.SIGKILL, code
                assert f"process {number % 2} died (SIGKILL); the same command continues" in command.said(), command.said()
                assert not tracebacks(command.said()), command.said()
                complete(place.line(out, flags), how)
            else:
                assert code == 0, command.said()[-3000:]
                assert "resuming at step" in command.said() or at < EPOCH
            same(out, place.whole(flags, "nproc"), 2)
            said.add(f"{'--nproc' if how == 'nproc' else 'torchrun'} exits with {code}")
    return f"torchrun restarted, --nproc continued with the same command, bit for bit; {', '.join(sorted(said))}"


def launcher(place, tries, flags="--epochs 100", hows=("nproc", "torchrun")):
    """`kill -9` of the launcher itself"""
    for _ in range(tries):
        for how in hows:
            out = place.new()
            command = Command(place.line(out, flags), how)
            assert command.until(lambda out=out: last_step(out) >= 2), command.said()
            command.process.kill()
            assert command.wait() == -signal.SIGKILL  # fails if the children live on
            sound(out)
            assert saved(out)["step"] == last_step(out) >= 2, "the children stopped without saving"
    return "its processes saved and ended; none was left"


def nodes(place, tries, flags="--epochs 5", losses=(None, "other", "host")):
    """Two nodes (torchrun agents on one machine): undisturbed; one is lost (`kill -9`) and returns; the host is lost"""
    unshared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # README, several nodes, says why
    for _ in range(tries):
        for loss in losses:
            out, port = place.new(), free_port()
            agent = ("-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv-backend c10d --rdzv-id drill "
                     f"--rdzv-endpoint 127.0.0.1:{port} --local-addr 127.0.0.1 --max-restarts 3")
            pair = [Command(place.line(out, flags), agent, env=unshared) for _ in range(2)]
            if loss:
                assert pair[0].until(lambda out=out: last_step(out) > EPOCH), pair[0].said() + pair[1].said()
                pair.sort(key=lambda command, port=port: listens(command.process.pid, port))  # the host, who holds the meeting, last
                lost = pair.pop(loss == "host")
                lost.process.kill()
                assert lost.wait() == -signal.SIGKILL
                sound(out)
                if loss == "host":
                    assert pair.pop().wait() == 1  # nobody to meet: both are started again
                    pair.append(Command(place.line(out, flags), agent, env=unshared))
                pair.append(Command(place.line(out, flags), agent, env=unshared))
            codes = [command.wait() for command in pair]
            said = "\n---- the other ----\n".join(command.said()[-3000:] for command in pair)
            assert codes == [0, 0], f"exit codes {codes}: {said}"
            assert not loss or "resuming at step" in pair[0].said() + pair[1].said()
            same(out, place.whole(flags, "nproc"), 2)
    return "the result of one node; one waits for the other to return, or, the host lost, ends; all continued bit for bit"


def listens(pid, port):
    """Whether a process listens on a port."""
    sockets = {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return any(row[3] == "0A" and int(row[1].split(":")[1], 16) == port and f"socket:[{row[9]}]" in sockets for row in rows)


FAKES = {  # stand-ins for SLURM's programs: two nodes on this machine, and a note of each requeue
    "srun": """#!/bin/bash
"$@" & a=$!
"$@" & b=$!
trap 'kill -TERM $a $b; wait $a $b' TERM
wait $a $b
""",
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then echo localhost; echo localhost; else echo "$@" >> $REQUEUED; fi
""",
    "torchrun": f"""#!/bin/bash
exec {sys.executable} -m torch.distributed.run --local-addr 127.0.0.1 "$@"
""",
}


def slurm(place, tries, flags="--epochs 6"):
    """README's SLURM scripts, one and two nodes: USR1 before the time limit, requeue"""
    page = (ROOT / "README.md").read_text()
    scripts = sorted(set(re.findall(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)))
    assert scripts
    for name, text in FAKES.items():
        (place.folder / name).write_text(text)
        (place.folder / name).chmod(0o755)
    for _ in range(tries):
        for text in scripts:
            out, batch = place.new(), place.folder / "batch.sh"
            text = re.sub(r"mocov2_asym.py .*?(?= & pid)", f"{ROOT}/mocov2_asym.py {place.line(out, flags)}", text, flags=re.DOTALL)
            text = text.replace("--nproc_per_node 8", f"--nproc_per_node {1 if 'srun' in text else 2}").replace("29500", str(free_port()))
            batch.write_text(text)
            env = {"PATH": f"{place.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost,localhost",
                   "REQUEUED": str(out) + ".requeued"}
            command = Command("", env=env, how="bash", program=["bash", str(batch)])
            assert command.until(lambda out=out: last_step(out) > EPOCH), command.said()
            command.process.send_signal(signal.SIGUSR1)
            command.wait()
            sound(out)
            assert Path(env["REQUEUED"]).read_text() == "requeue 7\n", command.said()
            assert saved(out)["step"] == last_step(out) < 6 * EPOCH, command.said()
            code = Command("", env=env, how="bash", program=["bash", str(batch)]).wait()
            assert code == 0 and Path(env["REQUEUED"]).read_text() == "requeue 7\n", code
            same(out, place.whole(flags, "nproc"), 2)
    return f"{len(scripts)} scripts, with stand-ins for srun and scontrol: saved, requeued once, and the next job continued"


class Mount:
    """A small file system of its own. Needs root."""

    def __init__(self, folder, size):
        self.folder = folder
        folder.mkdir(parents=True)
        self("-t", "tmpfs", "-o", f"size={size}", "tmpfs")

    def __call__(self, *options):
        subprocess.run(["mount", *options, str(self.folder)], check=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def disk_full(place, tries, flags="--epochs 5"):
    """A full disk: at the first save, at the second, in the log"""
    whole = {how: place.whole(flags, how) for how in ("fork", "nproc")}
    sizes = {p.name: p.stat().st_size for p in whole["fork"].iterdir()}
    kept, most = sizes["backbone.pth"] + sizes["backbone_target.pth"] + sizes["last.pt"], sizes["last.pt"]
    for _ in range(tries):
        for how in whole:
            for fault, size in (("first save", most // 2), ("second save", kept + most // 2), ("log", 2 * kept)):
                with Mount(place.new(), size) as mount:
                    out = mount.folder / "run"
                    command = Command(place.line(out, flags), how)
                    if fault == "log":
                        assert command.until(lambda out=out: last_step(out) > EPOCH), command.said()
                        with open(mount.folder / "filler", "wb", buffering=0) as f, suppress(OSError):
                            while True:
                                f.write(bytes(4096))
                    code = command.wait()
                    assert code == 1 and "cannot write" in command.said(), (fault, code, command.said())
                    assert "Traceback" not in command.said(), (fault, command.said())
                    assert command.said().count("cannot write") == 1, command.said()
                    sound(out)
                    assert (out / "last.pt").exists() == (fault != "first save")
                    (mount.folder / "filler").unlink(missing_ok=True)
                    mount("-o", "remount,size=100m")
                    complete(place.line(out, flags), how)
                    same(out, whole[how], 1 if how == "fork" else 2)
    return "says what it could not write, exits with 1; last.pt intact; with room, continued bit for bit"


def read_only(place, tries, flags="--epochs 5"):
    """A read-only --out: from the start, and during the run"""
    for _ in range(tries):
        with Mount(place.new(), "100m") as mount:
            out = mount.folder / "run"
            mount("-o", "remount,ro")
            assert "Read-only file system" in complete(place.line(out, flags), code=2)
            mount("-o", "remount,rw")
            command = Command(place.line(out, flags))
            assert command.until(lambda out=out: last_step(out) > EPOCH), command.said()
            over = Mount.__new__(Mount)  # read-only for all that is opened from now on; the run holds its lock open
            over.folder = out
            over("--bind", str(out))
            over("-o", "remount,bind,ro")
            assert command.wait() == 1 and "cannot write" in command.said() and "Traceback" not in command.said(), command.said()
            sound(out)
            complete(place.line(out, flags), code=2)
            subprocess.run(["umount", str(out)], check=True)
            complete(place.line(out, flags))
            same(out, place.whole(flags))
    return "refused in a line (2), or stopped in a line (1); writable again, continued bit for bit"


def loader(place, tries, flags="--epochs 5"):
    """`kill -9` of a loader worker"""
    before = shared_memory()
    for _ in range(tries):
        out = place.new()
        command = Command(place.line(out, flags))
        assert command.until(lambda out=out: last_step(out) > EPOCH), command.said()
        assert command.until(lambda command=command: len(command.everyone()) > 1), "no worker to kill"
        os.kill(max(command.everyone()), signal.SIGKILL)
        code = command.wait()
        assert code in (0, 1) and "Traceback" not in command.said(), command.said()  # 0: all was loaded already
        assert code == 0 or "lost another process" in command.said(), command.said()
        sound(out)
        complete(place.line(out, flags))
        same(out, place.whole(flags))
    left = shared_memory() - before  # nobody can remove what a worker had made, and not yet handed over, but who kills it
    for name in left:
        Path("/dev/shm", name).unlink()
    return f"one line, exit code 1; continued bit for bit; batches left in shared memory: {len(left)}"


def leaks(place, tries):
    """2,000 steps: memory of all processes, file descriptors, processes, shared memory"""
    said = []
    for _ in range(tries):
        out, seen = place.new(), {}
        command = Command(place.line(out, "--epochs 500 --knn-every 25 --save-every 25 --log-every 20"))
        while command.process.poll() is None:
            step, pid = last_step(out), command.process.pid
            with suppress(OSError, IndexError):
                everyone = command.everyone()  # the loader's worker too
                memory = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in everyone) * 4096 / 1e6
                seen[step] = memory, len(os.listdir(f"/proc/{pid}/fd")), len(everyone)
            time.sleep(0.5)
        assert command.wait() == 0 and last_step(out) == 2000, command.said()[-3000:]
        early, late = ([v for step, v in seen.items() if a <= step < b] for a, b in ((300, 800), (1500, 2000)))
        (m0, f0, p0), (m1, f1, p1) = ([max(m), min(f), min(p)] for m, f, p in (zip(*part, strict=True) for part in (early, late)))
        said.append(f"steps 300-800 to 1500-2000: {m0:.0f} to {m1:.0f} MB, {f0} to {f1} descriptors, {p0} to {p1} processes")
        assert m1 < m0 + 10 and f1 <= f0 and p1 <= p0, said
    return "; ".join(said)


def fuzzing(place, tries, seed=1):
    """Random command lines: each a step, or one line that says why not"""
    import test_fuzz

    said = [test_fuzz.run(place.folder, tries, seed)]
    return "; ".join(said + [test_fuzz.evaluate(place.folder / name, tries // 2, seed, name) for name in test_fuzz.BASES])


DRILLS = {  # name: function, tries by default
    "kill9": (kill9, 60), "kill-writing": (kill_writing, 20), "signals": (signals, 2), "worker": (worker, 4),
    "launcher": (launcher, 3), "nodes": (nodes, 2), "slurm": (slurm, 1), "disk-full": (disk_full, 1), "read-only": (read_only, 2),
    "loader": (loader, 5), "leaks": (leaks, 1), "fuzz": (fuzzing, 500),
}


def main(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME[:TRIES]", help=f"default: all of {' '.join(DRILLS)}")
    p.add_argument("--log", type=Path, default=ROOT / "runs" / "drill.jsonl", metavar="FILE")
    args = p.parse_args(argv)
    chosen = [name.partition(":") for name in args.names or DRILLS]
    if unknown := {name for name, *_ in chosen} - DRILLS.keys():
        p.error(f"no drill named {' '.join(unknown)}; there are {' '.join(DRILLS)}")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    commit = subprocess.run("git describe --always --dirty".split(), cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print("| fault | tries | outcome |\n|---|---|---|", flush=True)
    for name, _, number in chosen:
        drill, tries = DRILLS[name][0], int(number or DRILLS[name][1])
        folder, start, before = Path(tempfile.mkdtemp(prefix="drill-")), time.time(), shared_memory()
        try:
            outcome, good = drill(Place(folder), tries), True
            assert shared_memory() <= before, f"shared memory is left: {shared_memory() - before}"
        except Exception as e:
            outcome, good, failed = f"FAILED: {type(e).__name__}: {e}", False, failed + 1
            traceback.print_exc()
        row = {"drill": name, "fault": drill.__doc__, "tries": tries, "good": good, "outcome": outcome,
               "seconds": round(time.time() - start), "torch": torch.__version__, "commit": commit}
        with open(args.log, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(f"| {row['fault']} | {tries} | {outcome} ({row['seconds']} s) |", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
