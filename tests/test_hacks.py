"""The patches in tests/hacks/ are short, they apply, they train, and they do what they say."""

import importlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import ROOT, SCRIPTS, SMALL, build, class_tree, log_lines, small_args, views_of

from common.augment import rng

HACKS = {p.stem: p.read_text() for p in sorted((ROOT / "tests" / "hacks").glob("*.patch"))}
SCRIPT = {name: (re.findall(r"\+\+\+ b/(\w+_asym)", text) or ["mocov3_asym"])[0]
          for name, text in HACKS.items()}
FLAGS = {"mean_after_normalising": "--mean-enc 2", "mobilenet_backbone": "--arch mobilenet",
         "scalemix_on_patches": "--scalemix-src --arch vit_tiny"}  # where the hack is seen


@pytest.fixture
def plain(request):
    """The script of a patch, as it is."""
    return importlib.import_module(SCRIPT[request.node.callspec.params["script"]])


@pytest.fixture
def script(request, plain, tmp_path, monkeypatch):
    """Its patched copy, with the common/ beside it, as modules that nobody else gets."""
    if not shutil.which("git"):
        pytest.skip("git apply is needed to apply the patches")
    shutil.copy(plain.__file__, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    patch = ROOT / "tests" / "hacks" / f"{request.param}.patch"
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True, capture_output=True)
    for name in [k for k in sys.modules if k.split(".")[0] in ("common", plain.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(plain.__name__)


of = lambda *names: pytest.mark.parametrize("script", names, indirect=True)


def train(script, tree, out, flags):
    """Three steps; their losses."""
    more = f"--epochs 9 --warmup-epochs 0 --knn-every 0 --steps 3 {flags}"
    script.main(f"--data {tree} --out {out} {SMALL} {SCRIPTS[script.METHOD]} {more}".split())
    return [x["loss"] for x in log_lines(out)]


@of(*HACKS)
def test_a_hack_is_short_and_trains(script, plain, request, tmp_path):
    hack = request.node.callspec.params["script"]
    assert len(re.findall(r"^[+-](?![+-]{2} )", HACKS[hack], re.MULTILINE)) <= 15
    tree, flags = class_tree(tmp_path / "images"), FLAGS.get(hack, "")
    losses = train(script, tree, tmp_path / "run", flags)
    assert len(losses) == 3 and np.isfinite(losses).all()
    if "mobilenet" not in hack:  # which the script does not know
        assert train(plain, tree, tmp_path / "plain", flags) != losses


def first_loss(script, flags=""):
    args = small_args(script, flags)
    src, tgt, generator = views_of(script, args)
    return build(script, args)(src, tgt, 0.0, generator)[0].item()


@of("mean_after_normalising")
def test_the_mean_is_that_of_unit_vectors(script):
    model = build(script, small_args(script))
    views = list(torch.randn(2, 16, 3, 16, 16, generator=rng(3)))
    apart = F.normalize(model.source.encode(views, 1, None, True), dim=2).mean(0)
    assert torch.equal(model.source([views])[0], apart)


@of("scalemix_on_patches")
def test_boxes_are_made_of_whole_patches(script, monkeypatch):
    seen, mix = [], script.augment.scalemix
    monkeypatch.setattr(script.augment, "scalemix", lambda *a: (seen.append(a[2]), mix(*a))[1])
    views_of(script, small_args(script, "--scalemix-src --arch vit_tiny"))
    assert len(seen) == 1 and not (seen[0] % 4).any() and len(seen[0].unique()) > 2


@of("decoupled_contrastive_loss")
def test_the_positive_is_not_in_the_denominator(script):
    model = build(script, small_args(script, "--temperature 0.3"))
    z, keys = (F.normalize(torch.randn(7, 16, generator=rng(i))) for i in range(2))
    s = (z @ keys.T / 0.3).double().numpy()
    naive = [np.log(sum(np.exp(s[i, j]) for j in range(7) if j != i)) - s[i, i] for i in range(7)]
    assert model.info_nce(z, keys).item() == pytest.approx(np.mean(naive), rel=1e-5)  # Eq. 1
    alike, chance = z[:1].expand(16, 16), model.chance(small_args(script))
    assert model.info_nce(alike, alike).item() == pytest.approx(chance, rel=1e-5)


@of("vicreg_variance_term")
def test_the_term_is_the_hinge_on_the_spread(script, plain):
    args = small_args(script)
    z = build(script, args).source(views_of(script, args)[0])[0].detach().double().numpy()
    hinge = np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()
    added = first_loss(script) - first_loss(plain)
    assert hinge > 0.01 and added == pytest.approx(hinge, rel=1e-3)


@of("learnable_temperature")
def test_the_temperature_begins_at_the_flag_and_learns(script, plain, tmp_path):
    ours, theirs = (first_loss(module, "--temperature 0.3") for module in (script, plain))
    assert ours == pytest.approx(theirs, rel=1e-6)
    train(script, class_tree(tmp_path / "images"), tmp_path / "run", "--temperature 0.3")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert 1e-6 < abs(state["log_temperature"] - np.log(0.3)) < 0.5


@of("dropout_on_source_features")
def test_dropout_is_the_sources_alone(script):
    """That it resumes exactly: tests/test_processes.py."""
    model, x = build(script, small_args(script)), [[torch.randn(16, 3, 16, 16, generator=rng(3))]]
    assert torch.equal(*(model.target(x)[0] for _ in range(2)))
    assert not torch.equal(*(model.source(x)[0] for _ in range(2)))
    assert model.source.state_dict().keys() == model.target.state_dict().keys()
