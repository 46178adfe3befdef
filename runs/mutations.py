"""Makes one fault after another in a copy of the checkout, and sees whether the tests notice.

    runs/mutations.sh [--only N ...] [--folder DIR]

Example: ``runs/mutations.sh --only 2 7`` tries the second and the seventh of mutation_table.py.

A check has to pass on the copy as it is before its failure means anything. What came out stands in
DIR/outcomes.json (default: build/mutations). A run that was interrupted goes on there: what was
caught with these sources is not tried again. Ends with 1 if a fault survives, or if its text or its
check does not stand any more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mutation import Check, command
from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
# In place of the kernels of an instruction set: a table without any.
NO_KERNELS = b"""#include "../types.h"
namespace ssah {
namespace SSAH_ISA {
extern const Kernels kernels;
const Kernels kernels = {"none"};
}  // namespace SSAH_ISA
}  // namespace ssah
"""
# A check that fails for one of these says nothing about the fault.
BROKEN = re.compile(r"SyntaxError|ImportError|ModuleNotFoundError|no tests ran|: error: ")


def python(tree: Path, *args: str) -> tuple[bool, str]:
    """Whether a command succeeded in the copy, and what it said."""
    paths = (tree, tree / "tests", tree / "tests" / "helpers")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "SSAH_CUDA": "0",
        "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),
    }
    done = subprocess.run(
        [sys.executable, *args],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0, done.stdout + done.stderr


def sources() -> Iterator[tuple[str, bytes]]:
    """The files of the checkout, made for a quick build: with little optimisation, and with the
    kernels alone that this processor chooses."""
    asked = "from ssah_kernels.backends import cpu; print(cpu.facts()['isa'])"
    chosen = python(ROOT, "-c", asked)[1].split()[-1]
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        path = ROOT / name
        if not path.exists():
            continue  # removed, and not yet committed
        content = path.read_bytes()
        if name == "setup.py":
            content = content.replace(b'"-O3"', b'"-O1"')
        elif path.match("csrc/cpu/isa/*.cpp") and path.stem != chosen:
            content = content.replace(b'#include "kernels.h"\n', NO_KERNELS)
        yield name, content


def copy_to(tree: Path) -> str:
    """Brings the copy up to date; a hash of what it holds.

    A file that is as it should be keeps its time, any other gets the time of now: a build compiles
    that again, even where a run was stopped between a fault and its repair.
    """
    digest = hashlib.sha256()
    held = dict(sources())
    for old in tree.glob("csrc/**/*.*"):  # of which a build takes all that it finds
        if str(old.relative_to(tree)) not in held:
            old.unlink()
    for name, content in held.items():
        target = tree / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if not name.startswith("docs/") and not name.endswith(".md"):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


class Record:
    """What came out so far, in a JSON file: ``{"sound": {...}, "mutations": {...}}``.

    It counts only for the sources that the copy holds now, of which ``held`` is the hash.
    """

    def __init__(self, path: Path, held: str) -> None:
        self.path, self.held = path, held
        known = json.loads(path.read_text()) if path.exists() else {}
        self.sound: dict[str, str] = known.get("sound", {})  # a check that passed -> the sources
        self.mutations: dict[str, dict[str, Any]] = known.get("mutations", {})

    def is_sound(self, check: Check) -> bool:
        return self.sound.get(f"{check.file} {check.chosen}") == self.held

    def add_sound(self, check: Check) -> None:
        self.sound[f"{check.file} {check.chosen}"] = self.held
        self._write()

    def is_caught(self, mutation: Mutation) -> bool:
        known = self.mutations.get(mutation.name, {})
        return known.get("sources") == self.held and known["outcome"] == "caught"

    def add(self, mutation: Mutation, outcome: str, seconds: float) -> None:
        self.mutations[mutation.name] = {
            "outcome": outcome,
            "check": f"{mutation.check.file} {mutation.check.chosen}",
            "seconds": round(seconds, 1),
            "sources": self.held,
        }
        self._write()

    def _write(self) -> None:
        content = {"sound": self.sound, "mutations": self.mutations}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def build(tree: Path) -> None:
    done, said = python(tree, "setup.py", "--quiet", "build_ext", "--inplace")
    if not done:
        raise SystemExit(f"the extension does not build:\n{said[-3000:]}")


def broken_checks(tree: Path, checks: Iterable[Check], record: Record) -> dict[Check, str]:
    """Those that fail without any fault, and what they say; one process for those of a file."""
    of_file: dict[str, list[Check]] = {}
    for check in dict.fromkeys(checks):
        if not record.is_sound(check):
            of_file.setdefault(check.file, []).append(check)
    broken = {}
    for file, mine in of_file.items():
        together, _ = python(tree, *command(file, [check.chosen for check in mine]))
        for check in mine:
            passed, said = (True, "") if together else python(tree, *command(file, [check.chosen]))
            if passed:
                record.add_sound(check)
            else:
                broken[check] = said
    return broken


def verdict(tree: Path, mutation: Mutation) -> str:
    """ "caught", or what else became of it."""
    path = tree / mutation.file
    before = path.read_text()
    if before.count(mutation.old) != 1:
        return f"TEXT STANDS {before.count(mutation.old)} TIMES"
    try:
        path.write_text(before.replace(mutation.old, mutation.new))
        if mutation.rebuilds:
            build(tree)
        passed, said = python(tree, *command(mutation.check.file, [mutation.check.chosen]))
    finally:
        path.write_text(before)
    if passed:
        return "SURVIVED"
    return "CHECK BROKEN: " + said[-600:] if BROKEN.search(said) else "caught"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers in the table")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutations")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    tree = folder / "tree"
    record = Record(folder / "outcomes.json", copy_to(tree))
    chosen = [MUTATIONS[n - 1] for n in options.only or range(1, len(MUTATIONS) + 1)]
    left = [mutation for mutation in chosen if not record.is_caught(mutation)]
    if left:
        build(tree)
    # Those that need a build come last and one after the other: each build then makes one fault
    # and mends the one before it, and the rest meet a sound extension.
    for rebuilds in (False, True):
        now = [mutation for mutation in left if mutation.rebuilds == rebuilds]
        broken = broken_checks(tree, (mutation.check for mutation in now), record)
        for mutation in now:
            start = time.monotonic()
            said = broken.get(mutation.check)
            outcome = verdict(tree, mutation) if said is None else f"CHECK FAILS: {said[-900:]}"
            seconds = time.monotonic() - start
            record.add(mutation, outcome, seconds)
            line = mutation.name.splitlines()[0]
            number = MUTATIONS.index(mutation) + 1
            print(f"{number:3} {outcome:9} {seconds:4.0f} s  {line}", flush=True)
    caught = sum(map(record.is_caught, chosen))
    print(f"{caught} of {len(chosen)} caught: {record.path}")
    sys.exit(caught < len(chosen))


if __name__ == "__main__":
    main()
