"""Random command lines, from a seed. Each must end in a step, or in one line that says why not."""

import importlib
import random
import shutil

import pytest
import torch
from pool import SCRIPTS, call, log_lines
from test_cli import small

VALUES = {  # those that a user may mean, and those that he may not
    "arch": "tiny tiny resnet18 resnet10 vit", "img_size": "8 16 17 0", "epochs": "1 2 100000",
    "steps": "1 2 0", "batch_size": "8 16 15 32 64 1 0", "lr": "0 0.03 1 1e4 -1", "wd": "0 1e-4 1",
    "warmup_epochs": "0 0.5 1 7", "seed": "0 1 99999999999 -1", "amp": "auto off bf16 fp16",
    "device": "cpu cuda tpu", "bn_groups": "1 2 4 8 3 16", "queue": "1 16 24", "ema": "0 0.9 1 1.1",
    "temperature": "0.1 1 0", "hidden": "8 16 0", "dim": "2 16 0", "layers": "1 2 3 0",
    "lambd": "0 0.01 -1", "lr_bias": "0 0.01", "negatives": "all targets some",
    "aug_src": "base weak strong mild", "aug_tgt": "base weak strong", "bn_scope": "projector all",
    "mean_enc": "1 2 3 0", "mean_enc_src": "1 2 0", "num_small": "1 2 0", "small_size": "8 12 0",
    "small_scale": "0.1,0.4 0.4,0.1 0,0", "large_scale": "0.3,1 1,1 1,2", "knn_every": "1 2 0",
    "save_every": "1 2", "log_every": "1 3 0", "recipe": "demo small imagenet large",
    "data_root": "nowhere", "nproc": "1 3 16", "init": "nowhere {other.pth}",
    "data": "{tree} {tree/class0} {empty} cifar10 nowhere.npz", "workers": "0 -1",
}
STRANGE = "1_000 99999999999999 nan inf -inf 1e400 x -3 0x10 1e3 2**3 😀".split()
LABOUR = "mean_enc", "mean_enc_src", "num_small", "img_size", "workers", "nproc"  # 1,000 take hours


def command(dice, defaults):
    """Up to seven flags with a value each, now and then a strange one."""
    flags = [k for k in defaults if k in VALUES or defaults[k] is False and k != "download"]
    words = []
    for name in dice.sample(flags, dice.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 7])):
        words.append("--" + name.replace("_", "-"))
        if name in VALUES:
            values = dice.choice(VALUES[name].split()).split(",")
            if dice.random() < 0.15 and name not in LABOUR:
                values[dice.randrange(len(values))] = dice.choice(STRANGE)
            words += values
    return " ".join(words)


def outcome(script, line, out):
    """"refused" or "trained", or an AssertionError."""
    code, said = call(script, line)
    if code:
        assert code == 2 and said.count("\n") == 1 and said.startswith(f"{script}: "), (line, said)
        assert len(said) > 30, (line, said)
        return "refused"
    assert not said, (line, said)
    args = importlib.import_module(script).parse_args(line.split())
    if args.dry_run:
        assert not out.exists(), line
        return "trained"
    last = log_lines(out)[-1]
    assert 1 <= last["step"] <= (args.steps or 10**9) and last["epoch"] <= args.epochs, line
    weights = torch.load(out / "last.pt", weights_only=True)["model"]
    assert all(x.isfinite().all() for x in weights.values()), line
    return "trained"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_command_lines(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tries = 30 if script == "mocov2_asym" else 6
    dice, counts = random.Random(script), {"refused": 0, "trained": 0}
    defaults = vars(importlib.import_module(script).parse_args([]))
    base = "--bn-groups 8 --steps 1 --knn-every 0"
    for _ in range(tries):
        line = small(script, tmp_path, f"{base} {command(dice, defaults)}")
        counts[outcome(script, line, tmp_path / "out")] += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert tries < 20 or min(counts.values()) > 0.1 * tries, counts  # else it tries one thing only
