"""Where a training step's time goes, for each script and design: the networks' own forward and backward, and the rest.

    python tests/bench/bench_step.py                                     six scripts, the demo recipe, one thread
    python tests/bench/bench_step.py --scripts mocov2_asym --designs     MoCo v2 with each design
    python tests/bench/bench_step.py --recipe small --batch-size 64
    python tests/bench/bench_step.py --recipe imagenet --device cuda --amp bf16                        on a GPU

"networks": the same backbones, projectors and predictor with torch's own BatchNorm on views that are there already,
source forward and backward, target forward. Everything else is overhead: crops and augmentation of images in memory
(crops and views), the target's EMA, virtual-device BatchNorm, loss, queue and shuffle (the method), optimiser and logging.
"ready img/s" is the networks' own rate. A step is taken apart as train() takes it; on a GPU by waiting for the device after
each part. "waits" counts the places in a step without logging at which the host waits for the device; "idle" is the GPU's
share of the time without a kernel, in steps that are not taken apart, "GB" their peak memory. "views ops" and "step ops"
count the operations that torch dispatches for the views and for the whole of such a step: on a GPU about as many kernels."""

import argparse
import copy
import importlib
import itertools
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from bench import machine, measure, table
from pool import SCRIPTS, pictures
from torch.utils._python_dispatch import TorchDispatchMode

from common import augment, data
from common.augment import rng

DESIGNS = ("", "--multicrop-src", "--scalemix-src", "--asym-aug", "--aug-src strong", "--asym-bn", "--mean-enc 2",
           "--multicrop-src --asym-bn --mean-enc 2")
PARTS = ("crops", "views", "EMA", "method", "optimiser", "logging")
EVERY = slice(None)  # of the global batch: there is one process


class Count(TorchDispatchMode):
    """Counts the operations that are dispatched within it, but those that only look at a tensor in another way."""

    def __enter__(self):
        self.n = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += not function.is_view
        return function(*args, **kwargs or {})


class Stepper:
    """One training run, a step at a time, with the seconds of each part of a step."""

    def __init__(self, name, flags, cli):
        self.script, self.device = importlib.import_module(name), torch.device(cli.device)
        batch = ["--batch-size", str(cli.batch_size)] if cli.batch_size else []
        self.args = a = self.script.parse_args(["--data", "none", "--recipe", cli.recipe, *batch, *flags.split()])
        a.amp = cli.amp
        torch.manual_seed(0)
        self.model = self.script.Method(a).to(self.device)
        self.optimizer = self.model.optimizer(a)
        self.images = data.Images(pictures(2 * a.batch_size, 32 if a.img_size <= 64 else a.img_size), stats=data.HALF)
        self.plan, self.steps = self.script.plan_views(a), itertools.count()
        steps = ((s, torch.arange(a.batch_size) + s % 2 * a.batch_size) for s in itertools.count())
        self.crops = data.crop(self.images, augment.crops_of(self.plan), steps, 0, EVERY, 0, self.device)
        self.taken_apart = True
        self.seconds, self.mark = {part: [] for part in ("views", "crops", "EMA", "rest", "optimiser", "logging")}, 0.0
        self.views = self.make_views(0)
        self.plain, self.grouped = copy.deepcopy(self.model), copy.deepcopy(self.model)
        for bn in (m for m in self.plain.modules() if isinstance(m, self.script.BatchNorm)):
            bn.forward = lambda x, bn=bn: torch_batch_norm(bn, x)

    def lap(self, part):
        if not self.taken_apart:
            return
        now = clock(self.device)
        if part:
            self.seconds[part].append(now - self.mark)
        self.mark = now

    def make_views(self, step):
        """What data.stream() does, in two parts."""
        self.lap(None)
        crops = next(self.crops)
        self.lap("crops")
        generator = rng(0, "views", step)
        sides = augment.make_views(self.plan, crops, self.args.batch_size, generator, self.images.stats, EVERY)
        self.lap("views")
        return *sides, generator

    def step(self):
        """What train() does between two lines of its log, and the logging's share of one step."""
        src, tgt, generator = self.make_views(next(self.steps))
        self.script.update_target(self.model.target, self.model.source, 0.99)  # forward() does it once more, below
        self.lap("EMA")
        loss, spreads = self.learn(src, tgt, generator)
        self.lap("rest")
        self.optimizer.step()
        self.lap("optimiser")
        self.script.numbers(self.model, loss, spreads)
        self.lap("logging")

    def learn(self, src, tgt, generator):
        loss, spreads = self.model(src, tgt, 0.99, generator)
        self.optimizer.zero_grad()
        loss.backward()
        return loss, spreads

    def operations(self):
        """How many a step without logging dispatches: for its views, and in all."""
        with Count() as views:
            sides = self.make_views(0)
        with Count() as rest:
            self.learn(*sides)
            self.optimizer.step()
        return views.n, views.n + rest.n

    def networks(self, model):
        """The networks' own work on this step's views; with self.plain without virtual devices."""
        src, tgt, _ = self.views
        predictor = getattr(model, "predictor", torch.nn.Identity())
        z = [predictor(z) for z in model.source(src)]
        with torch.no_grad():
            model.target(tgt)
        model.zero_grad()
        sum(x.square().mean() for x in z).backward()
        clock(self.device)

    def gpu(self, steps=10):
        """Peak memory in GB, and the GPU's idle share, over steps that wait for it at their end alone, as train()'s do."""
        if self.device.type != "cuda":
            return "-", "-"
        self.taken_apart = False
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            since = clock(self.device)
            for _ in range(steps):
                src, tgt, generator = self.make_views(next(self.steps))
                self.learn(src, tgt, generator)
                self.optimizer.step()
            seconds = clock(self.device) - since
        self.taken_apart = True
        busy = sum(e.self_device_time_total for e in profiler.key_averages()) / 1e6
        return f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.2f}", f"{1 - busy / seconds:.0%}"

    def waits(self):
        """How often a step without logging waits for the GPU, as far as torch tells."""
        if self.device.type != "cuda":
            return "-"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            generator = rng(0, "views", 0)
            crops = next(self.crops)
            sides = augment.make_views(self.plan, crops, self.args.batch_size, generator, self.images.stats, EVERY)
            self.learn(*sides, generator)
            self.optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(w.message) for w in caught)


def torch_batch_norm(bn, x):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, bn.momentum, bn.eps)


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def row(name, flags, cli):
    s = Stepper(name, flags, cli)
    times = measure({"step": s.step, "plain": lambda: s.networks(s.plain), "grouped": lambda: s.networks(s.grouped)},
                    cli.repeats, lambda: clock(s.device))
    own, parts = times["plain"], {k: v[-cli.repeats:] for k, v in s.seconds.items()}
    parts["logging"] = [x / s.args.log_every for x in parts["logging"]]  # logged once in so many steps
    rests = zip(parts.pop("rest"), parts["EMA"], own, strict=True)
    parts["method"] = [rest - ema - networks for rest, ema, networks in rests]  # forward() holds an EMA
    whole = [sum(seconds) for seconds in zip(own, *parts.values(), strict=True)]  # of each round
    overhead = sorted(1 - a / b for a, b in zip(own, whole, strict=True))
    bn = statistics.median(a / b for a, b in zip(times["grouped"], own, strict=True))
    shares = [statistics.median(a / b for a, b in zip(parts[k], whole, strict=True)) for k in PARTS]
    step, groups = statistics.median(whole), s.args.bn_groups
    return [f"{name.removesuffix('_asym')} {flags}".strip(), s.args.batch_size, f"{s.args.batch_size / step:.0f}",
            f"{s.args.batch_size / statistics.median(own):.0f}", f"{1e3 * step:.0f}", *(f"{x:.1%}" for x in shares), f"{statistics.median(overhead):.1%}",
            f"({overhead[0]:.0%} to {overhead[-1]:.0%})", f"{bn:.2f}" if groups > 1 else "1 group", *s.gpu(), s.waits(),
            *s.operations()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    p.add_argument("--designs", action="store_true", help="each design, not only the baseline")
    p.add_argument("--flags", default="", help="more flags of the scripts, in one string")
    p.add_argument("--recipe", choices=("demo", "small", "imagenet"), default="demo")
    p.add_argument("--batch-size", type=int, help="default: the recipe's")
    p.add_argument("--device", default="cpu")
    p.add_argument("--amp", choices=("off", "bf16"), default="off")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=21)
    cli = p.parse_args()
    machine(cli.threads, cli.device)
    if cli.amp != "off":
        print(f"amp {cli.amp}; compare with a run without\n")
    rows = [[f"{cli.recipe} recipe", "batch", "img/s", "ready img/s", "ms", *PARTS, "overhead", "(range)", "BN", "GB", "idle", "waits",
             "views ops", "step ops"]]
    for name in cli.scripts:
        for design in DESIGNS if cli.designs else ("",):
            groups = "--bn-groups 8" if "bn" in design and name != "mocov2_asym" else ""
            rows.append(row(name, f"{design} {groups} {cli.flags}".strip(), cli))
    table(rows)
    print(f"Medians of {cli.repeats} rounds, in each of which the step, the networks alone and those with virtual devices take\n"
          "turns; shares are of the round's step. BN: networks with virtual-device BatchNorm / with torch's.")


if __name__ == "__main__":
    main()
