"""On a GPU, if there is one, a run is what it is on a CPU; it does not wait for it. In float64: as
for the number of processes, rounding decides nothing there."""

import importlib
import os

import pytest
import torch
from pool import SCRIPTS, SMALL, build, call, class_tree, free_port, small_args, small_images
from test_processes import ORIGINAL, OTHER, PREFERRED, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
CASES = [(script, flags) for script in SCRIPTS for flags in (PREFERRED, OTHER)]
CASES += [(script, ORIGINAL) for script in list(SCRIPTS)[1:]]
CASES += [("mocov3_asym", "--arch vit_tiny --multicrop-src")]


def run(script, out, flags):
    """Two steps and a measurement, on photographs of several sizes, with a loader."""
    images = class_tree(out.parent / "images", 48, sizes=(20, 24, 31))
    line = f"--data {images} --out {out} {SMALL} {SCRIPTS[script]} --bn-groups 4 --steps 2 "
    assert call(script, f"{line} --workers 1 {flags}") == (0, "")


@pytest.mark.parametrize("script, flags", CASES)
def test_a_run_is_that_of_a_cpu(script, flags, tmp_path, double):
    for device in ("cpu", "cuda"):
        run(script, tmp_path / device, f"{flags} --device {device} --amp off")
    same(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.parametrize("script", SCRIPTS)
def test_nccl_with_one_process(script, tmp_path, double, monkeypatch):
    flags = f"{PREFERRED} --device cuda --amp off"
    run(script, tmp_path / "alone", flags)
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free_port()}
    for name, value in launched.items():
        monkeypatch.setitem(os.environ, name, str(value))
    run(script, tmp_path / "nccl", flags)
    same(tmp_path / "alone", tmp_path / "nccl")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("script, flags", CASES)
def test_a_step_in_bf16_is_near_float32_and_never_waits(script, flags):
    module, losses = importlib.import_module(script), []
    for amp in ("off", "bf16"):
        args = small_args(module, f"{flags} --batch-size 64")
        args.amp = amp
        model = build(module, args).to(GPU)
        optimizer = module.Method.optimizer(args, model)
        batches = ((step, torch.arange(48).repeat(2)[:64]) for step in range(3))
        stream = module.views(args, small_images(), batches, GPU)
        for step in range(3):  # in the first, libraries allocate what they need
            if step:
                torch.cuda.set_sync_debug_mode("error")
            try:
                (src, tgt), generator = next(stream)
                loss, _ = model(src, tgt, 0.9, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all()
    assert losses[3].item() == pytest.approx(losses[0].item(), rel=0.05, abs=0.05)
