"""The paper's tables at small scale: do designs that raise the variance help on the source and hurt on the target?

    python tests/study/study.py --table sec4 --seeds 3 --jobs 2       trains and probes what is missing; hours
    python tests/study/study.py --table 2 --budget-minutes 60         begins no run after that time
    python tests/study/study.py --report                              the tables beside the paper's; figures, with matplotlib
    python tests/study/study.py --table sec4 --rows MultiCrop ScaleMix --data photos      images of a folder; some rows only

A run is one command line of a script and one of linear_probe.py, in one thread; both are written, with what came out, as
a line to results/DATA.jsonl. Runs that are there are not repeated; one that was interrupted continues. A cell's
difference from the baseline is paired by seed. All cells of a table have the same number of epochs, as in the paper.

micro, the default recipe, is the demo recipe made so small that a run takes about a minute of one thread. It was chosen on
the baseline alone, before any design was tried (results/micro.txt), and is left as it is."""

import argparse
import importlib
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT))  # the scripts
EPOCHS = 7  # of the micro recipe
RECIPES = {"micro": f"--recipe demo --img-size 24 --epochs {EPOCHS}", "demo": "--recipe demo", "small": "--recipe small"}
SMALL_CROPS = {"micro": "--small-size 12"}  # keeps the ratio to the large ones


@dataclass(frozen=True)
class Cell:
    """A cell of one of the paper's tables: a script, the flags of a design, and what the paper has there, in %."""

    row: str
    place: str
    paper: float
    flags: str = ""
    base: str = ""  # flags of the baseline that it is compared with
    base_paper: float = 65.8
    script: str = "mocov2_asym"

    @property
    def is_base(self):
        return self.flags == self.base

    @property
    def paper_delta(self):
        return round(self.paper - self.base_paper, 1)


def row(name, *columns):
    """A row of Sec. 4: the paper's figures and our flags for each placement."""
    return [Cell(name, place, paper, flags) for place, paper, flags in columns]


def both(name, figures, src, tgt):
    return row(name, *zip(("neither", "source", "target", "both"), figures, ("", src, tgt, f"{src} {tgt}"), strict=True))


SEC4 = [
    *both("MultiCrop ↑", (65.8, 69.9, 57.1, 61.7), "--multicrop-src", "--multicrop-tgt"),
    *both("ScaleMix ↑", (65.8, 67.3, 52.8, 64.8), "--scalemix-src", "--scalemix-tgt"),
    *both("WeakerAug ↓", (65.8, 51.0, 67.2, 46.8), "--aug-src weak", "--aug-tgt weak"),
    *both("StrongerAug ↑", (65.8, 66.7, 62.2, 66.2), "--aug-src strong", "--aug-tgt strong"),
    *row("Stronger & Weaker", ("source ↑ target ↓", 67.2, "--aug-src strong --aug-tgt weak"),
         ("source ↓ target ↑", 44.3, "--aug-src weak --aug-tgt strong")),
    *both("SyncBN ↓", (65.8, 64.7, 66.5, 66.0), "--sync-bn-src", "--asym-bn"),
    *row("MeanEnc ↓", ("1 source, 3 target", 67.9, "--mean-enc 3"), ("2 source, 2 target", 67.1, "--mean-enc-src 2 --mean-enc 2"),
         ("3 source, 1 target", 59.9, "--mean-enc-src 3"), ("1 source, 2 target", 67.5, "--mean-enc 2")),
]


def framework(name, script, asym, scalemix, asym_bn, mean_enc, flags=""):
    """A row of Tables 2 and 3: the asymmetric version, and three designs with their differences from it. One BN group is
    these methods' default, and AsymBN needs several: it is compared with the same groups without it."""
    groups = "--bn-groups 8"
    return [Cell(name, place, round(asym + delta, 1), f"{flags} {design}".strip(), f"{flags} {base}".strip(), asym, script)
            for place, design, base, delta in (("baseline", "", "", 0), ("ScaleMix", "--scalemix-src", "", scalemix),
                                               ("MeanEnc", "--mean-enc 2", "", mean_enc), ("8 BN groups", groups, groups, 0),
                                               ("AsymBN", f"{groups} --asym-bn", groups, asym_bn))]


TABLE2 = [*framework("MoCo v3", "mocov3_asym", 69.7, 1.0, 0.4, 0.9), *framework("SimCLR", "simclr_asym", 65.0, 1.3, 0.8, 1.4),
          *framework("BYOL", "byol_asym", 69.0, 1.4, 0.9, 0.7), *framework("SimSiam", "simsiam_asym", 67.4, 1.3, 0.6, 0.6),
          *framework("Barlow Twins", "barlow_asym", 66.4, 0.9, 0.2, 0.7)]
TABLE3 = framework("MoCo v3, ViT", "mocov3_asym", 68.7, 0.4, 0.7, 0.7, "--arch vit_tiny")
COMPOSITIONS = row("compositions", ("none", 65.8, ""), ("+MultiCrop", 69.9, "--multicrop-src"),
                   ("+AsymBN", 70.4, "--multicrop-src --asym-bn"), ("+MeanEnc", 71.3, "--multicrop-src --asym-bn --mean-enc 2"))


def longer(times):
    """A column of Fig. 3, which prints no figures: the baseline and five asymmetric designs, some times as long."""
    epochs = f"--epochs {times * EPOCHS}" if times > 1 else ""
    return [Cell(f"{times} x epochs", name, math.nan, f"{flags} {epochs}".strip(), epochs, math.nan) for name, flags in (
        ("baseline", ""), ("MultiCrop", "--multicrop-src"), ("ScaleMix", "--scalemix-src"), ("AsymAug", "--aug-tgt weak"),
        ("AsymBN", "--asym-bn"), ("MeanEnc", "--mean-enc 2"))]


LONGER = longer(1) + longer(2) + longer(4)
TABLES = {"sec4": SEC4, "compositions": COMPOSITIONS, "2": TABLE2, "longer": LONGER, "3": TABLE3}


# ---- runs ----

def key(cell, seed):
    """What tells one run from another."""
    return cell.script, cell.flags, seed


def read(path):
    """key -> what is known of the run, of all runs in a file of results. A line that was not written to its end is no run."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {(r["script"], r["flags"], r["seed"]): r for r in lines}


def wanted(cells, seeds, base_seeds):
    """The runs that the cells need, each once, seed by seed, so that when time runs out some seeds are complete."""
    runs = {}
    for seed in range(max(seeds, base_seeds)):
        for cell in cells:
            more = base_seeds if cell.is_base and cell.script == "mocov2_asym" and not cell.flags else seeds
            if seed < more:
                runs.setdefault(key(cell, seed), (cell, seed))
    return list(runs.values())


def command(cell, seed, recipe, data):
    """The command line that trains, without python and --out."""
    micro = RECIPES[recipe]
    if "--epochs" in cell.flags:
        micro = micro.split(" --epochs")[0]
    small = SMALL_CROPS.get(recipe, "") if "multicrop" in cell.flags else ""
    where = "" if data == "demo" else f"--data {shlex.quote(data)}"
    parts = [f"{cell.script}.py", micro, small, where, cell.flags, f"--seed {seed} --knn-every 1000"]
    return " ".join(part for part in parts if part)


def folder(script, flags, seed, args):
    return Path(args.work, "-".join([script, *flags.replace("--", "").split(), f"seed{seed}"]))


def run(cell, seed, args):
    """Trains and probes once, and returns the line for the results. An interrupted run continues in its folder."""
    out = folder(cell.script, cell.flags, seed, args)
    line = command(cell, seed, args.recipe, args.data)
    probe = f"linear_probe.py {shlex.quote(str(out))} --max-iter 30"
    environment, begun = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}, time.time()
    for text in (f"{line} --out {shlex.quote(str(out))}", f"{probe} --out {shlex.quote(str(out / 'probe'))}"):
        done = subprocess.run([sys.executable, *shlex.split(text)], cwd=ROOT, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"study: this command failed, exit code {done.returncode}; when mended, the same study continues\n"
                             f"  python {text}\n{done.stdout[-2000:]}")
    log = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    (result,) = json.loads((out / "probe" / "result.json").read_text())["results"].values()
    last = {k: log[-1][k] for k in ("loss", "std_src", "std_tgt", "v_src", "v_tgt")}
    return {"script": cell.script, "flags": cell.flags, "seed": seed, "linear": 100 * result["value"],
            "knn": 100 * log[-1]["knn"], **last, "steps": log[-1]["step"], "seconds": round(time.time() - begun),
            "command": f"python {line}", "probe": "python linear_probe.py RUN --max-iter 30", "commit": commit(), "versions": log[0]["versions"]}


def commit():
    """Of the scripts; "-dirty" after it where they were changed since; None in a copy without git."""
    if not shutil.which("git"):
        return None

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "*_asym.py", "linear_probe.py", "common")
    return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed) or None


def variances_on_baseline(cell, seed, args):
    """v_src and v_tgt of a cell's designs, both with the trained source encoder of its baseline, as the paper measures its
    designs (Sec. 7): a run's own encoders have learned to keep its own variance low."""
    import torch

    script, data = importlib.import_module(cell.script), importlib.import_module("common.data")
    torch.set_num_threads(1)
    flags = script.parse_args(shlex.split(command(cell, seed, args.recipe, args.data))[1:])
    flags.autocast, flags.peak_lr = None, flags.lr * flags.batch_size / 256
    model = script.Method(flags)
    model.load_state_dict(torch.load(folder(cell.script, cell.base, seed, args) / "last.pt", weights_only=True)["model"])
    model.target.load_state_dict(model.source.state_dict())
    images, _, _ = data.load(flags.data, flags.data_root)
    with torch.no_grad():
        return script.variances(flags, model, script.plan_views(flags), images, torch.device("cpu"))


def study(cells, args):
    """Runs what is missing, --jobs at a time, and appends each to the results as it ends."""
    path, lock, started = results_file(args), threading.Lock(), time.time()
    path.parent.mkdir(exist_ok=True)
    there = read(path)
    path.write_text("".join(json.dumps(r) + "\n" for r in there.values()))
    missing = [(c, s) for c, s in wanted(cells, args.seeds, args.base_seeds) if key(c, s) not in there]
    print(f"{len(missing)} runs to do, {args.jobs} at a time; results in {path}", flush=True)

    def work(job):
        if time.time() - started > 60 * args.budget_minutes:
            return False
        line = run(*job, args)
        with lock, open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
        print(f"{line['script']} {line['flags']} seed {line['seed']}: linear {line['linear']:.1f}, kNN {line['knn']:.1f}, "
              f"v_tgt/v_src {line['v_tgt'] / line['v_src']:.2f}, {line['seconds']} s", flush=True)
        return True

    with ThreadPoolExecutor(args.jobs) as pool:
        left = list(pool.map(work, missing)).count(False)
    if left:
        print(f"time is up: {left} runs are left; the same command continues")
    there, found = read(path), {}
    for c, s in wanted(cells, args.seeds, args.base_seeds):
        new = key(c, s) in there and "v_base" not in there[key(c, s)]
        if new and (folder(c.script, c.base, s, args) / "last.pt").exists():
            found[key(c, s)] = variances_on_baseline(c, s, args)
    there = read(path)  # as it is now
    for k, v in found.items():
        there[k]["v_base"] = v
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(r) + "\n" for r in there.values()))
    aside.replace(path)


def results_file(args):
    name = Path(args.data).name + ("" if args.recipe == "micro" else f"-{args.recipe}")
    return HERE / "results" / f"{name}.jsonl"

# ---- statistics ----

def differences(cells, runs, measure="linear"):
    """cell -> its differences from its baseline in points, one for each seed that both have. Baselines are left out."""
    found = {}
    for c in cells:
        if not c.is_base:
            seeds = [s for script, flags, s in runs if (script, flags) == (c.script, c.flags)]
            found[c] = [runs[key(c, s)][measure] - runs[c.script, c.base, s][measure]
                        for s in sorted(seeds) if (c.script, c.base, s) in runs]
    return found


def pooled_variance(groups):
    """Variance of a value around its group's mean, over all groups of values; nan where no group has two."""
    freedom = sum(len(g) - 1 for g in groups if g)
    squares = sum((x - statistics.fmean(g)) ** 2 for g in groups if g for x in g)
    return squares / freedom if freedom else math.nan


def binomial_tail(k, n):
    """Probability of k or more heads in n throws of a fair coin."""
    return sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n


@dataclass
class Delta:
    """A cell's difference from its baseline, in points: mean over seeds, and its standard error from the pooled variance."""

    mean: float
    se: float

    def __str__(self):
        return f"{self.mean:+.1f} ± " + ("?" if math.isnan(self.se) else f"{self.se:.1f}")


def deltas(cells, runs, measure):
    """cell -> Delta, of those cells that have runs."""
    found = {c: d for c, d in differences(cells, runs, measure).items() if d}
    distinct = {(c.script, c.flags): d for c, d in found.items()}  # the same runs in two cells count once
    variance = pooled_variance(list(distinct.values()))
    return {c: Delta(statistics.fmean(d), math.sqrt(variance / len(d))) for c, d in found.items()}


def expected(cell):
    """The sign of the paper's difference; of Fig. 3, which prints none: up."""
    return 1 if math.isnan(cell.paper_delta) or cell.paper_delta > 0 else -1


def ranks(values):
    order = sorted(values)
    return [statistics.fmean(i for i, v in enumerate(order) if v == x) for x in values]


# ---- report ----

def report(name, cells, args):
    """Prints a table as Markdown, ours beside the paper's, and draws it."""
    runs = read(results_file(args))
    linear, knn = deltas(cells, runs, "linear"), deltas(cells, runs, "knn")
    if not linear:
        return print(f"table {name}: no runs in {results_file(args)}; study.py --table {name} makes them\n")
    print(f"## Table {name}, {args.data}, {args.recipe} recipe\n")
    print("| row | cell | paper | paper Δ | ours: linear | Δ ± SE | kNN | Δ ± SE | v_tgt / v_src: own, baseline's | seeds | signs: linear, kNN |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for c in cells:
        mine = [r for (script, flags, _), r in runs.items() if (script, flags) == (c.script, c.flags)]
        if not mine:
            print(f"| {c.row} | {c.place} | {shown(c.paper)} | | not run | | | | | | |")
            continue
        mean = {k: statistics.fmean(r[k] for r in mine) for k in ("linear", "knn")}
        own, base = (mean_ratio(mine, which) for which in ENCODERS)
        signs = ", ".join("agrees" if d[c].mean * expected(c) > 0 else "**differs**" for d in (linear, knn) if c in d)
        print(f"| {c.row} | {c.place} | {shown(c.paper)} | {'' if c.is_base else shown(c.paper_delta, '+')} | {mean['linear']:.1f} | "
              f"{linear.get(c, '')} | {mean['knn']:.1f} | {knn.get(c, '')} | {own:.2f}, {'?' if math.isnan(base) else f'{base:.2f}'} | {len(mine)} | {signs} |")
    print()
    for measure, found in (("linear probe", linear), ("kNN", knn)):
        right, n = sum(d.mean * expected(c) > 0 for c, d in found.items()), len(found)
        print(f"{measure}: {right} of {n} signs agree with the paper's; {right} or more of {n} fair coins: p = {binomial_tail(right, n):.2g}")
        clear = {c: d for c, d in found.items() if abs(d.mean) > 2 * d.se}
        agree = sum(d.mean * expected(c) > 0 for c, d in clear.items())
        print(f"  of the {len(clear)} that are more than two standard errors from 0, {agree} agree")
    base = [r["linear"] for (script, flags, _), r in runs.items() if (script, flags) == ("mocov2_asym", "")]
    if len(base) > 1:
        print(f"baseline of MoCo v2: linear {statistics.fmean(base):.1f}, standard deviation over {len(base)} seeds {statistics.stdev(base):.1f}")
    for which, where in ENCODERS.items():
        points = claim(cells, runs, which)
        if len(points) > 2:
            x, y = [p[0] for p in points], [p[1] for p in points]
            print(f"{len(points)} runs: rank correlation of Δ linear with log(v_tgt / v_src), {where}: "
                  f"{statistics.correlation(ranks(x), ranks(y)):+.2f} (the paper's claim: negative)")
    seconds = sum(r["seconds"] for r in runs.values())
    print(f"all {len(runs)} runs of this file: {seconds / 3600:.1f} hours of one thread, with the probes\n")
    draw(name, cells, linear, runs, args)


def shown(x, sign=""):
    return "" if math.isnan(x) else f"{x:{sign}.1f}"


ENCODERS = {"own": "each run's own encoders at its end", "base": "its designs on the baseline's encoder"}


def log_ratio(run, which):
    """log(v_tgt / v_src) of a run, of its own encoders or on its baseline's; None if that was not measured."""
    v = run if which == "own" else run.get("v_base")
    return math.log(v["v_tgt"] / v["v_src"]) if v else None


def mean_ratio(runs, which):
    logs = [log_ratio(r, which) for r in runs if log_ratio(r, which) is not None]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def claim(cells, runs, which):
    """(log(v_tgt / v_src), Δ linear, cell) of each run but the baselines, each once."""
    points = {}
    for c in cells:
        for (script, flags, seed), r in runs.items():
            base = runs.get((script, c.base, seed))
            if (script, flags) == (c.script, c.flags) and base and not c.is_base and (x := log_ratio(r, which)) is not None:
                points[key(c, seed)] = x, r["linear"] - base["linear"], c
    return list(points.values())


def draw(name, cells, found, runs, args):
    """Two figures beside the results: the cells' differences, the paper's and ours; and these against the variances."""
    try:
        import matplotlib
    except ImportError:
        return print("no matplotlib, no figures")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stem = results_file(args).with_suffix("")
    colours = {row: f"C{i}" for i, row in enumerate(dict.fromkeys(c.row for c in cells))}
    markers = dict(zip(dict.fromkeys(c.place for c in found), "o^sDvP*X<>hdp", strict=False))
    if name == "longer":
        figure, axis = plt.subplots(figsize=(6, 4.5))
        for place in dict.fromkeys(c.place for c in cells):
            line = {}
            for c in cells:
                mine = [r["linear"] for (s, flags, _), r in runs.items() if (s, flags) == (c.script, c.flags)]
                if c.place == place and mine:
                    line[int(c.row.split()[0]) * EPOCHS] = statistics.fmean(mine)
            axis.plot(line.keys(), line.values(), "o-", label=place)
        axis.set(xscale="log", xlabel="epochs", ylabel="linear probe, %", title="Fig. 3 at small scale")
        axis.legend()
    else:
        rows = [c for c in cells if c in found][::-1]
        figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.27 * len(rows)), sharey=True)
        for i, c in enumerate(rows):
            axes[0].barh(i, c.paper_delta, color=colours[c.row])
            axes[1].barh(i, found[c].mean, xerr=found[c].se, color=colours[c.row], capsize=2)
        axes[0].set_yticks(range(len(rows)), [f"{c.row}   {c.place}" for c in rows])
        axes[0].set(title="paper: ImageNet, ResNet-50, 100 epochs", xlabel="change of top-1, points")
        axes[1].set(title=f"here: {Path(args.data).name}, {args.recipe} recipe, linear probe", xlabel="change, points, ± standard error")
        for axis in axes:
            axis.axvline(0, color="black", linewidth=0.8)
    figure.tight_layout()
    figure.savefig(f"{stem}-{name}.png", dpi=90)
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axis, (which, where) in zip(axes, ENCODERS.items(), strict=True):
        points = claim(cells, runs, which)
        for x, y, c in points:
            axis.plot(x, y, markers[c.place], color=colours[c.row], alpha=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="log(v_tgt / v_src)", title=f"one point per run: {where}")
    for text, style in [*((r, {"color": colours[r], "marker": "s"}) for r in dict.fromkeys(c.row for c in found)),
                        *((p, {"color": "grey", "marker": m}) for p, m in markers.items())]:
        axis.plot([], [], linestyle="", label=text, **style)
    axes[0].set_ylabel("change of the linear probe from the baseline, points")
    axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(f"{stem}-{name}-claim.png", dpi=90)
    print(f"drawn: {stem}-{name}.png, {stem}-{name}-claim.png\n")


def chosen(cells, rows, parser):
    """The cells of the rows whose names begin with one of rows, and their baselines; all without rows."""
    for name in rows or []:
        if not any(c.row.startswith(name) for c in cells):
            parser.error(f"--rows {name}: no row begins so; there are {', '.join(dict.fromkeys(c.row for c in cells))}")
    kept = [c for c in cells if rows is None or c.row.startswith(tuple(rows))]
    missing = {(c.script, c.base) for c in kept} - {(c.script, c.flags) for c in kept}
    bases = {(c.script, c.flags): c for c in reversed(cells) if (c.script, c.flags) in missing}
    return [c for c in cells if c in kept or c in bases.values()]


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", choices=TABLES, help="which cells")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="only rows of the table whose names begin so")
    p.add_argument("--report", action="store_true", help="run nothing; print and draw what there is")
    p.add_argument("--data", default="demo", help="demo, a data set, or a folder")
    p.add_argument("--recipe", choices=RECIPES, default="micro")
    p.add_argument("--seeds", type=positive, default=3, help="seeds 0, 1, ... of each cell")
    p.add_argument("--base-seeds", type=positive, default=6, help="of MoCo v2's baseline")
    p.add_argument("--jobs", type=positive, default=2, help="runs at a time, of one thread each")
    p.add_argument("--budget-minutes", type=float, default=math.inf, help="begin no run after that time")
    p.add_argument("--work", default="runs/study", help="where the runs' folders go")
    args = p.parse_args(argv)
    if not args.table and not args.report:
        p.error("nothing to do: give --table to run it, or --report")
    if args.rows and not args.table:
        p.error("--rows are of a table: give --table too")
    tables = {name: chosen(cells, args.rows, p) for name, cells in TABLES.items() if args.table in (None, name)}
    args.work = str(Path(args.work, results_file(args).stem).absolute())
    if not args.report:
        study(tables[args.table], args)
        return
    for name, cells in tables.items():
        report(name, cells, args)


if __name__ == "__main__":
    main()
