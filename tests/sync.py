"""Keeps the shared blocks of the six training scripts byte-identical. Needs no torch.

    python tests/sync.py --check            compares all scripts; says what differs, and exits with 1
    python tests/sync.py mocov2_asym.py     copies that file's shared blocks into its siblings

A block begins at a banner, "# ==== ... ==== shared: NAME" or "... method: NAME", and ends at the
next. A shared block may be absent from a script, never different; blocks that two scripts have in
common stand in the same order.
"""

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BANNER = re.compile(r"^# =+ ((?:shared|method): .+)\n", re.MULTILINE)


def scripts(root=ROOT):
    return sorted(root.glob("*_asym.py"))


def blocks(text):
    """From banner, such as "shared: views", to the block's text with its banner, in order."""
    starts = list(BANNER.finditer(text))
    ends = [m.start() for m in starts[1:]] + [len(text)]
    found = {m[1]: text[m.start() : end] for m, end in zip(starts, ends, strict=True)}
    assert len(found) == len(starts), "two blocks have one name"
    return found


def differences(texts):
    """What is wrong between scripts, a list of messages. texts: script name -> text."""
    wrong, first = [], {}
    parsed = {name: blocks(text) for name, text in texts.items()}
    for name, mine in parsed.items():
        for block, text in mine.items():
            owner, original = first.setdefault(block, (name, text))
            if block.startswith("shared: ") and text != original:
                lines = original.splitlines(), text.splitlines()
                diff = "\n".join(difflib.unified_diff(*lines, owner, name, lineterm="", n=1))
                wrong.append(f"{block} differs; tests/sync.py {owner} would copy it:\n{diff}")
        for other, theirs in parsed.items():
            common = [b for b in mine if b in theirs]
            if common != [b for b in theirs if b in mine]:
                wrong.append(f"{name} and {other} have their blocks in different orders")
    return wrong


def copy(source, root=ROOT):
    """Copies the shared blocks of source into the siblings that have them; the names of these."""
    mine, changed = blocks((root / source).read_text()), []
    for path in scripts(root):
        new = text = path.read_text()
        for block, old in blocks(text).items():
            if block.startswith("shared: ") and block in mine:
                new = new.replace(old, mine[block])
        if new != text:
            path.write_text(new)
            changed.append(path.name)
    return changed


def main(argv):
    if argv != ["--check"]:
        print("changed:", ", ".join(copy(*argv)) or "nothing")
        return 0
    wrong = differences({path.name: path.read_text() for path in scripts()})
    print("\n\n".join(wrong) or f"the shared blocks of {len(scripts())} script(s) agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
