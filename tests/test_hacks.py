"""The patches in tests/hacks/, as researchers would make them: short, they apply, they train, and they do what they say."""

import importlib.util
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import ROOT, SCRIPTS, SMALL, build, class_tree, log_lines, small_args, views_of

from common.augment import rng

HACKS = sorted((ROOT / "tests" / "hacks").glob("*.patch"))
FLAGS = {"mean_after_normalising": "--mean-enc 2", "scalemix_on_patches": "--scalemix-src --arch vit_tiny"}


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hacked(request, tmp_path):
    """The patched copy of a script, and the script, as modules."""
    if not shutil.which("git"):
        pytest.skip("git apply is needed to apply the patches")
    patch = ROOT / "tests" / "hacks" / f"{request.param}.patch"
    script = re.search(r"^\+\+\+ b/(\w+)\.py$", patch.read_text(), re.MULTILINE)[1]
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True, capture_output=True)
    return module_at(tmp_path / f"{script}.py"), module_at(ROOT / f"{script}.py")


def of(name):
    return pytest.mark.parametrize("hacked", [name], indirect=True)


@pytest.mark.parametrize("hacked", [p.stem for p in HACKS], indirect=True)
def test_a_hack_is_short_and_trains(hacked, request, tmp_path):
    name = request.node.callspec.params["hacked"]
    text = (ROOT / "tests" / "hacks" / f"{name}.patch").read_text()
    assert len(re.findall(r"^[+-](?![+-]{2} )", text, re.MULTILINE)) <= 15
    tree, losses, small = class_tree(tmp_path / "images"), [], SMALL.replace("--small-size 8 ", "")
    for i, module in enumerate(hacked):
        more = f"--epochs 9 --warmup-epochs 0 --steps 3 {FLAGS.get(name, '')}"
        module.main(f"--data {tree} --out {tmp_path / str(i)} {small} {SCRIPTS[module.METHOD]} {more}".split())
        losses.append([line["loss"] for line in log_lines(tmp_path / str(i))[1:]])
    assert len(losses[0]) == len(losses[1]) == 3 and np.isfinite(losses[0]).all() and losses[0] != losses[1]


@of("mean_after_normalising")
def test_the_mean_is_that_of_unit_vectors(hacked):
    script, _ = hacked
    model = build(script, small_args(script))
    views = list(torch.randn(2, 16, 3, 16, 16, generator=rng(3)))
    apart = F.normalize(model.source(torch.cat(views))).view(2, 16, -1).mean(0)
    assert torch.equal(script.encode(model.source, views), apart)


@of("scalemix_on_patches")
def test_boxes_are_made_of_whole_patches(hacked, monkeypatch):
    script, _ = hacked
    seen, mix = [], script.augment.scalemix
    monkeypatch.setattr(script.augment, "scalemix", lambda a, b, boxes: (seen.append(boxes), mix(a, b, boxes))[1])
    views_of(script, small_args(script, "--scalemix-src --arch vit_tiny"))
    assert len(seen) == 1 and not (seen[0] % 4).any() and len(seen[0].unique()) > 2


@of("decoupled_contrastive_loss")
def test_the_positive_is_not_in_the_denominator(hacked):
    script, _ = hacked
    model = build(script, small_args(script, "--temperature 0.3"))
    z, keys = (F.normalize(torch.randn(7, 16, generator=rng(i))) for i in range(2))
    s = (z @ keys.T / 0.3).double().numpy()
    naive = [np.log(sum(np.exp(s[i, j]) for j in range(7) if j != i)) - s[i, i] for i in range(7)]  # Eq. 1
    assert model.info_nce(z, keys).item() == pytest.approx(np.mean(naive), rel=1e-5)
    alike = z[:1].expand(16, 16)
    assert model.info_nce(alike, alike).item() == pytest.approx(script.Method.chance(small_args(script)), rel=1e-5)


@of("random_swap_of_views")
def test_the_views_of_some_steps_are_swapped(hacked):
    script, plain = hacked
    args, swapped = small_args(script), 0
    for number in range(6):
        losses = []
        for module in (script, plain, plain):
            model = build(module, args)
            src, tgt, generator = views_of(module, args, number)
            src, tgt = (tgt, src) if len(losses) == 2 else (src, tgt)
            losses.append(model(src, tgt, 0.0, generator)[0].item())
        assert losses[0] in losses[1:] and losses[1] != losses[2]
        swapped += losses[0] == losses[2]
    assert 0 < swapped < 6


@of("vicreg_variance_term")
def test_the_term_is_the_hinge_on_the_spread(hacked):
    script, plain = hacked
    args, losses = small_args(script), []
    for module in hacked:
        src, tgt, generator = views_of(module, args)
        model = build(module, args)
        losses.append(model(src, tgt, 0.0, generator)[0].item())
    z = F.normalize(build(plain, args).source(src[0][0])).detach().double().numpy() * 4  # sqrt(16)
    hinge = np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()
    assert hinge > 0.01 and losses[0] - losses[1] == pytest.approx(hinge, rel=1e-3)
