"""The linear probe: protocols against naive computations, metrics against examples worked by hand, checkpoints of
every format built here with their real names, data sets on tiny trees laid out as torchvision expects them."""

import argparse
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pool import ROOT, Pool, class_tree, close, pictures

import linear_probe as probe
import mocov2_asym
from common import data
from common.augment import rng
from common.lars import LARS

HAS_VIT = importlib.util.find_spec("mocov3_asym") is not None
FLAGS = ["--workers", "0", "--device", "cpu", "--knn-k", "5", "--max-iter", "20"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run's folder as mocov2_asym.py leaves it: a tiny network, 16 px, two steps on three classes."""
    root = tmp_path_factory.mktemp("probe")
    argv = (f"--data {class_tree(root / 'images', 60)} --out {root / 'run'} --recipe small --arch tiny --img-size 16 "
            "--batch-size 16 --bn-groups 2 --queue 8 --hidden 16 --dim 8 --workers 0 --epochs 1 --steps 2 --device cpu")
    mocov2_asym.main(argv.split())
    return root / "run"


@pytest.fixture(scope="session")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


def main(*argv):
    probe.main([str(a) for a in argv])


def flags(protocol):
    allowed = {"lbfgs": FLAGS, "knn": FLAGS[:-2]}.get(protocol, FLAGS[:4])
    return [*allowed, "--protocol", protocol]


def refuse(capsys, *argv):
    """The message with which the probe refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(*argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.count("\n") == 1 and err.startswith("linear_probe: "), (stopped.value, err)
    return err


def result(out, name=None):
    found = json.loads((Path(out) / "result.json").read_text())["results"]
    return found[name] if name else next(iter(found.values()))


def args_of(*argv):
    args = probe.parse_args(["x", *map(str, argv), "--device", "cpu", "--workers", "0"])
    args.place = torch.device("cpu")
    return args


def problem(n=90, d=5, classes=3, seed=0, views=1):
    """Three overlapping clouds, with a large common mean as features after a ReLU have."""
    generator = rng(seed, "problem")
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator)
    x, test = (3 + centres[labels] + torch.randn(views, n, d, generator=generator) for _ in range(2))
    return probe.Task("clouds", "top-1", classes, labels, torch.arange(0, n, 5), labels, x, x[0, ::5], test[0])


class NoRun:
    """A run that keeps its log in memory."""

    def __init__(self):
        self.lines, self.saved = [], {}

    def log(self, entry, show=True):
        self.lines.append(entry)

    def forget(self, repeated):
        pass

    def save(self, what, name, state):
        self.saved[what] = json.loads(json.dumps(state, default=lambda t: t.tolist()))

    def restore(self, what, name, use):
        return None


# ---- protocols ----


@pytest.mark.parametrize("protocol", ["lars", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_gradient_probes_equal_a_naive_loop(protocol, schedule):
    """Softmax regression with its gradient by hand, numbers in float64."""
    task, lr, batch, epochs = problem(), 0.4, 32, 5
    args = args_of("--protocol", protocol, "--lr", lr, "--batch-size", batch, "--epochs", epochs, "--schedule", schedule)
    probe.resolve(args, {"clouds": (task, data.Images(pixels=torch.zeros(90, 3, 8, 8)))})
    run = NoRun()
    probe.gradient_probe(args, run, task, probe.stored(args, task.x))

    head = probe.classifier(5, 3, args.seed)
    w, b = head.weight.detach().double(), head.bias.detach().double()
    assert 0.004 < w.std() < 0.02 and not b.any()  # N(0, 0.01)
    vw, vb, steps, loss = torch.zeros_like(w), torch.zeros_like(b), 90 // batch * epochs, []
    for step in range(steps):
        if step % (90 // batch) == 0:
            order = torch.randperm(90, generator=rng(0, "order", step // (90 // batch)))
        rows = order[step % (90 // batch) * batch :][:batch]
        x, y = task.x[0, rows].double(), task.labels[rows]
        p = torch.softmax(x @ w.T + b, 1)
        loss.append(-p[torch.arange(batch), y].log().mean().item())
        p = p - F.one_hot(y, 3)
        gw, gb = p.T @ x / batch, p.mean(0)
        share = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 0.1 ** sum(step / steps >= s for s in (0.6, 0.8))
        if protocol == "lars":  # trust ratio 0.001 |p| / |g|, 1 where a norm is 0, for the bias too
            gw, gb = (g * (0.001 * t.norm() / g.norm() if t.norm() > 0 else 1) for g, t in ((gw, w), (gb, b)))
        vw, vb = 0.9 * vw + gw, 0.9 * vb + gb
        w, b = w - lr * batch / 256 * share * vw, b - lr * batch / 256 * share * vb
    close(torch.tensor(run.saved["final"]["heads"]["0.weight"]), w.float(), 1e-4, 1e-5)
    close(torch.tensor(run.saved["final"]["heads"]["0.bias"]), b.float(), 1e-4, 1e-5)
    close([line["loss"][0] for line in run.lines], torch.tensor(loss).view(epochs, -1).mean(1), 1e-4)


def test_sweep_trains_each_classifier_as_if_alone_and_chooses_on_held_out_images():
    task = problem()
    args = args_of("--protocol", "sgd", "--lr-sweep", 0.01, 0.3, 1000, "--batch-size", 16, "--epochs", 4)
    probe.resolve(args, {"clouds": (task, data.Images(pixels=torch.zeros(90, 3, 8, 8)))})
    run = NoRun()
    found = probe.gradient_probe(args, run, task, probe.stored(args, task.x))
    together = run.saved["search"]["heads"]
    for i, lr in enumerate(args.lr_sweep):
        alone = NoRun()
        scores = probe.train(args, alone, task, probe.stored(args, task.x), "search", [lr], task.rest, task.held_x, task.labels[task.held])
        close(torch.tensor(together[f"{i}.weight"]), torch.tensor(alone.saved["search"]["heads"]["0.weight"]), 1e-5, 1e-6)
        assert scores[lr] == found["scores"][lr]
    assert found["chosen"]["lr"] == max(found["scores"], key=found["scores"].get)
    final = [line for line in run.lines if line["stage"] == "final"]
    assert found["value"] == final[-1]["top-1"][0] and set(task.rest.tolist()) | set(task.held.tolist()) == set(range(90))


@pytest.mark.parametrize("protocol", ["sgd", "lbfgs"])
def test_what_is_chosen_does_not_depend_on_the_test_set(protocol):
    sweep = ["--lr-sweep", 0.01, 0.1, 1, "--batch-size", 16, "--epochs", 2] if protocol == "sgd" else []
    args, chosen, values = args_of("--protocol", protocol, *sweep), [], []
    for labels in (torch.arange(90) % 3, (torch.arange(90) + 1) % 3, torch.zeros(90, dtype=torch.long)):
        task = problem()
        task.test_labels = labels
        probe.resolve(args, {"clouds": (task, data.Images(pixels=torch.zeros(90, 3, 8, 8)))})
        found = probe.learn(args, NoRun(), task, probe.stored(args, task.x))
        chosen.append(found["chosen"]), values.append(found["value"])
    assert chosen[0] == chosen[1] == chosen[2] and len(set(values)) > 1


def test_nothing_is_fitted_to_the_held_out_images_before_the_choice():
    """Wrong labels there change which l2 is chosen, never the fits chosen from."""
    logs = []
    for wrong in (False, True):
        task, run = problem(), NoRun()
        if wrong:
            task.labels = task.labels.clone()
            task.labels[task.held] = (task.labels[task.held] + 1) % 3
        probe.lbfgs_probe(args_of("--protocol", "lbfgs"), run, task)
        logs.append([(line["l2"], line["iterations"]) for line in run.lines])
        assert wrong or max(line["held_out"] for line in run.lines) > 0.6
    assert logs[0] == logs[1] and len(logs[0]) == 45 and logs[0][0][0] == 1e5 and logs[0][-1][0] == pytest.approx(1e-6)


@pytest.mark.parametrize("multi", [False, True])
def test_lbfgs_reaches_the_optimum(multi):
    """There the gradient, written by hand, is zero; and Adam, run long, ends at the same weights."""
    task, l2 = problem(), 0.7
    x, labels = task.x[0].double(), task.labels
    if multi:
        labels = torch.randint(-1, 2, (90, 3), generator=rng(5))
    fit = probe.fit_l2(x, labels, 3, l2)
    logits = x @ fit.w.T + fit.b
    error = (logits.sigmoid() - labels) * (labels >= 0) if multi else logits.softmax(1) - F.one_hot(labels, 3)
    scale = (error.T @ x).abs().sum()  # of the two addends that cancel
    assert (error.T @ x + l2 * fit.w).abs().max() < 1e-3 < 0.1 * scale and error.sum(0).abs().max() < 1e-3
    w, b = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w, b], lr=0.05)
    for step in range(3000):
        adam.param_groups[0]["lr"] = 0.05 * (1 - step / 3000)
        z = (x - x.mean(0)) @ w.T + b  # Adam needs this to arrive; the optimum's w is the same
        if multi:
            each = torch.where(labels == 1, F.softplus(-z), torch.where(labels == 0, F.softplus(z), 0))
        else:
            each = z.logsumexp(1) - z.gather(1, labels[:, None])[:, 0]
        adam.zero_grad()
        (each.sum() + l2 / 2 * w.square().sum()).backward()
        adam.step()
    close(fit.w, w, 1e-3, 1e-4)
    if multi:
        close(fit.b, b - w @ x.mean(0), 1e-3, 1e-3)


def test_a_warm_start_and_another_scale_find_the_same_fit():
    x, labels = problem().x[0].double(), problem().labels
    cold = probe.fit_l2(x, labels, 3, 0.1)
    warm = probe.fit_l2(x, labels, 3, 0.1, probe.fit_l2(x, labels, 3, 10.0))
    close(cold.w, warm.w, 1e-3, 1e-4)
    scaled = probe.fit_l2(100 * x, labels, 3, 0.1 * 100**2)
    close(scaled.w * 100, cold.w, 1e-3, 1e-4)
    assert probe.fit_l2(x, labels, 3, 0.1, cold).iterations <= 2


def test_l2_is_against_the_sum_of_losses_so_doubled_data_halve_it():
    x, labels = problem().x[0].double(), problem().labels
    twice = probe.fit_l2(x.repeat(2, 1), labels.repeat(2), 3, 2.0)
    close(twice.w, probe.fit_l2(x, labels, 3, 1.0).w, 1e-3, 1e-4)


def test_knn_equals_brute_force():
    task, args = problem(60, seed=3), args_of("--knn-k", 7, 60, 200)
    found, right = probe.knn_probe(args, task), {7: 0, 60: 0}
    for k in right:
        for x, truth in zip(task.test_x, task.test_labels, strict=True):
            cosine = [(F.cosine_similarity(x, key, 0).item(), label.item()) for key, label in zip(task.x[0], task.labels, strict=True)]
            votes = [sum(math.exp(c / 0.1) for c, label in sorted(cosine)[-k:] if label == one) for one in range(3)]
            right[k] += votes.index(max(votes)) == truth
    assert found == {k: pytest.approx(n / 60) for k, n in right.items()}  # 200 is more than there are


# ---- metrics ----


def test_mean_per_class_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    said = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    logits = F.one_hot(said, 4).float()
    assert probe.mean_per_class(logits, labels) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)  # class 2 has no image
    assert probe.top1(logits, labels) == pytest.approx(5 / 7)


def test_11_point_average_precision_by_hand():
    """Ranked: right, wrong, right, difficult, wrong, right. Precision 1 up to recall 1/3, 2/3 up to 2/3, 3/5 up to 1:
    recalls 0 to 0.3 (four), 0.4 to 0.6 (three), 0.7 to 1 (four). A second class has right images only at its end."""
    logits = torch.tensor([[9.0, 1], [8, 2], [7, 3], [6, 4], [5, 5], [4, 6]])
    labels = torch.tensor([[1, 1], [0, 1], [1, 0], [-1, 0], [0, 0], [1, 0]])
    first = (4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11
    second = 11 * (2 / 6) / 11  # the first hit at rank 5 has precision 1/5, the last, at full recall, 2/6
    assert probe.map11(logits, labels) == pytest.approx((first + second) / 2)
    assert probe.map11(logits[:, :1], labels[:, :1]) == pytest.approx(first)
    ten = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])[:, None]  # recall 0.3 exactly at rank 3, where precision is 1
    assert probe.map11(-torch.arange(11.0)[:, None], ten) == pytest.approx((4 * 1 + 7 * 10 / 11) / 11)


def test_multi_label_loss_leaves_out_what_does_not_count():
    logits, labels = torch.tensor([[2.0, -1, 0.5]]), torch.tensor([[1, 0, -1]])
    close(probe.losses(logits, labels), torch.tensor([math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))]))


# ---- checkpoints ----

DROPPED = ["conv1.weight", "layer3.0.bn1.bias"]


def resnet_state(name="resnet50", seed=0):
    torch.manual_seed(seed)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def head(prefix, *shapes):
    return {f"{prefix}{name}": torch.zeros(shape) for name, shape in shapes}


def formats(source, target):
    """The published files' keys (METHODS' table), around backbones source and target."""
    fc = head("fc.", ("0.weight", (8, 2048)), ("0.bias", (8,)), ("2.weight", (4, 8)), ("2.bias", (4,)))
    meta = {"epoch": 200, "arch": "resnet50", "optimizer": {"state": {}, "param_groups": []}}
    queue = {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    moco = {**prefixed(source | fc, "module.encoder_q."), **prefixed(target | fc, "module.encoder_k."), **queue}
    mocov3 = {**prefixed(source | fc, "module.base_encoder."), **prefixed(target | fc, "module.momentum_encoder."),
              **head("module.predictor.", ("0.weight", (4, 4)))}
    simsiam = {**prefixed(source | fc, "module.encoder."), **head("module.predictor.", ("0.weight", (4, 4)))}
    ours = {**prefixed(source, "source.backbone."), **head("source.projector.", ("0.weight", (4, 4))),
            **prefixed(target, "target.backbone."), "queue": torch.zeros(8, 4)}
    swav = {**prefixed(source, "module."), **head("module.projection_head.", ("0.weight", (4, 4))),
            **head("module.prototypes.", ("weight", (30, 4)))}
    barlow = {"epoch": 3, "model": {**prefixed(source, "module.backbone."), **head("module.projector.", ("0.weight", (4, 4))),
                                    **head("module.bn.", ("running_mean", (4,)))}, "optimizer": {}}
    dino = {"student": {**prefixed(source, "module.backbone."), **head("module.head.", ("mlp.0.weight", (4, 4)))},
            "teacher": {**prefixed(target, "backbone."), **head("head.", ("mlp.0.weight", (4, 4)))}, "epoch": 1}
    return {"moco": {**meta, "state_dict": moco}, "mocov3": {**meta, "state_dict": mocov3, "scaler": {"scale": 1.0}},
            "simsiam": {**meta, "state_dict": simsiam}, "ours": {"format": 1, "step": 2, "model": ours}, "swav": swav,
            "barlow full": barlow, "barlow bare": source, "dino full": dino,
            "torchvision": source | head("fc.", ("weight", (1000, 2048)), ("bias", (1000,))),
            "solo-learn": {**meta, "state_dict": prefixed(source, "backbone.") | prefixed(target, "momentum_backbone.")}}


NAMES = list(formats({}, {}))
NO_TARGET = {"simsiam", "swav", "barlow full", "barlow bare", "torchvision"}


@pytest.fixture(scope="session")
def encoders():
    return resnet_state(seed=1), resnet_state(seed=2)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_its_encoders_exactly(name, encoders, capsys):
    found = formats(*encoders)[name]
    for encoder, expected in zip(("source", "target"), encoders, strict=True):
        if encoder == "target" and name in NO_TARGET:
            with pytest.raises(SystemExit):
                probe.backbone_of(found, encoder, "FILE")
            assert "--encoder target: FILE" in capsys.readouterr().err
            continue
        state, title = probe.backbone_of(found, encoder, "FILE")
        assert state.keys() == expected.keys() and all(state[k] is expected[k] for k in state), title


@pytest.mark.parametrize("name", ["moco", "swav"])  # the loading itself is one for all
def test_a_file_loads_exactly_and_names_what_is_missing_surplus_or_other(name, encoders, tmp_path, capsys):
    found = formats(*encoders)[name]
    path = tmp_path / "file.pth.tar"
    torch.save(found, path)
    args = args_of("--data", "demo")
    args.checkpoint = str(path)
    net, about = probe.load_backbone(args)
    assert about["arch"] == "resnet50" and about["loaded"] == about["of"] == 265 and about["dim"] == 2048 and about["size"] == 224
    state = net.backbone.state_dict()
    assert state.keys() == encoders[0].keys() and all(torch.equal(v, encoders[0][k]) for k, v in state.items())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    x = torch.rand(2, 3, 64, 64, generator=rng(1))
    reference = torchvision.models.resnet50()
    reference.load_state_dict(encoders[0], strict=False)
    reference.fc = torch.nn.Identity()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in data.IMAGENET)
    close(net(x), reference.eval()((x - mean) / std), 1e-4, 1e-5)

    inner = found.get("state_dict", found)
    key = next(k for k in inner if k.endswith("layer3.0.bn1.bias"))
    for change, expected in ((lambda d: d.pop(key), "1 tensor(s) missing: layer3.0.bn1.bias (256,)"),
                             (lambda d: d.update({key.replace("bn1", "bn9"): torch.zeros(3)}), "1 tensor(s) surplus: layer3.0.bn9.bias (3,)"),
                             (lambda d: d.update({key: torch.zeros(3)}), "1 tensor(s) of another shape: layer3.0.bn1.bias (3,)")):
        changed = dict(inner)
        change(changed)
        torch.save({**found, "state_dict": changed} if "state_dict" in found else changed, path)
        with pytest.raises(SystemExit):
            probe.load_backbone(args)
        message = capsys.readouterr().err
        assert expected in message and "does not fit resnet50, the nearest architecture: " in message


def test_architecture_stem_and_size_are_recognised(tmp_path):
    args = args_of("--data", "demo")
    args.checkpoint = str(tmp_path / "file.pth")
    cifar = mocov2_asym.build_backbone(argparse.Namespace(arch="resnet18", img_size=32), torch.nn.BatchNorm2d)[0].state_dict()
    without = {k: v for k, v in resnet_state("resnet34").items() if "num_batches" not in k}  # files older than the counters
    for state, arch, size in ((cifar, "resnet18", 32), (without, "resnet34", 224)):
        torch.save(state, args.checkpoint)
        net, about = probe.load_backbone(args)
        assert (about["arch"], about["size"], net.size) == (arch, size, size) and about["mean"] == data.IMAGENET[0]


def timm_names(state):
    """A torchvision ViT's tensors in timm's names, written the other way round from the probe's table."""
    out = {"cls_token": state["class_token"], "pos_embed": state["encoder.pos_embedding"]}
    for part in ("weight", "bias"):
        out[f"patch_embed.proj.{part}"], out[f"norm.{part}"] = state[f"conv_proj.{part}"], state[f"encoder.ln.{part}"]
        for i in range(sum(k.endswith("ln_1.bias") for k in state)):
            layer = f"encoder.layers.encoder_layer_{i}."
            for timm, name in (("norm1.", "ln_1."), ("attn.qkv.", "self_attention.in_proj_"), ("attn.proj.", "self_attention.out_proj."),
                               ("norm2.", "ln_2."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.3.")):
                out[f"blocks.{i}.{timm}{part}"] = state[layer + name + part]
    return out


class TimmBlock(torch.nn.Module):
    """A block of timm's ViT, written from its description: pre-norm attention with one qkv matrix, pre-norm MLP."""

    def __init__(self, state, i, heads):
        super().__init__()
        self.p, self.heads = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}, heads

    def forward(self, x):
        p, (n, t, d) = self.p, x.shape
        y = F.layer_norm(x, (d,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        qkv = F.linear(y, p["attn.qkv.weight"], p["attn.qkv.bias"]).reshape(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(2, 3)) / math.sqrt(d // self.heads)).softmax(3) @ v
        x = x + F.linear(y.transpose(1, 2).reshape(n, t, d), p["attn.proj.weight"], p["attn.proj.bias"])
        y = F.linear(F.layer_norm(x, (d,), p["norm2.weight"], p["norm2.bias"], 1e-6), p["mlp.fc1.weight"], p["mlp.fc1.bias"])
        return x + F.linear(F.gelu(y), p["mlp.fc2.weight"], p["mlp.fc2.bias"])


def small_vit(seed=0):
    torch.manual_seed(seed)
    net = torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 32)
    net.heads = torch.nn.Identity()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


@pytest.mark.parametrize("container", ["mocov3", "dino"])
def test_timm_names_become_torchvisions_and_the_network_is_the_same(container):
    net, other = small_vit(0), small_vit(1)
    state, second = timm_names(net.state_dict()), timm_names(other.state_dict())
    if container == "mocov3":
        found = {"state_dict": {**prefixed(state, "module.base_encoder."), **prefixed(second, "module.momentum_encoder."),
                                **head("module.base_encoder.head.", ("0.weight", (4, 8)))}}
    else:
        found = {**state, **head("head.", ("weight", (4, 8)))}
    found, title = probe.backbone_of(found, "source", "FILE")
    assert found.keys() == net.state_dict().keys() and "ViT" not in probe.FORMATS[0][0] and title
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in found.items())
    x = torch.rand(3, 3, 16, 16, generator=rng(2))
    tokens = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 4).flatten(2).transpose(1, 2)
    tokens = torch.cat([state["cls_token"].expand(3, -1, -1), tokens], 1) + state["pos_embed"]
    for i in range(2):
        tokens = TimmBlock(state, i, 2)(tokens)
    close(net(x), F.layer_norm(tokens, (8,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0], 1e-4, 1e-5)


@pytest.mark.skipif(not HAS_VIT, reason="mocov3_asym.py is not there")
@pytest.mark.parametrize("arch, size", [("vit_small", 224), ("vit_tiny", 32)])
def test_published_vits_load_into_mocov3s(arch, size, tmp_path, capsys):
    import mocov3_asym
    reference, width = mocov3_asym.build_vit(mocov3_asym.parse_args(["--arch", arch, "--img-size", str(size)]))
    args = args_of("--data", "demo")
    args.checkpoint = str(tmp_path / "vit.pth")
    torch.save({"state_dict": prefixed(timm_names(reference.state_dict()), "module.base_encoder.")}, args.checkpoint)
    net, about = probe.load_backbone(args)
    assert about["arch"] == arch and about["size"] == size and about["dim"] == width and about["layer"] == "class token"
    x = torch.rand(2, 3, size, size, generator=rng(3))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in data.IMAGENET)
    close(net(x), reference.eval()((x - mean) / std), 1e-4, 1e-5)
    if reference.patch_size == 16:
        few = ["--data", "demo", "--device", "cpu", "--img-size", 15]
        assert f"--img-size 15: the first convolution of {arch} has 16 px" in refuse(capsys, args.checkpoint, *few)


@pytest.mark.skipif(not HAS_VIT, reason="mocov3_asym.py is not there")
@pytest.mark.parametrize("names", ["dino", "torchvision"])
def test_vits_with_learned_positions_have_64_channels_a_head(names, tmp_path, capsys):
    """DINO's ViT-S: MoCo v3's tensors, shape by shape, and half the heads."""
    torch.manual_seed(0)
    reference = torchvision.models.VisionTransformer(64, 16, 12, 6, 384, 4 * 384).eval()
    reference.heads = torch.nn.Identity()
    torch.nn.init.normal_(reference.encoder.pos_embedding)
    state = reference.state_dict()
    if names == "dino":
        found = {**timm_names(state), **head("head.", ("weight", (4, 384)))}
    else:  # its published files have older names
        found = {re.sub(r"mlp\.(\d)", lambda m: f"mlp.linear_{1 if m[1] == '0' else 2}", k): v for k, v in state.items()}
        assert found.keys() != state.keys()
    args = args_of("--data", "demo")
    args.checkpoint = str(tmp_path / "vit.pth")
    torch.save(found, args.checkpoint)
    net, about = probe.load_backbone(args)
    assert (about["arch"], about["heads"], about["size"]) == ("vit_small", 6, 64)
    x = torch.rand(2, 3, 64, 64, generator=rng(3))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in data.IMAGENET)
    close(net(x), reference((x - mean) / std), 1e-4, 1e-5)
    said = refuse(capsys, args.checkpoint, "--data", "demo", "--device", "cpu", "--img-size", 128)
    assert "--img-size 128: the positions of" in said and "are learned, for 64 px; leave it out" in said


def test_a_cifar_stem_whose_padding_the_file_does_not_tell_is_refused(tmp_path, capsys):
    flags = mocov2_asym.parse_args(["--arch", "tiny"])
    state = mocov2_asym.build_backbone(flags, torch.nn.BatchNorm2d)[0].state_dict()
    path = tmp_path / "solo.ckpt"
    torch.save({"state_dict": prefixed(state, "backbone.")}, path)
    assert "solo-learn pads a 3 x 3 first convolution by 2" in refuse(capsys, path, "--data", "demo", "--device", "cpu")
    torch.save({"state_dict": state}, path)
    args = args_of("--data", "demo")
    args.checkpoint = str(path)
    assert probe.load_backbone(args)[1]["arch"] == "tiny"


def test_a_run_tells_its_sizes_and_both_its_encoders(run_folder):
    about = json.loads((run_folder / "args.json").read_text())
    digests = {}
    for checkpoint, encoder in itertools.product((run_folder, run_folder / "last.pt"), ("source", "target")):
        args = args_of("--encoder", encoder)
        args.checkpoint = str(checkpoint)
        net, told = probe.load_backbone(args)
        expected = torch.load(run_folder / ("backbone.pth" if encoder == "source" else "backbone_target.pth"), weights_only=True)
        assert all(torch.equal(v, expected[k]) for k, v in net.backbone.state_dict().items())
        assert (told["arch"], told["size"], told["mean"], told["data"]) == ("tiny", 16, about["mean"], about["args"]["data"])
        digests.setdefault(encoder, set()).add(told["weights"])
    assert len(digests["source"]) == len(digests["target"]) == 1 and digests["source"] != digests["target"]
    args = args_of("--untrained", "--mean", 0, 0, 0, "--std", 1, 1, 1, "--img-size", 24)
    args.checkpoint = str(run_folder)
    net, told = probe.load_backbone(args)
    assert told["weights"] not in digests["source"] and told["loaded"] == 0 and net.size == 24 and not net.mean.any()


# ---- data sets ----


def picture(path, i=0, size=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures(20, size)[i % 20].permute(1, 2, 0).numpy()).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lay_food101(root):
    for part in ("train", "test"):
        lists = {c: [f"{c}/{part}{i}" for i in range(6)] for c in ("apple_pie", "waffles")}
        write(root / f"food-101/meta/{part}.json", json.dumps(lists))
        for name in sum(lists.values(), []):
            picture(root / f"food-101/images/{name}.jpg")
    return 12, None, 12, ["apple_pie", "waffles"]


def lay_tree(name, test):
    def lay(root):
        for part, c, i in itertools.product(("train", test), "ab", range(6)):
            picture(root / name / part / c / f"{i}.jpg", i, 12 + i % 2)  # of two sizes: not decoded at once
        return 12, None, 12, ["a", "b"]
    return lay


def lay_sun397(root):
    for part in ("Training", "Testing"):
        names = [f"/{c}/sun_{part}{i}.jpg" for c in ("a/abbey", "b/bar/indoor") for i in range(6)]
        write(root / f"SUN397/{part}_01.txt", "\n".join(names) + "\n")
        for name in names:
            picture(root / f"SUN397{name}")
    picture(root / "SUN397/a/abbey/sun_unused.jpg")  # not in this split
    return 12, None, 12, ["/a/abbey", "/b/bar/indoor"]


def lay_aircraft(root):
    top = root / "fgvc-aircraft-2013b/data"
    write(top / "variants.txt", "707-320\nA300\n")
    for part in ("train", "val", "test"):
        rows = [(f"{part}{i}", ["707-320", "A300"][i % 2]) for i in range(12)]
        write(top / f"images_variant_{part}.txt", "\n".join(map(" ".join, rows)) + "\n")
        for name, _ in rows:
            picture(top / f"images/{name}.jpg")
    return 24, 12, 12, ["707-320", "A300"]


def lay_voc2007(root):
    top = root / "VOCdevkit/VOC2007"
    for part in ("train", "val", "test"):
        names = [f"{part}{i:03d}" for i in range(12)]
        write(top / f"ImageSets/Main/{part}.txt", "\n".join(names) + "\n")
        for c, column in (("cat", [1, -1, 0]), ("dog", [-1, 1, 1])):
            write(top / f"ImageSets/Main/{c}_{part}.txt", "".join(f"{n} {column[i % 3]:2d}\n" for i, n in enumerate(names)))
        for name in names:
            picture(top / f"JPEGImages/{name}.jpg")
            write(top / f"Annotations/{name}.xml", "<annotation/>")
    return 24, 12, 12, ["cat", "dog"]


def lay_dtd(root):
    for part in ("train", "val", "test"):
        names = [f"{c}/{part}{i}.jpg" for c in ("banded", "woven") for i in range(6)]
        write(root / f"dtd/dtd/labels/{part}1.txt", "\n".join(names) + "\n")
        for name in names:
            picture(root / f"dtd/dtd/images/{name}")
    return 24, 12, 12, ["banded", "woven"]


def lay_pets(root):
    for part in ("trainval", "test"):
        rows = [f"{c}_{part}{i} {k + 1} 1 1" for k, c in enumerate(("Abyssinian", "great_pug")) for i in range(6)]
        write(root / f"oxford-iiit-pet/annotations/{part}.txt", "\n".join(rows) + "\n")
        for row in rows:
            picture(root / f"oxford-iiit-pet/images/{row.split()[0]}.jpg")
    return 12, None, 12, ["Abyssinian", "Great Pug"]


def lay_caltech101(root):
    for c, n in (("BACKGROUND_Google", 33), ("ant", 35)):
        for i in range(1, n + 1):
            picture(root / f"caltech101/101_ObjectCategories/{c}/image_{i:04d}.jpg", i)
    return 60, 10, 8, ["BACKGROUND_Google", "ant"]


def mat(monkeypatch, files):
    """scipy.io.loadmat, of files that are there and hold nothing: torchvision's calls, without scipy."""
    scipy, io = types.ModuleType("scipy"), types.ModuleType("scipy.io")
    scipy.io, io.loadmat = io, lambda path, squeeze_me: files[Path(path).name]
    for name in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, getattr(sys.modules.get("none"), name, scipy if name == "scipy" else io))
    monkeypatch.setattr(torchvision.datasets.stanford_cars, "sio", io, raising=False)


def lay_cars(root, monkeypatch):
    if not hasattr(torchvision.datasets.stanford_cars, "StanfordCars"):
        pytest.skip("torchvision has changed")
    row = lambda i: {"fname": f"{i:05d}.jpg", "class": i % 2 + 1}
    files = {"cars_train_annos.mat": {"annotations": [row(i) for i in range(12)]},
             "cars_test_annos_withlabels.mat": {"annotations": [row(i) for i in range(12)]},
             "cars_meta.mat": {"class_names": type("Names", (), {"tolist": lambda self: ["Acura", "BMW"]})()}}
    mat(monkeypatch, files)
    for part, i in itertools.product(("train", "test"), range(12)):
        picture(root / f"stanford_cars/cars_{part}/{i:05d}.jpg")
    write(root / "stanford_cars/devkit/cars_train_annos.mat", "")
    write(root / "stanford_cars/devkit/cars_meta.mat", "")
    write(root / "stanford_cars/cars_test_annos_withlabels.mat", "")
    return 12, None, 12, ["Acura", "BMW"]


LAY = {"food101": lay_food101, "birdsnap": lay_tree("birdsnap", "test"), "places205": lay_tree("places205", "val"), "sun397": lay_sun397,
       "aircraft": lay_aircraft, "voc2007": lay_voc2007, "dtd": lay_dtd, "pets": lay_pets, "caltech101": lay_caltech101, "cars": lay_cars}


@pytest.mark.parametrize("name", LAY)
def test_data_sets_on_trees_as_torchvision_expects_them(name, tmp_path, monkeypatch):
    train_n, val_n, test_n, classes = LAY[name](tmp_path, *[monkeypatch] * (name == "cars"))
    args = args_of("--data", name, "--data-root", tmp_path)
    task, train, test = probe.load_task(args, name)
    assert (len(train), len(task.labels), len(test), len(task.test_labels)) == (train_n, train_n, test_n, test_n)
    assert list(train.classes) == classes and task.classes == 2 and task.metric == probe.TRANSFER[name].metric
    if val_n is None:  # BYOL's number is more than this tree has: a tenth
        assert len(task.held) == train_n // 10
    else:
        assert task.held.tolist() == list(range(train_n - val_n, train_n))
        if name != "caltech101":
            assert all("val" in os.fsdecode(path) for path in train[task.held].paths)
    assert len(set(task.rest.tolist()) | set(task.held.tolist())) == train_n == len(task.rest) + len(task.held)
    assert not set(train.paths.tolist()) & set(test.paths.tolist())
    for images, labels in ((train, task.labels), (test, task.test_labels)):  # every path is there and has its class
        for path, label in zip(images.paths, labels, strict=True):
            path = os.fsdecode(path)
            assert os.path.exists(path)
            if labels.ndim == 1 and name not in ("aircraft", "cars"):
                assert classes[label].strip("/").lower().replace(" ", "_") in path.lower()
    if name == "voc2007":  # cat: present, absent, difficult; dog: absent, present, present
        assert task.labels[:3].tolist() == [[1, 0], [0, 1], [-1, 1]]
    if name == "caltech101":
        assert [int((task.labels == c).sum()) for c in (0, 1)] == [30, 30] and [int((task.labels[task.held] == c).sum()) for c in (0, 1)] == [5, 5]
        again = probe.load_task(args_of("--data", name, "--data-root", tmp_path, "--seed", 9), name)[1]
        assert (again.paths == train.paths).all()


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="its lists need scipy, which is not there")
def test_flowers102(tmp_path):
    import numpy as np
    from scipy.io import savemat
    for i in range(1, 37):
        picture(tmp_path / f"flowers-102/jpg/image_{i:05d}.jpg")
    splits = {"trnid": np.arange(1, 13), "valid": np.arange(13, 25), "tstid": np.arange(25, 37)}
    savemat(tmp_path / "flowers-102/setid.mat", splits)
    savemat(tmp_path / "flowers-102/imagelabels.mat", {"labels": np.arange(36) % 2 + 1})
    task, train, test = probe.load_task(args_of("--data-root", tmp_path), "flowers102")
    assert len(train) == 24 and task.held.tolist() == list(range(12, 24)) and len(test) == 12


def test_squares_are_the_protocols_crops(tmp_path):
    """ImageNet: resize the shorter side to 256, crop 224. Transfer: resize it to 224, crop 224, bicubic."""
    path = tmp_path / "image.png"
    Image.fromarray(pictures(1, 24)[0].permute(1, 2, 0).numpy()).resize((640, 512), Image.BICUBIC).save(path)
    images = probe.images_of([path], [0], ["a"])
    pixels = data.read_image(path)
    resize, crop = torchvision.transforms.functional.resize, torchvision.transforms.functional.center_crop
    for share, bicubic, short in ((224 / 256, False, 256), (1, True, 224)):
        kind = torchvision.transforms.InterpolationMode.BICUBIC if bicubic else torchvision.transforms.InterpolationMode.BILINEAR
        square, row = probe.Squares(images, 224, share, bicubic)[0]
        expected = crop(resize(pixels, short, kind, antialias=True), 224)
        assert row == -1 and square.shape == (3, 224, 224) and (square.int() - expected.int()).abs().float().mean() < 1
        assert (square.int() - resize(pixels, [224, 224], antialias=True).int()).abs().float().mean() > 2, "not the whole image"


@pytest.mark.parametrize("size, transfer, expected", [(224, False, (224, 0.875, False)), (224, True, (224, 1, True)), (32, False, (32, 1, False))])
def test_which_squares_are_encoded(size, transfer, expected, monkeypatch):
    seen, kind = [], probe.Squares
    monkeypatch.setattr(probe, "Squares", lambda images, *how: (seen.append(how), kind(images, *how))[1])
    net = probe.Frozen(torch.nn.Flatten(), size, False, [0.0] * 3, [1.0] * 3)
    images = data.Images(pixels=pictures(5, 40))
    x = probe.encode(args_of(), net, images, transfer)
    assert seen == [expected] and x.shape == (5, 3 * size * size)
    side = 35 if expected[1] < 1 else 40
    whole = data.resize(images.pixels[3][:, (40 - side) // 2 :][:, :side, (40 - side) // 2 :][:, :, :side], size, transfer)
    close(x[3], whole.float().flatten() / 255)


# ---- whole probes ----


@pytest.mark.parametrize("protocol, more", [("lbfgs", []), ("knn", []), ("sgd", ["--cache-views", 2, "--lr-sweep", 0.1, 1]),
                                            ("lars", ["--cache-features"]), ("sgd", ["--lr", 0.3])])
def test_a_probe_and_its_folder(protocol, more, run_folder, tmp_path, capsys):
    sizes = ["--batch-size", 16, "--epochs", 2] if protocol in ("lars", "sgd") else []
    argv = [run_folder, *flags(protocol), *sizes, *more, "--out", tmp_path / "out"]
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    main(*argv)
    out = capsys.readouterr().out
    for told in ("60 of 60 tensors loaded", "source encoder", "pooled features of 128", "norm", f"protocol {protocol}", "16 px"):
        assert told in out
    assert ("lr 0.3 x 16/256 = 0.01875" in out) == ("--lr" in more)
    found = result(tmp_path / "out")
    assert 0 <= found["value"] <= 1 and found["protocol"] == protocol and found["test"] == 6 and found["train"] == 54
    assert found["rule"] == {"lbfgs": "l2 search", "knn": "fixed"}.get(protocol, "lr search" if "--lr-sweep" in more else "fixed")
    first, *lines = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert first["backbone"]["arch"] == "tiny" and len(lines) == {"lbfgs": 45, "knn": 0}.get(protocol, 4 if "--lr-sweep" in more else 2)
    stamp = (tmp_path / "out" / "result.json").stat().st_mtime_ns
    main(*argv)  # complete: nothing is done again, and the result is printed
    assert capsys.readouterr().out.splitlines()[-2:] == out.splitlines()[-2:]
    assert stamp == (tmp_path / "out" / "result.json").stat().st_mtime_ns
    assert before == {p.name: p.read_bytes() for p in run_folder.iterdir()}
    assert "there, 5 here" in refuse(capsys, *argv, "--seed", 5)


def test_a_probe_on_fresh_crops_resumes_exactly(run_folder, tmp_path, monkeypatch):
    argv = [run_folder, *flags("sgd"), "--batch-size", 16, "--epochs", 4, "--lr-sweep", 0.1, 1, "--out"]
    main(*argv, tmp_path / "a")
    save = probe.Run.save
    for stage in ("search", "final"):
        def interrupted(self, what, name, state, stage=stage):
            save(self, what, name, state)
            if what == stage and state["step"] == 6:
                os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(probe.Run, "save", interrupted)
        with pytest.raises(SystemExit) as stopped:
            main(*argv, tmp_path / "b")
        assert stopped.value.code == 130
    monkeypatch.setattr(probe.Run, "save", save)
    main(*argv, tmp_path / "b")
    assert result(tmp_path / "a") == result(tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()[1:]]
    assert [(x["stage"], x["epoch"]) for x in lines] == list(itertools.product(("search", "final"), (1, 2, 3, 4))), "went on, not anew"
    name = next((tmp_path / "a").glob("final-*.pt")).name
    a, b = (torch.load(tmp_path / x / name, weights_only=True)["heads"] for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_stored_features_are_not_computed_twice(run_folder, tmp_path, monkeypatch):
    argv = [run_folder, *flags("lbfgs"), "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(probe, "learn", lambda args, *rest: (os.kill(os.getpid(), signal.SIGTERM), probe.heed(args)))
        with pytest.raises(SystemExit):
            main(*argv)
    monkeypatch.setattr(probe, "encode", None)
    main(*argv)
    assert result(tmp_path)["train"] == 54


def test_frozen_weights_do_not_move_and_a_moved_one_is_found(run_folder, tmp_path, capsys, monkeypatch):
    argv = [run_folder, *flags("sgd"), "--batch-size", 16, "--epochs", 1, "--lr", 1, "--out"]
    nets, load = [], probe.load_backbone
    monkeypatch.setattr(probe, "load_backbone", lambda args: (nets.append(load(args)), nets[-1])[1])
    main(*argv, tmp_path / "a")
    expected = torch.load(run_folder / "backbone.pth", weights_only=True)
    assert all(torch.equal(v, expected[k]) for k, v in nets[0][0].backbone.state_dict().items())
    forward = probe.Frozen.forward

    def leaky(self, x):
        self.backbone.train()  # BN's running statistics would move
        return forward(self, x)

    monkeypatch.setattr(probe.Frozen, "forward", leaky)
    message = refuse(capsys, *argv, tmp_path / "b")
    assert "frozen tensors have moved" in message and "running_mean" in message
    assert not (tmp_path / "b" / "result.json").exists()


def test_a_probe_learns_what_can_be_learnt(tmp_path, run_folder):
    """Two colours are told apart by any network."""
    generator = rng(0, "colours")
    for part, n in (("train", 40), ("val", 20)):
        for i in range(n):
            colour = torch.rand(3, 16, 16, generator=generator) * 60 + torch.tensor([160.0, 40, 40] if i % 2 else [40.0, 40, 160]).view(3, 1, 1)
            path = tmp_path / "data" / part / ("red" if i % 2 else "blue") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colour.byte().permute(1, 2, 0).numpy()).save(path)
    for protocol, more in (("lbfgs", []), ("knn", []), ("sgd", ["--batch-size", 20, "--epochs", 10, "--lr", 300, "--cache-features"])):
        main(run_folder, "--data", tmp_path / "data", *flags(protocol), *more, "--out", tmp_path / protocol)
        assert result(tmp_path / protocol)["value"] == 1.0


def probe_in_pool(argv):
    try:
        probe.main([str(a) for a in argv])
    except SystemExit as e:
        return e.code
    return 0


@pytest.mark.parametrize("protocol, more", [("lbfgs", []), ("sgd", ["--lr-sweep", 0.05, 0.5]), ("lars", ["--cache-views", 2])])
def test_two_processes_give_the_result_of_one(protocol, more, run_folder, tmp_path, pool):
    sizes = ["--batch-size", 16, "--epochs", 3] if protocol in ("lars", "sgd") else []
    argv = [run_folder, *flags(protocol), *sizes, *more, "--out"]
    for world, name in ((1, "one"), (2, "two")):
        assert pool.run(world, probe_in_pool, [*argv, tmp_path / name]) == [0] * world, pool.stderr
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    for k, v in one.items():
        if k in ("iterations", "gradient"):  # of the last bits
            continue
        assert two[k] == (pytest.approx(v) if isinstance(v, float | dict) and k != "chosen" else v), k
    lines = [[json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]] for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys() and ("loss" not in a or a["loss"] == pytest.approx(b["loss"], rel=1e-3))


def test_nproc_is_the_third_way_to_launch(run_folder, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    argv = [sys.executable, ROOT / "linear_probe.py", run_folder, *flags("knn"), "--nproc", 2, "--out", tmp_path / "out"]
    done = subprocess.run([str(a) for a in argv], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr and done.stdout.count("tensors loaded") == 1, done.stderr
    assert result(tmp_path / "out")["knn"].keys() == {"5"}
    done = subprocess.run([str(a) for a in [*argv, "--data", tmp_path / "no"]], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("no such folder") == 1 and "Traceback" not in done.stderr


def test_transfer_prints_a_table_and_names_what_is_absent(run_folder, tmp_path, capsys, monkeypatch):
    for name in ("food101", "dtd", "voc2007"):
        LAY[name](tmp_path / "data")
    argv = [run_folder, "--transfer", "all", "--data-root", tmp_path / "data", "--workers", 0, "--device", "cpu", "--out"]
    main(*argv, tmp_path / "l2", "--max-iter", 10)
    table = capsys.readouterr().out.split("\n\n")[1]
    assert "lbfgs, l2 search" in table.splitlines()[0]
    rows = {line[:12].strip(): line[12:].split(None, 2) for line in table.splitlines()[1:-1]}
    assert len(rows) == 13 and rows["DTD"][0] == "80.2" and rows["VOC-07"][2].endswith("is another metric")
    found = json.loads((tmp_path / "l2" / "result.json").read_text())["results"]
    assert found.keys() == {"food101", "dtd", "voc2007"} and found["voc2007"]["metric"] == "11-point mAP"
    for title, name in (("Food-101", "food101"), ("DTD", "dtd"), ("VOC-07", "voc2007")):
        assert rows[title][1] == f"{100 * found[name]['value']:.1f}"
    assert rows["Cars"][1] == rows["Pets"][1] == "-" and "put a copy's" in rows["Cars"][2] and str(tmp_path) in rows["Cars"][2]
    main(*argv, tmp_path / "lr", "--protocol", "sgd", "--lr-sweep", 0.1, 1, "--batch-size", 6, "--epochs", 1)
    out = capsys.readouterr().out
    assert "sgd, lr search" in out and {r["rule"] for r in json.loads((tmp_path / "lr" / "result.json").read_text())["results"].values()} == {"lr search"}


# ---- wrong input ----


def test_wrong_checkpoints_are_refused(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, data_flags = (run_folder / "backbone.pth").read_bytes(), ["--data", "demo", "--out", "out", *FLAGS]
    (tmp_path / "part.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    picture(tmp_path / "image.png")
    for name in ("part.pth", "text.pth", "empty.pth", "image.png"):
        assert "not a whole checkpoint" in refuse(capsys, name, *data_flags)
    torch.save({"weight": torch.zeros(10, 128), "bias": torch.zeros(10)}, "head.pth")
    assert "no backbone" in refuse(capsys, "head.pth", *data_flags)
    torch.save({"a": 1}, "none.pth")
    assert "but no tensor" in refuse(capsys, "none.pth", *data_flags)
    torch.save([torch.zeros(3)], "list.pth")
    assert "holds a list" in refuse(capsys, "list.pth", *data_flags)
    torch.save({"student": {}, "args": argparse.Namespace(lr=1)}, "dino.pth")
    assert "holds argparse.Namespace" in refuse(capsys, "dino.pth", *data_flags)
    assert "no such file" in refuse(capsys, "nowhere", *data_flags) and "no such file" in refuse(capsys, ".", *data_flags)
    broken = torch.load(run_folder / "backbone.pth", weights_only=True)
    broken["bn1.bias"][0] = math.nan
    torch.save(broken, "nan.pth")
    assert "not finite" in refuse(capsys, "nan.pth", *data_flags)
    assert "has none" in refuse(capsys, run_folder / "backbone.pth", *data_flags, "--encoder", "target")
    torch.save(resnet_state("resnet18"), "resnet.pth")
    assert "--img-size: 7 is not in [8, " in refuse(capsys, "resnet.pth", *data_flags, "--img-size", 7)
    shutil.copytree(run_folder, "other")
    torch.save(resnet_state("resnet18"), "other/backbone.pth")
    message = refuse(capsys, "other", *data_flags)
    assert "does not fit tiny, its run's architecture" in message and "tensor(s) surplus: layer1.1" in message
    assert not Path("out").exists() and not Path("runs").exists()


def test_what_a_checkpoint_says_of_its_run_is_not_trusted(run_folder, tmp_path, capsys, monkeypatch):
    """Neither last.pt nor the args.json beside backbone.pth; no module but the six scripts is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text("raise SystemExit(77)")
    state = torch.load(run_folder / "last.pt", weights_only=True)
    args, last, argv = state["args"], tmp_path / "last.pt", [*flags("knn"), "--out", tmp_path / "out"]
    for change, words in (
        ({"method": "planted"}, "is of 'planted', and there are barlow_asym"), ({"method": "this"}, "put that script beside"),
        ({"method": "common.data"}, "put that script"), ({"method": 3}, "is of 3"), ({"method": None}, "is of None"),
        ({"format": 7}, f"has format 7, not {mocov2_asym.FORMAT}"), ({"format": None}, "has format None"),
        ({"args": {}}, "cannot be used"), ({"args": [1]}, "cannot be used"), ({"args": None}, "cannot be used"),
        ({"mean": [1.0]}, "cannot be used"), ({"std": "abc"}, "cannot be used"), ({"std": [0.0] * 3}, "are not finite"),
        ({"mean": [math.nan] * 3}, "are not finite"), ({"args": {**args, "arch": "resnet7"}}, "cannot be used"),
        ({"args": {**args, "arch": "vit_tiny"}}, "cannot be used"), ({"args": {**args, "img_size": "x"}}, "cannot be used"),
        ({"args": {**args, "img_size": -1}}, "cannot be used"), ({"args": {**args, "data": 7}}, "--data 7: no such folder"),
    ):
        torch.save({**state, **change}, last)
        assert words in refuse(capsys, last, *argv), change
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.copytree(run_folder, tmp_path / "other")
    about = (run_folder / "args.json").read_text()
    changed = [json.dumps({**json.loads(about), k: v}) for k, v in (("method", "planted"), ("args", []), ("mean", 1))]
    for text, words in zip([*changed, about[:100], "[]", ""], ["is of 'planted'", *["args.json beside it"] * 5], strict=True):
        (tmp_path / "other" / "args.json").write_text(text)
        assert words in refuse(capsys, tmp_path / "other", *argv), text
    assert not {"planted", "this"} & sys.modules.keys() and not (tmp_path / "out").exists()


def test_a_file_that_would_run_code_does_not(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    assert "would run the file's code" in refuse(capsys, tmp_path / "evil.pth", "--data", "demo")
    assert not (tmp_path / "ran").exists()


def test_wrong_flags_and_data_are_refused_before_any_work(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "loose" / "1.png")
    for i in range(12):
        picture(tmp_path / "one" / "train" / "cat" / f"{i}.png", i)

    def says(*argv):
        return refuse(capsys, run_folder, *argv, "--device", "cpu", "--workers", 0)

    assert "no such folder" in says("--data", "nowhere") and "add --download" in says("--data", "cifar10")
    assert "add --download" in says("--data", "food101", "--data-root", "d") and "into d/birdsnap" in says("--data", "birdsnap", "--data-root", "d")
    assert "no labels" in says("--data", "loose") and "no labels" in says("--data", "one")
    assert "--knn-k 55 is more than the 54 training images" in says("--protocol", "knn", "--knn-k", 55)
    assert "has 54 images to learn" in says("--protocol", "sgd", "--batch-size", 64)
    assert "has 49 images to learn" in says("--protocol", "sgd", "--lr-sweep", "--batch-size", 50)
    assert "--lr: nothing in --protocol lbfgs" in says("--lr", 1) and "--max-iter" in says("--protocol", "knn", "--max-iter", 5, "--knn-k", 5)
    assert "drop one" in says("--protocol", "sgd", "--lr", 1, "--lr-sweep") and "drop one" in says("--data", "demo", "--transfer", "dtd")
    assert "invalid choice" in says("--transfer", "imagenet") and "unrecognized" in says("--lrr", 3)
    assert "is not in" in says("--std", 0, 1, 1) and "is not in" in says("--mean", "nan", 1, 1)
    assert "is not in" in says("--seed", "9" * 20) and "--workers: 1000000000000 is not in" in says("--workers", 10**12)
    for device in ("tpu", "cpu:7", "cuda:x", "mps:0"):
        assert f"--device {device} is unknown" in refuse(capsys, run_folder, "--device", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "cuda:2, 1 process(es): torch sees 2 GPU" in refuse(capsys, run_folder, "--device", "cuda:2")
    assert "3 process(es): torch sees 2 GPU" in refuse(capsys, run_folder, "--device", "cuda", "--nproc", 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "--device mps: not available" in refuse(capsys, run_folder, "--device", "mps")
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        assert "exclude each other" in says("--nproc", 2)
    (tmp_path / "trunc").mkdir()
    for i in range(20):
        picture(tmp_path / "trunc" / "ab"[i % 2] / f"{i}.png", i)
    whole = (tmp_path / "trunc" / "a" / "0.png").read_bytes()
    (tmp_path / "trunc" / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    assert "1 unreadable" in says("--data", "trunc") and "0.png: repair or remove" in says("--data", "trunc")
    message = says("--transfer", "dtd", "birdsnap", "--data-root", "d")  # of all that are absent, in one line
    assert "dtd is not in" in message and "into d/birdsnap" in message
    written = {p.name for p in tmp_path.iterdir()} - {"loose", "one", "trunc"}
    assert not written, written


def test_too_little_memory_is_said_in_a_line(run_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(run_folder, *flags("knn"), "--img-size", 10**6, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and err.startswith("linear_probe: out of memory (") and err.count("\n") == 1, err


def test_weights_that_are_not_finite_after_the_last_step_are_no_result(run_folder, tmp_path, capsys, monkeypatch):
    """The loss of an epoch of one step is measured before it."""
    argv = [run_folder, *flags("sgd"), "--batch-size", 48, "--epochs", 1, "--lr", 3, "--out", tmp_path]
    monkeypatch.setattr(probe, "schedule", lambda *a: math.nan)
    assert "weights that are not finite: --lr 3.0 is too large" in refuse(capsys, *argv)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "result.json").exists()


def test_an_unreadable_image_stops_the_probe(run_folder, tmp_path, capsys):
    """Its place would be taken by another image under its label. Images of several sizes are read on the way."""
    folder = class_tree(tmp_path / "mixed", 60, sizes=(20, 24, 31))
    broken = sorted(folder.rglob("*.png"))[4]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(SystemExit) as stopped:
        main(run_folder, "--data", folder, *flags("knn"), "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and str(broken) in err and "repair or remove" in err
    assert not (tmp_path / "out" / "result.json").exists()


def test_out_of_another_probe_is_left_alone(run_folder, tmp_path, capsys):
    argv = [run_folder, *flags("knn"), "--out", tmp_path]
    main(*argv)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert "weights" in refuse(capsys, *argv, "--untrained") and "knn_k [5] there, [3] here" in refuse(capsys, *argv, "--knn-k", 3)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    main(*argv, "--knn-k", 3, "--overwrite")
    assert result(tmp_path)["knn"].keys() == {"3"}
    for name, text in (("args.json", "["), ("result.json", "["), ("result.json", '{"results": {"a": {}}}'), ("log.jsonl", "x}"),
                       ("log.jsonl", b"\xff\xfe{}\n")):
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "cannot be used" in refuse(capsys, *argv, "--knn-k", 3) and str(tmp_path) in refuse(capsys, *argv, "--knn-k", 3)
        path.write_bytes(whole)
    main(*argv, "--knn-k", 3)


def test_a_folder_in_use_is_refused(run_folder, tmp_path, capsys):
    """A lock is a process's, so the first is a process of its own."""
    argv = [run_folder, *flags("knn"), "--out", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        for more in ([], ["--overwrite"]):
            assert "is in use by another process; wait for it" in refuse(capsys, *argv, *more)
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
        first.communicate("\n")
    main(*argv)


def test_lars_is_the_one_of_common():
    assert probe.LARS is LARS and re.search(r"LARS\(groups.*adapt_1d=True", Path(probe.__file__).read_text())
