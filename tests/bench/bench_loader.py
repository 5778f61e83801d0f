"""Worker time per image at 224 px: full-size JPEG files to what a worker sends, ours against the per-image PIL pipeline.

    python tests/bench/bench_loader.py --photos DIR      any folder of JPEG files; without it, made-up pictures

A PIL worker does all the augmentation. Ours decodes and crops; the rest is batched work for the training device,
measured in the second table: on a GPU it takes no worker's time, on a CPU it has to be added."""

import argparse
import itertools
import os
from dataclasses import replace

import bench
import numpy as np
import torch
from bench import compare, machine, measure, photographs, table
from PIL import Image
from pool import pictures
from torchvision import transforms as T

from common import augment, data
from common.augment import View, rng

LARGE, SMALL = (224, (0.2, 1.0)), (96, (0.05, 0.14))
LARGE_MULTI = 224, (0.14, 1.0)  # the large crops' scale with MultiCrop
DESIGNS = {  # name: crops, ScaleMix, the ratio to reach
    "two views": ([LARGE] * 2, False, 3), "ScaleMix (3 crops)": ([LARGE] * 3, True, 4),
    "MultiCrop (2 + 6)": ([LARGE_MULTI] * 2 + [SMALL] * 6, False, 5), "MeanEnc 2 (3 crops)": ([LARGE] * 3, False, 4)}


def crops_of(images, sizes):
    """Ours: row -> the crops of an image, of these sizes and shares of the area."""
    return data.Crops(images, [View(replace(augment.V2, scale=scale), size) for size, scale in sizes], seed=0)


def loader(paths, repeats):
    images = data.Images(paths=np.array([os.fsencode(path) for path in paths]))
    collate, n = torch.utils.data.default_collate, len(paths)
    rows = [["worker ms per image, collation included", "PIL", "ours", "PIL / ours", "(range)", "reach"]]
    for name, (crops, mix, reach) in DESIGNS.items():
        theirs = bench.PILImages(paths, [bench.pil_view(*crop) for crop in crops], mix)
        ours = crops_of(images, crops)
        work = {"PIL": lambda theirs=theirs: collate([theirs[i] for i in range(n)]),
                "ours": lambda ours=ours: collate([ours[0, i] for i in range(n)])}
        rows.append([name, *compare(measure(work, repeats), n), reach])
    decode = measure({"PIL": lambda: [Image.open(path).convert("RGB") for path in paths],
                      "ours": lambda: [data.read_image(path) for path in paths]}, repeats)
    rows.append(["of that, decoding (ours: to a tensor)", *compare(decode, n), ""])
    table(rows)


def large(repeats):
    """A camera's photograph, where few pixels of the file are needed."""
    path = photographs(None, 1, (3000, 4000))[0]
    images = data.Images(paths=np.array([os.fsencode(path)]))
    ours, theirs = crops_of(images, [LARGE] * 2), bench.PILImages([path], [bench.pil_view(*LARGE)] * 2)
    work = {"PIL": lambda: [theirs[0] for _ in range(5)], "ours": lambda: [ours[step, 0] for step in range(5)]}
    table([["worker ms per image of 4000 x 3000 pixels", "PIL", "ours", "PIL / ours", "(range)"],
           ["two views", *compare(measure(work, repeats), 5)]])


def photometric_part(repeats):
    """What is left for the training device: jitter, grey, blur, flip, normalisation, float conversion."""
    n, steps = 64, itertools.count()
    rows = [["photometric ms per view on the CPU", "PIL", f"ours, batch {n}", "PIL / ours", "(range)"]]
    for size, blur in ((32, False), (224, True)):
        recipe, x = replace(augment.V2, blur=0.5 * blur), pictures(n, size)
        pil, transform = [Image.fromarray(v.permute(1, 2, 0).numpy()) for v in x], T.Compose(bench.photometric(blur))
        work = {"PIL": lambda pil=pil, transform=transform: torch.stack([transform(image) for image in pil]),
                "ours": lambda x=x, plan=[[[View(recipe, size)]], []]: augment.make_views(
                    plan, [x.float() / 255], n, rng(0, next(steps)), bench.IMAGENET, slice(None))}
        rows.append([f"{size} px, {'with' if blur else 'without'} blur", *compare(measure(work, repeats), n)])
    table(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", help="a folder of JPEG files")
    p.add_argument("--images", type=int, default=24, help="images per repeat")
    p.add_argument("--repeats", type=int, default=7)
    args = p.parse_args()
    machine()
    loader(photographs(args.photos, args.images), args.repeats)
    large(args.repeats)
    photometric_part(args.repeats)


if __name__ == "__main__":
    main()
