"""The variance of encodings: Fig. 2, and the theory of Sec. 5, of Wang, Fan, Tian, Kihara, Chen:
On the Importance of Asymmetry for Siamese Representation Learning, CVPR 2022.

The source encoder with its projector encodes each image r times, with other views and batch-mates
each time, BatchNorm with the statistics of the batch (Sec. 3 and 7). With unit vectors z_1 .. z_r
of image i in d dimensions and their mean z:

    v_i = (1 - |z|^2) / d           intra-image variance per dimension, over r (not r - 1)
    v   = mean of v_i over images   the paper's number for a design
    (1 - |mean of z|^2) / d         total variance; its limit is 1/d, uniform encodings (App. A)

Half trained or collapsed encoders have a small v for the wrong reason: see v / total. Draws depend
on (seed, view, batch), not on the design, so that differences between designs are paired.

    python variance_ref.py runs/mocov2_asym-demo --designs scalemix,mean-enc-3 --plot fig2.png
    torchrun --nproc_per_node=8 variance_ref.py checkpoint_baseline_100ep.pth --data IMAGENET
    python variance_ref.py --theory --plot theory.png       Sec. 5 by simulation; no checkpoint
"""

import argparse
import importlib.util
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from common import data
from common.augment import rng
from common.distributed import check_launch, say
from common.flags import check, code_digest, number, parser, positive, whole
from mocov2_asym import launch, load

# ============================================================================== designs
# Flags of the training scripts, the bags encoded, the paper's v (1e-4, Sec. 4), who gains. Two rows
# where the paper does not say which crops, or where SyncBN is. tgt-recipe: the target's, if other.
DESIGNS = {
    "baseline": ({}, "large", 8.5, ""),
    "multicrop": ({"multicrop_src": True}, "small", 38.0, "source"),
    "multicrop-mix": ({"multicrop_src": True}, "both", 38.0, "source"),
    "scalemix": ({"scalemix_src": True}, "large", 29.5, "source"),
    "strong": ({"aug_src": "strong"}, "large", 19.7, "source"),
    "weak": ({"aug_src": "weak"}, "large", 6.9, "target"),
    "sync-bn": ({"sync_bn_src": True}, "large", 8.3, "target"),
    "sync-bn-all": ({"sync_bn_src": True, "bn_scope": "all"}, "large", 8.3, "target"),
    "mean-enc-2": ({"mean_enc_src": 2}, "large", 4.2, "target"),
    "tgt-recipe": ({}, "target", None, ""),
}
ORDER = ("multicrop", "scalemix", "strong", "baseline", "sync-bn", "weak", "mean-enc-2")  # by v
PLAIN = dict(aug_src="base", aug_tgt="base", asym_bn=False, sync_bn_src=False, mean_enc_src=1,
             mean_enc=1, bn_scope="projector", multicrop_src=False, multicrop_tgt=False,
             scalemix_src=False, scalemix_tgt=False, symmetrize=False)


def choose(names, script, run):
    """The designs of --designs after the baseline: {name: (the script's arguments, bags, paper's v,
    who gains)}. "all" leaves out what would change nothing for this run."""
    source, target = script.augmentations(run)
    useless = {"tgt-recipe"} if source == target else set()
    if run.bn_groups == 1 or getattr(run, "vanilla_head", False):  # SyncBN already, or no BN
        useless |= {"sync-bn", "sync-bn-all"}

    chosen = {}
    names = [k for k in DESIGNS if k not in useless] if names == "all" else names.split(",")
    for name in ["baseline", *names]:
        mean = re.fullmatch(r"mean-enc-([1-9]\d?)", name)
        check(mean or name in DESIGNS, f"--designs {name}: use all, {','.join(DESIGNS)},mean-enc-N")
        flags, *rest = DESIGNS.get(name) or ({"mean_enc_src": int(mean[1])}, "large", None, "")
        chosen[name] = argparse.Namespace(**{**vars(run), **flags}), *rest
    return chosen


# ============================================================================== checkpoints
def open_checkpoint(args):
    """The script of a last.pt or of a published MoCo v2, its arguments, its source's weights."""
    path = Path(args.checkpoint)
    state = load(path / "last.pt" if path.is_dir() else path)
    ours = {"model", "args"} <= state.keys()
    run = state["args"] if ours else {"method": "mocov2_asym", "format": 3}
    known = run.get("format") == 3 and Path(__file__).with_name(f"{run.get('method')}.py").exists()
    check(known and (ours or "state_dict" in state),
          f"{path} has no projector known here; give a run's folder, last.pt or asym-siam's file")
    script = importlib.import_module(run["method"])
    prefix, model = ("source.", "model") if ours else ("module.encoder_q.", "state_dict")
    weights = {k.removeprefix(prefix): v for k, v in state[model].items() if k.startswith(prefix)}
    if not ours:
        check(args.data, "--data: this checkpoint does not name its data; give the folder")
        linear = [v for k, v in weights.items() if k.startswith("fc.") and v.ndim == 2]
        check(len(linear) > 1, f"{path} has no projector in {prefix}*, and v is of its outputs")
        flags = f"--arch {state.get('arch', 'resnet50')} --hidden {len(linear[0])}".split()
        flags += f"--recipe imagenet --dim {len(linear[-1])} --data".split() + [args.data]
        flags += ["--vanilla-head"] * (len(linear) == 2)  # MoCo v2's own, fc.0 and fc.2
        run = {**vars(script.parse_args(flags)), "mean": data.IMAGENET[0], "std": data.IMAGENET[1]}
        rename = lambda k: f"projector.{k[3:]}" if k.startswith("fc.") else f"backbone.{k}"
        weights = {rename(k): v for k, v in weights.items()}

    given = {k: v for k, v in vars(args).items() if v is not None}  # --seed, --bn-groups, ..
    run = {**run, **PLAIN, **given, "amp": "off"}
    return script, argparse.Namespace(**run), weights


# ============================================================================== variance
@torch.no_grad()
def encoding_sums(script, args, weights, which, images, views, device):
    """Each image's unit encodings summed over views: (N, d), on all processes; which: the bags."""
    encoder = script.Method(args).source.to(device)
    script.fit(encoder, weights, args.checkpoint)
    src, tgt = script.plan_views(args)
    bags = {"large": src[:1], "small": src[1:], "both": src, "target": tgt[:1]}[which]
    n, total, part = args.batch_size, len(images), script.mine()
    sums = torch.zeros(total, args.dim)

    for view in range(views):
        order = torch.randperm(total, generator=rng(args.seed, "mates", view))
        batches = torch.cat([order, order[:-total % n]]).split(n)  # the last is full, for its BN
        steps = [(f"variance {view} {i}", rows) for i, rows in enumerate(batches)]
        plan = [[bags[view % len(bags)]]]  # a side with a bag
        stream = data.stream(images, plan, steps, args.seed, part, args.workers, device)
        for i, ([[bag]], _) in enumerate(stream):
            [z] = encoder([bag], track=False)
            new = (torch.arange(n) < total - i * n)[part]  # what fills up does not count
            sums[batches[i][part][new]] += F.normalize(z).cpu()[new]
    return script.all_sum(sums)


def summary(sums, views, baseline=None):
    """A design's numbers as they stand in variance.json, from its sums (N, d) of unit vectors over
    views and the baseline's numbers. standard_error: of the difference, paired by image."""
    n, d = sums.shape
    v_i = (1 - (sums.double() / views).square().sum(1)) / d
    base = torch.tensor(baseline["v_i"], dtype=torch.double) if baseline else v_i
    total = (1 - (sums.double().sum(0) / (n * views)).square().sum()) / d
    v, paired = v_i.mean(), v_i - base
    numbers = {
        "v": v, "unbiased": v * views / (views - 1), "ratio": v / base.mean(),
        "difference": paired.mean(), "standard_error": paired.std() / n**0.5,
        "total": total, "between_images": total - v, "share": v / total}
    return {**{k: x.item() for k, x in numbers.items()}, "d": d, "v_i": v_i.tolist()}


# ============================================================================== theory
# Sec. 5: z = W f without normalisation; features f = f~ + e, with isotropic noise e of trace s, and
# f' = f~ + e'. Eq. 2 and MoCo's queue in one form: targets f'_m are the batch's, then the queue's;
# C (N, M) holds alpha_im, minus 1 at the positive, so that its rows sum to 0.
TAU, N, D, K, QUEUE = 0.2, 64, 32, 16, 512
LEVELS, FIXED, DRAWS = [0.05 * i for i in range(11)], 0.25, 3000  # traces of noise: swept, and not


def setting(queue, mu, generator):
    """Features of a mean of norm mu: f (N, D), f' (M, D). W = W' (K, D). Alpha's places (N, M)."""
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.double)
    tgt = F.normalize(draw(N + QUEUE * queue, D)) + mu * F.normalize(draw(1, D))
    batch, queued = torch.eye(N, dtype=torch.bool), (torch.arange(len(tgt)) >= N).expand(N, -1)
    return tgt[:N], tgt, draw(K, D) / K**0.5, queued if queue else ~batch


def coefficients(logits, negative):
    alpha = logits.masked_fill(~negative, -math.inf).softmax(-1)
    return alpha - torch.eye(*negative.shape).to(logits)


def gradient(f, tgt, c, w):
    """Eq. 2, ending in the source's f_i: (1 / tau N) W' sum_im C_im f'_m f_i^T, (.., K, D)."""
    return w @ tgt.mT @ c.mT @ f / (TAU * N)


def closed_form(f, tgt, c, w, s, s_tgt):
    """tr V[dL/dW] for fixed C: of the target's noise, of the source's, of the product of both."""
    noise = s_tgt / D * w.square().sum()  # tr(W' Sigma' W'^T)
    a, b, ab = (x.square().sum() for x in (c.T @ f, c @ tgt @ w.T, c))
    return ((noise * a + s * b + s * noise * ab) / (TAU * N) ** 2).item()


def simulate(f, tgt, c, w, negative, live, noise, draws, generator):
    """tr V[dL/dW] of noise (the source's trace, the target's), its standard error and closed form;
    how far the mean gradient moves, and would by chance. live: alpha is each draw's own softmax."""
    clean, closed = gradient(f, tgt, c, w), closed_form(f, tgt, c, w, *noise)
    f, tgt, w, c = (x.float() for x in (f, tgt, w, c))  # twice as fast
    (s, s_tgt), g = noise, []
    for _ in range(0, draws, 50):
        src = f + torch.randn(50, *f.shape, generator=generator) * (s / D) ** 0.5
        to = tgt + torch.randn(50, *tgt.shape, generator=generator) * (s_tgt / D) ** 0.5
        alpha = coefficients((src @ w.T) @ (to @ w.T).mT / TAU, negative) if live else c
        g.append(gradient(src, to, alpha, w))
    g = torch.cat(g).double()
    square = (g - g.mean(0)).square().sum((1, 2))
    var, norm = square.sum().item() / (len(g) - 1), clean.norm().item()
    return {"var": var, "se": square.std().item() / len(g) ** 0.5, "closed": closed,
            "moved": (g.mean(0) - clean).norm().item() / norm,
            "chance": (var / len(g)) ** 0.5 / norm}


def errors_of_eq2(generator):
    """Relative errors of Eq. 2, as corrected and as printed, against autograd's of Eq. 1."""
    f, _, w, negative = setting(False, 1.0, generator)
    near = lambda x: x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.double)
    tgt, w_tgt = near(f), near(w)
    logits = (f @ w.requires_grad_().T) @ (tgt @ w_tgt.T).T / TAU  # the target without gradient
    (logits.masked_fill(~negative, -math.inf).logsumexp(1) - logits.diagonal()).mean().backward()
    c = coefficients(logits.detach(), negative)
    return [((gradient(x, tgt, c, w_tgt) - w.grad).norm() / w.grad.norm()).item() for x in (f, tgt)]


def theory(seed, draws=DRAWS):
    """Errors of Eq. 2; rows: noise of the source, of the target; points: sweeps, fixed and live."""
    generator, rows, points = rng(seed, "theory"), [], []
    right, wrong = errors_of_eq2(generator)
    for queue, mu in ((False, 0), (False, 2), (True, 0), (True, 2)):
        f, tgt, w, negative = setting(queue, mu, generator)
        logits = (f @ w.T) @ (tgt @ w.T).T / TAU
        uniform, frozen = coefficients(0 * logits, negative), coefficients(logits, negative)
        case = {"negatives": "queue" if queue else "in batch", "mu": mu}

        for alpha, c in (("uniform", uniform), ("frozen", frozen), ("live", frozen)):
            for noise in ((FIXED, 0), (0, FIXED)):
                x = simulate(f, tgt, c, w, negative, alpha == "live", noise, draws, generator)
                rows.append({**case, "alpha": alpha, **x})
        for noise in [(s, FIXED) for s in LEVELS] + [(FIXED, s) for s in LEVELS]:
            for live in (False, True):
                x = simulate(f, tgt, frozen, w, negative, live, noise, draws // 10, generator)
                points.append({**case, "live": live, **x})
    return right, wrong, rows, points


# ============================================================================== tables, figures
HEAD = ("design          v e-4  unbiased   d v   v/v0  v/total   v - v0, paired         "
        "paper: v e-4  v/v0  prefers")
PANELS = {"MultiCrop": "multicrop", "ScaleMix": "scalemix", "Stronger, weaker": "strong|weak",
          "SyncBN": "sync-bn", "MeanEnc": "mean-enc", "Target's recipe": "tgt-recipe"}


def row(name, x, paper, prefers):
    delta, se = x["difference"] * 1e4, x["standard_error"] * 1e4
    change = "same" if abs(delta) < 2 * se else "up" if delta > 0 else "down"
    change = "" if name == "baseline" else f"{delta:+.3f} +- {se:.3f} {change}"
    paper = f"{paper:12.1f}  {paper / 8.5:4.2f}  {prefers}" if paper else ""
    return (f"{name:14s}{x['v'] * 1e4:7.3f}  {x['unbiased'] * 1e4:8.3f}  {x['v'] * x['d']:.3f}  "
            f"{x['ratio']:5.2f}  {x['share']:7.3f}   {change:23s}{paper}").rstrip()


def print_theory(right, wrong, rows, points):
    """The table of both sides' noise, and what holds exactly, what to first order."""
    print("negatives  |mean f|  coefficients  V tgt / V src  closed form   "
          "mean moved by source's noise, target's, chance")
    for src, tgt in zip(rows[::2], rows[1::2], strict=True):
        closed = "-" if src["alpha"] == "live" else f"{tgt['closed'] / src['closed']:.2f}"
        print(f"{src['negatives']:9s}{src['mu']:10d}  {src['alpha']:12s}"
              f"{tgt['var'] / src['var']:15.2f}{closed:>13s}{src['moved']:31.3f}"
              f"{tgt['moved']:10.3f}{max(src['chance'], tgt['chance']):11.3f}")

    fixed = [r for r in rows if r["alpha"] != "live"]
    live = [r for r in rows if r["alpha"] == "live"]
    uniform = [r["var"] for r in rows if r["alpha"] == "uniform" and r["negatives"] == "in batch"]
    low, high = sorted((uniform[1] / uniform[0], uniform[3] / uniform[2]))
    off = max(abs(r["var"] - r["closed"]) / r["se"] for r in fixed)
    line = max(abs(p["var"] - p["closed"]) / p["se"] for p in points if not p["live"])
    still = all(r["moved"] < 3 * r["chance"] for r in fixed)
    moves = all(r["moved"] > 2 * r["chance"] for r in live)
    for holds, statement in (
        (right < 1e-6 < 0.01 < wrong, "(a) exact: Eq. 2 ending in f_i is autograd's for Eq. 1 "
         f"(error {right:.0e}); ending in f'_i, as printed, it is not ({wrong:.0%})"),
        (off < 4, f"(b) exact: three terms give tr V for fixed alpha (within {off:.1f} errors)"),
        (still, "(c) exact: for fixed alpha the mean gradient stays, whichever side is noisy, and"),
        (line < 4.5, f"    tr V is linear in either noise, as derived (within {line:.1f})"),
        (moves, "(d) first order: with the softmax of noisy features the mean gradient moves, here "
         f"by up to {max(r['moved'] for r in live):.0%}"),
        (0.9 < low and high < 1.1, "(e) control: with uniform alpha in the batch both sides are "
         f"alike, but for W (ratios {low:.2f} to {high:.2f})"),
    ):
        print("ok   " if holds else "WRONG", statement)


def plot_designs(results, path):
    """Fig. 2, lower row: cumulative distributions of v_i beside the baseline's; means dotted."""
    from matplotlib.figure import Figure

    panels = {title: [k for k in results if re.match(p, k)] for title, p in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names} or {"Baseline": []}
    figure = Figure(figsize=(3 * len(panels), 2.8))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        right = 0.0
        for i, name in enumerate(["baseline", *names]):
            v = torch.tensor(results[name]["v_i"]).sort().values * 1e4
            paper = DESIGNS[name][2] if name in DESIGNS else None
            label = f"{name} {v.mean():.2f}" + f" (paper: {paper})" * bool(paper)
            axis.plot(v, torch.linspace(0, 1, len(v)), f"C{i}", label=label)
            axis.axvline(v.mean().item(), color=f"C{i}", linestyle=":")
            right = max(right, v.quantile(0.995).item())
        axis.set(title=title, xlabel="intra-image variance (1e-4)", xlim=(0, right), ylim=(0, 1))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9, frameon=False)
    axes[0].set_ylabel("share of images")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_theory(points, path):
    """tr V over the noise of one side: derived, simulated, with the softmax of noisy features."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    for i, side in enumerate(["source", "target"] * 4):
        axis, sweep = axes[i // 2], points[22 * i:22 * i + 22]  # 11 levels, fixed and live
        for style, label, v in (
                ("-", "fixed coefficients: derived", [p["closed"] for p in sweep[::2]]),
                ("o", "simulated", [p["var"] for p in sweep[::2]]),
                ("x", "softmax of noisy features", [p["var"] for p in sweep[1::2]])):
            axis.plot(LEVELS, v, style, color=f"C{i % 2}", label=f"{side}'s noise, {label}")
        axis.set(title="{negatives}, mean feature of norm {mu}".format(**sweep[0]),
                 xlabel="noise of one side (trace)", ylim=(0, axis.dataLim.ymax * 1.05))
    axes[0].set_ylabel("variance of dL/dW (trace)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    figure.savefig(path, dpi=150)


# ============================================================================== main
def parse_args(argv=None):
    p = parser("variance_ref.py", __doc__)
    flag = p.add_argument
    flag("checkpoint", nargs="?", help="a run's folder, its last.pt, asym-siam's or MoCo v2's file")
    flag("--data", help="default: the run's. Encoded are kNN's queries (val/), or all images")
    flag("--data-root", metavar="DIR", help="where torchvision's data sets are; default: the run's")
    flag("--images", type=positive, metavar="N", help="so many, evenly spaced; default: all")
    flag("--views", type=number(int, 2), default=32, help="of each image (32 in Sec. 7)")
    flag("--designs", default="all", help=f"all, or some of {','.join(DESIGNS)},mean-enc-N")
    flag("--batch-size", type=positive, help="of all processes together; default: the run's")
    flag("--bn-groups", type=positive, help="virtual devices of BN; default: the run's")
    flag("--seed", type=whole, default=0, help="of views and batch-mates")
    flag("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    flag("--workers", type=whole, help="loader processes of each process; default: up to 8")
    flag("--nproc", type=positive, default=1, help="processes to start here (or use torchrun)")
    flag("--out", default="variance.json", metavar="FILE", help="all numbers, each v_i too")
    flag("--plot", metavar="FILE.png", help="Fig. 2, or what --theory finds; needs matplotlib")
    flag("--theory", action="store_true", help="Sec. 5 by simulation: a minute, no checkpoint")
    args = p.parse_args(argv)

    check(args.theory != bool(args.checkpoint), "give a checkpoint, or --theory and none")
    for path in map(Path, (args.out, args.plot or args.out)):  # now, not when all is measured
        check(os.access(path.parent, os.W_OK | os.X_OK) and not path.is_dir(),
              f"{path} cannot be written; name a file in a folder that is there")
    check(not args.plot or args.plot.endswith(".png") and importlib.util.find_spec("matplotlib"),
          "--plot FILE.png needs matplotlib: pip install matplotlib, or leave --plot out")
    return args


def work(args):
    """All that one process does: the table, variance.json and the figure."""
    script, run, weights = open_checkpoint(args)
    device = script.join_processes(args)
    if getattr(run, "code", None) not in (None, code_digest(script.__file__)):
        say(f"note: {run.method}.py or common/ changed since {args.checkpoint} was trained")
    images = [x for x in data.load(run.data, run.data_root) if x is not None][-1]
    images.stats = run.mean, run.std
    if args.images:
        images = images[torch.linspace(0, len(images) - 1, min(args.images, len(images))).long()]
    n, method = run.batch_size, script.Method.__name__
    check(len(images) >= n, f"{len(images)} images are too few for --batch-size {n}; use a smaller")
    say(f"{args.checkpoint}: {method}, {run.arch}; {len(images)} images of {run.data}, "
        f"{args.views} views; BN over {n // run.bn_groups} images, SyncBN over {n}\n{HEAD}")

    results = {}
    for name, (changed, bags, *paper) in choose(args.designs, script, run).items():
        sums = encoding_sums(script, changed, weights, bags, images, args.views, device)
        results[name] = summary(sums, args.views, results.get("baseline"))
        say(row(name, results[name], *paper))

    total, limit = results["baseline"]["total"] * 1e4, 1e4 / results["baseline"]["d"]
    say(f"total variance of the baseline {total:.2f}e-4; its limit 1/d is {limit:.2f}e-4")
    paper = [k for k in ORDER if k in results]
    order = sorted(paper, key=lambda k: -results[k]["v"])
    say(f"order: {' > '.join(order)}\npaper: {' > '.join(paper)}")

    if script.rank() == 0:
        about = {k: getattr(run, k) for k in ("data", "arch", "batch_size", "bn_groups", "seed")}
        about |= {"checkpoint": args.checkpoint, "method": method, "images": len(images)}
        Path(args.out).write_text(json.dumps({**about, "views": args.views, "designs": results}))
        if args.plot:
            plot_designs(results, args.plot)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv=None):
    args = parse_args(argv)
    if args.theory:
        found = theory(args.seed)
        print_theory(*found)
        return plot_theory(found[3], args.plot) if args.plot else None
    check_launch(args)
    script, run, _ = open_checkpoint(args)
    for changed, *_ in choose(args.designs, script, run).values():
        script.check_flags(changed)
    launch(args, work)


if __name__ == "__main__":
    main()
