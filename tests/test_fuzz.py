"""Random command lines, from a seed. Each must end in a step, or in one line that says why not."""

import argparse
import importlib
import io
import json
import random
import shutil
import signal
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from pool import SCRIPTS, SMALL, class_tree, log_lines

SENSIBLE = {  # values that a user may mean; mocov2's, which the other scripts share as far as they have the flag
    "--arch": ["tiny", "tiny", "tiny", "resnet18", "resnet10", "vit", ""], "--img-size": [8, 16, 17, 32, 7, 0],
    "--epochs": [1, 2, 3, 100000], "--steps": [1, 2, 3, 0], "--batch-size": [8, 16, 15, 32, 64, 1, 0], "--lr": [0, 0.03, 1, 1e4, -1],
    "--wd": [0, 1e-4, 1, -0.1], "--warmup-epochs": [0, 0.5, 1, 7], "--seed": [0, 1, 2**40, -1], "--workers": [0, 1, -1],
    "--amp": ["auto", "off", "bf16", "fp16", "fp8"], "--device": ["cpu", "cuda", "cuda:3", "mps", "tpu", "cpu:x"],
    "--bn-groups": [1, 2, 4, 8, 3, 16], "--queue": [1, 16, 24, 1000], "--ema": [0, 0.9, 1, 1.1], "--temperature": [0.1, 1, 0],
    "--hidden": [8, 16, 0], "--dim": [1, 2, 16, 0], "--aug-src": ["base", "weak", "strong", "mild"],
    "--aug-tgt": ["base", "weak", "strong", "mild"], "--bn-scope": ["projector", "all"], "--mean-enc": [1, 2, 3, 0],
    "--mean-enc-src": [1, 2, 0], "--num-small": [1, 2, 0], "--small-size": [8, 12, 64], "--small-scale": [(0.1, 0.4), (0.4, 0.1), (0, 0)],
    "--large-scale": [(0.3, 1), (1, 1), (1, 2)], "--knn-every": [1, 2, 0], "--save-every": [1, 2], "--log-every": [1, 3, 0],
    "--recipe": ["demo", "small", "imagenet", "large"], "--data-root": ["nowhere"], "--nproc": [1, 3, 16],
    "--show-views": ["views.png", "nowhere/views.png", "views.xyz"],
}
STRANGE = ["1_000", "9" * 30, "nan", "inf", "-inf", "1e400", "", " ", "x", "-3", "0", "0x10", "1e3", "١٢", "2**3", "--", "😀"]
EVALUATION = {  # of the probe and the variance, beside what they share with the above
    "--encoder": ["source", "target", "both"], "--mean": [(0.5, 0.5, 0.5), (0, 0, 1), (9, 9)], "--std": [(1, 1, 1), (0.2, 0.2, 0)],
    "--transfer": ["dtd", "cifar10", ("dtd", "pets"), "imagenet"], "--epochs": [1, 2, 3, 0], "--protocol": ["lars", "sgd", "lbfgs", "knn", "svm"],
    "--lr-sweep": [(0.1, 1), (3,), (0, -1)], "--schedule": ["cosine", "step", "linear"], "--cache-views": [1, 2, 0], "--batch-size": [8, 16, 15, 64, 0],
    "--max-iter": [1, 3, 0], "--knn-k": [(3,), (1, 5), (500,), (0,)], "--views": [2, 3, 1], "--images": [16, 17, 5, 0], "--img-size": [8, 16, 1, 10**5, 0],
    "--designs": ["baseline", "strong,weak", "mean-enc-3", "multicrop", "sync-bn", "sync-bn-all", "tgt-recipe", "weak,", "mean-enc-0"],
    "--plot": ["f.xyz", "nowhere/f.png"], "--device": SENSIBLE["--device"] + ["cpu:7"], "--workers": [0, 1, 10**12],
    "checkpoint": ["run"] * 5 + ["run/last.pt"] * 5 + ["run/backbone.pth", "cut.pt", "list.pt", "edited.pt", "nowhere"],
}
LABOUR = "--mean-enc", "--mean-enc-src", "--num-small", "--img-size"  # 1,000 of these are no mistake, but hours
SECONDS = 600  # after which a case hangs, on a busy machine too


def command(dice, parser, places):
    """One random command line: flags of a small run, which later ones override, and up to seven others."""
    actions = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "out", "data", "download")]
    argv = ["--data", dice.choices(*zip(*places.items(), strict=True))[0], "--steps", "1", "--arch", "tiny", "--img-size", "16",
            "--batch-size", "16", "--workers", "0", "--bn-groups", dice.choice("248"), "--recipe", "small", "--knn-every", "50"]
    names = {o for a in actions for o in a.option_strings}
    argv += [word for name, value in (("--queue", 24), ("--hidden", 16), ("--dim", 8)) if name in names for word in (name, str(value))]
    argv += flags(dice, dice.sample(actions, dice.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 7])), SENSIBLE, LABOUR)
    if dice.random() < 0.05:
        argv.insert(dice.randrange(len(argv)), dice.choice(["--mean-ecn", "--arhc=tiny", "surplus", "-v", "--no-download"]))
    return argv


def flags(dice, actions, values, labour):
    """Words that give each of these flags a value, now and then a strange one."""
    argv = []
    for action in actions:
        name = action.option_strings[0]
        if action.nargs == 0:
            argv.append(name)
            continue
        value = dice.choice(values.get(name, [1, 0.5, 0]))
        words = [str(v) for v in (value if isinstance(value, tuple) else [value])]
        if dice.random() < 0.15 and not dangerous(name):
            words[dice.randrange(len(words))] = dice.choice(STRANGE[2:] if name in labour else STRANGE)
        argv += [f"{name}={words[0]}"] if len(words) == 1 and dice.random() < 0.5 else [name, *words]
    return argv


def dangerous(name):
    """Flags whose number may fill this machine: 1,000 loader workers are what the user asked for."""
    return name in ("--workers", "--show-views", "--nproc")


def late(number, frame):
    raise TimeoutError(f"it hangs: more than {SECONDS} s")


def call(module, argv):
    """Runs a command line in this process: the exit code. Raises AssertionError unless it succeeds in silence, or fails in a line."""
    stdout, stderr = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    state = torch.get_default_dtype(), torch.is_grad_enabled()
    code = None
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "This DataLoader will create")  # of a machine with one core
            module.main(argv)
    except SystemExit as e:
        code = e.code
    except BaseException:
        raise AssertionError(f"{argv}\n{traceback.format_exc()}") from None
    finally:
        signal.alarm(0)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == state
    said = stderr.getvalue()
    if code:
        assert code in (1, 2) and said.count("\n") == 1 and said.startswith(f"{module.__name__}: ") and len(said) > 30, (argv, code, said)
    else:
        assert not said, (argv, said)
    return code


def outcome(module, argv, out):
    """Returns "refused", "stopped" or "trained", or raises AssertionError."""
    if call(module, [*argv, "--out", str(out)]):
        return "refused" if not (out / "last.pt").exists() else "stopped"
    args = module.parse_args([*argv, "--out", str(out)])
    if args.show_views or args.dry_run:
        assert not out.exists() and (not args.show_views or Path(args.show_views).stat().st_size > 100), argv
        return "trained"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps, batch = args.steps or 10**9, args.batch_size
    assert lines[-1]["step"] == min(steps, args.epochs * (lines[0]["images"] // batch)) >= 1, argv
    about = json.loads((out / "args.json").read_text())["args"]
    for k, v in vars(args).items():  # what was asked for is what was run
        assert k == "knn_asked" or k not in about or about[k] == (list(v) if isinstance(v, tuple) else v), (k, argv)
    weights = torch.load(out / "last.pt", weights_only=True)["model"]
    assert all(x.isfinite().all() for x in weights.values()), argv
    return "trained"


def run(folder, tries, seed, script="mocov2_asym"):
    """Tries command lines; returns what came of them in a sentence. Raises AssertionError for the first that is wrong."""
    module, dice, counts = importlib.import_module(script), random.Random(seed), {}
    trees = class_tree(folder / "same", 32), class_tree(folder / "mixed", 32, (20, 24, 31)), folder / "nowhere"
    places = dict(zip(map(str, trees), (6, 3, 1), strict=True)) | {"demo": 0.03, "cifar10": 0.2}
    for number in range(tries):
        argv = [a.replace("views.", f"{folder}/views.").replace("nowhere/", f"{folder}/nowhere/") for a in
                command(dice, module.make_parser(), places)]
        result = outcome(module, argv, folder / f"fuzz{number}")
        counts[result] = counts.get(result, 0) + 1
        shutil.rmtree(folder / f"fuzz{number}", ignore_errors=True)
    assert min(counts.get("trained", 0), counts.get("refused", 0)) > 0.15 * tries, counts  # else it tries one thing only
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) + ", no traceback, no hang"


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_lines(script, tmp_path, monkeypatch):
    """drill.py tries more, from another seed."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path, 60 if script == "mocov2_asym" else 6, 0, script)


# ---- the probe, and the variance of encodings ----


BASES = {  # command lines that end in a result, and the images for them
    "linear_probe": (["--protocol knn --knn-k 3", "--protocol lbfgs --knn-k 3 --max-iter 3", "--protocol sgd --batch-size 16 --epochs 1",
                      "--protocol lars --batch-size 16 --epochs 1 --cache-features"], ["same", "same", "same", "mixed", "mixed", "nowhere"]),
    "variance_ref": (["--views 2 --designs baseline", "--views 2 --designs scalemix"], ["same/class0"] * 5 + ["same", "nowhere"]),
}


def checkpoints(folder):
    """Images, the folder of a run on them, and checkpoints that are cut short, of another kind, or edited."""
    images = class_tree(folder / "same", 96), class_tree(folder / "mixed", 48, (20, 24, 31))
    line = f"--data {images[0]} --out {folder}/run --steps 1 {SMALL.replace('--small-size 8 ', '')} {SCRIPTS['mocov2_asym']}"
    with redirect_stdout(io.StringIO()):
        importlib.import_module("mocov2_asym").main(line.split())
    last = folder / "run" / "last.pt"
    state = torch.load(last, weights_only=True)
    (folder / "cut.pt").write_bytes(last.read_bytes()[:5000])
    torch.save([state], folder / "list.pt")
    torch.save({**state, "args": {**state["args"], "img_size": "x"}}, folder / "edited.pt")


def measured(script, argv, out):
    """What a command line left must be what it asked for; its flags are read here anew."""
    p = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind in (("--views", int), ("--images", int), ("--designs", str), ("--protocol", str), ("--epochs", int)):
        p.add_argument(name, type=kind)
    asked, _ = p.parse_known_args(argv)
    if script == "variance_ref":
        found = json.loads(out.read_text())
        assert found["views"] == asked.views and found["images"] == min(32, asked.images or 32), argv
        assert asked.designs == "all" or found["designs"].keys() == {"baseline", *asked.designs.split(",")}, argv
        assert all(0 < x["v"] < x["total"] < 1 and len(x["v_i"]) == found["images"] for x in found["designs"].values()), argv
        return
    results = json.loads((out / "result.json").read_text())["results"]
    assert results and all(0 <= r["value"] <= 1 and r["protocol"] == asked.protocol for r in results.values()), argv
    stages = {line.get("stage") for line in log_lines(out)}
    assert len(log_lines(out)) == {"knn": 0, "lbfgs": 45}.get(asked.protocol, len(stages) * (asked.epochs or 0)), argv


def evaluate(folder, tries, seed, script):
    """run(), for the probe and the variance."""
    module, dice, counts = importlib.import_module(script), random.Random(seed), {"refused": 0, "measured": 0}
    checkpoints(folder)
    actions = [a for a in module.make_parser()._actions if a.option_strings and a.dest not in ("help", "out", "data", "download", "nproc")]
    for number in range(tries):
        base, images = map(dice.choice, BASES[script])
        argv = [f"{folder}/{dice.choice(EVALUATION['checkpoint'])}", "--workers", "0", "--device", "cpu", *base.split()]
        argv += ["--data", f"{folder}/{images}"] * (dice.random() < 0.9)
        some = dice.sample(actions, dice.choice([0, 0, 0, 1, 1, 1, 2, 3]))
        argv += flags(dice, some, SENSIBLE | EVALUATION, (*LABOUR, "--views", "--cache-views", "--epochs"))
        argv = [a.replace("nowhere/", f"{folder}/nowhere/").replace("f.xyz", f"{folder}/f.xyz") for a in argv]
        out = folder / f"fuzz{number}"
        refused = call(module, [*argv, "--out", str(out)])
        if not refused:
            measured(script, argv, out)
        counts["refused" if refused else "measured"] += 1
    assert min(counts.values()) > 0.15 * tries, counts
    return f"{script}: {counts['refused']} refused, {counts['measured']} measured"


@pytest.mark.parametrize("script", BASES)
def test_command_lines_of_the_evaluation(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(tmp_path, 24, 0, script)
