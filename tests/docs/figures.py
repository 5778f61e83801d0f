"""Draws the pictures of the README and of docs/; needs matplotlib.

    python tests/docs/figures.py                       all
    python tests/docs/figures.py overview claim        some

overview: the pipeline and where each design acts. views: what source and target see of the demo
data. curves: kNN over the epochs of the demo, from docs/logs/demo-*.txt. claim: change of accuracy
over the ratio of variances, the paper's cells and those in tests/study/results.
"""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "study")]
RAISES, LOWERS, INK, GREY = "#c0392b", "#1f6fb2", "#222222", "#888888"
GREEN, PURPLE = "#2e8b57", "#6a3d9a"


def overview():
    figure = Figure(figsize=(11, 5.6))
    axis = figure.add_axes([0, 0, 1, 1])
    axis.set(xlim=(0, 110), ylim=(0, 56))
    axis.axis("off")

    def box(x, y, text, width=15, height=6, colour=INK):
        style = FancyBboxPatch((x - width / 2, y - height / 2), width, height, fc="white",
                               boxstyle="round,pad=0,rounding_size=1", ec=colour, lw=1.5)
        axis.add_patch(style)
        axis.text(x, y, text, ha="center", va="center", fontsize=12, color=colour)

    def arrow(start, end, colour=INK, line="-", width=1.5):
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", linestyle=line, lw=width,
                                       mutation_scale=14, color=colour, shrinkA=0, shrinkB=0))

    def pin(x, y, edge, name, flag, colour):
        """A design's name and flag at (x, y), and a line to the box's edge where it acts."""
        axis.plot([x, x], [edge, y + 2.6], color=colour, lw=1.5)
        axis.plot([x], [edge], "o", color=colour, ms=6)
        axis.text(x, y + 1.1, name, ha="center", va="center", fontsize=11, color=colour,
                  weight="bold")
        axis.text(x, y - 1.3, flag, ha="center", va="center", fontsize=8.5, color=colour,
                  family="monospace")

    top, low, middle = 36, 18, 27
    columns = {"views": 31, "backbone": 51, "projector": 71}
    box(10, middle, "image", width=12)
    for y, name in ((top, "source"), (low, "target")):
        arrow((16, middle + (1 if y > middle else -1)), (columns["views"] - 7.5, y))
        for text, x in columns.items():
            box(x, y, text)
        for x in (columns["views"], columns["backbone"]):
            arrow((x + 7.5, y), (x + 12.5, y))
        arrow((columns["projector"] + 7.5, y), (85, y))
        z = "$z_{src}$" if name == "source" else "$z_{tgt}$"
        axis.text(87.5, y, z, ha="center", va="center", fontsize=17)
        axis.text(10, y + (2 if y > middle else -2), f"{name} encoder", ha="center", va="center",
                  fontsize=12, weight="bold")
    box(101, middle, "loss", width=11)
    arrow((90, top - 1), (99, middle + 3))
    arrow((90, low + 1), (99, middle - 3))

    # the gradient goes back along the source; the target's weights follow by a moving average
    axis.plot([104, 104, columns["backbone"] + 2], [middle + 3, top + 6, top + 6], GREEN, lw=2)
    for name in ("backbone", "projector"):
        arrow((columns[name] + 2, top + 6), (columns[name] + 2, top + 3), GREEN, width=2)
    axis.text(91, 37.2, "a predictor in MoCo v3,\nBYOL, SimSiam", fontsize=8, color=GREY)
    axis.text(97.5, 19.5, "stop-gradient", fontsize=10, color=GREY)
    for name in ("backbone", "projector"):
        arrow((columns[name], top - 3), (columns[name], low + 3), PURPLE, line="--", width=2)

    for x, name, flag in ((16, "MultiCrop 4.1", "--multicrop-src"),
                          (35, "ScaleMix 4.2", "--scalemix-src"),
                          (55, "StrongerAug 4.3", "--aug-src strong")):
        pin_x = columns["views"] + (x - 35) / 4
        axis.plot([pin_x, x], [top + 3, 45.5], color=RAISES, lw=1.5)
        axis.plot([pin_x], [top + 3], "o", color=RAISES, ms=6)
        axis.text(x, 49.2, name, ha="center", va="center", fontsize=11, color=RAISES, weight="bold")
        axis.text(x, 46.8, flag, ha="center", va="center", fontsize=9, color=RAISES,
                  family="monospace")
    pin(columns["views"], 9, low - 3, "WeakerAug 4.3", "--asym-aug", LOWERS)
    pin(columns["projector"], 9, low - 3, "SyncBN 4.4", "--asym-bn", LOWERS)
    pin(87.5, 9, low - 2.5, "MeanEnc 4.5", "--mean-enc 2", LOWERS)

    axis.text(36, 53.2, "raise the variance: better on the source", ha="center", va="center",
              fontsize=12, color=RAISES, style="italic")
    axis.text(60, 4.6, "lower the variance: better on the target", ha="center", va="center",
              fontsize=12, color=LOWERS, style="italic")
    for x, line, colour, text in ((66, "-", GREEN, "gradient"),
                                  (80, "--", PURPLE, "EMA of the weights, or a copy")):
        axis.plot([x, x + 4], [51, 51], line, color=colour, lw=2)
        axis.text(x + 5, 51, text, va="center", fontsize=10.5, color=colour)
    figure.savefig(DOCS / "overview.png", dpi=130)


def views():
    import torch

    import mocov2_asym as script
    from common import data

    args = script.parse_args(["--multicrop-src", "--scalemix-src", "--asym-aug", "--mean-enc", "2"])
    images, n = data.load("demo")[0], 5
    steps = [(0, torch.arange(n))]
    plan = script.plan_views(args)
    ((sides, _),) = data.stream(images, plan, steps, args.seed, slice(None), 0, "cpu")
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in images.stats)
    columns = [("image", images.pixels[:n] / 255, GREY)]
    for bags, colour, names in (
            (sides[0], RAISES, ["source:\nScaleMix", "source:\nsmall crop", "source:\nsmall crop"]),
            (sides[1], LOWERS, ["target:\nweaker aug", "target:\n2nd of MeanEnc"])):
        seen = [(x * std + mean).clamp(0, 1) for x in sum(bags, [])]
        columns += zip(names, seen, [colour] * len(seen), strict=True)

    figure = Figure(figsize=(1.25 * len(columns), 1.2 * n + 0.4))
    for k, (title, column, colour) in enumerate(columns):
        for i, image in enumerate(column):
            axis = figure.add_subplot(n, len(columns), i * len(columns) + k + 1)
            size = image.shape[1]
            axis.imshow(image.permute(1, 2, 0), extent=(0, size, size, 0))
            edge = (args.img_size - size) / 2  # small crops are drawn small
            axis.set(xlim=(-edge, size + edge), ylim=(size + edge, -edge), xticks=[], yticks=[])
            axis.axis("off")
            if i == 0:
                axis.set_title(title, fontsize=10, color=colour)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.9, 0.06, 0.06)
    figure.savefig(DOCS / "views.png", dpi=110)


def curves():
    """A thin line for each seed, a thick one for their mean."""
    names = {"mocov2": "MoCo v2", "mocov3": "MoCo v3", "simclr": "SimCLR", "byol": "BYOL",
             "simsiam": "SimSiam", "barlow": "Barlow Twins"}
    pixels = re.search(r"raw pixels: (\S+)", (DOCS / "logs" / "pixels.txt").read_text())
    figure = Figure(figsize=(8, 4.6))
    axis = figure.add_subplot()
    for i, (name, title) in enumerate(names.items()):
        runs = []
        for path in sorted((DOCS / "logs").glob(f"demo-{name}-seed[345].txt")):
            points = re.findall(r"^epoch (\d+) .* knn (\S+)$", path.read_text(), re.MULTILINE)
            epochs, values = zip(*((int(e), float(v)) for e, v in points), strict=True)
            runs.append(values)
            axis.plot(epochs, values, color=f"C{i}", lw=0.7, alpha=0.5)
        mean = [sum(values) / len(runs) for values in zip(*runs, strict=True)]
        axis.plot(epochs, mean, color=f"C{i}", lw=2.2, label=f"{title} {mean[-1]:.2f}")
        untrained = [values[0] for values in runs]
        axis.plot([0] * len(runs), untrained, "o", color=f"C{i}", ms=3)
    axis.axhline(float(pixels[1]), color=GREY, lw=1, ls="--")
    axis.text(8.7, float(pixels[1]) + 0.01, "raw pixels", color=GREY, fontsize=9)
    axis.legend(loc="lower right", fontsize=9, title="mean at the end")
    axis.set(xlabel="epoch; 0: the untrained network", ylabel="kNN accuracy", ylim=(0, 1),
             xlim=(-0.2, 10.2), title="The demo, seeds 3, 4, 5 and their mean")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "curves.png", dpi=110)


def claim():
    import report
    import tables

    cells = tables.tables("micro")["sec4"]
    rows = list(dict.fromkeys(c.row for c in cells))
    panels = {"the paper: ImageNet, 100 epochs": [(*p, 0) for p in report.papers_points(cells)]}
    for title, file in (("here: demo data, 20 px, 7 epochs", "demo"),
                        ("here: 50,000 photographs, GPU, 5 epochs", "cifar10-jpeg-gpu"),
                        ("here: 16,000 photographs, CPU, 4 epochs", "cifar10-16k-photos")):
        runs = tables.read(ROOT / f"tests/study/results/{file}.jsonl")
        found = report.deltas(cells, runs, "linear")
        means = report.cell_means(report.claim(cells, runs, "base"))
        panels[title] = [(*p, found[p[2]].se) for p in means]

    figure = Figure(figsize=(13, 11))
    axes = list(figure.subplots(2, 2).flat)
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        rho = report.rank_correlation([p[:3] for p in points])[0]
        for x, y, c, error in points:
            axis.errorbar(x, y, error or None, fmt="o", color=f"C{rows.index(c.row)}", lw=1)
        axis.axhline(0, color=GREY, lw=0.8)
        axis.axvline(0, color=GREY, lw=0.8)
        axis.margins(0.06)
        left, right = axis.get_xlim()
        axis.set_xlim(left, right + 0.28 * (right - left))  # room for names
        axis.set(title=f"{title}\nrank correlation {rho:+.2f} of {len(points)} cells",
                 xlabel="log(v_tgt / v_src); left: the target varies less than the source")
        axis.set_ylabel("change of the linear probe, points")
    figure.tight_layout()
    for axis, points in zip(axes, panels.values(), strict=True):
        label(axis, [(x, y, name_of(c), f"C{rows.index(c.row)}") for x, y, c, _ in points])
    figure.savefig(DOCS / "claim.png", dpi=100)


def name_of(cell):
    if "&" in cell.row:
        return "strong src, weak tgt" if "source ↑" in cell.place else "weak src, strong tgt"
    place = cell.place.replace(" source", "").replace(" target", "").replace(", ", ":")
    return f"{cell.row[:-2]} {place}"


def label(axis, points):
    """Names points (x, y, text, colour) at their right; where names would meet, the lower goes
    further down, with a thin line to its point."""
    placed, scale = [], axis.figure.dpi / 72
    for x, y, text, colour in sorted(points, key=lambda p: -p[1]):
        left, middle = axis.transData.transform((x, y))
        left, wide, high, down = left + 9 * scale, 4.6 * scale * len(text), 9 * scale, middle
        while any(abs(down - b) < high and left < a + w and a < left + wide for a, b, w in placed):
            down -= 0.5
        placed.append((left, down, wide))
        axis.annotate(text, (x, y), (9, (down - middle) / scale), textcoords="offset points",
                      fontsize=8, color=colour, va="center",
                      arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour,
                                  "relpos": (0, 0.5), "shrinkA": 0})


if __name__ == "__main__":
    drawn = {"overview": overview, "views": views, "curves": curves, "claim": claim}
    for name in sys.argv[1:] or drawn:
        drawn[name]()
