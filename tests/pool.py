"""What several tests share: flags and images of tiny runs, a step's views, a pool of processes."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from common import data
from common.augment import rng

ROOT = Path(__file__).resolve().parent.parent
HEADS = "--hidden 32 --dim 16"
SCRIPTS = {  # the six, and what makes each one small
    "mocov2_asym": f"--queue 40 {HEADS}", "mocov3_asym": HEADS, "simclr_asym": HEADS,
    "byol_asym": HEADS, "simsiam_asym": "--layers 2 --hidden 8 --dim 16",
    "barlow_asym": f"--layers 2 {HEADS}"}
SMALL = ("--recipe small --arch tiny --img-size 16 --small-size 8 --batch-size 16 --bn-groups 8 "
         "--workers 0 --device cpu")
TIMINGS = {"img_s", "data_frac", "mem_gb", "eta_s"}  # in which lines of equal runs may differ


def small_args(script, flags=""):
    """The arguments of a small run as the model gets them."""
    flags = f"--data none --amp off {SMALL} {SCRIPTS[script.METHOD]} {flags}"
    args = script.parse_args(flags.split())
    script.check_flags(args)
    return args


def pictures(n, size=24):
    """n smooth random images, uint8 (n, 3, size, size)."""
    low = torch.randn(n, 3, 4, 4, generator=rng(7, "pictures"))
    x = torch.nn.functional.interpolate(low, size=size, mode="bicubic")
    return ((x * 0.25 + 0.5).clamp(0, 1) * 255).byte()


def small_images(n=48):
    labels = torch.arange(n) % 3
    return data.Images(pictures(n), labels=labels, classes=("a", "b", "c"), stats=data.HALF)


def build(script, args):
    torch.manual_seed(args.seed)
    return script.Method(args)


def views_of(script, args):
    """A step's views, as the training loop makes them, and the generator for the forward pass."""
    batches = [(0, torch.arange(args.batch_size))]
    stream = script.data.stream(
        small_images(), script.plan_views(args), batches, args.seed, slice(None), 0, "cpu")
    (src, tgt), generator = next(stream)
    return src, tgt, generator


def class_tree(folder, n=64, sizes=(24,)):
    """Three classes of PNG images. A run decodes one size once, several sizes at each step."""
    for i, x in enumerate(pictures(n)):
        path, w = folder / f"class{i % 3}" / f"{i:03d}.png", sizes[i % len(sizes)]
        path.parent.mkdir(parents=True, exist_ok=True)
        size = w, w + 4 * (len(sizes) > 1)
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize(size).save(path)
    return folder


def log_lines(out, drop=TIMINGS):
    """The lines of log.jsonl after the first, without timings."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()][1:]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def saved(out):
    return torch.load(Path(out, "last.pt"), map_location="cpu", weights_only=True)


def tensors(state, prefix=""):
    """All tensors and numbers in nested dicts and lists, by path."""
    if isinstance(state, (dict, list, tuple)):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in pairs for k, v in tensors(value, f"{prefix}/{key}").items()}
    return {prefix: torch.as_tensor(state)} if isinstance(state, (torch.Tensor, int, float)) else {}


def same_state(a, b, limit=0.0, running=0.0):
    """Two runs left the same weights, queue and state of the optimiser, up to the relative error
    limit; running: that of running statistics, which are means over processes. Of small tensors
    0.1 is the scale: where a gradient is 0, AdamW makes of its rounding steps of 1e-12."""
    a, b = tensors(saved(a)), tensors(saved(b))
    assert a.keys() == b.keys() and len(a) > 100
    for k, x in a.items():
        if not k.startswith("/args"):
            x, y, most = x.double(), b[k].double(), running if "running_" in k else limit
            assert (x - y).norm() <= most * (x.norm() + 0.1), k


class Bomb:
    """Where it is loaded as code, the folder shows it."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pool:
    """Processes that live through many tests; each job has a process group of its own."""

    def __init__(self, size=4):
        context = multiprocessing.get_context("forkserver")  # a new one, but with imports done
        context.set_forkserver_preload(["torch.distributed", "torchvision", "numpy", "PIL.Image"])
        self.pipes, theirs = zip(*(context.Pipe() for _ in range(size)), strict=True)
        self.workers = [context.Process(target=worker, args=[x], daemon=True) for x in theirs]
        for process in self.workers:
            process.start()

    def run(self, world, function, *args, timeout=240, dtype=torch.float32):
        """function(*args) in world processes, with a launcher's environment if they are two or
        more: what they return, by rank. An exception there is raised here. dtype: the default."""
        port, pipes = free_port(), self.pipes[:world]
        for r, pipe in enumerate(pipes):
            pipe.send((function, args, r, world, port, dtype))
        end = time.time() + timeout
        hanging = [r for r, x in enumerate(pipes) if not x.poll(max(0, end - time.time()))]
        if hanging:
            self.close()  # what is left of the job would disturb the next
            raise TimeoutError(f"of {world} processes, {hanging} did not return")
        errors, blobs = zip(*(pipe.recv() for pipe in pipes), strict=True)
        if any(errors):
            raise RuntimeError("\n".join(f"process {r}: {e}" for r, e in enumerate(errors) if e))
        return [torch.load(io.BytesIO(blob)) for blob in blobs]

    def close(self):
        for process in self.workers:
            process.kill()  # scripts answer to SIGTERM
            process.join()


def worker(pipe):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    with contextlib.suppress(EOFError):  # when the tests have ended, in whatever way
        while True:
            pipe.send(job(*pipe.recv()))


def job(function, args, r, world, port, dtype):
    """What is wrong, or None, and torch.save() of what function(*args) returns."""
    error, blob = None, io.BytesIO()
    torch.set_default_dtype(dtype)
    launched = dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with mock.patch.dict(os.environ, launched if world > 1 else {}):
        try:
            torch.save(function(*args), blob)
        except BaseException:
            error = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
    return error, blob.getvalue()


def call(script, line):
    """The exit code of a command (a string, or words), run here, and what it says on stderr."""
    words = line.split() if isinstance(line, str) else list(map(str, line))
    with (mock.patch.object(sys, "argv", [f"{script}.py"]),
          contextlib.redirect_stderr(io.StringIO()) as said):
        try:
            code = importlib.import_module(script).main(words) or 0
        except SystemExit as e:
            code = e.code
    return code, said.getvalue()


def refusal(script, line):
    """What a command that must not work says: one line, exit code 2."""
    code, said = call(script, line)
    assert code == 2 and said.count("\n") == 1 and said.startswith(f"{script}: "), (code, said)
    return said


def close(a, b, rtol=1e-5, atol=1e-6):
    a, b = (torch.as_tensor(x).detach().numpy() for x in (a, b))
    np.testing.assert_allclose(a, b, rtol, atol, equal_nan=False)
