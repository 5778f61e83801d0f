"""The linear probe's sweeps against plain runs, on one core: ten learning rates, and SimCLR's 45 strengths of l2.

    python tests/bench/bench_probe.py

A sweep trains ten classifiers on one pass of the backbone over random crops; the rival makes ten runs, as a script without a
sweep asks for. Both see the same crops. For l2, both solve the same problems on stored features; the sweep starts each fit at the
last one, the rival at zero. "differ": the largest difference between the accuracies that the two find, in points."""

import argparse
import time
from types import SimpleNamespace

import torch
from bench import compare, machine, measure, table
from torchvision.transforms import Normalize

import linear_probe as probe
from common import data, resnet, transfer

LRS = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]


# a probe that writes nothing
probe.save = probe.log = lambda *args, **more: None


def sweep(n, epochs, repeats):
    """The demo recipe's network as initialised, on n demo images of 32 px: the least that a pass can cost."""
    args = SimpleNamespace(protocol="sgd", batch_size=64, epochs=epochs, seed=0, workers=0,
                           device=torch.device("cpu"), transfer=None, out="nowhere", size=32)
    images, _, test = data.load("demo")
    images, test = images[range(n)], test[range(256)]
    torch.manual_seed(0)
    backbone, _ = resnet.build("tiny", 32, torch.nn.BatchNorm2d)
    net = torch.nn.Sequential(Normalize(*data.HALF), backbone).requires_grad_(False).eval()
    task = SimpleNamespace(name="demo", metric="top-1", classes=10, images=images, labels=images.labels, x=None,
                           test_x=probe.encode(args, net, test), test_labels=test.labels)
    found = {}

    def train(lrs):
        return probe.train(args, net, task, "final", lrs)

    def ten_runs():
        found["rival"] = {lr: train([lr])[lr] for lr in LRS}

    def one_sweep():
        found["ours"] = train(LRS)

    cells = compare(measure({"rival": ten_runs, "ours": one_sweep}, repeats), 1, unit=1)
    differ = max(abs(found["rival"][lr] - found["ours"][lr]) for lr in LRS)
    return [f"10 learning rates, the demo's network, {n} images, {epochs} epochs", *cells, f"{100 * differ:.2f}", 6]


def l2(n, d, repeats):
    """n features of d channels, of ten classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    x = (torch.randn(10, d, generator=generator)[labels] * 0.3 + torch.randn(n, d, generator=generator)).double()
    x, held, labels, held_labels = x[n // 5 :], x[: n // 5], labels[n // 5 :], labels[: n // 5]
    found = {}

    def fits(name, warm):
        fit, found[name] = None, []
        for strength in probe.L2_SWEEP:
            fit = probe.fit_l2(x, labels, 10, strength, fit if warm else None, 100)
            found[name].append(transfer.top1(fit.predict(held), held_labels))

    work = {"rival": lambda: fits("rival", False), "ours": lambda: fits("ours", True)}
    cells = compare(measure(work, repeats), 1, unit=1)
    differ = abs(max(found["rival"]) - max(found["ours"]))
    return [f"45 strengths of l2, {n} features of {d} channels", *cells, f"{100 * differ:.2f}", ""]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=512)
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    machine()
    begun = time.time()
    table([["seconds", "plain", "sweep", "plain / sweep", "(range)", "differ", "reach"],
           sweep(args.images, args.epochs, args.repeats), l2(2000, 128, args.repeats)])
    print(f"the best of the 45, not each, is compared for l2; measured in {time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
