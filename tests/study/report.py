"""The study's statistics, tables and figures. Runs are what tables.read() returns."""

import math
import random
import statistics
import sys
from dataclasses import dataclass

from tables import SOURCE, TARGET, key

MEASURES = {"linear": "linear probe", "knn": "kNN"}
BY_ROW = ("2", "3", "longer")  # their rows are networks of their own, whose runs vary by different amounts
ENCODERS = {"own": "each run's own encoders at its end", "base": "its designs on the baseline's encoder"}


# ---- statistics ----

def seeds_of(cell, runs):
    return sorted(s for script, flags, s in runs if (script, flags) == (cell.script, cell.flags))


def differences(cells, runs, measure="linear"):
    """cell -> seed -> its difference from its baseline in points, for the seeds that both have, run with one version of the
    scripts: in another, which rounds otherwise, a seed is another draw. Baselines are left out."""
    found = {}
    for c in cells:
        if not c.is_base:
            pairs = {s: (runs[key(c, s)], runs[c.script, c.base, s]) for s in seeds_of(c, runs) if (c.script, c.base, s) in runs}
            found[c] = {s: r[measure] - base[measure] for s, (r, base) in pairs.items() if r.get("commit") == base.get("commit")}
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
    """Differences in points: their mean over n seeds; its standard error, from the pooled variance; their own standard
    deviation."""

    mean: float
    se: float
    sd: float
    n: int

    @property
    def seen(self):
        """Beyond two standard errors, the pooled and its own: cells do not vary by the same amount."""
        return self.n > 1 and abs(self.mean) > 2 * max(self.se, self.sd / math.sqrt(self.n))

    def __str__(self):
        text = f"{self.mean:+.1f}" + ("" if math.isnan(self.se) else f" ± {self.se:.1f}")
        return text + ("" if math.isnan(self.sd) else f" ({self.sd:.1f})") + " *" * self.seen


def pooled(groups):
    """name -> Delta, of name -> differences: all are taken to vary by the same amount."""
    groups = {name: list(g) for name, g in groups.items() if g}
    variance = pooled_variance(groups.values())
    return {name: Delta(statistics.fmean(g), math.sqrt(variance / len(g)), statistics.stdev(g) if len(g) > 1 else math.nan, len(g))
            for name, g in groups.items()}


def deltas(cells, runs, measure, by_row=False):
    """cell -> Delta, of those cells that have runs; the variance is pooled over all cells, or over those of a row."""
    found, each = {c: d.values() for c, d in differences(cells, runs, measure).items()}, {}
    for row in {c.row for c in found} if by_row else {""}:
        each.update(pooled({(c.script, c.flags): d for c, d in found.items() if row in ("", c.row)}))  # runs in two cells count once
    return {c: each[c.script, c.flags] for c in found if (c.script, c.flags) in each}


def preferences(cells, runs, measure):
    """row -> (the paper's accuracy with the design on the source minus with it on the target, Delta of ours): Table 1. The
    baseline, whose noise all differences from it share, is not in it."""
    pairs = {c.row: (c, d) for c in cells if c.place in SOURCE for d in cells if d.row == c.row and d.place in TARGET}
    found = {}
    for row, (c, d) in pairs.items():
        both = [s for s in seeds_of(c, runs) if key(d, s) in runs and runs[key(c, s)].get("commit") == runs[key(d, s)].get("commit")]
        found[row] = [runs[key(c, s)][measure] - runs[key(d, s)][measure] for s in both]
    return {row: (round(pairs[row][0].paper - pairs[row][1].paper, 1), delta) for row, delta in pooled(found).items()}


def expected(cell):
    """The sign of the paper's difference; of Fig. 3, which prints none: up."""
    return 1 if math.isnan(cell.paper_delta) or cell.paper_delta > 0 else -1


def learned(cell, runs):
    """Whether a cell's baseline ended better than it began, in the mean; None where that was not measured."""
    bases = [r for (script, flags, _), r in runs.items() if (script, flags) == (cell.script, cell.base)]
    known = [r["linear"] - r["untrained"] for r in bases if "untrained" in r]
    return statistics.fmean(known) > 0 if known else None


def ranks(values):
    order = sorted(values)
    return [statistics.fmean(i for i, v in enumerate(order) if v == x) for x in values]


def rank_correlation(points):
    """Spearman's, of (x, y, ...), and the share of it and 10,000 permutations of y that are as low or lower."""
    x, y = ranks([p[0] for p in points]), ranks([p[1] for p in points])
    if len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan, math.nan
    found, shuffled, rng = statistics.correlation(x, y), y[:], random.Random(0)
    mean, below = statistics.fmean(x) * statistics.fmean(y) * len(x), 0
    product = sum(a * b for a, b in zip(x, y, strict=True)) - mean  # all that a permutation changes
    for _ in range(10_000):
        rng.shuffle(shuffled)
        below += sum(a * b for a, b in zip(x, shuffled, strict=True)) - mean <= product + 1e-9
    return found, (below + 1) / 10_001


def log_ratio(run, which):
    """log(v_tgt / v_src) of a run, of its own encoders or on its baseline's; None if that was not measured."""
    v = run if which == "own" else run.get("v_base")
    return math.log(v["v_tgt"] / v["v_src"]) if v and v["v_tgt"] > 0 and v["v_src"] > 0 else None


def mean_ratio(runs, which):
    logs = [log_ratio(r, which) for r in runs if log_ratio(r, which) is not None]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def claim(cells, runs, which):
    """(log(v_tgt / v_src), Δ linear, cell) of each run but the baselines, each once."""
    points = {}
    for c, found in differences(cells, runs).items():
        for seed, delta in found.items():
            if (x := log_ratio(runs[key(c, seed)], which)) is not None:
                points[key(c, seed)] = x, delta, c
    return list(points.values())


def cell_means(points):
    """The points of a cell's runs as one: runs of one cell are no independent witnesses."""
    cells = {c: [p for p in points if p[2] is c] for _, _, c in points}
    return [(statistics.fmean(p[0] for p in ps), statistics.fmean(p[1] for p in ps), c) for c, ps in cells.items()]


def stratified(strata):
    """The claim in one number: the correlation of the change of accuracy with log(v_tgt / v_src) over the cells of all strata,
    both as ranks within their stratum, centred and in units of its size. strata: lists of (x, y, ...). With an interval of
    95 %: cells drawn again, with replacement, within each stratum, 2,000 times."""
    def within(points):
        n = len(points)
        ranked = zip(*(ranks([p[i] for p in points]) for i in (0, 1)), strict=True)
        return [((x - (n - 1) / 2) / n, (y - (n - 1) / 2) / n) for x, y in ranked]

    def correlation(strata):
        pairs = [pair for points in strata for pair in within(points)]
        xx, yy = sum(x * x for x, _ in pairs), sum(y * y for _, y in pairs)
        return sum(x * y for x, y in pairs) / math.sqrt(xx * yy) if xx * yy else 0.0

    rng = random.Random(0)
    drawn = sorted(correlation([rng.choices(points, k=len(points)) for points in strata]) for _ in range(2000))
    return correlation(strata), drawn[49], drawn[1949]


def papers_points(cells):
    """The paper's own: log(v_tgt / v_src) by its measured variances, and its Δ."""
    cells = {(c.script, c.flags): c for c in cells if c.v and not c.is_base}
    return [(math.log(c.v[1] / c.v[0]), c.paper_delta, c) for c in cells.values()]


# ---- tables ----

def report(name, cells, table, runs, stem, args):
    """Prints the cells of a table as Markdown, ours beside the paper's, and draws them. table: all its cells; stem: of the
    figures' names."""
    bases = [c for i, c in enumerate(cells) if c.is_base and not any((c.script, c.flags) == (b.script, b.flags) for b in cells[:i])]
    cells = [c for c in cells if not c.is_base or c in bases]  # a baseline once
    each = {m: deltas(cells, runs, m, name in BY_ROW) for m in MEASURES}
    if not each["linear"]:
        return print(f"table {name}: no runs in {stem.name}.jsonl; study.py --table {name} makes them\n")
    print(f"## Table {name}, {args.data}, {args.recipe} recipe\n")
    print("| row | cell | paper | linear | of each seed | Δ ± SE (SD) | kNN | Δ ± SE (SD) | v_tgt / v_src: own, baseline's | signs |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for c in cells:
        row, place = ("baseline", "") if c.place == "neither" else (c.row, c.place)
        print(f"| {row} | {place} | {shown(c.paper)}{'' if c.is_base else shown(c.paper_delta, ' ({:+.1f})')} | {ours(c, cells, each, runs)} |")
    print()
    for measure, found in each.items():
        count(measure, found, runs, name)
    print("(*: beyond two standard errors, the pooled and its own. The cells share their baseline, and some their runs: they are no independent coins.)")
    baseline(cells, runs)
    if name == "sec4":
        print_preferences(cells, runs)
    correlations(cells, runs)
    mine = {key(c, s): runs[key(c, s)] for c in cells for s in seeds_of(c, runs)}
    versions = " and ".join(dict.fromkeys(str(r.get("commit")) for r in mine.values()))
    print(f"\n{len(mine)} runs, {sum(r['seconds'] for r in mine.values()) / 3600:.1f} hours of runs and probes, added up; scripts of commit {versions}\n")
    draw(name, cells, table, each["linear"], runs, stem, args)


def shown(x, form="{:.1f}"):
    return "" if math.isnan(x) else form.format(x)


def ours(cell, cells, each, runs):
    """The columns of a cell that are ours. A baseline's are of those seeds that the cells compared with it have."""
    seeds = seeds_of(cell, runs)
    if cell.is_base:
        used = {s for c in cells if not c.is_base and (c.script, c.base) == (cell.script, cell.flags) for s in seeds_of(c, runs)}
        seeds = [s for s in seeds if s in used] or seeds
    mine = [runs[key(cell, s)] for s in seeds]
    if not mine:
        return "not run | | | | | |"
    paired = next((d[cell].n for d in each.values() if cell in d), len(mine) if cell.is_base else 0)
    mean = {m: f"{statistics.fmean(r[m] for r in mine):.1f}" for m in MEASURES}
    untrained = [r["untrained"] for r in mine if "untrained" in r]
    if untrained:
        mean["linear"] += f" (untrained {statistics.fmean(untrained):.1f})"
    delta = {m: str(found.get(cell, "")) for m, found in each.items()}
    own, base = (mean_ratio(mine, which) for which in ENCODERS)
    signs = ", ".join("agrees" if d[cell].mean * expected(cell) > 0 else "**differs**" for d in each.values() if cell in d)
    seeds = " ".join(f"{r['linear']:.0f}" for r in mine) + (f"; {paired} paired" if paired < len(mine) else "")
    return " | ".join([mean["linear"], seeds, delta["linear"], mean["knn"], delta["knn"], f"{own:.2f}, {'?' if math.isnan(base) else f'{base:.2f}'}", signs])


def agreeing(found):
    return f"{sum(d.mean * expected(c) > 0 for c, d in found.items())} of {len(found)}"


def count(measure, found, runs, name):
    """The signs that agree with the paper's, over all cells; then over those that say more."""
    if name == "longer":  # the first column is Sec. 4's
        found = {c: d for c, d in found.items() if not c.row.startswith("1 x")}
    right = sum(d.mean * expected(c) > 0 for c, d in found.items())
    print(f"{MEASURES[measure]}: {agreeing(found)} signs agree with the paper's; so many or more of as many fair coins: p = {binomial_tail(right, len(found)):.2g}")
    print(f"  of those that are seen (*): {agreeing({c: d for c, d in found.items() if d.seen})}")
    idle = [c for c in found if learned(c, runs) is False]
    if idle:
        print(f"  without {', '.join(f'{c.row} {c.place}' for c in idle)}, whose baseline ended no better than it began: "
              f"{agreeing({c: d for c, d in found.items() if c not in idle})}")
    means = {}  # against the mean of all runs of the baseline, those of seeds that the cell lacks too
    for c in found:
        base = [runs[c.script, c.base, s][measure] for script, flags, s in runs if (script, flags) == (c.script, c.base)]
        mine = [runs[key(c, s)][measure] for s in seeds_of(c, runs)]
        if len(base) > len(mine):
            means[c] = Delta(statistics.fmean(mine) - statistics.fmean(base), math.nan, math.nan, len(mine))
    if means:
        print(f"  not paired, those with more seeds of their baseline than of themselves, against all of these: {agreeing(means)}")


def baseline(cells, runs):
    values = [r["linear"] for (script, flags, _), r in runs.items() if (script, flags) == ("mocov2_asym", "")]
    if any(c.script == "mocov2_asym" for c in cells) and len(values) > 1:
        sd = statistics.stdev(values)
        print(f"baseline of MoCo v2, {len(values)} seeds: linear {statistics.fmean(values):.1f}, standard deviation {sd:.1f}: "
              f"its mean is uncertain by {sd / len(values) ** 0.5:.1f}, and all differences from it together with it")


def print_preferences(cells, runs):
    found = {m: preferences(cells, runs, m) for m in MEASURES}
    print("\nTable 1, which encoder a design prefers: accuracy with it on the source minus with it on the target, paired by seed\n")
    print("| design | paper | linear ± SE (SD) | kNN ± SE (SD) | pairs | signs |")
    print("|---|---|---|---|---|---|")
    for row, (paper, linear) in found["linear"].items():
        both = linear, found["knn"][row][1]
        print(f"| {row} | {paper:+.1f} | {both[0]} | {both[1]} | {linear.n} | {', '.join('agrees' if d.mean * paper > 0 else '**differs**' for d in both)} |")
    print()


def averaged(point):
    """Whether its cell has MeanEnc, in Sec. 4 a row, in Tables 2 and 3 a place."""
    return point[2].row.startswith("MeanEnc") or point[2].place == "MeanEnc"


def correlations(cells, runs):
    """Of the cells' means, where there are enough cells to speak of it."""
    for which, where in ENCODERS.items():
        means = cell_means(claim(cells, runs, which))
        rest = [p for p in means if not averaged(p)]
        if len(means) < 8:
            continue
        texts = [f"{rho:+.2f}, p {p:.2g}, of {len(ps)} cells" for ps in (means, rest) if len(ps) > 3 for rho, p in [rank_correlation(ps)]]
        print(f"rank correlation of Δ linear with log(v_tgt / v_src), {where}: {texts[0]}" + (f"; without MeanEnc {texts[1]}" if len(rest) < len(means) else ""))
    paper = papers_points(cells)
    if len(paper) >= 8:
        rest = [p for p in paper if not averaged(p)]
        print(f"the paper's own Δ with its own variances: {rank_correlation(paper)[0]:+.2f} of {len(paper)} cells; without MeanEnc {rank_correlation(rest)[0]:+.2f}")


def print_claim(files):
    """files: name -> (tables, runs). A cell that stands in several tables counts in the first."""
    print("## The claim over all tables and data sets\n")
    for which, where in ENCODERS.items():
        strata = {}
        for name, (tables, runs) in files.items():
            seen = set()
            for table, cells in tables.items():
                means = [p for p in cell_means(claim(cells, runs, which)) if (p[2].script, p[2].flags) not in seen]
                seen |= {(c.script, c.flags) for _, _, c in means}
                if len(means) > 1:
                    strata[f"{name} {table}"] = means
        if strata:
            found, low, high = stratified(list(strata.values()))
            print(f"rank correlation of Δ linear with log(v_tgt / v_src), {where}, within tables: {found:+.2f}, 95 % interval "
                  f"{low:+.2f} to {high:+.2f}; cells: {', '.join(f'{name} {len(means)}' for name, means in strata.items())}")
            found, low, high = stratified([[p for p in means if not averaged(p)] for means in strata.values()])
            print(f"  without MeanEnc {found:+.2f}, {low:+.2f} to {high:+.2f}")
    print()


# ---- figures ----

def draw(name, cells, table, found, runs, stem, args):
    """Beside the results: the cells' differences, the paper's and ours; and ours against the variances."""
    try:
        import matplotlib
    except ImportError:
        return print("no matplotlib, no figures", file=sys.stderr)
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {row: f"C{i}" for i, row in enumerate(dict.fromkeys(c.row for c in table))}  # the same, whichever rows are chosen
    markers = dict(zip(dict.fromkeys(c.place for c in table if not c.is_base), "o^sDvP*X<>hdp", strict=False))
    figures = {name: draw_longer(plt, cells, runs) if name == "longer" else draw_cells(plt, cells, found, colours, args)}
    if name != "longer":
        figures[f"{name}-claim"] = draw_claim(plt, cells, runs, colours, markers)
    for ending, figure in figures.items():
        figure.tight_layout()
        figure.savefig(f"{stem}-{ending}.png", dpi=90)
        plt.close(figure)
    print(f"drawn: {', '.join(f'{stem}-{ending}.png' for ending in figures)}", file=sys.stderr)


def draw_cells(plt, cells, found, colours, args):
    rows = [c for c in cells if c in found][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.27 * len(rows)), sharey=True)
    for i, c in enumerate(rows):
        axes[0].barh(i, c.paper_delta, color=colours[c.row])
        axes[1].barh(i, found[c].mean, xerr=found[c].se, color=colours[c.row], capsize=2)
    axes[0].set_yticks(range(len(rows)), [f"{c.row}   {c.place}" for c in rows])
    axes[0].set(title="paper: ImageNet", xlabel="change of top-1, points")
    axes[1].set(title=f"here: {args.data}, {args.recipe} recipe", xlabel="change, points, ± standard error")
    for axis in axes:
        axis.axvline(0, color="black", linewidth=0.8)
    return figure


def draw_longer(plt, cells, runs):
    """Fig. 3: accuracy over epochs, of the seeds that all designs have at all lengths that were run."""
    of_row = {row: [set(seeds_of(c, runs)) for c in cells if c.row == row] for row in dict.fromkeys(c.row for c in cells)}
    lengths = [row for row, found in of_row.items() if set.intersection(*found)]
    seeds = set.intersection(*(s for row in lengths for s in of_row[row])) if lengths else set()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for i, place in enumerate(dict.fromkeys(c.place for c in cells)):
            mine = [c for c in cells if c.place == place and c.row in lengths]
            values = [[runs[key(c, s)][measure] for s in seeds] for c in mine] if seeds else []
            x = [int(c.row.split()[0]) * (1 + 0.015 * (i - 2)) for c in mine][: len(values)]  # side by side
            errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0 for v in values]
            axis.errorbar(x, [statistics.fmean(v) for v in values], yerr=errors, fmt="o-", capsize=2, label=place)
        axis.set(xscale="log", xlabel="epochs, times those of the recipe", ylabel=f"{title}, % ± standard error over {len(seeds)} seeds",
                 title=f"Fig. 3 at small scale: {title}")
        times = [row.split()[0] for row in lengths]
        axis.set_xticks([int(t) for t in times], times)
        axis.minorticks_off()
    axes[1].legend()
    return figure


def draw_claim(plt, cells, runs, colours, markers):
    """Change of accuracy against the ratio of variances: the paper's cells, where it measured both, and our runs."""
    panels = [("the paper's cells, with its variances", papers_points(cells))] if papers_points(cells) else []
    panels += [(f"ours, a point per run: {where}", claim(cells, runs, which)) for which, where in ENCODERS.items()]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels) + 2, 5))
    for axis, (title, points) in zip(axes, panels, strict=True):
        for x, y, c in points:
            axis.plot(x, y, markers[c.place], color=colours[c.row], alpha=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="log(v_tgt / v_src)", title=title)
    present = [c for c in cells if not c.is_base]
    for text, style in [*((r, {"color": colours[r], "marker": "s"}) for r in dict.fromkeys(c.row for c in present)),
                        *((p, {"color": "grey", "marker": markers[p]}) for p in dict.fromkeys(c.place for c in present))]:
        axis.plot([], [], linestyle="", label=text, **style)
    axes[0].set_ylabel("change of accuracy from the baseline, points")
    axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8)
    return figure
