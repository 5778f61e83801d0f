"""Views per second at 32 px on one core: images in memory through our batched path, against the per-image PIL pipeline.

    python tests/bench/bench_small.py

Both end in normalised float batches: crop, jitter, grey, flip, normalisation (MoCo v2's, without blur on small images)."""

import argparse
import itertools

import torch
from bench import compare, machine, measure, pil_view, table
from PIL import Image
from pool import pictures

import mocov2_asym as script
from common import data


class PILArrays(torch.utils.data.Dataset):
    """As torchvision's CIFAR10: an array in memory, a PIL image of each row, and two views of it."""

    def __init__(self, arrays, view):
        self.arrays, self.view = arrays, view

    def __getitem__(self, i):
        image = Image.fromarray(self.arrays[i])
        return self.view(image), self.view(image)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=9)
    args = p.parse_args()
    machine()
    images = data.Images(pictures(1024, 32), stats=data.CIFAR)
    theirs = PILArrays(images.pixels.permute(0, 2, 3, 1).numpy(), pil_view(32, (0.2, 1.0), blur=False))
    plan = script.plan_views(script.parse_args(["--recipe", "small"]))
    rows, steps = [["thousand views per second", "ours", "PIL", "ours / PIL", "(range)", "reach"]], itertools.count()
    for batch in (64, 512):
        def pil(batch=batch):
            return torch.utils.data.default_collate([theirs[i] for i in range(batch)])

        def ours(batch=batch):
            batches = [(next(steps), torch.arange(batch))]
            return next(data.stream(images, plan, batches, 0, slice(None), 0, "cpu"))

        a, b, *ratio = compare(measure({"PIL": pil, "ours": ours}, args.repeats), 2 * batch, digits=6)
        rows.append([f"batch {batch}", f"{1 / float(b):.2f}", f"{1 / float(a):.2f}", *ratio, 7])
    table(rows)


if __name__ == "__main__":
    main()
