"""The house rules that a machine can check: shared blocks, budgets, dead flags and definitions, imports, README commands."""

import ast
import importlib
import re
import shlex
import sys

import pytest
import sync

ROOT = sync.ROOT
SCRIPTS = sync.scripts()
EVALUATION = [p for p in (ROOT / "linear_probe.py", ROOT / "variance_ref.py") if p.exists()]
COMMON = sorted((ROOT / "common").glob("*.py"))


def test_shared_blocks_are_identical():
    assert not sync.differences({path.name: path.read_text() for path in SCRIPTS})


def test_sync_finds_and_mends_what_differs(tmp_path):
    text = SCRIPTS[0].read_text()
    block = sync.blocks(text)["shared: schedules"]
    (tmp_path / "a_asym.py").write_text(text)
    (tmp_path / "b_asym.py").write_text(text.replace(block, block.replace("0.5", "0.6")))
    (tmp_path / "c_asym.py").write_text(text.replace(block, ""))  # may be absent

    def wrong():
        return sync.differences({p.name: p.read_text() for p in sync.scripts(tmp_path)})

    assert len(wrong()) == 1 and "shared: schedules differs" in wrong()[0] and "+    return 0.6" in wrong()[0]
    assert sync.copy("a_asym.py", tmp_path) == ["b_asym.py"]
    assert not wrong() and (tmp_path / "c_asym.py").read_text() == text.replace(block, "")
    views = sync.blocks(text)["shared: views"]
    (tmp_path / "d_asym.py").write_text(text.replace(views, "").replace(block, block + views))
    assert any("different orders" in w for w in wrong())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_method_before_plumbing_and_budgets(path):
    """A budget that is exceeded asks for a feature less, not for code moved to common/."""
    blocks = sync.blocks(path.read_text())
    kinds = [name.split(":")[0] for name in list(blocks)[1:]]  # the imports come first
    assert kinds == sorted(kinds)
    lines = {name: len(text.splitlines()) for name, text in blocks.items()}
    of_methods = "shared: heads", "shared: the original methods"
    plumbing = sum(n for name, n in lines.items() if name.startswith("shared: ") and name not in of_methods)
    total = len(path.read_text().splitlines()) - lines.get("method: vit", 0)  # a ViT comes on top
    assert plumbing <= BUDGET["plumbing"] and total - plumbing <= BUDGET["method"], (plumbing, total - plumbing)


BUDGET = {"method": 240, "plumbing": 890, "common": 665}  # lines


def test_common_budget():
    assert sum(len(path.read_text().splitlines()) for path in COMMON) <= BUDGET["common"]


@pytest.mark.parametrize("path", [*SCRIPTS, *EVALUATION, *COMMON], ids=lambda p: p.name)
def test_lines_are_at_most_110_wide(path):
    assert not [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_no_dead_flags_and_definitions(path):
    module, text = importlib.import_module(path.stem), path.read_text()
    for action in module.make_parser()._actions:
        if action.dest != "help":
            used = re.search(rf"args\.{action.dest}\b|\"{action.dest}\"", text.replace(f'"--{action.dest}', ""))
            assert used, f"--{action.dest} is parsed and never used"
            assert action.help, f"--{action.dest} has no help"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("__"):
            if node.name in ("forward", "backward", "main"):
                continue  # called by torch; by the last line
            assert len(re.findall(rf"\b{node.name}\b", text)) > 1, f"{node.name} is defined and never used"


@pytest.mark.parametrize("path", COMMON, ids=lambda p: p.name)
def test_common_is_used(path):
    users = "\n".join(p.read_text() for p in [*SCRIPTS, *EVALUATION, *COMMON])
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert len(re.findall(rf"\b{node.name}\b", users)) > 1, f"{path.name}: nobody uses {node.name}"


@pytest.mark.parametrize("path", [*SCRIPTS, *EVALUATION, *COMMON], ids=lambda p: p.name)
def test_imports(path):
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "PIL", "common"}
    if path in EVALUATION:
        allowed |= {p.stem for p in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {n.split(".")[0] for n in names} <= allowed, names


def readme_commands():
    """Every line of the README's code blocks that starts one of our scripts: (script, arguments, processes of torchrun)."""
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&"):
                if m := re.search(r"(\w+)\.py\b(.*)", part):
                    if any(p.stem == m[1] for p in [*SCRIPTS, *EVALUATION]):
                        yield m[1], m[2], 8 if "torchrun" in line else None


def test_readme_commands_parse():
    commands = list(readme_commands())
    assert len(commands) > 10
    for script, rest, launched in commands:
        module = importlib.import_module(script)
        argv = [a for a in shlex.split(rest.replace("...", "")) if a not in ("|", "tee")]
        args = module.parse_args(argv)
        if "check_flags" in vars(module) and not args.device.startswith("cuda"):
            module.check_flags(args, launched or args.nproc)
