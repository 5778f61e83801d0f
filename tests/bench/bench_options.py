"""What torch's options would bring on a GPU: cudnn.benchmark; weights channels last, as the images are; images that are not.

    python tests/bench/bench_options.py
    python tests/bench/bench_options.py --cases "imagenet byol_asym 256"

Whole steps without logging, bf16, images in memory, which wait for the device at the end of a round alone, as train() does.
Images per second, medians over the rounds, in each of which all take turns; and their ratio to the scripts as they are."""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from bench import machine, table
from bench_step import Stepper

CASES = ("imagenet mocov2_asym 32 --bn-groups 1", "imagenet mocov2_asym 32", "imagenet mocov2_asym 256", "imagenet byol_asym 32",
         "imagenet byol_asym 256", "small mocov2_asym 512", "small byol_asym 512", "demo mocov2_asym 64", "demo byol_asym 64")
LAST, PLAIN = torch.channels_last, torch.contiguous_format
OPTIONS = {"as they are": (False, False, LAST), "benchmark": (True, False, LAST), "weights last": (False, True, LAST),
           "images not": (False, False, PLAIN)}


def stepper(recipe, script, batch, flags, last, device):
    cli = SimpleNamespace(recipe=recipe, batch_size=int(batch), device=device, amp="bf16" if device == "cuda" else "off")
    s = Stepper(script, flags, cli)
    s.taken_apart = False
    if last:
        s.model.to(memory_format=LAST)
    return s


def steps(s, n):
    """Images per second of n steps."""
    since = time.perf_counter()
    for _ in range(n):
        src, tgt, generator = s.make_views(next(s.steps))
        s.learn(src, tgt, generator)
        s.optimizer.step()
    if s.device.type == "cuda":
        torch.cuda.synchronize()
    return n * s.args.batch_size / (time.perf_counter() - since)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", default=CASES, help="recipe, script, batch, flags")
    p.add_argument("--device", default="cuda")
    p.add_argument("--images", type=int, default=2560, help="of a round, at most 20 steps")
    p.add_argument("--rounds", type=int, default=5)
    cli = p.parse_args()
    machine(1, cli.device)
    rows = [["images per second", "batch", *OPTIONS, *(f"{name} / as they are" for name in list(OPTIONS)[1:])]]
    for case in cli.cases:
        recipe, script, batch, *flags = case.split()
        several = [stepper(recipe, script, batch, " ".join(flags), last, cli.device) for last in (False, True)]
        found = {name: [] for name in OPTIONS}
        for _ in range(1 + cli.rounds):
            for name, (benchmark, last, images) in OPTIONS.items():
                torch.backends.cudnn.benchmark, torch.channels_last = benchmark, images  # as Encoder finds it
                found[name].append(steps(several[last], max(1, min(20, cli.images // int(batch)))))
        medians = [statistics.median(rates[1:]) for rates in found.values()]  # the first chooses kernels
        rows.append([" ".join([recipe, script, *flags]), batch, *(f"{x:.0f}" for x in medians), *(f"{x / medians[0]:.2f}" for x in medians[1:])])
    table(rows)


if __name__ == "__main__":
    main()
