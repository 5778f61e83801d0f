"""The processes of a run: which one this is, and what they exchange. Also for a run of one."""

import os
import sys

import torch
import torch.distributed as dist

from common.flags import check


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def mine():
    """The positions of the global batch that this process holds: every world-th."""
    return slice(rank(), None, world_size())


class AllSum(torch.autograd.Function):
    """Sum over processes, as a new tensor. An addend acts on the losses of all processes, so its
    gradient is the sum of theirs: right where the mean of the losses is minimised, as by DDP."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        if world_size() > 1:
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad)


class Gather(torch.autograd.Function):
    """The global batch (N, ...), in its order, of each process's (n, ...). Gradients: as above."""

    @staticmethod
    def forward(ctx, x):
        if world_size() == 1:
            return x.view_as(x)
        parts = x.new_empty(world_size(), *x.shape)
        dist.all_gather(list(parts), x.contiguous())
        return parts.transpose(0, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad)[mine()]


all_sum, gather = AllSum.apply, Gather.apply


def barrier():
    all_sum(torch.zeros(1))


def say(message):
    if rank() == 0:
        print(message, flush=True)


def check_launch(args):
    """Processes and devices; fills in --device and --workers."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc)), torch.cuda.device_count()
    check(args.nproc == 1 or "RANK" not in os.environ, "--nproc and torchrun exclude each other")
    check(args.device != "mps" or torch.backends.mps.is_available(), "no mps here; use cpu")
    args.device = args.device or ("cuda" if gpus else "cpu")
    check(args.device != "cuda" or here <= gpus,
          f"{here} process(es) here and {gpus} GPU(s): start fewer, or use --device cpu")
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        args.workers = min(8, max(1, cores // here))
