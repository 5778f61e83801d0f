"""The paper's tables at small scale: do designs that raise the variance help on the source and hurt on the target?

    python tests/study/study.py --table sec4 --seeds 3 --jobs 2       trains and probes what is missing; hours
    python tests/study/study.py --table 2 --budget-minutes 60         begins no run after that time
    python tests/study/study.py --report                              the tables beside the paper's; figures, with matplotlib
    python tests/study/study.py --claim                               one number over all data sets and frameworks
    python tests/study/study.py --table sec4 --rows MultiCrop ScaleMix --data photos      images of a folder; some rows only

A run is one command line of a script and one of linear_probe.py, in one thread; both are written, with what came out, as
a line to results/DATA.jsonl. Runs that are there are not repeated; one that was interrupted continues. Cells that are
compared have the same number of epochs, as in the paper. tables.py has the cells, report.py the statistics.

micro, the default recipe, is MoCo v2's demo recipe made so small that a run takes about a minute of one thread. It was chosen
on the baseline alone, before any design was tried (results/micro.txt). Results are of the demo recipe and data of their commits."""

import argparse
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import print_claim, report
from tables import OWN, RECIPES, key, read, tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT))  # the scripts


class Failed(Exception):
    """A command that a run needs ended with an error."""


def wanted(cells, seeds, base_seeds):
    """The runs that the cells need, each once, seed by seed, so that when time runs out some seeds are complete."""
    runs = {}
    for seed in range(max(seeds, base_seeds)):
        for cell in cells:
            more = cell.is_base and cell.script == "mocov2_asym" and not cell.flags
            if seed < seeds or more and seed < base_seeds:
                runs.setdefault(key(cell, seed), (cell, seed))
    return list(runs.values())


def command(cell, seed, recipe, data):
    """The command line that trains, without python and --out."""
    flags, epochs, small = RECIPES[recipe]
    own = OWN.get((recipe, cell.script), "")
    epochs = "" if "--epochs" in cell.flags else f"--epochs {epochs}"
    where = "" if data == "demo" else f"--data {shlex.quote(data)}"
    parts = [f"{cell.script}.py", flags, own, epochs, small if "multicrop" in cell.flags else "", where, cell.flags,
             f"--seed {seed} --knn-every 1000"]
    return " ".join(part for part in parts if part)


def folder(script, flags, seed, args):
    return Path(args.work, "-".join([script, *flags.replace("--", "").split(), f"seed{seed}"]))


class Commands:
    """Runs command lines, each in one thread of its own; stop() ends those that run, and lets none begin."""

    def __init__(self):
        self.running, self.stopped = set(), False

    def __call__(self, text):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with subprocess.Popen([sys.executable, *shlex.split(text)], cwd=ROOT, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            self.running.add(process)
            if self.stopped:  # in between
                process.terminate()
            said = process.communicate()[0]
            self.running.remove(process)
        if process.returncode:
            raise Failed(f"study: this command failed, exit code {process.returncode}\n  python {text}\n{said[-2000:]}")

    def stop(self):
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def probe(out, name, run, *flags):
    """Accuracy of the linear probe on a run's own data, in %."""
    run(f"linear_probe.py {shlex.quote(str(out))} --max-iter 30 {' '.join(flags)} --out {shlex.quote(str(out / name))}")
    (result,) = json.loads((out / name / "result.json").read_text())["results"].values()
    return 100 * result["value"]


def train(cell, seed, args, run):
    """Trains and probes once, and returns the line for the results. An interrupted run continues in its folder."""
    out, begun, version = folder(cell.script, cell.flags, seed, args), time.time(), commit(cell.script)
    line = command(cell, seed, args.recipe, args.data)
    run(f"{line} --out {shlex.quote(str(out))}")
    linear = probe(out, "probe", run)
    log = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    last = {k: log[-1][k] for k in ("loss", "std_src", "std_tgt", "v_src", "v_tgt")}
    if not all(map(math.isfinite, last.values())):
        raise Failed(f"study: {out} ended with values that are not finite: {last}; remove that folder to run it anew")
    return {"script": cell.script, "flags": cell.flags, "seed": seed, "linear": linear, "knn": 100 * log[-1]["knn"], **last,
            "steps": log[-1]["step"], "seconds": round(time.time() - begun), "command": f"python {line}",
            "probe": "python linear_probe.py RUN --max-iter 30", "commit": version, "versions": {"torch": log[0]["torch"]}}


def commit(script):
    """The last that changed a script or common/; "-dirty" after it where they were changed since; None in a copy without git."""
    if not shutil.which("git"):
        return None

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    files = f"{script}.py", "common"
    return git("log", "-1", "--format=%h", "--", *files) + "-dirty" * bool(git("status", "--porcelain", "--", *files)) or None


def variances_on_baseline(cell, seed, args):
    """v_src and v_tgt of a cell's designs, both with the trained source encoder of its baseline, as the paper measures its
    designs (Sec. 7): a run's own encoders have learned to keep its own variance low."""
    import torch

    script, data = importlib.import_module(cell.script), importlib.import_module("common.data")
    torch.set_num_threads(1)
    flags = script.parse_args(shlex.split(command(cell, seed, args.recipe, args.data))[1:])
    flags.workers = 0
    model = script.Method(flags)
    last = folder(cell.script, cell.base, seed, args) / "last.pt"
    model.load_state_dict(torch.load(last, map_location="cpu", weights_only=True)["model"])
    model.target.load_state_dict(model.source.state_dict())
    images, _, _ = data.load(flags.data, flags.data_root)
    with torch.no_grad():
        return script.variances(flags, model, images, torch.device("cpu"))


def more(cell, seed, line, args, run):
    """What is measured when the runs are done, where their folders still are: the variances on the baseline's encoder; of a
    baseline also what its network has before training."""
    base = folder(cell.script, cell.base, seed, args)
    found = {}
    if "v_base" not in line and (base / "last.pt").exists():
        found["v_base"] = variances_on_baseline(cell, seed, args)
    if cell.is_base and "untrained" not in line and (base / "last.pt").exists():
        found["untrained"] = probe(base, "untrained", run, f"--untrained --seed {seed}")
    return found


def study(cells, args):
    """Runs what is missing, --jobs at a time, and appends each to the results as it ends."""
    path, lock, started, run = results_file(args), threading.Lock(), time.time(), Commands()
    path.parent.mkdir(exist_ok=True)
    there = known(cells, args)
    if path.exists() and not path.read_text().endswith("\n"):  # a study was killed while it wrote
        with open(path, "a") as f:
            f.write("\n")
    jobs = wanted(cells, args.seeds, args.base_seeds)
    missing, outcomes = [(c, s) for c, s in jobs if key(c, s) not in there], []
    print(f"{len(missing)} runs to do, {args.jobs} at a time; results in {path}", flush=True)
    old = {s for c, s in missing if (b := there.get((c.script, c.base, s))) and b.get("commit") != commit(c.script)}
    if old:
        print(f"the baselines of seeds {sorted(old)} are of another version of the scripts, with which new runs are not compared: "
              f"take their lines out of that file and their folders out of {args.work}, and this command runs them anew", flush=True)

    def write(cell, seed, found):
        with lock, open(path, "a") as f:
            f.write(json.dumps({"script": cell.script, "flags": cell.flags, "seed": seed, **found}) + "\n")

    def work(job):
        hopeless = "failed" in outcomes and "done" not in outcomes and not there
        if run.stopped or hopeless or time.time() - started > 60 * args.budget_minutes:
            return outcomes.append("left")
        try:
            line = train(*job, args, run)
        except Failed as e:
            if run.stopped:
                return outcomes.append("left")
            print(e, file=sys.stderr, flush=True)
            return outcomes.append("failed")
        write(*job, line)
        print(f"{line['script']} {line['flags']} seed {line['seed']}: linear {line['linear']:.1f}, kNN {line['knn']:.1f}, "
              f"v_tgt/v_src {line['v_tgt'] / line['v_src']:.2f}, {line['seconds']} s", flush=True)
        return outcomes.append("done")

    def end(number, frame):  # the runs save and end; this process waits for them
        run.stop()
        raise SystemExit(128 + number)

    before = {s: signal.signal(s, end) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, missing))
        now = read(path)
        for c, s in jobs:
            try:
                if key(c, s) in now and not run.stopped and (found := more(c, s, now[key(c, s)], args, run)):
                    write(c, s, found)
            except (Failed, RuntimeError, KeyError) as e:  # a folder of another version
                print(f"study: {c.script} {c.flags} seed {s} cannot be measured further: {e}", file=sys.stderr, flush=True)
                outcomes.append("failed")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed, left = outcomes.count("failed"), outcomes.count("left")
    if left and not failed:
        print(f"time is up: {left} runs are left; the same command continues")
    if failed:
        raise SystemExit(f"study: {failed} runs failed, as said above, and {left} were not tried; when mended, the same command continues")


def is_data_set(name):
    return name in importlib.import_module("common.data").NAMES


def results_file(args):
    name = Path(args.data).name
    name += "-folder" * (is_data_set(name) and not is_data_set(args.data)) + ("" if args.recipe == "micro" else f"-{args.recipe}")
    return HERE / "results" / f"{name}.jsonl"


def known(cells, args):
    """The runs that the file of results has. They must be of these data, and of the commands that would be run now."""
    runs, cells_of = read(results_file(args)), {(c.script, c.flags): c for c in cells}
    for (script, flags, seed), r in runs.items():
        words = shlex.split(r["command"])
        data, c = words[words.index("--data") + 1] if "--data" in words else "demo", cells_of.get((script, flags))
        now = f"python {command(c, seed, args.recipe, args.data)}" if c else r["command"]
        if r["command"] != now or data != args.data:
            raise SystemExit(f"study: {results_file(args)} has results of another command: it has\n  {r['command']}\nand this study "
                             f"has\n  {now if c else f'--data {args.data}'}\nMove that file away, or use a folder of another name")
    return runs


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def chosen(cells, rows, designs, parser):
    """The cells of the rows whose names begin with one of rows, and in them of designs, and their baselines; all without."""
    for name in rows or []:
        if not any(c.row.startswith(name) for c in cells):
            parser.error(f"--rows {name}: no row begins so; there are {', '.join(dict.fromkeys(c.row for c in cells))}")
    for name in designs or []:
        if not any(c.place == name for c in cells):
            parser.error(f"--designs {name}: no cell is called so; there are {', '.join(dict.fromkeys(c.place for c in cells))}")
    kept = [c for c in cells if (rows is None or c.row.startswith(tuple(rows))) and (designs is None or c.place in designs)]
    missing = {(c.script, c.base) for c in kept} - {(c.script, c.flags) for c in kept}
    bases = {(c.script, c.flags): c for c in reversed(cells) if (c.script, c.flags) in missing}
    return [c for c in cells if c in kept or c in bases.values()]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", choices=tables("micro"), help="which cells")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="only rows of the table whose names begin so")
    p.add_argument("--designs", nargs="+", metavar="DESIGN", help="only these of its cells, as Table 2 calls them")
    p.add_argument("--report", action="store_true", help="run nothing; print and draw what there is")
    p.add_argument("--claim", action="store_true", help="print the claim in one number, over all files of results")
    p.add_argument("--data", default="demo", help="demo, a data set, or a folder (README)")
    p.add_argument("--recipe", choices=RECIPES, default="micro")
    p.add_argument("--seeds", type=positive, default=3, help="seeds 0, 1, ... of each cell")
    p.add_argument("--base-seeds", type=positive, default=6, help="of MoCo v2's baseline")
    p.add_argument("--jobs", type=positive, default=2, help="runs at a time, of one thread each")
    p.add_argument("--budget-minutes", type=float, default=math.inf, help="begin no run after that time")
    p.add_argument("--work", default="runs/study", help="where the runs' folders go")
    args = p.parse_args(argv)
    if not args.table and not args.report and not args.claim:
        p.error("nothing to do: give --table to run it, --report or --claim")
    if (args.rows or args.designs) and not args.table:
        p.error("--rows and --designs are of a table: give --table too")
    if Path(args.data).is_dir() and not is_data_set(args.data):  # the commands run in the repository's folder; within it, no machine's paths
        path = Path(os.path.abspath(args.data))
        args.data = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
        args.data = f"./{args.data}" if is_data_set(args.data) else args.data
    asked = {name: chosen(cells, args.rows, args.designs, p) for name, cells in tables(args.recipe).items() if args.table in (None, name)}
    args.work = str(Path(args.work, results_file(args).stem).absolute())
    os.chdir(ROOT)
    if args.claim:
        files = sorted((HERE / "results").glob("*.jsonl"))
        return print_claim({path.stem: (tables(args.recipe), read(path)) for path in files})
    if not args.report:
        study(asked[args.table], args)
        return
    for name, cells in asked.items():
        report(name, cells, tables(args.recipe)[name], known(cells, args), results_file(args).with_suffix(""), args)


if __name__ == "__main__":
    main()
