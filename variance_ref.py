"""The variance of encodings: Fig. 2 of the paper, and the theory of its Sec. 5.

Wang, Fan, Tian, Kihara, Chen: On the Importance of Asymmetry for Siamese Representation Learning, CVPR 2022.

The source encoder with its projector encodes each image r times, with other views and other batch-mates each
time, BatchNorm with the statistics of the batch (Sec. 3 and 7). With unit vectors z_1 .. z_r of image i in d
dimensions and their mean z:

    v_i = (1 - |z|^2) / d              intra-image variance per dimension, population form (over r, not r - 1)
    v   = mean of v_i over images      the paper's number for a design
    (1 - |mean of z|^2) / d            total variance; near 1/d, its limit, for uniform encodings (Appendix A)

An encoder that is half trained or collapsed has a small v for the wrong reason: look at v / total too.
Designs are not defined here: the script that made the checkpoint gets a design's flag and makes views, BN and
MeanEnc. Draws depend on (seed, view, batch), not on the design: designs share crops, permutations and
batch-mates, so their differences are paired. Of an image only the sum of its encodings is kept.
All methods are measured alike, at the l2-normalised output of the projector, before any predictor. The loss
of Barlow Twins does not see that vector: it has a BatchNorm of its own in place of the normalisation.

    python variance_ref.py runs/mocov2_asym-demo                          all designs, on the run's own data
    python variance_ref.py runs/mocov2_asym-demo --designs scalemix,mean-enc-3 --images 512 --plot fig2.png
    torchrun --nproc_per_node=8 variance_ref.py checkpoint_baseline_100ep.pth --data IMAGENET --plot fig2.png
    python variance_ref.py --theory --plot theory.png                     Sec. 5 by simulation; no checkpoint
"""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import data
from common.augment import rng

METHOD, HERE = Path(__file__).stem, Path(__file__).resolve().parent
SCRIPTS = sorted(path.stem for path in HERE.glob("*_asym.py"))

# ============================================================================== designs
LARGE, SMALL, BOTH, TARGET = (  # which bags of what plan_views() plans are encoded, in turn
    lambda plan: plan[0][:1], lambda plan: plan[0][1:], lambda plan: plan[0], lambda plan: plan[1][:1])
DESIGNS = {  # flags of the training scripts, the bags, the paper's v in 1e-4 (Sec. 4), the encoder that gains
    "baseline": ({}, LARGE, 8.5, ""),
    "multicrop": ({"multicrop_src": True}, SMALL, 38.0, "source"),  # the paper does not say which crops:
    "multicrop-mix": ({"multicrop_src": True}, BOTH, 38.0, "source"),  # the small, or 1 large to 6 small;
    "scalemix": ({"scalemix_src": True}, LARGE, 29.5, "source"),
    "strong": ({"aug_src": "strong"}, LARGE, 19.7, "source"),
    "weak": ({"aug_src": "weak"}, LARGE, 6.9, "target"),
    "sync-bn": ({"sync_bn_src": True}, LARGE, 8.3, "target"),  # nor whether in the projector,
    "sync-bn-all": ({"sync_bn_src": True, "bn_scope": "all"}, LARGE, 8.3, "target"),  # or in the backbone too
    "mean-enc-2": ({"mean_enc_src": 2}, LARGE, 4.2, "target"),
    "tgt-recipe": ({}, TARGET, None, ""),  # the target's augmentation, where a method has two
}
ORDER = ("multicrop", "scalemix", "strong", "baseline", "sync-bn", "weak", "mean-enc-2")  # by the paper's v
PLAIN = {"aug_src": "base", "aug_tgt": "base", "asym_aug": False, "asym_bn": False, "sync_bn_src": False,
         "bn_scope": "projector", "mean_enc": 1, "mean_enc_src": 1, "multicrop_src": False,
         "multicrop_tgt": False, "scalemix_src": False, "scalemix_tgt": False, "symmetrize": False}


def choose(names, plain, two_recipes):
    """The designs of --designs after the baseline; all leaves out what would change nothing for this run."""
    useless = set() if two_recipes else {"tgt-recipe"}
    if plain.bn_groups == 1 or getattr(plain, "vanilla_head", False):
        useless |= {"sync-bn", "sync-bn-all"}
    chosen = {"baseline": DESIGNS["baseline"]}
    for name in [k for k in DESIGNS if k not in useless] if names == "all" else names.split(","):
        mean = re.fullmatch(r"mean-enc-([1-9]\d?)", name)
        check(mean or name in DESIGNS, f"--designs {name}: unknown; give all, or some of {','.join(DESIGNS)},"
              "mean-enc-N, with commas between")
        check(name != "tgt-recipe" or two_recipes, "--designs tgt-recipe: both encoders have the same recipe")
        chosen[name] = DESIGNS.get(name) or ({"mean_enc_src": int(mean[1])}, LARGE, None, "target")
    return chosen


# ============================================================================== checkpoints
def open_checkpoint(args):
    """Reads last.pt of any of the six scripts, or MoCo v2's checkpoints as asym-siam and moco publish them.
    Returns the training script, its arguments for the baseline, the source's weights, (mean, std)."""
    path = Path(args.checkpoint)
    path = path / "last.pt" if path.is_dir() else path
    state = torch.load(path, map_location="cpu", weights_only=True)
    ours = "method" in state
    prefix, entries = ("source.", state["model"]) if ours else ("module.encoder_q.", state["state_dict"])
    weights = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
    linear = [v for k, v in weights.items() if k.startswith(("projector.", "fc.")) and v.ndim == 2]
    stats = data.IMAGENET
    check(len(linear) > 1, f"{path} has no projector in {prefix}*, and v is of its outputs; use one that has")
    if ours:
        script = load_script(state["method"])
        check(state.get("format") == script.FORMAT, f"{path} has format {state.get('format')}, not "
              f"{script.FORMAT}; use the version that wrote it")
        kinds = {"data": str, "data_root": str, "batch_size": count, "bn_groups": count, "workers": few}
        run = {**state["args"], **{k: kind(state["args"][k]) for k, kind in kinds.items()}, **PLAIN}
        stats = torch.tensor([state["mean"], state["std"]], dtype=torch.double).view(2, 3).tolist()
    else:  # their fc.0, 1, 3, 5 are projector.0, 1, 3, 5 here, and MoCo v2's fc.0, 2 are --vanilla-head's
        check(args.data, "--data: this checkpoint does not name its data; give the folder")
        script = load_script("mocov2_asym")
        sizes = f"--hidden {len(linear[0])} --dim {len(linear[-1])} --arch {state.get('arch', 'resnet50')}"
        head = ["--vanilla-head"] if len(linear) == 2 else []
        run = vars(script.parse_args(["--data", args.data, "--recipe", "imagenet", *sizes.split(), *head]))
        rename = lambda k: "projector." + k[3:] if k.startswith("fc.") else "backbone." + k
        weights = {rename(k): v for k, v in weights.items()}
    names = ("data", "data_root", "batch_size", "bn_groups", "workers", "seed", "device", "nproc")
    run.update({k: getattr(args, k) for k in names if getattr(args, k) is not None}, amp="off", autocast=None)
    return script, argparse.Namespace(**run), weights, stats


def load_script(name):
    """A training script, as a module of this file's own, whose launch code starts this file's work()."""
    check(name in SCRIPTS, f"the checkpoint is of {name!r}, and there are {', '.join(SCRIPTS)}")
    spec = importlib.util.spec_from_file_location(f"{METHOD}_{name}", HERE / f"{name}.py")
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.METHOD, script.work = METHOD, work  # METHOD begins its messages
    return script


# ============================================================================== variance
@torch.no_grad()
def encoding_sums(script, args, weights, bags_of, images, views, device):
    """Sums over its views of each image's unit encodings: float32 (N, d), the same on all processes."""
    torch.manual_seed(args.seed)
    try:
        encoder = script.Method(args).source
        encoder.load_state_dict(weights)
        bags, sums = bags_of(script.plan_views(args)), torch.zeros(len(images), args.dim)
    except Exception as e:  # its arguments may be of any kind
        stop(f"the checkpoint's weights are not those of its {args.arch} ({' '.join(str(e).split()):.200})")
    encoder, n, total, bad = encoder.to(device), args.batch_size, len(images), set()
    for view in range(views):
        order = torch.randperm(total, generator=rng(args.seed, "mates", view))
        batches = torch.cat([order, order[: -total % n]]).split(n)  # the last is filled up, for its BN
        plan = [[bags[view % len(bags)]]]
        steps = [(f"variance {view} {i}", rows) for i, rows in enumerate(batches)]
        stream = data.stream(images, script.planned_crops(plan), steps, args.seed, script.rank(),
                             script.world_size(), args.workers, device)
        for i, ((step, rows), (crops, unreadable)) in enumerate(zip(steps, stream, strict=True)):
            [[bag]] = script.make_views(plan, crops, n, rng(args.seed, "views", step), images.stats)
            z = F.normalize(script.encode(encoder, bag, track=False)).cpu()
            new = (torch.arange(i * n, i * n + n) < total)[script.mine()]  # what fills up does not count
            sums[rows[script.mine()][new]] += z[new]
            script.report(args, set(unreadable) - bad)
            bad.update(unreadable)
    return script.all_sum(sums)


def statistics(sums, views):
    """v_i (N,) and the total variance of unit vectors, from their sums (N, d) over the views."""
    n, d = sums.shape
    total = (1 - (sums.double().sum(0) / (n * views)).square().sum()) / d
    return (1 - (sums.double() / views).square().sum(1)) / d, total


def summary(sums, views, v0=None):
    """A design's numbers as they stand in variance.json, and its v_i; v0: the baseline's."""
    v, total = statistics(sums, views)
    v0 = v if v0 is None else v0
    check(v.isfinite().all(), "the encodings are not finite; are the checkpoint's weights?")
    x = {"v": v.mean(), "unbiased": v.mean() * views / (views - 1), "ratio": v.mean() / v0.mean(),
         "difference": (v - v0).mean(), "standard_error": (v - v0).std() / len(v) ** 0.5,
         "total": total, "between_images": total - v.mean(), "share": v.mean() / total}
    return {**{k: value.item() for k, value in x.items()}, "d": sums.shape[1], "v_i": v.tolist()}, v


HEAD = ("design          v e-4  unbiased   d v   v/v0  v/total   v - v0, paired         paper: v e-4  v/v0  "
        "prefers")


def row(name, x, paper, prefers):
    delta, se = x["difference"] * 1e4, x["standard_error"] * 1e4
    change = "same" if abs(delta) < 2 * se else "up" if delta > 0 else "down"
    change = "" if name == "baseline" else f"{delta:+.3f} +- {se:.3f} {change}"
    paper = f"{paper:12.1f}  {paper / 8.5:4.2f}  {prefers}" if paper else ""
    return (f"{name:14s}{x['v'] * 1e4:7.3f}  {x['unbiased'] * 1e4:8.3f}  {x['v'] * x['d']:.3f}  "
            f"{x['ratio']:5.2f}  {x['share']:7.3f}   {change:23s}{paper}").rstrip()


# ============================================================================== figures
PANELS = {"MultiCrop": "multicrop", "ScaleMix": "scalemix", "Stronger, weaker": "strong|weak",
          "SyncBN": "sync-bn", "MeanEnc": "mean-enc", "Target's recipe": "tgt-recipe"}
RED, BLUE, GREEN, GREY = "#c0392b", "#2471a3", "#1e8449", "#555555"


def pyplot():
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as e:
        stop(f"--plot needs matplotlib ({e}): pip install matplotlib, or leave --plot out")


def save(figure, path):
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as e:
        stop(f"--plot {path} cannot be written ({e})", 1)


def plot_designs(results, path):
    """Fig. 2, lower row: cumulative distributions of v_i, each design beside the baseline; means dotted."""
    panels = {title: [k for k in results if re.match(names, k)] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names} or {"Baseline": []}
    size = (3 * len(panels), 2.8)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        shown = {k: torch.tensor(results[k]["v_i"]).sort().values * 1e4 for k in ("baseline", *names)}
        for (name, v), colour in zip(shown.items(), (GREY, RED, BLUE, GREEN), strict=False):
            share = torch.linspace(0, 1, len(v)).tolist()
            axis.plot(v.tolist(), share, color=colour, label=f"{name} {v.mean():.2f}")
            axis.axvline(v.mean().item(), color=colour, linestyle=":")
        axis.set(title=title, xlabel="intra-image variance (1e-4)", ylim=(0, 1),
                 xlim=(0, max(v.quantile(0.995).item() for v in shown.values())))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9, handlelength=1, frameon=False)
    axes[0, 0].set_ylabel("share of images")
    save(figure, path)


# ============================================================================== theory
# Sec. 5: z = W f without normalisation, features f = f~ + e with noise e of covariance Sigma, f' = f~ + e';
# here Sigma is isotropic, of trace s. Eq. 2 and MoCo's queue in one form: targets f'_m are the batch's, then
# the queue's; C (N, M) holds alpha_im, minus 1 at the positive, so that its rows sum to 0.
TAU, N, D, K, QUEUE = 0.2, 64, 32, 16, 512
LEVELS, FIXED, DRAWS = [0.05 * i for i in range(11)], 0.25, 3000  # traces of the noise: swept, and not


def setting(queue, mu, generator):
    """Clean features, unit vectors plus a common mean of norm mu (after a ReLU there is one): sources (N, D),
    targets (M, D). W = W' (K, D). Where alpha lives (N, M)."""
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.double)
    tgt = F.normalize(draw(N + QUEUE * queue, D)) + mu * F.normalize(draw(1, D))
    negative = (torch.arange(len(tgt)) >= N).expand(N, -1) if queue else ~torch.eye(N, dtype=torch.bool)
    return tgt[:N], tgt, draw(K, D) / K**0.5, negative


def coefficients(logits, negative):
    return logits.masked_fill(~negative, -math.inf).softmax(-1) - torch.eye(*negative.shape).to(logits)


def gradient(f, tgt, c, w):
    """Eq. 2, ending in the source's f_i: (1 / tau N) W' sum_im C_im f'_m f_i^T, (.., K, D)."""
    return w @ tgt.mT @ c.mT @ f / (TAU * N)


def closed_form(f, tgt, c, w, s, s_tgt):
    """tr V[dL/dW] for fixed C: the target's noise times source features, the source's noise times differences
    of targets, and the product of both."""
    noise = s_tgt / D * w.square().sum()  # tr(W' Sigma' W'^T)
    norms = [x.square().sum() for x in (c.T @ f, c @ tgt @ w.T, c)]
    return ((noise * norms[0] + s * norms[1] + s * noise * norms[2]) / (TAU * N) ** 2).item()


def simulate(f, tgt, c, w, negative, s, s_tgt, draws, generator):
    """Mean gradient, tr V and its standard error. c None: alpha is each draw's own softmax."""
    f, tgt, w, c = (x if x is None else x.float() for x in (f, tgt, w, c))  # twice as fast
    g = []
    for _ in range(0, draws, 50):
        noise, noise_tgt = (torch.randn(50, *x.shape, generator=generator) for x in (f, tgt))
        src, to = f + noise * (s / D) ** 0.5, tgt + noise_tgt * (s_tgt / D) ** 0.5
        alpha = coefficients((src @ w.T) @ (to @ w.T).mT / TAU, negative) if c is None else c
        g.append(gradient(src, to, alpha, w))
    g = torch.cat(g).double()
    square = (g - g.mean(0)).square().sum((1, 2))
    return g.mean(0), square.sum().item() / (len(g) - 1), square.std().item() / len(g) ** 0.5


def errors_of_eq2(generator):
    """Relative errors of Eq. 2, as corrected and as printed, against autograd's gradient of Eq. 1."""
    f, _, w, negative = setting(False, 1.0, generator)
    tgt, w_tgt = (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.double) for x in (f, w))
    logits = (f @ w.requires_grad_().T) @ (tgt @ w_tgt.T).T / TAU  # no gradient through the target
    (logits.masked_fill(~negative, -math.inf).logsumexp(1) - logits.diagonal()).mean().backward()
    c = coefficients(logits.detach(), negative)
    return [((gradient(x, tgt, c, w_tgt) - w.grad).norm() / w.grad.norm()).item() for x in (f, tgt)]


def theory(seed, draws=DRAWS):
    """Errors of Eq. 2; rows, with noise on one side at a time; sweeps over the noise of one side."""
    generator, rows, sweeps = rng(seed, "theory"), [], []
    errors = errors_of_eq2(generator)
    for case in ({"queue": queue, "mu": mu} for queue in (False, True) for mu in (0, 2)):
        f, tgt, w, negative = setting(**case, generator=generator)
        logits = (f @ w.T) @ (tgt @ w.T).T / TAU
        uniform, frozen = coefficients(0 * logits, negative), coefficients(logits, negative)
        for alpha, c in (("uniform", uniform), ("frozen", frozen), ("live", None)):
            clean, found = gradient(f, tgt, frozen if c is None else c, w), {}
            for side, noise in (("src", (FIXED, 0)), ("tgt", (0, FIXED))):
                mean, var, se = simulate(f, tgt, c, w, negative, *noise, draws, generator)
                found[side] = {"var": var, "se": se, "moved": ((mean - clean).norm() / clean.norm()).item(),
                               "by_chance": (var / draws) ** 0.5 / clean.norm().item(),
                               "closed": None if c is None else closed_form(f, tgt, c, w, *noise)}
            rows.append({**case, "alpha": alpha, **found})
        for side in ("src", "tgt"):
            sweep = {**case, "side": side, "closed": [], "frozen": [], "live": []}
            for noise in [(s, FIXED) if side == "src" else (FIXED, s) for s in LEVELS]:
                sweep["closed"].append(closed_form(f, tgt, frozen, w, *noise))
                for alpha, c in (("frozen", frozen), ("live", None)):
                    sweep[alpha].append(simulate(f, tgt, c, w, negative, *noise, draws // 10, generator)[1:])
            sweeps.append(sweep)
    return errors, rows, sweeps


def verdicts(errors, rows, sweeps):
    """What holds exactly, what to first order: (statement, whether the simulation agrees)."""
    fixed = [r[side] for r in rows for side in ("src", "tgt") if r["alpha"] != "live"]
    live = [r[side] for r in rows for side in ("src", "tgt") if r["alpha"] == "live"]
    control = [r["tgt"]["var"] / r["src"]["var"] for r in rows if r["alpha"] == "uniform" and not r["queue"]]
    off = max(abs(x["var"] - x["closed"]) / x["se"] for x in fixed)
    line = max(abs(var - closed) / se for sweep in sweeps
               for (var, se), closed in zip(sweep["frozen"], sweep["closed"], strict=True))
    return [
        (f"(a) exact: Eq. 2 ending in f_i is autograd's gradient of Eq. 1 (error {errors[0]:.0e}); ending in "
         f"f'_i, as printed, it is not ({errors[1]:.0%})", errors[0] < 1e-6 and errors[1] > 0.01),
        (f"(b) exact: three terms give tr V for fixed coefficients (within {off:.1f} std. errors)", off < 4),
        ("(c) exact: for fixed coefficients the mean gradient stays, whichever side is noisy, and",
         all(x["moved"] < 3 * x["by_chance"] for x in fixed)),
        (f"    tr V grows linearly with either noise, on the derived line (within {line:.1f})", line < 4.5),
        (f"(d) first order: with the softmax of the noisy features the mean moves, here by up to "
         f"{max(x['moved'] for x in live):.0%}", all(x["moved"] > 2 * x["by_chance"] for x in live)),
        (f"(e) control: with uniform coefficients in the batch both sides are alike, but for W (ratios "
         f"{min(control):.2f} to {max(control):.2f})", all(abs(x - 1) < 0.1 for x in control)),
    ]


def print_theory(errors, rows, sweeps):
    print("negatives  |mean f|  coefficients  V tgt / V src  closed form   mean moved by source's noise,"
          " target's, chance")
    for r in rows:
        src, tgt = r["src"], r["tgt"]
        closed = "-" if src["closed"] is None else f"{tgt['closed'] / src['closed']:.2f}"
        print(f"{'queue' if r['queue'] else 'in batch':9s}{r['mu']:10d}  {r['alpha']:12s}"
              f"{tgt['var'] / src['var']:15.2f}{closed:>13s}{src['moved']:31.3f}{tgt['moved']:10.3f}"
              f"{max(src['by_chance'], tgt['by_chance']):11.3f}")
    for statement, holds in verdicts(errors, rows, sweeps):
        print("ok   " if holds else "WRONG", statement)


def plot_theory(sweeps, path):
    figure, axes = pyplot().subplots(1, 4, figsize=(13, 3))
    for i, sweep in enumerate(sweeps):
        axis, side = axes[i // 2], {"src": "source", "tgt": "target"}[sweep["side"]]
        style = {"color": RED if side == "target" else BLUE, "markersize": 4}
        axis.plot(LEVELS, sweep["closed"], label=f"{side}'s noise, fixed coefficients: derived", **style)
        for kind, marker, label in (("frozen", "o", "simulated"), ("live", "x", "softmax of noisy features")):
            axis.plot(LEVELS, [v for v, _ in sweep[kind]], marker, label=f"{side}'s noise, {label}", **style)
        axis.set(title=f"{'queue' if sweep['queue'] else 'in batch'}, mean feature of norm {sweep['mu']}",
                 xlabel="noise of one side (trace)")
        axis.set_ylim(0, axis.dataLim.ymax * 1.05)
    axes[0].set_ylabel("variance of dL/dW (trace)")
    figure.tight_layout()
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="upper center", ncol=2, bbox_to_anchor=(0.5, 0), fontsize=9)
    save(figure, path)


# ============================================================================== main
def make_parser():
    p = argparse.ArgumentParser(prog=f"{METHOD}.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: stop(f"{message}; --help lists the flags")
    flag = p.add_argument
    flag("checkpoint", nargs="?", help="a run's folder, its last.pt, or a checkpoint of asym-siam or MoCo v2")
    flag("--data", help="default: the run's. Encoded are the images that ask in kNN (val/), or all")
    flag("--data-root", metavar="DIR", help="where torchvision's data sets are; default: the run's")
    flag("--images", type=count, metavar="N", help="so many, evenly spaced; default: all")
    flag("--views", type=whole(2), default=32, metavar="R", help="of each image (32 in Sec. 7)")
    flag("--designs", default="all", metavar="A,B", help=f"all, or some of {','.join(DESIGNS)},mean-enc-N")
    flag("--batch-size", type=count, help="of all processes together; default: the run's")
    flag("--bn-groups", type=count, metavar="G", help="virtual devices of BatchNorm; default: the run's")
    flag("--seed", type=whole(0, 2**63 - 1), default=0, help="of views and batch-mates")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps")
    flag("--workers", type=few, help="loader processes of each process; default: the run's")
    flag("--nproc", type=count, default=1, help="start that many processes here (or use torchrun)")
    flag("--out", default="variance.json", metavar="FILE", help="all numbers, v_i of each image among them")
    flag("--plot", metavar="FILE.png", help="Fig. 2, or what --theory finds; needs matplotlib")
    flag("--theory", action="store_true", help="check Sec. 5 by simulation: one minute, no checkpoint")
    return p


def whole(low, high=2**31 - 1):
    """An argparse type: a whole number in [low, high]."""
    def parse(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return int(text)

    parse.__name__ = "int"  # for argparse's messages
    return parse


count, few = whole(1), whole(0, 1000)


def parse_args(argv):
    p = make_parser()
    args = p.parse_args(argv)
    empty = ["--" + k.replace("_", "-") for k, v in vars(args).items() if v == []]  # argparse's for --seed=--
    check(not empty, f"{' '.join(empty)}: -- is no value; give one, or leave the flag out")
    check(args.theory != bool(args.checkpoint), "give a checkpoint, or --theory and none")
    given = {k for k, v in vars(args).items() if v != p.get_default(k)}
    useless = [f"--{k.replace('_', '-')}" for k in sorted(given - {"theory", "seed", "plot"})]
    check(not args.theory or not useless, f"{' '.join(useless)}: nothing in --theory to act on; leave it out")
    return args


def prepare(args):
    """Checkpoint and designs; refuses, before any work, what cannot work."""
    designs = {}
    try:
        script, plain, weights, stats = open_checkpoint(args)
        first, second = script.augmentations(plain)
        for name, (flags, *rest) in choose(args.designs, plain, first != second).items():
            changed = argparse.Namespace(**{**vars(plain), **flags})
            script.check_flags(changed, int(os.environ.get("WORLD_SIZE", args.nproc)))
            designs[name] = changed, *rest
    except Exception as e:  # a truncated or foreign file raises nearly anything
        why = f"{type(e).__name__}: {' '.join(str(e).split()):.150}"
        stop(f"{args.checkpoint} cannot be used ({why}); give a run's folder, its last.pt (not backbone.pth, "
             "which has no projector), or a checkpoint of asym-siam")
    return script, plain, weights, stats, designs


def check_files(args):
    """Whether --out and --plot can be written: now, not when all has been measured."""
    for flag, path in (("--out", None if args.theory else args.out), ("--plot", args.plot)):
        try:
            if path is not None:
                check(path and not os.path.isdir(path), f"{flag} {path!r} is no file; name one")
                with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):
                    pass
        except OSError as e:
            stop(f"{flag} {path} cannot be written ({e.strerror}); name a file in another folder")
    if args.plot is not None:
        kinds = pyplot().gcf().canvas.get_supported_filetypes()
        kind = os.path.splitext(args.plot)[1][1:].lower() or "png"
        check(kind in kinds, f"--plot {args.plot}: no such format; use one of {' '.join(kinds)}")


def work(args):
    """All that one process does."""
    script, plain, weights, stats, designs = prepare(args)
    device, n, groups = script.join_processes(plain), plain.batch_size, plain.bn_groups
    try:
        images, _, held_out = data.load(plain.data, plain.data_root)
    except data.DataError as e:
        stop(e)
    images = held_out or images
    images.stats = stats
    script.report(plain, images.bad if script.rank() == 0 else ())
    if args.images:
        images = images[torch.linspace(0, len(images) - 1, min(args.images, len(images))).long()]
    check(len(images) >= n, f"{len(images)} images are too few for {groups} BN group(s) of {n // groups} "
          f"different ones; use {n} or more, or smaller --batch-size and --bn-groups")
    script.say(f"{args.checkpoint}: {script.Method.__name__}, {plain.arch}; {len(images)} images of "
               f"{plain.data}, {args.views} views; BN over {n // groups} images, SyncBN over {n}\n{HEAD}")
    results, v0 = {}, None
    for name, (changed, bags, paper, prefers) in designs.items():
        began = time.time()
        sums = encoding_sums(script, changed, weights, bags, images, args.views, device)
        results[name], v = summary(sums, args.views, v0)
        v0 = v if v0 is None else v0
        script.say(f"{row(name, results[name], paper, prefers)}  [{time.time() - began:.0f} s]")
    base, paper = results["baseline"], [k for k in ORDER if k in results]
    order = sorted(paper, key=lambda k: -results[k]["v"])
    script.say(f"total variance of the baseline {base['total'] * 1e4:.2f}e-4; its limit 1/d is "
               f"{1e4 / base['d']:.2f}e-4")
    if len(order) > 1:
        same = "the same" if order == paper else " > ".join(paper)
        script.say(f"order: {' > '.join(order)}\npaper: {same}")
    if script.rank() == 0:
        about = {k: getattr(plain, k) for k in ("data", "arch", "batch_size", "bn_groups", "seed")}
        about |= {"checkpoint": args.checkpoint, "method": script.Method.__name__, "images": len(images)}
        try:
            part = Path(f"{args.out}.tmp")  # aside, then renamed: never half a file
            part.write_text(json.dumps({**about, "views": args.views, "designs": results}))
            os.replace(part, args.out)
        except OSError as e:
            stop(f"--out {args.out} cannot be written ({e})", 1)
        if args.plot:
            plot_designs(results, args.plot)


def child(*rank_and_argv):
    """What --nproc starts: the scripts' own child(), which calls parse_args() and work() by name."""
    script = load_script(SCRIPTS[0])
    script.parse_args = parse_args
    script.child(*rank_and_argv)


def check(good, message):
    if not good:
        stop(message)


def stop(message, code=2):
    """Ends this process; the first of each node says why."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{METHOD}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def main(argv=None):
    args = parse_args(argv)
    if int(os.environ.get("RANK", 0)) == 0:  # which writes
        check_files(args)
    if args.theory:
        found = theory(args.seed)
        print_theory(*found)
        return plot_theory(found[2], args.plot) if args.plot else None
    check(args.nproc == 1 or "RANK" not in os.environ, "--nproc and torchrun exclude each other; drop one")
    if args.nproc > 1:
        return prepare(args)[0].spawn(argv, args.nproc, child)
    load_script(SCRIPTS[0]).guard(args)


if __name__ == "__main__":
    main()
