"""The variance of encodings against closed forms, naive loops and the training scripts; Sec. 5 against brute force."""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pool import ROOT, SCRIPTS, Pool, build, class_tree, close, small_args, small_images
from torch import nn

import variance_ref
from common import data
from common.augment import rng

FLAGS = {  # what a user would type to train with a design on the source; written here anew, not read from the script
    "baseline": "", "multicrop": "--multicrop-src", "multicrop-mix": "--multicrop-src", "scalemix": "--scalemix-src",
    "strong": "--aug-src strong", "weak": "--aug-src weak", "sync-bn": "--sync-bn-src",
    "sync-bn-all": "--sync-bn-src --bn-scope all", "mean-enc-2": "--mean-enc-src 2", "mean-enc-3": "--mean-enc-src 3",
    "tgt-recipe": "",
}
TRAINED = "--multicrop-src --scalemix-src --asym-aug --mean-enc 2 --asym-bn"  # the designs of the checkpoint itself


def unit(*shape, seed=0):
    return nn.functional.normalize(torch.randn(shape, generator=rng(seed)), dim=-1)


def save_checkpoint(folder, method, flags="", images="none", **changes):
    """A run's folder with the last.pt of an untrained network."""
    script = importlib.import_module(method)
    args = small_args(script, flags)
    state = {"format": script.FORMAT, "method": method, "mean": data.HALF[0], "std": data.HALF[1],
             "args": {k: v for k, v in vars(args).items() if k not in ("autocast", "peak_lr")} | {"data": str(images)},
             "model": build(script, args).state_dict(), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "last.pt")
    return folder


def given(checkpoint, *argv):
    return variance_ref.parse_args([str(checkpoint), "--device", "cpu", *map(str, argv)])


@pytest.fixture(scope="session", params=SCRIPTS)
def method(request):
    return request.param


@pytest.fixture(scope="session")
def run(method, tmp_path_factory):
    """A checkpoint of each method, trained with designs, all of which a baseline must not have."""
    return save_checkpoint(tmp_path_factory.mktemp(method), method, TRAINED)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("variance")
    return save_checkpoint(root / "run", "mocov2_asym", images=class_tree(root / "images", 120) / "class0")  # 40 images


@pytest.fixture(scope="session")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


# ---- v of encodings that are known ----


def test_uniform_encodings_have_variance_1_over_d():
    n, r, d = 400, 50, 32
    z = unit(n, r, d)
    x, v = variance_ref.summary(z.sum(1), r)
    spread = v.std().item() / n**0.5
    assert abs(x["unbiased"] - 1 / d) < 4 * spread * r / (r - 1) < 0.01 / d
    assert abs(x["v"] - (1 - 1 / r) / d) < 4 * spread
    assert x["total"] == pytest.approx(1 / d, rel=1e-3) and x["share"] == pytest.approx(1 - 1 / r, rel=1e-2)


@pytest.mark.parametrize("angle", [0.0, 0.02, 0.7, math.pi / 2, math.pi])
def test_two_point_distributions(angle):
    """Half of the views at +angle/2, half at -angle/2: the mean has length cos(angle / 2)."""
    a, b = (torch.tensor([math.cos(s * angle / 2), math.sin(s * angle / 2), 0.0, 0.0]) for s in (1, -1))
    sums = (5 * a + 5 * b).repeat(3, 1)
    x, v = variance_ref.summary(sums, 10)
    close(v, torch.full((3,), math.sin(angle / 2) ** 2 / 4), 1e-4, 1e-7)
    assert x["unbiased"] == pytest.approx(x["v"] * 10 / 9) and x["d"] == 4
    assert x["between_images"] == pytest.approx(0, abs=1e-7)  # all images are the same


def test_total_variance_of_images_that_do_not_vary():
    x, v = variance_ref.summary(8 * torch.eye(4), 8)  # four images at right angles
    close(v, torch.zeros(4), 0, 1e-7)
    assert x["total"] == pytest.approx((1 - 1 / 4) / 4) == x["between_images"]


def test_sums_are_enough():
    z = unit(7, 9, 5, seed=1)
    x, v = variance_ref.summary(z.sum(1), 9)
    kept = z.double().numpy()
    close(v, kept.var(1).mean(1))  # over the views, per dimension
    assert x["unbiased"] == pytest.approx(kept.var(1, ddof=1).mean(), rel=1e-5)
    assert x["total"] == pytest.approx(kept.reshape(-1, 5).var(0).mean(), rel=1e-5)
    other, w = variance_ref.summary(unit(7, 9, 5, seed=2).sum(1), 9, v0=v)
    paired = (w - v).numpy()
    assert other["difference"] == pytest.approx(paired.mean()) and other["ratio"] == pytest.approx((w.mean() / v.mean()).item())
    assert other["standard_error"] == pytest.approx(paired.std(ddof=1) / 7**0.5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_mean_of_n_encodings(n):
    """Isotropic noise: of T, the share of an encoding that is noise, T/n is left; normalising divides by 1 - T + T/n."""
    d, images, r, sigma = 128, 100, 400, 0.35
    centre = unit(images, 1, 1, d)
    noise = sigma * torch.randn(images, r, n, d, generator=rng(n)) / d**0.5
    single = nn.functional.normalize(centre + noise, dim=-1)
    t = 1 - single.flatten(1, 2).mean(1).square().sum(1).mean().item()
    x, _ = variance_ref.summary(nn.functional.normalize(single.mean(2), dim=-1).sum(1), r)
    assert x["v"] * d == pytest.approx((t / n) / (1 - t + t / n), rel=0.02)


# ---- designs are what the training scripts make of their flags ----


def watch(run, name, images, monkeypatch, views=2, *argv):
    """encoding_sums() of a design: the sums, and what script.encode() was given and gave: (encoder, bag, z)."""
    args = given(run, "--designs", name, "--views", views, *argv)
    script, plain, weights, stats, designs = variance_ref.prepare(args)
    calls, encode = [], script.encode

    def spy(encoder, bag, **kwargs):
        calls.append((encoder, bag, encode(encoder, bag, **kwargs)))
        return calls[-1][2]

    monkeypatch.setattr(script, "encode", spy)
    images.stats = tuple(stats)
    changed, bags = designs[name][:2]
    return variance_ref.encoding_sums(script, changed, weights, bags, images, views, "cpu"), calls


def batches(total, n, views):
    """(name of the step, rows) of each batch, written anew."""
    for view in range(views):
        order = torch.randperm(total, generator=rng(0, "mates", view)).tolist()
        for i in range(math.ceil(total / n)):
            rows = order[i * n : (i + 1) * n]
            yield f"variance {view} {i}", rows + order[: n - len(rows)]


def designs_of(method):
    script = importlib.import_module(method)
    first, second = script.augmentations(small_args(script))
    return [k for k in FLAGS if k != "tgt-recipe" or first != second]


@pytest.mark.parametrize("name", FLAGS)
def test_views_and_norms_are_the_training_scripts(method, run, name, monkeypatch):
    """The same views for the same seed as in a training step with the design's flag, and the same BN groups."""
    if name not in designs_of(method):
        pytest.skip("both encoders have the same recipe")
    images, script = small_images(32), importlib.import_module(method)
    _, calls = watch(run, name, images, monkeypatch)
    trained = small_args(script, FLAGS[name])
    plan, n = script.plan_views(trained), trained.batch_size
    bags = plan[1][:1] if name == "tgt-recipe" else plan[0][1:] if name == "multicrop" else plan[0]
    for k, (step, rows) in enumerate(batches(32, n, 2)):
        bag = bags[k // 2 % len(bags)]
        step_plan = plan if bag is plan[0][0] else [[bag], []]  # a training step draws the source's large views first
        steps = [(step, torch.tensor(rows))]
        crops, _ = next(data.stream(images, script.planned_crops(step_plan), steps, 0, 0, 1, 0, "cpu"))
        expected = script.make_views(step_plan, crops, n, rng(0, "views", step), images.stats)[0][0]
        seen = calls[k][1]
        assert len(seen) == len(expected) == (int(name[-1]) if name.startswith("mean-enc") else 1)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    norms = lambda encoder: [(k, m.groups) for k, m in encoder.named_modules() if hasattr(m, "groups") and hasattr(m, "track")]
    assert norms(calls[0][0]) == norms(build(script, trained).source) != []
    assert len(calls) == 4


def test_designs_share_crops_and_mates(run, method, monkeypatch):
    images = small_images(32)
    seen = {name: watch(run, name, images, monkeypatch)[1] for name in
            ("baseline", "scalemix", "strong", "sync-bn", "mean-enc-2")}
    for base, mixed, strong, synced, mean in zip(*seen.values(), strict=True):
        assert torch.equal(base[1][0], synced[1][0]) and torch.equal(base[1][0], mean[1][0])
        kept = (base[1][0] == mixed[1][0]).all(1).float().mean()
        assert 0.3 < kept < 0.95  # what ScaleMix's boxes leave
        untouched = (base[1][0] == strong[1][0]).flatten(1).all(1).sum()
        assert 0 < untouched < 16  # RandAugment leaves a quarter alone
    first, second = seen["baseline"][0][1][0], seen["baseline"][2][1][0]
    assert not torch.equal(first, second)  # but another view is another draw


@pytest.mark.parametrize("name", ["sync-bn-all", "mean-enc-2"])
def test_streaming_is_keeping_all(run, name, monkeypatch):
    """Sums against all encodings, kept, by image; 40 images do not fill the third batch of 16."""
    views, n = 3, 16
    sums, calls = watch(run, name, small_images(40), monkeypatch, views)
    kept = {}
    for call, (step, rows) in zip(calls, batches(40, n, views), strict=True):
        z = nn.functional.normalize(call[2]).double().numpy()
        last = step.endswith(" 2")
        for i in range(8 if last else 16):
            kept.setdefault(rows[i], []).append(z[i])
    assert sorted(kept) == list(range(40)) and all(len(x) == views for x in kept.values())
    every = np.array([kept[i] for i in range(40)])
    v, total = variance_ref.statistics(sums, views)
    close(v, every.var(1).mean(1), 1e-4, 1e-7)
    close(total, every.reshape(-1, every.shape[2]).var(0).mean(), 1e-4)
    assert v.std() > 0


def test_batch_mates_are_drawn_anew_and_fill_the_last_batch():
    mates = []
    for _, rows in batches(40, 16, 5):
        assert len(set(rows)) == 16
        mates.append([set(rows[g::8]) for g in range(8) for x in rows[g::8] if x == 7])
    mates = [m[0] for m in mates if m]
    assert len({frozenset(m) for m in mates}) > 3


def test_batch_size_does_not_change_v_if_the_groups_are_as_large(folder, monkeypatch):
    """BN over 4 images in either case; other draws, so equal to a few standard errors."""
    found = []
    for size, groups in ((16, 4), (32, 8)):
        sums, _ = watch(folder, "baseline", small_images(96), monkeypatch, 8, "--batch-size", size, "--bn-groups", groups)
        found.append(variance_ref.statistics(sums, 8)[0])
    error = (found[0] - found[1]).std().item() / 96**0.5
    assert abs((found[0] - found[1]).mean().item()) < 4 * error < 0.2 * found[0].mean().item()
    assert not torch.equal(*found)


# ---- runs ----


def main(*argv):
    variance_ref.main([str(a) for a in argv])


def test_a_run_is_a_function_of_its_arguments_and_leaves_the_checkpoint_alone(folder, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    outs = [tmp_path / f"{k}.json" for k in "abc"]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        main(folder, "--views", 2, "--out", out, "--device", "cpu", "--seed", seed)
    text = capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    a, b, c = (json.loads(out.read_text()) for out in outs)
    assert a == b and a["designs"]["baseline"]["v"] != c["designs"]["baseline"]["v"]
    assert list(a["designs"]) == [k for k in FLAGS if k not in ("mean-enc-3", "tgt-recipe")]
    for name, x in a["designs"].items():
        assert len(x["v_i"]) == a["images"] == 40 and np.mean(x["v_i"]) == pytest.approx(x["v"]), name
        assert f"\n{name} " in text and x["total"] == pytest.approx(x["v"] + x["between_images"])
    best = sorted(variance_ref.ORDER, key=lambda k: -a["designs"][k]["v"])
    assert " > ".join(best) in text


def measured(*argv):
    """In a pool's process; rank 0 writes."""
    main(*argv, "--views", 2, "--device", "cpu", "--workers", 0)
    return 0


def same_for_1_and_2_processes(pool, checkpoint, images, designs, tmp_path):
    for world in (1, 2):
        out = str(tmp_path / f"{world}.json")
        pool.run(world, measured, str(checkpoint), "--data", str(images), "--designs", designs, "--out", out)
    one, two = (json.loads((tmp_path / f"{world}.json").read_text())["designs"] for world in (1, 2))
    assert list(one) == list(two) == ["baseline", *designs.split(",")]
    for name in one:
        assert len(one[name]["v_i"]) == 40
        close(one[name]["v_i"], two[name]["v_i"], 1e-3, 1e-6)
        assert one[name]["total"] == pytest.approx(two[name]["total"], rel=1e-4)


def test_processes_do_not_change_the_result(pool, run, tmp_path):
    images = class_tree(tmp_path / "images", 120) / "class0"  # 40 images without labels, in memory
    same_for_1_and_2_processes(pool, run, images, "multicrop,scalemix,sync-bn-all,mean-enc-2", tmp_path)


def test_processes_do_not_change_the_result_with_decoded_images(pool, folder, tmp_path):
    images = class_tree(tmp_path / "images", 120, (20, 24, 25, 31)) / "class0"
    same_for_1_and_2_processes(pool, folder, images, "scalemix", tmp_path)


def test_nproc(folder, tmp_path):
    """With the launch code of the training scripts; torchrun's environment is that of the pool's processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "error"}
    argv = [f"{ROOT}/variance_ref.py", folder, "--views", 2, "--designs", "scalemix", "--out", tmp_path / "v.json"]
    argv = map(str, [*argv, "--device", "cpu", "--nproc", 2])
    done = subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("\nbaseline ") == 1 and not done.stderr, done.stderr
    assert set(json.loads((tmp_path / "v.json").read_text())["designs"]) == {"baseline", "scalemix"}


def test_figure(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, save = [], variance_ref.save
    monkeypatch.setattr(variance_ref, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    designs = "multicrop,strong,weak,mean-enc-2,mean-enc-3"
    main(folder, "--views", 2, "--designs", designs, "--out", tmp_path / "v.json", "--plot", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((tmp_path / "v.json").read_text())["designs"]
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(axes) == ["MultiCrop", "Stronger, weaker", "MeanEnc"]
    for axis in axes.values():
        names = [text.get_text().split()[0] for text in axis.get_legend().get_texts()]
        curves, dotted = axis.lines[0::2], axis.lines[1::2]
        for name, curve, line in zip(names, curves, dotted, strict=True):
            close(curve.get_xdata(), np.sort(results[name]["v_i"]) * 1e4, 1e-5)
            assert line.get_xdata()[0] == pytest.approx(results[name]["v"] * 1e4) and line.get_linestyle() == ":"


@pytest.mark.parametrize("head", ["paper", "moco"])
def test_published_checkpoints(head, tmp_path):
    """A file as asym-siam or MoCo v2 publish it gives the encodings of the torchvision network it was taken from."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    paper = [nn.Linear(512, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 16)]
    net.fc = nn.Sequential(*paper if head == "paper" else [nn.Linear(512, 24), nn.ReLU(), nn.Linear(24, 16)])
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in net.state_dict().items()}
    state |= {"module.queue": torch.zeros(16, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save({"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "c.pth")
    args = given(tmp_path / "c.pth", "--data", "none", "--batch-size", 4, "--bn-groups", 1, "--designs", "weak")
    script, plain, weights, stats, designs = variance_ref.prepare(args)
    assert plain.img_size == 224 and stats == data.IMAGENET and script.__name__.endswith("mocov2_asym")
    encoder = script.Method(designs["baseline"][0]).source
    encoder.load_state_dict(weights)
    x = torch.randn(4, 3, 224, 224)
    close(script.encode(encoder, [x], track=False), net.train()(x), 1e-3, 1e-4)
    chosen = variance_ref.choose("all", argparse.Namespace(**{**vars(plain), "bn_groups": 2}), False)
    assert ("sync-bn" in chosen) == ("sync-bn-all" in chosen) == (head == "paper")  # MoCo v2's projector has no BN


# ---- wrong input ----


def refuse(capsys, *argv, code=2):
    with pytest.raises(SystemExit) as stopped:
        main(*argv)
    err = capsys.readouterr().err
    assert stopped.value.code == code and err.count("\n") == 1 and err.startswith("variance_ref: "), (stopped.value, err)
    return err


def test_wrong_flags(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says = lambda *argv: refuse(capsys, folder, "--device", "cpu", *argv)
    assert "give a checkpoint" in refuse(capsys) and "give a checkpoint" in says("--theory")
    assert "--views: 1 is not in [2, " in says("--views", 1) and "is not in" in says("--views", 10**12)
    assert "is not in" in says("--seed", "9" * 20) and "--workers: 1000000000000 is not in" in says("--workers", 10**12)
    unused = ["--images", 5, "--data", "nowhere", "--device", "tpu", "--out", "f"]
    assert ": --data --device --images --out: nothing in --theory" in refuse(capsys, "--theory", *unused)
    assert ": --nproc: nothing in --theory" in refuse(capsys, "--theory", "--nproc", 2)
    assert "unknown; give all, or some of baseline,multicrop" in says("--designs", "multicorp")
    assert "unknown" in says("--designs", "mean-enc-0") and "same recipe" in says("--designs", "tgt-recipe")
    assert "add --bn-groups 8" in says("--designs", "sync-bn", "--bn-groups", 1)
    assert "41 images" not in says("--batch-size", 48, "--bn-groups", 8)
    assert "40 images are too few for 8 BN group(s) of 6" in says("--batch-size", 48)
    assert "8 images are too few for 8 BN group(s) of 2" in says("--images", 8)
    assert "use 16 or 24" in says("--batch-size", 20)
    assert "no such folder" in says("--data", "nowhere")
    assert "drop one" in (monkeypatch.setenv("RANK", "0"), says("--nproc", 2))[1]
    assert not any(tmp_path.iterdir())


def test_a_design_that_the_image_size_cannot_give(tmp_path, capsys):
    small = save_checkpoint(tmp_path / "run", "mocov2_asym", "--multicrop-src --small-size 6 --img-size 12")
    assert "views of 6 px are too small" in refuse(capsys, small, "--designs", "multicrop", "--device", "cpu")


def test_wrong_checkpoints(folder, capsys, tmp_path):
    says = lambda path: refuse(capsys, path, "--device", "cpu")
    whole = (folder / "last.pt").read_bytes()
    state = torch.load(folder / "last.pt", weights_only=True)
    model = state["model"]
    cases = {
        "truncated": (whole[: len(whole) // 2], "cannot be used"),
        "empty": (b"", "cannot be used"),
        "text": (b"hello", "cannot be used"),
        "backbone": ({k.removeprefix("source.backbone."): v for k, v in model.items() if "source.backbone" in k},
                     "not backbone.pth, which has no projector"),
        "headless": ({**state, "model": {k: v for k, v in model.items() if "projector" not in k}}, "has no projector"),
        "foreign": ({**state, "method": "os"}, "the checkpoint is of 'os'"),
        "future": ({**state, "format": 99}, "has format 99"),
        "other network": ({**state, "args": {**state["args"], "hidden": 8}}, "are not those of its tiny"),
        "list": ([1, 2], "cannot be used"),
        "no arguments": ({**state, "args": {}}, "cannot be used"), "a list of them": ({**state, "args": [1]}, "cannot be used"),
        "mean": ({**state, "mean": [1.0]}, "cannot be used"), "std": ({**state, "std": None}, "cannot be used"),
        "dim": ({**state, "args": {**state["args"], "dim": "x"}}, "are not those of its tiny"),
        "crops": ({**state, "args": {**state["args"], "num_small": "x"}}, "are not those of its tiny"),
        "workers": ({**state, "args": {**state["args"], "workers": -1}}, "cannot be used"),
        "no recipe": ({**state, "args": {k: v for k, v in state["args"].items() if k != "recipe"}}, "cannot be used"),
        "arch": ({**state, "args": {**state["args"], "arch": "resnet7"}}, "--arch resnet7 is unknown"),
        "data": ({**state, "args": {**state["args"], "data": 7}}, "--data 7: no such folder"),
        "not finite": ({**state, "model": {k: v * math.nan if v.is_floating_point() else v for k, v in model.items()}},
                       "not finite"),
        "nameless data": ({"arch": "resnet18", "state_dict": {f"module.encoder_q.fc.{i}.weight": torch.zeros(2, 2) for i in (0, 2)}},
                          "does not name its data"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert message in says(path), name
    assert "cannot be used (FileNotFoundError" in says(tmp_path / "nothing.pt")
    assert "cannot be used" in says(tmp_path)  # a folder without last.pt


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_checkpoint_does_not_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"method": Evil()}, "evil.pt")
    assert "cannot be used" in refuse(capsys, "evil.pt") and not Path("executed").exists()


def test_without_matplotlib(folder, capsys, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(variance_ref.importlib, "import_module", missing)
    assert "pip install matplotlib" in refuse(capsys, folder, "--device", "cpu", "--plot", "f.png")


def test_output_that_cannot_be_written(folder, capsys, tmp_path, monkeypatch):
    """It is refused before anything is read or measured, with and without a checkpoint."""
    monkeypatch.setattr(variance_ref, "open_checkpoint", None)
    monkeypatch.setattr(variance_ref, "theory", None)
    (tmp_path / "file").touch()
    argv = folder, "--device", "cpu", "--views", 2, "--designs", "baseline"
    for path, words in (("no/v.json", "No such file"), ("file/v.json", "Not a directory"), ("", "is no file")):
        message = refuse(capsys, *argv, "--out", tmp_path / path if path else "")
        assert words in message and "--out" in message, message
    assert "is no file" in refuse(capsys, *argv, "--out", tmp_path)
    pytest.importorskip("matplotlib")
    for start in ((*argv, "--out", tmp_path / "v.json", "--plot"), ("--theory", "--plot")):
        for path, words in (("no/f.png", "No such file"), ("f.xyz", "no such format; use one of"), ("", "is no file")):
            message = refuse(capsys, *start, tmp_path / path if path else "")
            assert words in message and "--plot" in message, message
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- Sec. 5 ----


@pytest.fixture
def small_theory(monkeypatch):
    for name, value in {"N": 4, "D": 3, "K": 2, "QUEUE": 5}.items():
        monkeypatch.setattr(variance_ref, name, value)


def loss_of_eq1(w, f, targets, negatives_of, tau):
    """Eq. 1, an image and a product at a time."""
    loss = 0
    for i in range(len(f)):
        s = [float((w @ f[i]) @ z) / tau for z in targets]
        loss -= (s[i] - math.log(sum(math.exp(s[j]) for j in negatives_of(i)))) / len(f)
    return loss


@pytest.mark.parametrize("queue", [False, True])
def test_gradient_against_finite_differences(small_theory, queue):
    f, tgt, w, negative = (x.numpy() for x in variance_ref.setting(queue, 1.0, rng(0)))
    f = f + 0.3 * np.random.default_rng(0).normal(size=f.shape)
    tau, z = variance_ref.TAU, tgt @ w.T
    ours = lambda i: [j for j in range(len(tgt)) if (j >= len(f) if queue else j != i)]
    slope, h = np.zeros_like(w), 1e-6
    for place in np.ndindex(*w.shape):
        step = np.zeros_like(w)
        step[place] = h
        slope[place] = (loss_of_eq1(w + step, f, z, ours, tau) - loss_of_eq1(w - step, f, z, ours, tau)) / (2 * h)
    f, tgt, w, negative = map(torch.tensor, (f, tgt, w, negative))
    c = variance_ref.coefficients((f @ w.T) @ (tgt @ w.T).T / tau, negative)
    close(c.sum(1), torch.zeros(4), 0, 1e-12)
    close(variance_ref.gradient(f, tgt, c, w), slope, 1e-6, 1e-7)


@pytest.mark.parametrize("s, s_tgt", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.5)])
@pytest.mark.parametrize("queue", [False, True])
def test_closed_form_is_exact(small_theory, queue, s, s_tgt):
    """For fixed coefficients the gradient is bilinear in the two noises: its variance, term by term over coordinates."""
    f, tgt, w, negative = variance_ref.setting(queue, 1.0, rng(0))
    c = variance_ref.coefficients((f @ w.T) @ (tgt @ w.T).T / variance_ref.TAU, negative)
    g = lambda e, e_tgt: variance_ref.gradient(f + e, tgt + e_tgt, c, w)
    basis = lambda x: torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    no, no_tgt, clean = 0 * f, 0 * tgt, g(0, 0)
    var, d = 0, variance_ref.D
    for e in basis(f):
        var += s / d * (g(e, no_tgt) - clean).square().sum()
        for e_tgt in basis(tgt):
            cross = g(e, e_tgt) - g(e, no_tgt) - g(no, e_tgt) + clean
            var += s / d * s_tgt / d * cross.square().sum()
    for e_tgt in basis(tgt):
        var += s_tgt / d * (g(no, e_tgt) - clean).square().sum()
    assert variance_ref.closed_form(f, tgt, c, w, s, s_tgt) == pytest.approx(var.item(), rel=1e-9)
    shift = torch.ones(d, dtype=f.dtype)  # a mean of the target's noise does nothing, one of the source's does
    close(g(no, no_tgt + shift), clean, 1e-9, 1e-9)
    assert (g(no + shift, no_tgt) - clean).norm() > 1e-3 * clean.norm()


@pytest.fixture(scope="module")
def found():
    return variance_ref.theory(0, draws=1000)


def test_theory(found, capsys):
    """Checks (a) to (e) of the Monte Carlo, and what the table says of source and target."""
    errors, rows, sweeps = found
    assert all(holds for _, holds in variance_ref.verdicts(*found)), variance_ref.verdicts(*found)
    ratio = {(r["queue"], r["mu"], r["alpha"]): r["tgt"]["var"] / r["src"]["var"] for r in rows}
    assert len(ratio) == 12
    for queue in (False, True):
        for alpha in ("frozen", "live"):
            assert 1.2 < ratio[queue, 0, alpha] < 4 < ratio[queue, 2, alpha]  # uncentred features make the asymmetry
    assert abs(ratio[False, 2, "uniform"] - 1) < 0.1 and ratio[True, 2, "uniform"] > 3  # and nothing cancels in a queue
    for sweep in sweeps:
        assert len(sweep["live"]) == len(sweep["frozen"]) == 11
        steps = np.diff(sweep["closed"])
        assert steps.std() < 1e-9 * steps.mean() and steps.min() > 0  # a line that rises, for either side's noise
    variance_ref.print_theory(*found)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 12 + 6 and sum(line.startswith("ok") for line in lines) == 6


@pytest.mark.parametrize("verdict", range(6))
def test_verdicts_can_fail(found, verdict):
    errors, rows, sweeps = json.loads(json.dumps(found))
    frozen = next(r for r in rows if r["alpha"] == "frozen")
    uniform, live = rows[0], next(r for r in rows if r["alpha"] == "live")
    assert uniform["alpha"] == "uniform" and not uniform["queue"]
    if verdict == 0:
        errors.reverse()
    elif verdict == 1:
        frozen["src"]["var"] *= 1.5
    elif verdict == 2:
        frozen["tgt"]["moved"] += 0.3
    elif verdict == 3:
        sweeps[3]["frozen"][7][0] *= 1.5
    elif verdict == 4:
        live["src"]["moved"] = 0
    else:
        uniform["tgt"]["var"] *= 1.3
    holds = [good for _, good in variance_ref.verdicts(errors, rows, sweeps)]
    assert not holds[verdict] and sum(holds) == (4 if verdict == 5 else 5)  # a wrong ratio is a wrong variance too


def test_theory_is_a_function_of_the_seed_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variance_ref, "LEVELS", [0.0, 0.5])
    a, b, c = (variance_ref.theory(seed, draws=100) for seed in (0, 0, 1))
    assert a == b != c
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(variance_ref, "theory", lambda seed: a)
    main("--theory", "--plot", tmp_path / "theory.png")
    assert (tmp_path / "theory.png").read_bytes()[:4] == b"\x89PNG" and "autograd" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main("--help")
    assert stopped.value.code == 0 and "--bn-groups" in capsys.readouterr().out
