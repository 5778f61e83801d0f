"""Variances against sums kept whole and the training scripts; Sec. 5 against brute force."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
import torchvision
from pool import SCRIPTS, build, class_tree, close, refusal, small_args, small_images
from torch import nn

import variance_ref
from common import data
from common.augment import rng

FLAGS = {  # what one would type to train with a design on the source
    "baseline": "", "multicrop": "--multicrop-src", "multicrop-mix": "--multicrop-src",
    "scalemix": "--scalemix-src", "strong": "--aug-src strong", "weak": "--aug-src weak",
    "sync-bn": "--sync-bn-src", "sync-bn-all": "--sync-bn-src --bn-scope all",
    "mean-enc-2": "--mean-enc-src 2", "tgt-recipe": "", "mean-enc-3": "--mean-enc-src 3",
}
TRAINED = "--multicrop-src --scalemix-src --asym-aug --mean-enc 2 --asym-bn"  # none in a baseline
main = lambda *argv: variance_ref.main([str(a) for a in argv])


def save_checkpoint(folder, method, images="none"):
    """A run's folder with the last.pt of an untrained network."""
    script = importlib.import_module(method)
    args = small_args(script, TRAINED)
    about = {"method": method, "format": 3, "mean": data.HALF[0], "std": data.HALF[1],
             **vars(args), "data": str(images)}
    model = build(script, args).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"args": about, "step": 0, "model": model, "optimizer": {}}, folder / "last.pt")
    return folder


@pytest.fixture(scope="session", params=SCRIPTS)
def run(request, tmp_path_factory):
    """A run of each script; its folder has the script's name."""
    return save_checkpoint(tmp_path_factory.mktemp("runs") / request.param, request.param)


@pytest.fixture(scope="session")
def mocov2(tmp_path_factory):
    """A run on 24 images without labels."""
    images = class_tree(tmp_path_factory.mktemp("images"), 72) / "class0"
    return save_checkpoint(tmp_path_factory.mktemp("run"), "mocov2_asym", images)


def test_sums_are_enough():
    z = nn.functional.normalize(torch.randn(2, 7, 9, 5, generator=rng(0)), dim=-1)
    x = variance_ref.summary(z[0].sum(1), 9)
    y = variance_ref.summary(z[1].sum(1), 9, x)
    z = z.double().numpy()
    v, w = z.var(2).mean(2)  # over the views, per dimension
    close(x["v_i"], v)
    close(y["v_i"], w)
    total = z[1].reshape(-1, 5).var(0).mean()
    expected = {
        "v": w.mean(), "unbiased": z[1].var(1, ddof=1).mean(), "ratio": w.mean() / v.mean(),
        "difference": (w - v).mean(), "standard_error": (w - v).std(ddof=1) / 7**0.5,
        "total": total, "between_images": z[1].mean(1).var(0).mean(), "share": w.mean() / total}
    assert {k: y[k] for k in expected} == pytest.approx(expected, rel=1e-4)


def watch(run, name, images, views, monkeypatch):
    """encoding_sums() of a design, and what its encoder was given and gave: (encoder, bag, z)."""
    argv = run, "--designs", name, "--device", "cpu", "--workers", 0
    args = variance_ref.parse_args([str(a) for a in argv])
    script, plain, weights = variance_ref.open_checkpoint(args)
    changed, bags, *_ = variance_ref.choose(name, script, plain)[name]
    calls, forward = [], script.Encoder.forward

    def spy(encoder, bags, **kwargs):
        z = forward(encoder, bags, **kwargs)
        calls.append((encoder, bags[0], z[0]))
        return z

    monkeypatch.setattr(script.Encoder, "forward", spy)
    return variance_ref.encoding_sums(script, changed, weights, bags, images, views, "cpu"), calls


def batches(total, n, views):
    """(name of the step, its rows) of each batch, written anew."""
    for view in range(views):
        order = torch.randperm(total, generator=rng(0, "mates", view)).tolist()
        for i in range(math.ceil(total / n)):
            rows = order[i * n : (i + 1) * n]
            yield f"variance {view} {i}", rows + order[: n - len(rows)]


CASES = [(script, name) for script in SCRIPTS for name in ("sync-bn", "sync-bn-all")]
CASES += [(script, name) for script in ("mocov2_asym", "byol_asym")  # one recipe on both sides; two
          for name in FLAGS if "sync" not in name]


@pytest.mark.parametrize("run, name", CASES, indirect=["run"])
def test_views_and_norms_are_the_training_scripts(run, name, monkeypatch):
    """Views and BN groups of a training step with the design's flag; the seed, too: paired."""
    images, script = small_images(24), importlib.import_module(run.name)
    plan = script.plan_views(trained := small_args(script, FLAGS[name]))
    bags = {"multicrop": plan[0][1:], "tgt-recipe": plan[1][:1]}.get(name, plan[0])
    _, calls = watch(run, name, images, 3, monkeypatch)
    for k, (step, rows) in enumerate(batches(24, 16, 3)):  # two to a view, the second filled up
        bag = bags[k // 2 % len(bags)]
        alone = plan if bag is plan[0][0] else [[bag], []]  # a step draws the large views first
        stream = data.stream(images, alone, [(step, torch.tensor(rows))], 0, slice(None), 0, "cpu")
        (source, _), _ = next(stream)
        assert all(torch.equal(a, b) for a, b in zip(calls[k][1], source[0], strict=True))

    groups = lambda net: [m.groups for m in net.modules() if isinstance(m, script.BatchNorm)]
    assert groups(calls[0][0]) == groups(build(script, trained).source) != []
    assert len(calls) == 6


def test_streaming_is_keeping_all(mocov2, monkeypatch):
    """The sums against all encodings, kept; 40 images do not fill the third batch of 16."""
    sums, calls = watch(mocov2, "mean-enc-2", small_images(40), 3, monkeypatch)
    kept = [[] for _ in range(40)]
    for (_, _, z), (step, rows) in zip(calls, batches(40, 16, 3), strict=True):
        z = nn.functional.normalize(z)
        for i in range(8 if step.endswith(" 2") else 16):
            kept[rows[i]].append(z[i])
    close(sums, torch.stack([sum(z) for z in kept]))


@pytest.mark.slow
def test_a_run_and_the_theory_are_functions_of_their_arguments(mocov2, tmp_path, capsys):
    found, theories = [], []
    for seed in (0, 0, 1):
        theories.append(variance_ref.theory(seed, draws=50))
        main(mocov2, "--views", 2, "--out", tmp_path / "v", "--device", "cpu", "--seed", seed)
        found.append(json.loads((tmp_path / "v").read_text()))
        text = capsys.readouterr().out
    assert found[0] == found[1] != found[2] and theories[0] == theories[1] != theories[2]
    designs = found[2]["designs"]
    assert list(designs) == [k for k in FLAGS if k not in ("mean-enc-3", "tgt-recipe")]
    for name, x in designs.items():
        assert len(x["v_i"]) == found[2]["images"] == 24
        assert f"\n{name:14s}{1e4 * x['v']:7.3f} " in text
    assert " > ".join(sorted(variance_ref.ORDER, key=lambda k: -designs[k]["v"])) in text


@pytest.mark.parametrize("run", [
    pytest.param(name, marks=[] if name == "mocov2_asym" else pytest.mark.slow)
    for name in SCRIPTS], indirect=True)
def test_processes_do_not_change_the_result(pool, run, tmp_path):
    """In float64. MoCo v2's images are decoded at each step. --nproc: tests/test_faults.py."""
    sizes = (20, 24, 25, 31) if run.name == "mocov2_asym" else (24,)
    images = class_tree(tmp_path / "images", 72, sizes) / "class0"
    designs, found = ["multicrop", "scalemix", "sync-bn-all", "mean-enc-2"], []
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        argv = (f"{run} --data {images} --designs {','.join(designs)} --out {out} --views 2 "
                "--device cpu --workers 0")
        pool.run(world, variance_ref.main, argv.split(), dtype=torch.float64)
        found.append(json.loads(out.read_text())["designs"])
    for name in ["baseline", *designs]:
        close(found[0][name]["v_i"], found[1][name]["v_i"], 1e-9, 1e-12)
        assert found[0][name]["total"] == pytest.approx(found[1][name]["total"], rel=1e-9)


@pytest.mark.slow
def test_figure(mocov2, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    out, plot = tmp_path / "v.json", tmp_path / "f.png"
    flags = "--views", 2, "--device", "cpu", "--out", out, "--plot", plot
    main(mocov2, "--designs", "multicrop,strong,weak,mean-enc-2", *flags)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    results = json.loads(out.read_text())["designs"]
    assert len(drawn[0].axes) == 3  # panels: multicrop; strong and weak; mean-enc-2
    for axis in drawn[0].axes:
        names = [text.get_text().split()[0] for text in axis.get_legend().get_texts()]
        for name, curve, line in zip(names, axis.lines[0::2], axis.lines[1::2], strict=True):
            close(curve.get_xdata(), np.sort(results[name]["v_i"]) * 1e4, 1e-5)
            assert line.get_xdata()[0] == pytest.approx(results[name]["v"] * 1e4)


@pytest.mark.parametrize("head", ["paper", "moco"])
def test_published_checkpoints(head, tmp_path):
    """A file as asym-siam or MoCo v2 publish it encodes as the network it was taken from."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    more = [nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24)] if head == "paper" else []
    net.fc = nn.Sequential(nn.Linear(512, 24), *more, nn.ReLU(), nn.Linear(24, 16))
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    state["module.encoder_k.conv1.weight"] = torch.zeros(1)
    torch.save({"arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "c.pth")

    flags = "--data", "none", "--batch-size", "4", "--bn-groups", "1", "--device", "cpu"
    args = variance_ref.parse_args([str(tmp_path / "c.pth"), *flags])
    script, run, weights = variance_ref.open_checkpoint(args)
    assert script.METHOD == "mocov2_asym" and run.img_size == 224 and run.mean == data.IMAGENET[0]
    encoder = script.Method(run).source
    encoder.load_state_dict(weights)
    x = torch.randn(4, 3, 224, 224)
    close(encoder([[x]], track=False)[0], net.train()(x), 1e-3, 1e-4)
    run.bn_groups = 2  # MoCo v2's projector has no BN
    assert ("sync-bn" in variance_ref.choose("all", script, run)) == (head == "paper")


@pytest.mark.parametrize("flags, said", [
    ("--theory", "give a checkpoint, or --theory and none"), ("--data nowhere", "--data nowhere"),
    ("--views 1", "1 is not in [2, "), ("--designs multicorp", "multicorp: use all, baseline,multicrop,"),
    ("--designs sync-bn --bn-groups 1", "add --bn-groups 8"), ("--batch-size 20", "use 16 or 24"),
    ("--batch-size 32", "24 images are too few for --batch-size 32"), ("--device tpu", "invalid choice"),
    ("--out no/v.json", "no/v.json cannot be written"), ("--plot f.xyz", "FILE.png"),
    ("--out last.pt/v.json", "cannot be written"), ("--plot f.png", "pip install matplotlib"),
    ("--plot no/f.png", "no/f.png cannot be written"),
])
def test_wrong_flags(flags, said, mocov2, monkeypatch):
    monkeypatch.chdir(mocov2)
    if "out" in flags or "plot" in flags:  # refused before anything is read
        monkeypatch.setattr(variance_ref, "open_checkpoint", None)
    if flags == "--plot f.png":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said in refusal("variance_ref", [mocov2, "--device", "cpu", *flags.split()])
    assert [path.name for path in mocov2.iterdir()] == ["last.pt"]


def test_wrong_checkpoints(mocov2, tmp_path):
    state = torch.load(mocov2 / "last.pt", weights_only=True)
    args = state["args"]
    cases = {
        "text": (None, "cannot be read"),
        "backbone": ({"conv1.weight": torch.zeros(1)}, "has no projector known here"),
        "future": ({**state, "args": {**args, "format": 99}}, "has no projector known here"),
        "other": ({**state, "args": {**args, "hidden": 8}}, "does not fit"),
        "nameless": ({"state_dict": {}}, "does not name its data"),
    }
    for name, (content, said) in cases.items():
        path = tmp_path / f"{name}.pt"
        path.write_text("hello") if content is None else torch.save(content, path)
        assert said in refusal("variance_ref", [path, "--device", "cpu"]), name
    plain = refusal("variance_ref", [path, "--device", "cpu", "--data", "none"])
    assert "has no projector in module.encoder_q.*" in plain


@pytest.fixture(params=[False, True], ids=["in batch", "queue"])
def case(request, monkeypatch):
    """A small setting, f, f', C, W, and where alpha lives."""
    for name, value in {"N": 4, "D": 3, "K": 2, "QUEUE": 5}.items():
        monkeypatch.setattr(variance_ref, name, value)
    f, tgt, w, negative = variance_ref.setting(request.param, 1.0, rng(0))
    c = variance_ref.coefficients((f @ w.T) @ (tgt @ w.T).T / variance_ref.TAU, negative)
    return f, tgt, c, w, [j for j in range(len(tgt)) if j >= 4] if request.param else None


def test_gradient_is_eq1s(case):
    """Eq. 1, an image and a product at a time; alpha among the queue, or the batch's others."""
    f, tgt, c, w, queue = case
    moving, loss = w.clone().requires_grad_(), 0
    for i in range(4):
        s = [(moving @ f[i]) @ (w @ z) / variance_ref.TAU for z in tgt]
        negatives = queue or [j for j in range(4) if j != i]
        loss = loss - (s[i] - sum(s[j].exp() for j in negatives).log()) / 4
    loss.backward()
    close(variance_ref.gradient(f, tgt, c, w), moving.grad, 1e-9, 1e-9)


@pytest.mark.parametrize("s, s_tgt", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.5)])
def test_closed_form_is_exact(case, s, s_tgt):
    """The gradient is bilinear in the noises: its variance is a sum over their coordinates."""
    f, tgt, c, w, _ = case
    g = lambda e, e_tgt: variance_ref.gradient(f + e, tgt + e_tgt, c, w)
    basis = lambda x: torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    var, clean = 0, g(0, 0)
    for e in basis(f):
        var += s / 3 * (g(e, 0) - clean).square().sum()
        for e_tgt in basis(tgt):
            both = g(e, e_tgt) - g(e, 0) - g(0, e_tgt) + clean
            var += s / 3 * s_tgt / 3 * both.square().sum()
    for e_tgt in basis(tgt):
        var += s_tgt / 3 * (g(0, e_tgt) - clean).square().sum()
    assert variance_ref.closed_form(f, tgt, c, w, s, s_tgt) == pytest.approx(var.item(), rel=1e-9)


@pytest.fixture(scope="module")
def found():
    return variance_ref.theory(0, draws=500)


def test_theory(found, capsys, tmp_path):
    """What it says holds, and what its table says of source and target. It draws, too."""
    variance_ref.print_theory(*found)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 12 + 6 and all(line.startswith("ok ") for line in lines[13:]), lines
    *_, rows, points = found
    for src, tgt in zip(rows[::2], rows[1::2], strict=True):
        ratio = tgt["var"] / src["var"]
        if src["alpha"] != "uniform":  # features that are not centred make the asymmetry
            assert ratio > 4 if src["mu"] else 1.2 < ratio < 4
    if importlib.util.find_spec("matplotlib"):
        variance_ref.plot_theory(points, tmp_path / "theory.png")
        assert (tmp_path / "theory.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("verdict", range(6))
def test_verdicts_can_fail(found, verdict, capsys):
    right, wrong, rows, points = json.loads(json.dumps(found))
    frozen, live = (next(r for r in rows if r["alpha"] == a) for a in ("frozen", "live"))
    changes = [(frozen, "mu", 1), (frozen, "var", 1.5), (frozen, "moved", 99),
               (points[44], "var", 1.5), (live, "moved", 0), (rows[1], "var", 1.3)]
    row, key, factor = changes[verdict]
    row[key] *= factor
    variance_ref.print_theory(wrong if verdict == 0 else right, wrong, rows, points)
    holds = [x.startswith("ok ") for x in capsys.readouterr().out.splitlines()[13:]]
    assert not holds[verdict] and sum(holds) >= 4  # a wrong ratio is a wrong variance, too
