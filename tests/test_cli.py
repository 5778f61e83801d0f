"""The command line as users meet it: real processes, wrong input, and what a run leaves behind."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sync
import torch
import torchvision
from PIL import Image
from pool import class_tree
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

ROOT = sync.ROOT
SCRIPTS = [p.stem for p in sync.scripts()]
TINY = ("--data {data} --recipe small --arch tiny --batch-size 16 --epochs 2 --warmup-epochs 0 --workers 0 "
        "--device cpu").split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """48 noise images of 32 px in three classes, and a flat folder of 24 beside it."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for i in range(48):
        for path in [root / "tree" / "abc"[i % 3] / f"{i}.png"] + ([root / "flat" / f"{i}.png"] if i < 24 else []):
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=generator)
            to_pil_image(pixels).save(path)
    return root


def run(script, *argv, folder=ROOT):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "error"}
    return subprocess.run([sys.executable, f"{folder}/{script}.py", *map(str, argv)], env=env, capture_output=True,
                          text=True, timeout=120)


def refuse(module, capsys, *argv):
    """The message with which a script refuses its arguments, before any work."""
    with pytest.raises(SystemExit) as stopped:
        module.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.count("\n") == 1 and err.startswith(module.METHOD), (stopped.value, err)
    return err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_common_are_enough_for_a_run_and_its_folder(script, folder, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    argv = [a.format(data=folder / "tree") for a in TINY]
    done = run(script, *argv, "--bn-groups", 2, "--out", tmp_path / "out", folder=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    out = tmp_path / "out"
    names = {"args.json", "log.jsonl", "last.pt", "backbone.pth", "backbone_target.pth", f"{script}.py", ".lock"}
    assert {p.name for p in out.iterdir()} == names
    first, *lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert first["command"][1:4] == argv[:3] and first["args"]["bn_groups"] == 2 and first["chance"] is not None
    assert [x["step"] for x in lines] == list(range(7))
    keys = ("loss chance lr m std_src std_tgt grad_norm img_s data_frac mem_gb eta_s epoch bad_images").split()
    assert all(set(keys) <= set(x) for x in lines[1:])
    assert {"knn", "v_src", "v_tgt"} <= set(lines[0]) & set(lines[-1])
    about = json.loads((out / "args.json").read_text())
    assert about["method"] == script and len(about["mean"]) == 3 and about["args"]["img_size"] == 32
    state = torch.load(out / "last.pt", weights_only=True)
    backbone = torch.load(out / "backbone.pth", weights_only=True)
    assert state["step"] == 6 and all(torch.equal(v, state["model"][f"source.backbone.{k}"]) for k, v in backbone.items())


def test_backbone_loads_into_torchvision(folder, tmp_path):
    argv = [a.format(data=folder / "tree") for a in TINY]
    argv[argv.index("tiny")] = "resnet18"
    sizes = ["--img-size", 72, "--recipe", "imagenet", "--queue", 32, "--hidden", 32]
    done = run("mocov2_asym", *argv, *sizes, "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    model = torchvision.models.resnet18()
    keys = model.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_dry_run_and_show_views(script, folder, tmp_path, capsys):
    helped = run(script, "--help")
    assert helped.returncode == 0 and "theta" in helped.stdout and "--mean-enc-src" in helped.stdout
    module = importlib.import_module(script)
    argv = [a.format(data=folder / "tree") for a in TINY] + ["--bn-groups", "2", "--out", str(tmp_path / "none")]
    module.main([*argv, "--dry-run", "--multicrop-src"])
    dry = capsys.readouterr().out
    assert "parameters" in dry and "chance" in dry and "6 in all" in dry
    picture = tmp_path / "views.png"
    module.main([*argv, "--show-views", str(picture), "--scalemix-src", "--multicrop-src", "--asym-aug"])
    pixels = pil_to_tensor(Image.open(picture))
    assert pixels.shape == (3, 8 * 98 + 2, 9 * 98 + 2)  # one large view and six small, a gap, one target view
    assert (pixels[:, 2:98, 7 * 98 + 2 : 8 * 98] == 255).all()  # the white column between source and target
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_flags_are_refused_before_any_work(script, folder, capsys, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    base = [a.format(data=folder / "tree") for a in TINY]

    def says(*argv):
        return refuse(module, capsys, *base, *argv)

    assert "use 16 or 24" in says("--batch-size", 20, "--bn-groups", 8)
    assert "one image in each" in says("--batch-size", 8, "--bn-groups", 8)
    assert "0 is not in" in says("--mean-enc", 0) and "0 is not in" in says("--steps", 0)
    assert "8 px or more" in says("--img-size", 4)
    assert "add --bn-groups 8" in says("--asym-bn", "--bn-groups", 1)
    assert "resnet50" in says("--arch", "resnet51")
    assert "no --multicrop" in says("--num-small", 3)
    assert "no --asym-bn" in says("--bn-scope", "all")
    assert "drop one" in says("--asym-aug", "--aug-tgt", "strong")
    assert "unrecognized arguments: --mean-ecn" in says("--mean-ecn", 2)
    assert "invalid" in says("--lr", "fast") and "nan is not in" in says("--lr", "nan")
    assert "is not in [0, 1]" in says("--multicrop-src", "--small-scale", 0.1, 1.5)
    assert "the smaller first" in says("--multicrop-src", "--small-scale", 0.5, 0.1)
    assert "fp16 does not work on cpu" in says("--amp", "fp16")
    assert "more than the 48 images; use 48 or less" in says("--batch-size", 64, "--bn-groups", 8)
    assert "no less than --epochs" in says("--warmup-epochs", 2, "--bn-groups", 2)
    if not torch.cuda.is_available():
        assert "no GPU" in says("--device", "cuda")
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        assert "exclude each other" in says("--nproc", 2)
    assert "among 3 processes; use 15 or 18" in says("--nproc", 3)
    assert not any(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("script, argv", [*((s, ["--seed=--"]) for s in SCRIPTS), ("linear_probe", ["x", "--max-iter=--"]),
                                          ("variance_ref", ["x", "--views=--"])])
def test_two_dashes_are_no_value(script, argv, capsys):
    """argparse makes an empty list of them, which no check of a type sees."""
    with pytest.raises(SystemExit) as e:
        importlib.import_module(script).parse_args(argv)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and argv[-1][:-3] + ": -- is no value; give one" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_data_is_refused_before_any_work(script, folder, capsys, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    cpu = ["--device", "cpu"]
    assert "no such folder" in refuse(module, capsys, *cpu, "--data", "nowhere")
    assert "cifar10" in refuse(module, capsys, *cpu, "--data", "cifar11")
    assert "no images in empty" in refuse(module, capsys, *cpu, "--data", "empty")
    assert "add --download" in refuse(module, capsys, *cpu, "--data", "cifar10")
    flat = [a.format(data=folder / "flat") for a in TINY] + ["--bn-groups", 2]
    assert "has no labels" in refuse(module, capsys, *flat, "--knn-every", 1)
    assert {p.name for p in tmp_path.iterdir()} == {"empty"}


def test_out_holding_another_run(folder, tmp_path, capsys):
    import mocov2_asym as module
    argv = [a.format(data=folder / "tree") for a in TINY] + ["--out", str(tmp_path), "--queue", "16"]
    module.main(argv)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert "--temperature 0.1 there, 0.3 here" in refuse(module, capsys, *argv, "--temperature", 0.3)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert "complete" in (module.main(argv), capsys.readouterr().out)[1]


@pytest.mark.parametrize("sizes", [(24,), (24, 31)])
def test_unreadable_images_in_val_are_named_and_counted(sizes, tmp_path, capsys):
    """And what replaces them has its own label, whatever class it is of."""
    import mocov2_asym as module
    train, val = (class_tree(tmp_path / "data" / part, 24, sizes) for part in ("train", "val"))
    last = sorted((val / "class0").iterdir())[-1]  # the next is of another class
    last.write_bytes(last.read_bytes()[:-100])
    argv = [a.format(data=tmp_path / "data") for a in TINY] + ["--bn-groups", "2", "--queue", "16", "--batch-size", "8"]
    module.main([*argv, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.count(f"unreadable image, replaced by the next: {last}") == (1 if len(sizes) == 1 else 2)
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["bad_images"] == (1 if len(sizes) == 1 else 2)  # asked at the start and at the end
    assert "stopped (--strict-images)" in refuse(module, capsys, *argv, "--strict-images", "--out", tmp_path / "strict")
    _, _, queries = module.data.load(str(tmp_path / "data"))
    args = module.parse_args(argv)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    z, labels = module.features(args, SimpleNamespace(bad=0), net, queries, "cpu")
    assert torch.equal(z[7], z[8]) and labels.tolist() == [0] * 7 + [1] * 9 + [2] * 8


def test_flat_folder_trains_without_labels(folder, tmp_path):
    argv = [a.format(data=folder / "flat") for a in TINY]
    done = run("mocov2_asym", *argv, "--bn-groups", 2, "--queue", 16, "--out", tmp_path)
    assert done.returncode == 0 and "v_src" in done.stdout and "kNN" not in done.stdout, done.stderr
