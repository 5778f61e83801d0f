"""The linear probe: protocols against naive computations, metrics worked by hand, checkpoints with
the names of published ones, data sets on tiny trees laid out as torchvision expects them."""

import argparse
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from pool import SCRIPTS, SMALL, Bomb, call, class_tree, close, log_lines, pictures, refusal

import linear_probe as probe
import mocov2_asym
import mocov3_asym
from common import data, knn, transfer
from common.augment import rng

main = lambda *argv: probe.main([str(a) for a in argv])
refuse = lambda *argv: refusal("linear_probe", argv)
FLAGS = ["--workers", "0", "--device", "cpu"]
RUN = f"{SMALL} {SCRIPTS['mocov2_asym']} --steps 2 --knn-every 0".split()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run's folder: a tiny network, 16 px, two steps on three classes of 24 px."""
    root = tmp_path_factory.mktemp("probe")
    mocov2_asym.main(["--data", str(class_tree(root / "images", 60)), "--out", f"{root}/run", *RUN])
    return root / "run"


def flags(protocol):
    more = "--batch-size 16 --epochs 2" if protocol in ("sgd", "lars") else "--knn-k 5"
    return [*FLAGS, *more.split(), "--protocol", protocol]


def result(out):
    found = json.loads((Path(out) / "result.json").read_text())["results"]
    return next(iter(found.values()))


def args_of(*argv):
    args = probe.parse_args(["x", *map(str, argv), *FLAGS])
    args.device, args.size = torch.device("cpu"), args.img_size
    return args


def backbone(path, *argv):
    args = args_of("--data", "demo", *argv)
    args.checkpoint = str(path)
    return probe.load_backbone(args)


def problem(d=5):
    """Overlapping clouds, with a large common mean as features after a ReLU have."""
    generator, labels, held = rng(0, "problem"), torch.arange(90) % 3, torch.arange(0, 90, 5)
    centres = torch.randn(3, d, generator=generator)
    x, test = (3 + centres[labels] + torch.randn(90, d, generator=generator) for _ in range(2))
    rest = torch.tensor(sorted({*range(90)} - {*held.tolist()}))
    return types.SimpleNamespace(
        name="clouds", metric="top-1", classes=3, labels=labels, held=held, rest=rest,
        images=data.Images(pixels=torch.zeros(90, 3, 8, 8)), test_labels=labels, x=x,
        held_x=x[held], test_x=test)


def resolved(task, out, *argv):
    args = args_of(*argv, "--cache-features", "--out", out)
    probe.resolve(args, {"clouds": task})
    return args


# ---- protocols ----

def descend(protocol, x, labels, lr, batch, epochs):
    """Softmax regression with its gradient by hand, in float64: w, b, the mean loss per epoch."""
    head, epoch, losses = probe.classifier(5, 3, 0), len(x) // batch, []
    w, b = head.weight.detach().double(), head.bias.detach().double()
    assert 0.004 < w.std() < 0.02 and not b.any()  # N(0, 0.01)
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(epoch * epochs):
        if step % epoch == 0:
            order = torch.randperm(len(x), generator=rng(0, "order", step // epoch))
        rows = order[step % epoch * batch :][:batch]
        p = torch.softmax(x[rows] @ w.T + b, 1)
        losses.append(-p[torch.arange(batch), labels[rows]].log().mean())
        p = p - F.one_hot(labels[rows], 3)
        gw, gb = p.T @ x[rows] / batch, p.mean(0)
        if protocol == "lars":  # trust ratio 0.001 |p| / |g|, 1 where a norm is 0, for the bias too
            gw = gw * 0.001 * w.norm() / gw.norm()
            gb = gb * (0.001 * b.norm() / gb.norm() if b.norm() > 0 else 1)
        vw, vb = 0.9 * vw + gw, 0.9 * vb + gb
        rate = lr * batch / 256 * 0.5 * (1 + math.cos(math.pi * step / (epoch * epochs)))
        w, b = w - rate * vw, b - rate * vb
    return w, b, torch.stack(losses).view(epochs, -1).mean(1)


@pytest.mark.parametrize("protocol", ["lars", "sgd"])
def test_gradient_probes_equal_a_naive_loop(protocol, tmp_path):
    """Each classifier of a sweep, whatever becomes of another, and the chosen one on all images."""
    task, lrs = problem(), [0.01, 1000, 0.4]
    args = resolved(task, tmp_path, "--protocol", protocol, "--lr-sweep", *lrs, "--batch-size", 32,
                    "--epochs", 5)
    found = probe.gradient_probe(args, None, task)
    chosen = found["chosen"]["lr"]
    assert chosen == max(found["scores"], key=found["scores"].get) and chosen < 1000
    lines = list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    for stage, rows, tried in (("search", task.rest, lrs), ("final", torch.arange(90), [chosen])):
        heads = torch.load(tmp_path / f"{stage}-clouds.pt", weights_only=True)["heads"]
        x, labels = task.x[rows].double(), task.labels[rows]
        for i, lr in enumerate(tried):
            if lr < 1000:
                w, b, losses = (t.float() for t in descend(protocol, x, labels, lr, 32, 5))
                close(heads[f"{i}.weight"], w, 1e-4, 1e-5)
                close(heads[f"{i}.bias"], b, 1e-4, 1e-5)
                close([x["loss"][i] for x in lines if x["stage"] == stage], losses, 1e-4)
                score = transfer.top1(task.held_x @ w.T + b, task.labels[task.held])
                assert stage == "final" or found["scores"][lr] == score


@pytest.mark.parametrize("protocol", ["sgd", "lbfgs"])
def test_nothing_is_chosen_on_the_test_set_nor_fitted_to_the_held_out_images(protocol, tmp_path):
    """Wrong test labels change the result alone. Of three labellings of the held-out images one is
    right for each: the scores of a fit that has not seen them add up to 1."""
    sweep = "--lr-sweep 0.01 0.1 1 --batch-size 16 --epochs 2".split() * (protocol == "sgd")
    found = []
    for test, held in ((0, 0), (1, 0), (0, 1), (0, 2)):
        task, out = problem(), tmp_path / f"{test}{held}"
        out.mkdir()
        task.labels = task.labels.clone()
        task.labels[task.held] = (task.labels[task.held] + held) % 3
        task.test_labels = (task.test_labels + test) % 3
        args = resolved(task, out, "--protocol", protocol, *sweep)
        found.append(probe.gradient_probe(args, None, task) if sweep else
                     probe.lbfgs_probe(args, task))
    right, other, *wrong = found
    assert (right["chosen"], right["scores"]) == (other["chosen"], other["scores"])
    assert right["value"] != other["value"] and max(right["scores"].values()) > 0.6
    for key, score in right["scores"].items():
        assert score + sum(x["scores"][key] for x in wrong) == pytest.approx(1)


@pytest.mark.parametrize("multi, d, l2, scale", [
    (False, 5, 100.0, 1), (False, 5, 0.7, 1), (True, 5, 0.7, 1), (False, 5, 7e3, 100),
    (False, 30, 1e-4, 1), (False, 30, 1e-6, 1), (True, 30, 1e-6, 1)])
def test_lbfgs_reaches_the_optimum(multi, d, l2, scale):
    """That of Newton's method on all parameters, from zero and from the fit at the next stronger l2,
    as in the search. With 30 channels the classes can be separated: only the penalty bounds w."""
    task = problem(d)
    x, labels = scale * task.x.double(), task.labels
    if multi:
        labels = torch.randint(-1, 2, (90, 3), generator=rng(5))
        labels = torch.where(labels < 0, labels, F.one_hot(task.labels, 3)) if d == 30 else labels

    def objective(v):
        w, b = v.view(3, d + 1).split([d, 1], 1)
        z = x @ w.T + b[:, 0]
        if labels.ndim == 1:
            loss = z.logsumexp(1) - z[torch.arange(90), labels]
        else:
            loss = (F.softplus(z) - (labels == 1) * z) * (labels >= 0)
        return loss.sum() + l2 * w.square().sum() / 2

    cold = probe.fit_l2(x, labels, 3, l2)
    v = torch.cat([cold.w, cold.b[:, None]], 1).flatten()
    for _ in range(6):
        gradient = torch.autograd.functional.jacobian(objective, v)
        hessian = torch.autograd.functional.hessian(objective, v) + 1e-12 * torch.eye(len(v))
        v = v - torch.linalg.solve(hessian, gradient)
    best, w = objective(v), v.view(3, d + 1)[:, :d]
    assert gradient.norm() < 1e-8 * best  # and the objective is convex

    warm = probe.fit_l2(x, labels, 3, l2, probe.fit_l2(x, labels, 3, l2 * 10**0.25))
    for fit in (cold, warm):
        assert fit.solved
        value = probe.losses(fit.predict(x), labels).sum() + l2 / 2 * fit.w.square().sum()
        assert best * (1 - 1e-6) <= value < best * (1 + 1e-4)
        assert (fit.w - w).norm() < 0.02 * w.norm()


def test_a_fit_starts_at_another_and_says_whether_it_is_solved(capsys, monkeypatch):
    task = problem()
    x, labels = task.x.double(), task.labels
    cold = probe.fit_l2(x, labels, 3, 0.1)
    assert probe.fit_l2(x, labels, 3, 0.1, cold).iterations <= 5 < cold.iterations
    monkeypatch.setattr(probe, "L2_SWEEP", [1e-3])
    words = "the fit at l2 0.001 did not converge; raise --max-iter"
    for most, search, final in ((100, True, True), (10, False, True), (1, False, False)):
        assert probe.fit_l2(x[task.rest], labels[task.rest], 3, 1e-3, None, most).solved == search
        assert probe.fit_l2(x, labels, 3, 1e-3, None, 10 * most).solved == final
        probe.lbfgs_probe(args_of("--max-iter", most), task)
        said = capsys.readouterr().out
        assert bool(said) == (words in said) != search, most


# ---- metrics ----

def test_mean_per_class_by_hand():
    labels, found = torch.tensor([[0, 0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 1, 2, 3]])
    logits = F.one_hot(found, 4)
    means = (3 / 4 + 1 / 2 + 1) / 3  # class 2 has no image
    assert transfer.mean_per_class(logits, labels) == pytest.approx(means)
    assert transfer.top1(logits, labels) == pytest.approx(5 / 7)


def test_11_point_average_precision_by_hand():
    """Ranked: right, wrong, right, difficult, wrong, right. Precision 1 up to recall 1/3, 2/3 up to
    2/3, 3/5 up to 1: recalls 0 to 0.3 (four), 0.4 to 0.6 (three), 0.7 to 1 (four). A second class
    has its two at the end: the first has precision 1/5, the last, at full recall, 2/6."""
    map11, logits = transfer.map11, torch.tensor([[9.0, 1], [8, 2], [7, 3], [6, 4], [5, 5], [4, 6]])
    labels = torch.tensor([[1, 1], [0, 1], [1, 0], [-1, 0], [0, 0], [1, 0]])
    first, second = (4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11, 2 / 6
    assert map11(logits, labels) == pytest.approx((first + second) / 2)
    assert map11(logits[:, :1], labels[:, :1]) == pytest.approx(first)
    ten = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])[:, None]  # recall 0.3 exactly at rank 3
    assert map11(-torch.arange(11.0)[:, None], ten) == pytest.approx((4 + 7 * 10 / 11) / 11)


# ---- published checkpoints ----

def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def zeros(prefix, *names):
    return {prefix + name: torch.zeros(4, 4) for name in names}


@pytest.fixture(scope="session")
def encoders():
    """Of source and target: torchvision's resnet18 without fc."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = torchvision.models.resnet18()
        states.append({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")})
    return states


@pytest.fixture(scope="session")
def tiny(run_folder):
    """The run's backbone, with the stem for small images."""
    return torch.load(run_folder / "backbone.pth", weights_only=True)


FORMATS = {  # what stands before the names of the source's backbone, of the target's; other tensors
    "MoCo": ("module.encoder_q. module.encoder_k.", "module.encoder_k.fc.2.weight module.queue"),
    "MoCo v3": ("module.base_encoder. module.momentum_encoder.",
                "module.base_encoder.fc.0.weight module.predictor.0.weight"),
    "DINO": ("student/module.backbone. teacher/backbone.", "backbone.head.mlp.0.weight"),
    "solo-learn": ("backbone. momentum_backbone.", "classifier.weight projector.0.weight"),
    "lightly": ("backbone. backbone_momentum.", "projection_head.layers.0.weight"),
    "timm": ("state_dict/ state_dict_ema/", "fc.weight fc.bias"),
}


def published(name, *encoders):
    """A file of that format with these backbones."""
    places, more = FORMATS[name]
    file = {"epoch": 200, "arch": "resnet18", "optimizer": {"state": {}, "param_groups": []}}
    children = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4".split()
    number = lambda match: str(children.index(match[0]))
    for place, state in zip(places.split(), encoders, strict=True):
        if name == "lightly":  # nn.Sequential(*resnet.children())
            state = {re.sub(r"^\w+", number, k): x for k, x in state.items()}
        *where, prefix = ["state_dict", *place.split("/")][-2:]
        file.setdefault(*where, {}).update(prefixed(state, prefix) | zeros("", *more.split()))
    return file


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_encoders_exactly(name, encoders):
    for encoder, expected in zip(("source", "target"), encoders, strict=True):
        _, state = probe.find_backbone(published(name, *encoders), encoder, "FILE")
        assert state.keys() == expected.keys() and all(state[k] is expected[k] for k in state)


def test_any_wrapper_and_container_is_looked_through(tiny, capsys):
    """As those of SimSiam, SwAV and Barlow Twins, in whose files there is no target."""
    heads = "fc.weight", "projection_head.0.weight", "prototypes.weight", "projector.0.weight"
    wrappers = ["module.", "_orig_mod.", "model.", "backbone.", "net.", "encoder."]
    prefixes = ["", *wrappers, *map("".join, itertools.permutations(wrappers, 2))]
    containers = [lambda x: x, lambda x: {"model_state_dict": x, "optimizer": {"state": {}}},
                  lambda x: {"checkpoint": {"net": x}, "epoch": 1}]
    for prefix, wrap in itertools.product(prefixes, containers):
        found = wrap(prefixed(tiny, prefix) | zeros(prefix, *heads))
        names, state = probe.find_backbone(found, "source", "FILE")
        assert names.endswith(prefix) and state.keys() == tiny.keys(), prefix

    shared = prefixed(tiny, "net.") | prefixed(tiny, "online_encoder.net.")  # one, by two names
    assert probe.find_backbone(shared, "source", "FILE")[1].keys() == tiny.keys()
    other = {k: v.clone() for k, v in tiny.items()}
    two = prefixed(tiny, "a.") | prefixed(other, "b.")
    for encoder, words in (("source", "2 backbones for --encoder source, of a.*, b.*"),
                           ("target", "0 backbones for --encoder target, of a.*, b.*")):
        with pytest.raises(SystemExit):
            probe.find_backbone(two, encoder, "FILE")
        assert f"FILE holds {words}" in capsys.readouterr().err


def test_a_file_loads_exactly_and_names_what_is_missing_surplus_or_other(encoders, tmp_path):
    """That such a network is torchvision's: tests/test_shared.py. Some lack BN's counters."""
    old = {k: v for k, v in encoders[0].items() if "num_batches" not in k}
    found, path = published("MoCo", old, encoders[1]), tmp_path / "file.pth.tar"
    torch.save(found, path)
    net, about = backbone(path)
    assert (about["arch"], about["dim"], about["size"]) == ("resnet18", 512, 224)
    assert about["mean"] == data.IMAGENET[0]
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, encoders[0][k]) for k, v in net[1].state_dict().items())

    state = found["state_dict"]
    state["module.encoder_q.layer3.0.bn9.bias"] = state.pop("module.encoder_q.layer3.0.bn1.bias")
    state["module.encoder_q.layer3.0.bn1.weight"] = torch.ones(3)
    torch.save(found, path)
    message = refuse(path, "--data", "demo", *FLAGS)
    for words in ("nearest is resnet18", 'Missing key(s) in state_dict: "layer3.0.bn1.bias"',
                  'Unexpected key(s) in state_dict: "layer3.0.bn9.bias"',
                  "size mismatch for layer3.0.bn1.weight"):
        assert words in message


def test_architecture_stem_and_size_are_recognised(tiny, tmp_path):
    torch.save(tiny, tmp_path / "file.pth")
    about = backbone(tmp_path / "file.pth")[1]
    assert (about["arch"], about["size"]) == ("tiny", 32)
    with torch.device("meta"):  # the names of resnet50, other shapes
        state = torchvision.models.wide_resnet50_2().state_dict()
        assert probe.of_others(None, state)[1:] == ("wide_resnet50_2", 224)


TIMM = {  # torchvision's names of a ViT, the other way round from the probe's
    "class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "encoder.ln.": "norm.",
    "conv_proj.": "patch_embed.proj.", r"encoder.layers.encoder_layer_(\d+)": r"blocks.\1",
    "ln_": "norm", "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}


@pytest.mark.parametrize("names, arch, size, patch, layers, heads", [
    ("MoCo v3's", "vit-12x384/16", 32, 16, 12, 12), ("MoCo v3's", "vit-4x96/4", 16, 4, 4, 3),
    ("torchvision's", "vit-12x384/8", 32, 8, 12, 6)])
def test_vits_are_the_networks_of_those_who_publish_them(
        names, arch, size, patch, layers, heads, tmp_path):
    """timm's names and fixed positions; older names and learned positions, which come with 64
    channels a head: such a ViT-S has MoCo v3's tensors, shape by shape, and half the heads."""
    torch.manual_seed(0)
    width, path = 384 if "384" in arch else 96, tmp_path / "vit.pth"
    reference = torchvision.models.VisionTransformer(size, patch, layers, heads, width, 4 * width)
    reference.heads = torch.nn.Identity()
    torch.nn.init.normal_(reference.class_token)
    torch.nn.init.normal_(reference.encoder.pos_embedding)
    state = reference.eval().state_dict()
    if names == "MoCo v3's":
        grid = size // patch
        state["encoder.pos_embedding"].copy_(mocov3_asym.sincos(grid, grid, width))
        for name, timm in TIMM.items():
            state = {re.sub(name, timm, k): x for k, x in state.items()}
        found = prefixed(state | zeros("head.", "weight"), "module.base_encoder.")
    else:  # torchvision's published files have older names
        old = lambda m: f"mlp.linear_{1 if m[1] == '0' else 2}"
        found = {re.sub(r"mlp\.(\d)", old, k): v for k, v in state.items()}
    torch.save(found, path)

    net, about = backbone(path)
    assert (about["arch"], about["size"], about["dim"]) == (arch, size, width)
    x = torch.rand(2, 3, size, size, generator=rng(3))
    close(net(x), reference(TF.normalize(x, *data.IMAGENET)), 1e-3, 1e-4)
    said = refuse(path, "--data", "demo", *FLAGS, "--img-size", 80)
    assert f"--img-size 80: the positions of {path} are for {size} px" in said
    assert "does not say how it began" in refuse(path, "--data", "demo", *FLAGS, "--untrained")
    if names == "torchvision's":
        torch.save(found | {"conv_proj.weight": torch.zeros(1280, 3, 16, 16)}, path)
        assert "a ViT of width 1280; up to 1024" in refuse(path, *FLAGS)


# ---- a run's own files ----

def test_a_run_tells_its_sizes_and_both_its_encoders(run_folder):
    about, digests = json.loads((run_folder / "args.json").read_text()), {}
    for checkpoint, encoder in itertools.product((run_folder, run_folder / "last.pt"),
                                                 ("source", "target")):
        net, told = backbone(checkpoint, "--encoder", encoder)
        name = "backbone.pth" if encoder == "source" else "backbone_target.pth"
        expected = torch.load(run_folder / name, weights_only=True)
        state = net[1].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in state.items())
        assert (told["arch"], told["size"], told["dim"]) == ("tiny", 16, 128)
        assert (told["mean"], told["trained_on"]) == (about["mean"], about["data"])
        digests.setdefault(encoder, set()).add(told["weights"])
    assert "is not the source's" in refuse(run_folder / "backbone_target.pth", *FLAGS)
    assert len(digests["source"]) == len(digests["target"]) == 1
    assert digests["source"] != digests["target"]
    other = ["--mean", 0, 0, 0, "--std", 1, 1, 1, "--img-size", 24]
    net, told = backbone(run_folder, "--untrained", *other)
    assert told["weights"] not in digests["source"]
    assert told["size"] == 24 and net[0](torch.ones(1, 3, 2, 2)).eq(1).all()


def test_a_runs_network_is_that_of_its_own_script(run_folder, tmp_path, monkeypatch, capsys):
    """A researcher's script beside the probe, with a network that no other file knows."""
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "linear_probe.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    network = ("nn.Sequential(nn.Conv2d(3, 8, 3, 2), bn_body(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), "
               "nn.Flatten()), 8")
    text = Path(mocov2_asym.__file__).read_text()
    Path("mine.py").write_text(re.sub(r"resnet\.build\(.*\)", lambda _: network, text))
    import mine
    mine.main(["--data", f"{run_folder.parent}/images", "--out", "run", *RUN])
    capsys.readouterr()
    assert backbone("run")[1]["dim"] == 8 and not capsys.readouterr().out
    Path("mine.py").write_text(Path("mine.py").read_text() + "# changed\n")
    backbone("run")
    assert "note: mine.py or common/ changed since run" in capsys.readouterr().out


def test_export_writes_torchvisions_names_and_exits(encoders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(published("lightly", *encoders), "lightly.ckpt")
    main("lightly.ckpt", *FLAGS, "--encoder", "target", "--export", "lightly.pth")
    said = capsys.readouterr().out  # what the file does not hold
    assert "dim 512  size 224  mean 0.485 0.456 0.406  std 0.229 0.224 0.225" in said
    found = torch.load("lightly.pth", weights_only=True)
    assert found.keys() == encoders[1].keys()
    assert all(torch.equal(found[k], v) for k, v in encoders[1].items())
    assert {p.name for p in tmp_path.iterdir()} == {"lightly.ckpt", "lightly.pth"}


def test_features_are_saved_with_labels_and_names(run_folder, tmp_path):
    folder, net = class_tree(tmp_path / "images", 40, sizes=(20, 24)), backbone(run_folder)[0]
    arrays, of_arrays = pictures(40).permute(0, 2, 3, 1), tmp_path / "in.npz"
    np.savez(of_arrays, images=arrays, labels=np.arange(40) % 2)
    for source, out in ((folder, "a"), (of_arrays, "b"), (of_arrays, "b")):  # again, and complete
        file = tmp_path / "features"
        main(run_folder, *flags("knn"), "--data", source, "--out", tmp_path / out,
             "--save-features", file)
        found = np.load(file)
        file.unlink()
        for part, images in zip(("train", "test"), data.load(str(source))[1:], strict=True):
            names = [""] * len(images) if images.paths is None else map(os.fsdecode, images.paths)
            assert found[f"{part}_names"].tolist() == list(names)
            assert found[f"{part}_labels"].tolist() == images.labels.tolist()
            assert found[f"{part}_x"].dtype == np.float32
            alone = probe.encode(args_of("--img-size", 16), net, images[[3]])
            close(found[f"{part}_x"][3], alone[0], 1e-4, 1e-5)


# ---- data sets ----

def lay(folder, names):
    for i, name in enumerate(names):
        path = Path(f"{folder}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(20, 12)[i % 20].permute(1, 2, 0).numpy()).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def spread(form, part, classes=("ant", "bee"), n=6):
    """Names of n images of each class."""
    return [form.format(c=c, part=part, i=i) for c, i in itertools.product(classes, range(n))]


def lay_birdsnap(root):
    for part in ("train", "test"):
        class_tree(root / "birdsnap" / part, 12, sizes=(12, 13))  # of two sizes: files
    return 12, None, 12, ["class0", "class1", "class2"]


def lay_sun397(root):
    for part in ("Training", "Testing"):
        names = spread("/{c}/sun_{part}{i}.jpg", part, ("a/abbey", "b/bar/indoor"))
        write(root / f"SUN397/{part}_01.txt", "\n".join(names) + "\n")
        lay(root / "SUN397", [*names, "/a/abbey/sun_unused.jpg"])  # which is not in this split
    return 12, None, 12, ["/a/abbey", "/b/bar/indoor"]


def lay_voc2007(root):
    top = root / "VOCdevkit/VOC2007"
    for part in ("train", "val", "test"):
        names = spread("{part}{i:03d}", part, [""], 12)
        write(top / f"ImageSets/Main/{part}.txt", "\n".join(names) + "\n")
        for c, column in (("cat", [1, -1, 0]), ("dog", [-1, 1, 1])):
            rows = "".join(f"{n} {column[i % 3]:2d}\n" for i, n in enumerate(names))
            write(top / f"ImageSets/Main/{c}_{part}.txt", rows)
        lay(top / "JPEGImages", [f"{name}.jpg" for name in names])
    return 24, 12, 12, ["cat", "dog"]


def lay_dtd(root):
    for part in ("train", "val", "test"):
        names = spread("{c}/{part}{i}.jpg", part)
        write(root / f"dtd/dtd/labels/{part}1.txt", "\n".join(names) + "\n")
        lay(root / "dtd/dtd/images", names)
    return 24, 12, 12, ["ant", "bee"]


def lay_caltech101(root):
    for c, n in (("BACKGROUND_Google", 33), ("ant", 35)):
        lay(root / "caltech101/101_ObjectCategories", spread("{c}/image_{i:04d}.jpg", "", [c], n))
    return 60, 10, 8, ["BACKGROUND_Google", "ant"]


LAY = {"birdsnap": lay_birdsnap, "sun397": lay_sun397, "voc2007": lay_voc2007, "dtd": lay_dtd,
       "caltech101": lay_caltech101}


@pytest.mark.parametrize("name", LAY)
def test_data_sets_on_trees_as_torchvision_expects_them(name, tmp_path):
    train_n, val_n, test_n, classes = LAY[name](tmp_path)
    task = probe.load_task(args_of("--transfer", name, "--data-root", tmp_path), name)
    assert (len(task.images), len(task.test_images)) == (train_n, test_n)
    assert list(task.images.classes) == classes
    assert task.metric == transfer.TRANSFER[name].metric
    assert sorted([*task.rest.tolist(), *task.held.tolist()]) == list(range(train_n))

    train, test = (list(map(os.fsdecode, x.paths)) for x in (task.images, task.test_images))
    assert not {*train} & {*test} and all(map(os.path.exists, train + test))
    if val_n is None:  # BYOL's number is more than this tree has: a tenth
        assert len(task.held) == train_n // 10
    else:
        assert task.held.tolist() == list(range(train_n - val_n, train_n))
        assert name == "caltech101" or all("val" in path for path in train[-val_n:])
    if name == "voc2007":  # cat: present, absent, difficult; dog: absent, present, present
        assert task.labels[:3].tolist() == [[1, 0], [0, 1], [-1, 1]]
        return
    labels = [*task.labels.tolist(), *task.test_labels.tolist()]
    for path, label in zip(train + test, labels, strict=True):
        assert classes[label].strip("/") in path
    if name == "caltech101":  # the draw does not depend on the seed
        assert task.labels.bincount().tolist() == [30, 30]
        assert task.labels[task.held].bincount().tolist() == [5, 5]
        args = args_of("--transfer", name, "--data-root", tmp_path, "--seed", 9)
        assert (probe.load_task(args, name).images.paths == task.images.paths).all()


@pytest.mark.parametrize("lists", [
    "Food101 _image_files _labels", "FGVCAircraft _image_files _labels", "StanfordCars _samples",
    "OxfordIIITPet _images _labels", "Flowers102 _image_files _labels"])
def test_torchvision_keeps_its_lists_where_they_are_looked_for(lists):
    kind, *lists = lists.split()
    source = inspect.getsource(getattr(torchvision.datasets, kind))
    assert all(f"self.{name} = " in source for name in lists) and "classes" in source


def test_centre_crops_are_those_of_the_scripts_knn_or_of_transfer(tmp_path):
    """Those: tests/test_data.py. Transfer: resize the shorter side to 224, crop 224, bicubic."""
    image = Image.fromarray(pictures(1, 24)[0].permute(1, 2, 0).numpy())
    image.resize((640, 512), Image.NEAREST).save(tmp_path / "image.png")
    images, net = transfer.images_of([tmp_path / "image.png"], [0], ["a"]), torch.nn.Flatten()
    images.stats = data.RAW
    theirs = knn.features(net, images, torch.arange(1), 224, 0, "cpu")[0]
    plain, x = (probe.encode(args_of("--img-size", 224, *more), net, images)
                for more in ((), ("--transfer", "dtd")))
    assert torch.equal(theirs, F.normalize(plain))

    image, modes = data.read_image(tmp_path / "image.png"), TF.InterpolationMode
    bilinear, bicubic = (TF.center_crop(TF.resize(image, 224, mode), 224)
                         for mode in (modes.BILINEAR, modes.BICUBIC))
    error = lambda want: (x.view(3, 224, 224) * 255 - want).abs().mean()
    assert error(bicubic) < 0.2 and error(bicubic) < error(bilinear)


# ---- whole probes ----

@pytest.mark.parametrize("protocol, more, rule, epochs", [
    ("lbfgs", "", "l2 search", 0), ("knn", "", "fixed", 0), ("lars", "--lr 0.3", "fixed", 2),
    ("sgd", "--cache-features --lr-sweep 0.1 1", "lr search", 4)])
def test_a_probe_and_its_folder(protocol, more, rule, epochs, run_folder, tmp_path, capsys):
    argv = [run_folder, *flags(protocol), *more.split(), "--out", tmp_path]
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    main(*argv)
    out = capsys.readouterr().out
    for told in ("source encoder", "arch tiny", "dim 128", "size 16", f"protocol {protocol}"):
        assert told in out
    assert ("lr 0.3 x 16/256 = 0.01875" in out) == ("--lr 0.3" in more)
    found = result(tmp_path)
    assert 0 <= found["value"] <= 1 and (found["protocol"], found["rule"]) == (protocol, rule)
    assert found["test"] == 6 and found["train"] == 54
    assert len(log_lines(tmp_path)) == epochs
    assert '"arch": "tiny"' in (tmp_path / "log.jsonl").read_text().splitlines()[0]

    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    main(*argv)  # complete: nothing is done again, and the result is printed
    assert capsys.readouterr().out.splitlines()[-1] == out.splitlines()[-1]
    assert stamp == (tmp_path / "result.json").stat().st_mtime_ns
    assert before == {p.name: p.read_bytes() for p in run_folder.iterdir()}


def test_a_probe_on_fresh_bilinear_crops_resumes_exactly(run_folder, tmp_path, monkeypatch):
    crop, kinds = data.crop, set()
    monkeypatch.setattr(data, "crop", lambda images, views, *more: (
        kinds.update(view.recipe.bicubic for view in views), crop(images, views, *more))[1])
    argv = [run_folder, *flags("sgd"), "--epochs", 4, "--lr-sweep", 0.1, 1, "--out"]
    main(*argv, tmp_path / "a")
    save, stages = probe.save, ["search", "final"]

    def interrupted(args, name, content):
        save(args, name, content)
        if stages and name.startswith(stages[0]) and content["epoch"] == 2:
            stages.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(probe, "save", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main(*argv, tmp_path / "b")
        assert stopped.value.code == 128 + signal.SIGTERM
    main(*argv, tmp_path / "b")
    assert result(tmp_path / "a") == result(tmp_path / "b") and kinds == {False}
    done = [(line["stage"], line["epoch"]) for line in log_lines(tmp_path / "b")]
    assert done == list(itertools.product(("search", "final"), (1, 2, 3, 4))), "went on, not anew"
    a, b = (torch.load(next((tmp_path / x).glob("final-*.pt"))) for x in "ab")
    assert all(torch.equal(a["heads"][k], v) for k, v in b["heads"].items())


@pytest.mark.parametrize("protocol, more", [
    ("sgd", ["--lr-sweep", 0.05, 0.5]), pytest.param("lbfgs", [], marks=pytest.mark.slow),
    pytest.param("lars", ["--cache-features"], marks=pytest.mark.slow)])
def test_two_processes_give_the_result_of_one(protocol, more, run_folder, tmp_path, pool):
    """In float64. The launcher, --nproc, is the scripts' (tests/test_processes.py)."""
    for world in (1, 2):
        argv = [run_folder, *flags(protocol), *more, "--out", tmp_path / str(world)]
        pool.run(world, probe.main, [str(a) for a in argv], dtype=torch.float64)
    assert result(tmp_path / "1") == result(tmp_path / "2")
    for x, y in zip(*(log_lines(tmp_path / x) for x in "12"), strict=True):
        assert x.keys() == y.keys() and x["loss"] == pytest.approx(y["loss"], rel=1e-9)


def test_transfer_prints_a_table_and_names_what_is_absent(run_folder, tmp_path, capsys):
    for name in ("birdsnap", "dtd", "voc2007"):
        LAY[name](tmp_path / "data")
    argv = [run_folder, "--transfer", "all", "--data-root", tmp_path / "data", *FLAGS, "--out"]
    main(*argv, tmp_path / "l2")
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert "lbfgs, l2 search" in table[0]
    rows = {line[:12].strip(): line[12:].split(None, 2) for line in table[1:]}
    assert len(rows) == 13 and rows["DTD"][0] == "80.2"
    assert rows["VOC-07"][2].endswith("is probably another")
    found = json.loads((tmp_path / "l2" / "result.json").read_text())["results"]
    assert found.keys() == {"birdsnap", "dtd", "voc2007"}
    assert found["voc2007"]["metric"] == "11-point mAP"
    for title, name in (("Birdsnap", "birdsnap"), ("DTD", "dtd"), ("VOC-07", "voc2007")):
        assert rows[title][1] == f"{100 * found[name]['value']:.1f}"
    assert rows["Cars"][1] == rows["Pets"][1] == "-" and "Data of Table 4" in rows["Cars"][2]
    assert str(tmp_path) in rows["Cars"][2]
    sgd = ["--protocol", "sgd", "--lr-sweep", 0.1, 1, "--batch-size", 6, "--epochs", 1]
    main(*argv, tmp_path / "lr", *sgd)
    assert "sgd, lr search" in capsys.readouterr().out


# ---- wrong input ----

def test_wrong_checkpoints_are_refused(run_folder, encoders, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (run_folder / "backbone.pth").read_bytes()
    Path("part.pth").write_bytes(whole[: len(whole) // 2])

    save, state = torch.save, tiny
    save({"weight": torch.zeros(10, 128), "bias": torch.zeros(10)}, "head.pth")
    save({"epoch": 1}, "none.pth")
    save([torch.zeros(3)], "list.pth")
    save({"student": {}, "args": argparse.Namespace(lr=1)}, "dino.pth")
    save({"conv1.weight": Bomb()}, "evil.pth")
    save(state | {"bn1.bias": state["bn1.bias"] * math.nan}, "nan.pth")
    save({k: 0 * v for k, v in state.items()}, "zero.pth")
    save(prefixed(state, "backbone.") | zeros("", "classifier.weight"), "solo.pth")
    save({k.replace("conv1", "conv1.0"): v for k, v in encoders[0].items() if "layer" not in k}
         | {k: v for k, v in encoders[0].items() if "layer" in k}, "deep.pth")
    last = torch.load(run_folder / "last.pt", weights_only=True)
    for i, change in enumerate(({"method": "planted"}, {"method": "../x"}, {"format": 2})):
        save({**last, "args": {**last["args"], **change}}, f"last{i}.pt")
    shutil.copytree(run_folder, "other")
    save(encoders[0], "other/backbone.pth")

    for name, words in {
        "part.pth": "is it whole?", "nowhere": "no such file; give the",
        ".": "no such file; give the folder", "list.pth": "cannot be read",
        "head.pth": "holds no backbone, but weight, ", "last2.pt": "of another version",
        "none.pth": "no backbone, but epoch", "dino.pth": "GLOBAL argparse.Namespace",
        "evil.pth": "If it holds more than tensors, and you trust it: load it with weights_only",
        "nan.pth": "are not finite", "zero.pth": "or all the same; are the weights, --mean",
        "deep.pth": 'Missing key(s) in state_dict: "conv1.weight"',
        "solo.pth": "solo-learn pads a 3 x 3 first convolution by 2",
        "last0.pt": "planted.py is not beside", "last1.pt": "is not beside",
        "other": 'Unexpected key(s) in state_dict: "layer1.1.',
    }.items():
        assert words in refuse(name, "--data", "demo", "--out", "out", *flags("knn")), name
        shutil.rmtree("out", ignore_errors=True)
    assert not Path("exploded").exists() and not Path("runs").exists()


def test_wrong_flags_and_data_are_refused_before_work(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv, words in {
        "--data cifar10": "cifar10: not in data/; add --download, or say where with --data-root",
        "--transfer food101 --data-root d": "see docs/", "--lr 1": "--protocol lbfgs has no learning rate",
        f"--data {run_folder.parent}/images/class0": "no labels", "--lrr 3": "unrecognized",
        "--transfer dtd birdsnap --data-root d": "dtd is not in d/",  # of all, in one line
        "--protocol knn --knn-k 55": "--knn-k 55 needs as many training images",
        "--protocol sgd --batch-size 64": "has 54 images to learn",
        "--protocol sgd --lr-sweep --batch-size 50": "has 49 images to learn",
        "--protocol sgd --lr 1 --lr-sweep": "exclude each other",
        "--data demo --transfer dtd": "exclude each other", "--transfer imagenet": "invalid choice",
        "--std 0 2 1": "is not in", "--epochs 0": "is not in", "--nproc 2 --device tpu": "invalid choice",
        "--protocol sgd --save-features f.npz": "use --protocol lbfgs or knn",
    }.items():
        assert words in refuse(run_folder, *argv.split(), "--workers", 0), argv
    assert not [*tmp_path.iterdir()]


def test_a_learning_rate_too_large_is_no_result(run_folder, tmp_path, monkeypatch):
    """Weights after the last step: the loss of an epoch of one step is measured before it."""
    sizes = "--batch-size", 48, "--epochs", 1, "--lr", 3, "--out", tmp_path
    monkeypatch.setattr(probe, "lr_factor", lambda *a: math.nan)
    message = refuse(run_folder, *flags("sgd"), *sizes)
    assert "not finite, after epoch 1: try a tenth of --lr 3.0" in message
    assert not list(tmp_path.glob("*.pt")) and not json.loads(
        (tmp_path / "result.json").read_text())["results"]


@pytest.mark.parametrize("protocol, sizes", [("knn", (24,)), ("knn", (20, 31)), ("sgd", (20, 31))])
def test_an_unreadable_image_stops_the_probe(protocol, sizes, run_folder, tmp_path):
    """Another image would take its place, under its label. Of several sizes: read on the way."""
    folder = class_tree(tmp_path / "images", 60, sizes)
    broken = sorted(folder.rglob("*.png"))[4]
    broken.write_bytes(broken.read_bytes()[:60])
    argv = [run_folder, "--data", folder, *flags(protocol), "--out", tmp_path / "out"]
    code, said = call("linear_probe", argv)
    assert code == 2 and str(broken) in said and "repair or remove" in said


def test_out_of_another_probe_is_left_alone(run_folder, tmp_path, monkeypatch):
    """Of other images too, known by their names, as a run's: not by the spelling of the path."""
    moved = sorted(class_tree(tmp_path / "images", 60).glob("*/*.*"))[0]
    moved.rename(moved.with_name("new.png"))
    argv = [run_folder, *FLAGS, "--protocol", "knn", "--out", out := tmp_path / "out"]
    out.mkdir()
    (out / "mine.pt").write_text("a user's own file")
    main(*argv, "--knn-k", 5)
    main(*argv, "--knn-k", 5, "--data", f"{run_folder.parent}/./images/")
    monkeypatch.chdir(class_tree(tmp_path / "others", 60))
    main(*argv, "--knn-k", 5, "--data", ".")  # and images is not forgotten:
    assert json.loads((out / "result.json").read_text())["results"].keys() == {"images", "others"}
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "weights" in refuse(*argv, "--knn-k", 5, "--untrained")
    assert "knn_k [5] there, [3] here" in refuse(*argv, "--knn-k", 3)
    assert "holds another probe (images of " in refuse(
        *argv, "--knn-k", 5, "--data", tmp_path / "images")
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    main(*argv, "--knn-k", 3, "--overwrite")
    assert result(out)["knn"].keys() == {"3"} and (out / "mine.pt").exists()
    for more in ([], ["--overwrite"]):  # a run's folder least of all
        assert "holds no probe" in refuse(*argv[:-1], run_folder, "--knn-k", 5, *more)
    assert (run_folder / "last.pt").exists()
