"""On a GPU, if there is one, a run in float64 is that of a CPU, and no step waits for it."""

import importlib
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import SCRIPTS, build, call, class_tree, small_args, small_images
from test_processes import ORIGINAL, OTHER, PREFERRED, SYNC, argv, same

from common import data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = [(script, flags) for script in SCRIPTS for flags in (PREFERRED, OTHER)]
CASES += [(script, ORIGINAL) for script in list(SCRIPTS)[1:]]
CASES += [("mocov3_asym", "--arch vit_tiny --multicrop-src")]


@pytest.mark.parametrize("script, flags", CASES)
def test_a_run_is_that_of_a_cpu(script, flags, tmp_path, double):
    images = class_tree(tmp_path / "images", 48, sizes=(20, 24, 31))
    for device in ("cpu", "cuda"):
        more = f"--steps 2 --workers 1 --amp off --device {device}"
        assert call(script, argv(script, images, tmp_path / device, f"{flags} {more}")) == (0, "")
    same(tmp_path / "cpu", tmp_path / "cuda")


def sharing(*command):
    """As call(), in several processes on one GPU: NCCL wants one for each, gloo does not."""
    gloo = partial(dist.init_process_group, "gloo")
    torch.cuda.init()  # which looks at all devices
    with (mock.patch.object(torch.cuda, "device_count", return_value=2),
          mock.patch.object(torch.cuda, "set_device"),
          mock.patch.object(dist, "init_process_group", lambda backend, **more: gloo(**more))):
        return call(*command)


@pytest.mark.parametrize("script, flags", [
    *((script, SYNC) for script in SCRIPTS), ("mocov2_asym", PREFERRED),
    ("byol_asym", OTHER), ("simclr_asym", ORIGINAL)])
def test_two_processes_on_it_agree_with_one(pool, script, flags, tmp_path):
    images = class_tree(tmp_path / "images", 48)
    for world in (1, 2):
        line = argv(script, images, tmp_path / str(world), f"{flags} --steps 2 --amp off --device cuda")
        ends = pool.run(world, sharing, script, line, dtype=torch.float64)
        assert ends == [(0, "")] * world
    same(tmp_path / "1", tmp_path / "2")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("script, flags", CASES)
def test_a_step_in_bf16_is_near_float32_and_never_waits(script, flags, request):
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    module, losses = importlib.import_module(script), []
    for amp in ("off", "bf16"):
        args = small_args(module, f"{flags} --batch-size 64 --amp {amp}")
        model = build(module, args).to("cuda")
        optimizer = model.optimizer(args)
        batches = ((step, torch.arange(48).repeat(2)[:64]) for step in range(3))
        plan = module.plan_views(args)
        stream = data.stream(small_images(), plan, batches, args.seed, slice(None), 0, "cuda")
        for step in range(3):  # in the first, libraries allocate what they need
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            (src, tgt), generator = next(stream)
            loss, _ = model(src, tgt, 0.9, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    assert losses[3].item() == pytest.approx(losses[0].item(), rel=0.05, abs=0.05)
