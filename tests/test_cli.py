"""The command line as users meet it: wrong input, and what a run leaves."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pool import ROOT, SCRIPTS, SMALL, class_tree, refusal

TINY = SMALL.replace("--recipe small ", "") + " --device cpu --data {tree} --out {out}"
WRONG = [  # flags, what the one line says of them, and the scripts if not all six
    ("--mean-ecn 2", "unrecognized arguments: --mean-ecn"),
    ("--epochs 0", "0 is not in [1,"), ("--epochs 1e3", "invalid int value: '1e3'"),
    ("--seed 2147483648", "is not in [0, 2147483647]"), ("--lr nan", "nan is not in [0,"),
    ("--small-scale 0.1 1.5", "1.5 is not in [0, 1]"),
    ("--small-scale 0.5 0.1", "give FROM and TO"), ("--large-scale 0 1", "give FROM and TO"),
    ("--amp fp16", "invalid choice: 'fp16' (choose from"), ("--arch resnet51", "resnet50"),
    ("--warmup-epochs 2 --epochs 2", "must be less than --epochs"),
    ("--batch-size 20 --bn-groups 8", "use 16 or 24"),
    ("--batch-size 8 --bn-groups 8", "two images to a group; use 16"),
    ("--nproc 3 --bn-groups 8", "use 3, or 1 (SyncBN)"),
    ("--nproc 3 --bn-groups 1", "use 15 or 18"), ("--asym-bn --bn-groups 1", "add --bn-groups 8"),
    ("--device cuda", "use --device cpu"), ("--data nowhere", "cifar10"),
    ("--ema 1.5", "give 0 to 1", "mocov2 mocov3 byol"),
    ("--temperature 0", "give more than 0", "mocov2 mocov3 simclr"),
    ("--vanilla-head --asym-bn", "add --bn-scope all", "mocov2"),
    ("--no-stop-grad-conv1", "ViTs only", "mocov3"),
    ("--arch vit_tiny --img-size 30", "vit_tiny's 4 px patches; use 28", "mocov3"),
    ("--arch vit_small --img-size 100", "use 96", "mocov3"),
    ("--arch vit_tiny --multicrop-src --small-size 18", "views of 18 px", "mocov3"),
    ("--arch vit_tiny --asym-bn --bn-scope all", "drop --bn-scope", "mocov3"),
    ("--arch vit_tiny --init {other.pth}", "it has learned positions, and heads", "mocov3"),
    ("--symmetrize --mean-enc 2", "or --mean-enc", "mocov3 simclr byol simsiam barlow"),
    ("--data cifar10 --data-root {tree}", "add --download"),
    ("--batch-size 64", "more than the 48 images"),
    ("--init {other.pth}", "conv1.weight"), ("--out {other.pth}", "is no folder"),
]


def small(script, folder, more=""):
    """A small run's command line. In braces: below the folder, with images and others' weights."""
    if not (folder / "tree").exists():
        class_tree(folder / "tree", 48)
        torch.save({"encoder.pos_embedding": torch.ones(1, 2, 3)}, folder / "other.pth")
    return re.sub(r"\{(\S+)\}", rf"{folder}/\1", f"{TINY} {SCRIPTS[script]} {more}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_input_ends_in_one_line_before_any_work(script, tmp_path, monkeypatch):
    """Data, a folder of another run: tests/test_data.py, tests/test_faults.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for flags, says, *scripts in WRONG:
        if not scripts or script.removesuffix("_asym") in scripts[0].split():
            assert says in refusal(script, small(script, tmp_path, flags)), flags
    monkeypatch.setenv("RANK", "0")
    assert "exclude each other" in refusal(script, small(script, tmp_path, "--nproc 2"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of each script, from a copy of the scripts and common/ alone."""
    root, commands = tmp_path_factory.mktemp("alone"), {}
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", root)
        more = f"--epochs 2 --warmup-epochs 0 --out {{{script}}}"
        commands[script] = [f"{script}.py", *small(script, root, more).split()]
    shutil.copytree(ROOT / "common", root / "common", ignore=shutil.ignore_patterns("__pyc*"))
    code = (f"import runpy, sys\nfor sys.argv in {[*commands.values()]}:\n"
            "    runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return root, commands


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_its_folder(script, runs):
    """That the same command adds nothing: tests/test_faults.py."""
    root, commands = runs
    files = {p.name: p.read_bytes() for p in (root / script).iterdir()}
    assert files.keys() == {"args.json", "log.jsonl", "last.pt", "backbone.pth",
                            "backbone_target.pth", f"{script}.py"}
    first, *lines = map(json.loads, files["log.jsonl"].splitlines())
    assert first["command"] == commands[script] and [x["step"] for x in lines] == [*range(7)]
    assert first["method"] == script and first["torch"] == torch.__version__
    keys = {*"step epoch loss chance lr m std_src std_tgt grad_norm img_s data_frac mem_gb eta_s "
            "bad_images".split()}
    assert all(keys == x.keys() for x in lines[1:-1])
    assert {"knn", "v_src", "v_tgt"} == lines[-1].keys() - keys == lines[0].keys() - keys

    about = json.loads(files["args.json"])
    assert about["method"] == script and about["format"] == 3 and about["img_size"] == 16
    state = torch.load(root / script / "last.pt", weights_only=True)
    assert state["step"] == 6 and state["args"] == about
    for name, x in torch.load(root / script / "backbone.pth", weights_only=True).items():
        assert torch.equal(x, state["model"][f"source.backbone.{name}"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_dry_run_and_show_views(script, tmp_path, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match="^0$"):
        module.main(["--help"])
    module.main(small(script, tmp_path, "--dry-run --data {tree/class0}").split())  # unlabelled
    said = capsys.readouterr().out
    assert all(w in said for w in ("theta", "--mean-enc-src", "16 images", "M parameters", "chance"))
    more = "--show-views {v.png} --scalemix-src --multicrop-src --num-small 6 --asym-aug"
    module.main(small(script, tmp_path, more).split())
    pixels = np.asarray(Image.open(tmp_path / "v.png"))  # each in its place: tests/test_data.py
    assert pixels.shape == (8 * 98 + 2, 9 * 98 + 2, 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe, size", [("small", 24), ("imagenet", 72)])
def test_the_recipe_is_chosen_by_the_size_of_images(recipe, size, tmp_path):
    """Not by the kind of source."""
    folder, file = class_tree(tmp_path / "images", 9, (size,)), tmp_path / "images.npz"
    np.savez(file, images=np.full((9, 20, size), 200, np.uint8))
    parse_args = importlib.import_module("mocov2_asym").parse_args
    for name in (folder, folder / "class0", file):
        assert parse_args(["--data", str(name)]).recipe == recipe
