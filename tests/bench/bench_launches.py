"""What a training step asks of a GPU, counted without one: kernels, copies, waits, exchanges, bytes.

    python tests/bench/bench_launches.py                               six scripts, MoCo v2's designs
    python tests/bench/bench_launches.py --worlds 8 --scripts byol_asym --flags "--symmetrize"

The device is torch's "meta", whose tensors have shapes and no numbers. What the host keeps is real, so
that masks choose as many images as in training. On meta, torch dispatches what it does on CUDA, but
autocast, which is emulated: convolutions and linear layers in bf16. A launch is an operation that is
neither a view nor an allocation; those over lists of tensors may start several kernels. Processes are
torch's fake group; the gradients' exchange by DistributedDataParallel, in few large pieces, is apart.

Columns: launches of each part (crops: their arrival from the loader; BN: forward, and backward where
synchronised; loss: the rest of forward); all of them, and as a multiple of "plain", the forward and
backward of the same networks with torch's own BatchNorm; copies from the host; waits, operations whose
result the host must have, in a step without logging and in the logging itself; exchanges; GB kept for
backward, and as a multiple of plain's."""

import argparse
import importlib
import itertools
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench import machine, table
from bench_step import torch_batch_norm
from pool import SCRIPTS
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import augment, data

META = torch.device("meta")
ALL_ON = "--multicrop-src --scalemix-src --aug-src strong --asym-aug --asym-bn --mean-enc 2"
DESIGNS = ("--multicrop-src", "--scalemix-src", "--aug-src strong", "--asym-bn", "--mean-enc 2", ALL_ON)
PARTS = "crops", "views", "source", "target", "BN", "loss", "backward", "optimiser"
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class Step(TorchDispatchMode):
    """Counts, by the part that is at work, what is dispatched within it."""

    def __enter__(self):
        self.launches, self.copies, self.exchanges, self.waits = Counter(), 0, 0, []
        self.part, self.kept = "loss", {}
        return super().__enter__()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, f._schema.name.split("::")[1]
        given = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        if META in given and (to_host or name == "_local_scalar_dense"):
            self.waits.append(name)
            return torch.zeros_like(args[0], device="cpu") if to_host else 1.0

        result = f(*args, **kwargs)
        got = {x.device for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        if META not in given | got:
            return result
        if f.namespace == "c10d":
            self.exchanges += 1
        elif not f.is_view and name not in NO_KERNEL:
            self.launches[self.part] += 1
            self.copies += name in ("_to_copy", "copy_") and torch.device("cpu") in given
        return result

    def within(self, part, function):
        """The function, whose launches count for this part."""
        def counted(*args, **kwargs):
            before, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before
        return counted

    def saving(self, model):
        """A context in which what autograd keeps is noted, but for the model's own tensors."""
        own = {x.untyped_storage()._cdata for x in model.state_dict().values()}

        def pack(x):
            storage = x.untyped_storage()
            if x.device == META and storage._cdata not in own:
                self.kept[storage._cdata] = storage
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def gigabytes(self):
        return sum(storage.nbytes() for storage in self.kept.values()) / 1e9


class Autocast(TorchFunctionMode):
    """What torch.autocast does to our encoders, on a device that it does not know."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f in (F.conv2d, F.linear):
            args = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in args]
        return f(*args, **kwargs or {})


@contextmanager
def processes(world):
    """This is one of so many processes, and the others only seem to answer."""
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    yield
    if world > 1:
        dist.destroy_process_group()


def count(name, flags, world, batch=32):
    """One step of a script with batch images in each process, and its networks' plain work: two Steps
    and the waits of logging."""
    script = importlib.import_module(name)
    flags = f"--data none --recipe imagenet --batch-size {batch * world} {flags}"
    args, step, plain = script.parse_args(flags.split()), Step(), Step()
    args.amp = "bf16"
    crops = [torch.zeros(batch, 3, view.size, view.size, dtype=torch.uint8)
             for view in augment.crops_of(script.plan_views(args))]
    images = SimpleNamespace(pixels=None, paths=(), report=lambda bad: None, stats=data.HALF)
    batches = ((i, torch.arange(batch * world)) for i in itertools.count())

    with ExitStack() as stack:
        def replace(owner, **new):
            for key, value in new.items():
                stack.enter_context(mock.patch.object(owner, key, value))

        stack.enter_context(processes(world))
        replace(torch, autocast=lambda *args, enabled: Autocast() if enabled else nullcontext())
        loaded = crops, [""] * batch  # as Crops has it, collated
        replace(torch.utils.data, DataLoader=lambda *args, **kwargs: itertools.repeat(loaded))
        replace(data, make_views=step.within("views", data.make_views))
        replace(script.BatchNorm, forward=step.within("BN", script.BatchNorm.forward))
        replace(script.SyncNorm, backward=staticmethod(step.within("BN", script.SyncNorm.backward)))

        torch.manual_seed(0)
        model = script.Method(args).to(META)
        optimizer = model.optimizer(args)
        for group in optimizer.param_groups:
            group["foreach"] = True  # torch's choice on CUDA
        replace(model.source, forward=step.within("source", model.source.forward))
        replace(model.target, forward=step.within("target", model.target.forward))

        views = data.stream(images, script.plan_views(args), batches, args.seed, script.mine(), 0, META)
        for _ in range(2):  # the first makes the optimiser's state
            with step:
                (src, tgt), generator = step.within("crops", next)(views)
                with step.saving(model):
                    loss, spreads = model(src, tgt, 0.99, generator)
                optimizer.zero_grad()
                step.within("backward", loss.backward)()
                step.within("optimiser", optimizer.step)()

        with Step() as logging:
            script.numbers(model, loss, spreads)

        replace(script.BatchNorm, forward=torch_batch_norm)
        predictor = getattr(model, "predictor", torch.nn.Identity())
        model.zero_grad()
        with plain:
            with plain.saving(model):
                loss = sum(predictor(z).square().mean() for z in model.source(src))
            with torch.no_grad():
                model.target(tgt)
            loss.backward()
    return step, plain, len(logging.waits)


def row(name, flags, world, batch):
    step, plain, logging = count(name, flags, world, batch)
    total = step.launches.total()
    return [f"{name.removesuffix('_asym')} {flags}".strip(), *(step.launches[part] for part in PARTS),
            total, f"{total / plain.launches.total():.2f}", step.copies, f"{len(step.waits)} / {logging}", step.exchanges,
            f"{step.gigabytes():.2f}", f"{step.gigabytes() / plain.gigabytes():.2f}"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    p.add_argument("--flags", default="", help="more flags of the scripts, in one string")
    p.add_argument("--worlds", nargs="+", type=int, default=[1, 8], help="numbers of processes")
    p.add_argument("--batch-size", type=int, default=32, help="images of each process")
    cli = p.parse_args()
    machine()
    for world in cli.worlds:
        rows = [[f"{world} process(es)", *PARTS, "all", "/ plain", "copies", "waits", "exchanges", "GB", "/ plain"]]
        for name in cli.scripts:
            for design in ("", *(DESIGNS if name == "mocov2_asym" and not cli.flags else ())):
                rows.append(row(name, f"{design} {cli.flags}".strip(), world, cli.batch_size))
        table(rows)


if __name__ == "__main__":
    main()
