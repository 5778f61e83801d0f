"""The command line: its parser, types of flags, how a wrong one ends a run. A run's code."""

import argparse
import hashlib
import os
import sys
from pathlib import Path


def parser(name, doc):
    """An argparse parser that takes no abbreviations and ends in check()'s way."""
    p = argparse.ArgumentParser(prog=name, description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: check(False, f"{message}; --help lists the flags")
    return p


def number(kind, low, high=2**31 - 1):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


positive, whole = number(int, 1), number(int, 0)
amount, fraction = number(float, 0), number(float, 0, 1)


def given_flags(args, p, leave):
    """The flags that were given, without those to leave, for the name of a folder."""
    text = ""
    for name, value in sorted(vars(args).items()):
        if value != p.get_default(name) and name not in leave:
            value = "_".join(map(str, value)) if isinstance(value, list) else value
            text += f"-{name}={value}".replace("=True", "").replace("/", "_")
    return text


def check(good, message, alone=False):
    """Unless good, ends the program with a line that says what was wrong, what was found and what
    to do, exit code 2: once a node, or by this process alone, if the others may not fail."""
    if not good:
        if alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def code_digest(script):
    """Of a script and common/: by it a run knows whether its code has changed."""
    paths = [Path(script), *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
