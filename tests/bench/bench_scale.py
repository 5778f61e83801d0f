"""Cost as the work grows: batch size, views, queue, processes, number of images. Each should grow linearly or slower.

    python tests/bench/bench_scale.py                                   all of it, a few minutes
    python tests/bench/bench_scale.py --only paths --most 100000        fewer files

Demo recipe on the CPU. "x work": how much more there is than in the row before; "x cost": how much more that costs."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from bench import ROOT, machine, measure, table
from bench_step import Stepper

from common import data


def steps(cases, repeats=7):
    """Median seconds of processor time of MoCo v2's step for each (flags, batch size), all in turn."""
    work = {}
    for i, (flags, batch) in enumerate(cases):
        cli = argparse.Namespace(device="cpu", batch_size=batch, recipe="demo", amp="off")
        work[i] = Stepper("mocov2_asym", flags, cli).step
    return [statistics.median(s) for s in measure(work, repeats).values()]


def growth(heads, works, costs):
    """Prints costs, in seconds, as ms beside the amounts of work, and how both grow from row to row."""
    rows = [[*heads, "x work", "x cost"]]
    for i, (work, cost) in enumerate(zip(works, costs, strict=True)):
        more = [f"{x[i] / x[i - 1]:.2f}" if i and x[i - 1] else "" for x in (works, costs)]
        rows.append([str(work), f"{1e3 * cost:.2f}", *more])
    table(rows)


def batches(args):
    works = [32, 64, 128, 256, 512]
    growth(["batch size", "ms per step"], works, steps([("", batch) for batch in works]))


def views(args):
    works = [2, 3, 5, 9]
    growth(["views (1 of the source, rest MeanEnc's)", "ms per step"], works, steps([(f"--mean-enc {n - 1}", 64) for n in works]))
    works = [2, 4, 8, 16]
    growth(["small crops", "ms per step"], works, steps([(f"--multicrop-src --num-small {n}", 64) for n in works]))


def queue(args):
    works = [256, 4096, 65536]
    growth(["queue", "ms per step"], works, steps([(f"--queue {n}", 64) for n in works]))


def processes(args):
    """Images per second of the script itself, from its log, by the wall's clock; each process has one thread. What two
    cores give that share caches, memory or a clock, two runs side by side show that have nothing to do with each other."""
    rows, rates = [["processes", "img/s", "of two separate runs"]], []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for runs, n in ((1, 1), (2, 1), (1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            outs = [f"{folder}/{i}" for i in range(runs)]
            words = [sys.executable, "mocov2_asym.py", "--steps", "100", "--knn-every", "100", "--nproc", str(n), "--out"]
            running = [subprocess.Popen([*words, out], cwd=ROOT, stdout=subprocess.DEVNULL, env=environment) for out in outs]
            if any(process.wait() for process in running):
                raise SystemExit("bench: a run failed")
            logs = [[json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()] for out in outs]
        rate = sum(statistics.median(x["img_s"] for x in log[5:] if "img_s" in x) for log in logs)
        rates.append(rate)
        rows.append([f"{runs} run(s) of {n}", f"{rate:.0f}", f"{rate / rates[1]:.0%}" if n == 2 else ""])
    table(rows)


def paths(args):
    """A class tree of empty files: what a run does with it before its first step."""
    works = [10**i for i in range(1, 7) if 10**i <= args.most]
    rows = [["files", "scan, s", "order of an epoch, s", "MB kept", "MB at most"]]
    with tempfile.TemporaryDirectory() as folder:
        made = 0
        for n in works:
            for i in range(made, n):
                place = f"{folder}/n{i % 1000 // 10:08d}"
                if i < 1000:
                    os.makedirs(place, exist_ok=True)
                open(f"{place}/n{i % 1000 // 10:08d}_{i}.JPEG", "w").close()
            made, begun = n, time.perf_counter()
            images = data.scan(folder)
            scanned = time.perf_counter() - begun
            begun = time.perf_counter()
            next(iter(data.global_batches(n, min(n, 256), 0, 0, 1)))
            ordered = time.perf_counter() - begun
            kept = images.paths.nbytes + (images.labels.nbytes if images.labels is not None else 0)
            tracemalloc.start()  # makes it slower, so once more
            data.scan(folder)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            rows.append([n, f"{scanned:.4f}", f"{ordered:.4f}", f"{kept / 1e6:.3f}", f"{peak / 1e6:.3f}"])
    table(rows)


PARTS = {"batches": batches, "views": views, "queue": queue, "paths": paths, "processes": processes}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    p.add_argument("--most", type=int, default=10**6, help="files")
    args = p.parse_args()
    machine()
    for part in args.only:
        PARTS[part](args)


if __name__ == "__main__":
    main()
