"""What several tests share: flags and images of tiny runs, the views of a step, a pool of processes."""

import importlib
import io
import json
import multiprocessing
import os
import queue
import socket
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from common import data
from common.augment import rng

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {  # the six, and what makes each one small
    "mocov2_asym": "--queue 40 --hidden 32 --dim 16", "mocov3_asym": "--hidden 32 --dim 16",
    "simclr_asym": "--hidden 32 --dim 16", "byol_asym": "--hidden 32 --dim 16", "simsiam_asym": "--layers 2 --hidden 8 --dim 16",
    "barlow_asym": "--layers 2 --hidden 32 --dim 16"}
SMALL = "--recipe small --arch tiny --img-size 16 --small-size 8 --batch-size 16 --bn-groups 8 --workers 0"
TIMINGS = {"img_s", "data_frac", "mem_gb", "eta_s"}  # the keys of a log line that two runs need not share


def small_args(script, flags=""):
    """The arguments of a small run as the model gets them."""
    args = script.parse_args(f"--data none --amp off {SMALL} {SCRIPTS[script.METHOD]} {flags}".split())
    script.check_flags(args)
    return args


def pictures(n, size=24):
    """n smooth random images, uint8 (n, 3, size, size)."""
    low = torch.randn(n, 3, 4, 4, generator=rng(7, "pictures"))
    x = torch.nn.functional.interpolate(low, size=size, mode="bicubic")
    return ((x * 0.25 + 0.5).clamp(0, 1) * 255).byte()


def small_images(n=48):
    return data.Images(pictures(n), labels=torch.arange(n) % 3, classes=("a", "b", "c"), stats=data.HALF)


def build(script, args):
    torch.manual_seed(args.seed)
    return script.Method(args)


def views_of(script, args, step=0, images=None):
    """The views of a step, as the training loop makes them, and the generator left for the forward pass."""
    images, n = images or small_images(), args.batch_size
    batches = [(step, torch.arange(step * n, (step + 1) * n) % len(images))]
    (src, tgt), generator = next(script.views(args, images, batches, torch.device("cpu")))
    return src, tgt, generator


def class_tree(folder, n=64, sizes=(24,)):
    """A folder of three classes of PNG images; of several sizes, they are decoded at each step, else once."""
    for i, x in enumerate(pictures(n)):
        size, path = sizes[i % len(sizes)], folder / f"class{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize((size, size + 4 * (len(sizes) > 1))).save(path)
    return folder


def log_lines(out, drop=TIMINGS):
    """The lines of log.jsonl after the first, without timings."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()][1:]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def saved(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def tensors(state, prefix=""):
    """All tensors and numbers in nested dicts and lists, by path."""
    if isinstance(state, (dict, list, tuple)):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in pairs for k, v in tensors(value, f"{prefix}/{key}").items()}
    return {prefix: torch.as_tensor(state)} if isinstance(state, (torch.Tensor, int, float)) else {}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- a pool of processes that live through a test session; each job has a process group of its own ----


class Pool:
    def __init__(self, size=4):
        context = multiprocessing.get_context("spawn")
        self.jobs, self.results = [context.Queue() for _ in range(size)], context.Queue()
        arguments = [(jobs, self.results) for jobs in self.jobs]
        self.workers = [context.Process(target=worker, args=a, daemon=True) for a in arguments]
        for process in self.workers:
            process.start()

    def run(self, world, function, *args, timeout=240, dtype=torch.float32):
        """function(*args) in each of world processes, with a launcher's environment if there are two or more:
        what they return, in order of rank. An exception there is raised here."""
        port, results, self.stderr = free_port(), {}, {}
        for r in range(world):
            self.jobs[r].put((function, args, r, world, port, dtype))
        for _ in range(world):
            try:
                r, error, blob, self.stderr[r] = self.results.get(timeout=timeout)
            except queue.Empty:
                self.close()  # what is left of the job would disturb the next
                raise TimeoutError(f"of {world} processes, only {sorted(results)} returned") from None
            results[r] = error, blob
        errors = [f"process {r}: {error}" for r, (error, _) in sorted(results.items()) if error]
        if errors:
            raise RuntimeError("\n".join(errors))
        return [torch.load(io.BytesIO(blob)) for _, (_, blob) in sorted(results.items())]

    def close(self):
        for process in self.workers:
            process.kill()  # scripts answer to SIGTERM
        for process in self.workers:
            process.join()


def worker(jobs, results):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    while multiprocessing.parent_process().is_alive():
        try:
            function, args, r, world, port, dtype = jobs.get(timeout=10)
        except queue.Empty:
            continue
        sys.stderr = io.StringIO()
        torch.set_default_dtype(dtype)
        names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
        if world > 1:
            os.environ.update(zip(names, map(str, (r, r, world, "127.0.0.1", port)), strict=True))
        error, blob = None, io.BytesIO()
        try:
            torch.save(function(*args), blob)
        except BaseException:
            error = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for name in names:
                os.environ.pop(name, None)
        results.put((r, error, blob.getvalue(), sys.stderr.getvalue()))


def train(method, argv):
    """A run of a script in this process; returns its exit code."""
    try:
        importlib.import_module(method).main(argv.split())
    except SystemExit as e:
        return e.code
    return 0


def in_group(function, *args):
    """function(*args) in a process group, where there is one to join."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    return function(*args)


def part(x):
    """This process's rows of a global batch."""
    return x[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def close(a, b, rtol=1e-5, atol=1e-6):
    a, b = (torch.as_tensor(x).detach().numpy() for x in (a, b))
    np.testing.assert_allclose(a, b, rtol, atol)
