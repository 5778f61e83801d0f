"""The patches in tests/hacks/, as researchers would make them: short, they apply, they train, and they change the loss."""

import importlib.util
import re
import shutil
import subprocess

import numpy as np
import pytest
from pool import ROOT, SCRIPTS, SMALL, class_tree, log_lines

HACKS = sorted((ROOT / "tests" / "hacks").glob("*.patch"))
FLAGS = {"mean_after_normalising": "--mean-enc 2", "scalemix_on_patches": "--scalemix-src --arch vit_tiny"}


def losses(path, tree, out, flags):
    """Three steps of the script at path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = SMALL.replace("--small-size 8 ", "")
    module.main(f"--data {tree} --out {out} {small} {SCRIPTS[path.stem]} --epochs 9 --warmup-epochs 0 --steps 3 {flags}".split())
    return [line["loss"] for line in log_lines(out)[1:]]


@pytest.mark.parametrize("patch", HACKS, ids=lambda p: p.stem)
def test_a_hack_applies_and_trains(patch, tmp_path):
    text = patch.read_text()
    assert len(re.findall(r"^[+-](?![+-]{2} )", text, re.MULTILINE)) <= 15
    script = re.search(r"^\+\+\+ b/(\w+)\.py$", text, re.MULTILINE)[1]
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    subprocess.run(["git", "apply", "--verbose", patch], cwd=tmp_path, check=True, capture_output=True)
    tree, flags = class_tree(tmp_path / "images"), FLAGS.get(patch.stem, "")
    hacked = losses(tmp_path / f"{script}.py", tree, tmp_path / "hacked", flags)
    plain = losses(ROOT / f"{script}.py", tree, tmp_path / "plain", flags)
    assert len(hacked) == len(plain) == 3 and np.isfinite(hacked).all() and hacked != plain
