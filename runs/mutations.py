"""Makes one fault after another in a copy of the checkout, and sees whether the tests notice.

    runs/mutations.sh [--only N ...] [--folder DIR]

Ends with 1 if one survives, or if its text or its check does not stand any more. A check has to
pass on the copy as it is before its failure means anything.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
# In place of the kernels of an instruction set: a table without any.
NO_KERNELS = """#include "../types.h"
namespace ssah {
namespace SSAH_ISA {
extern const Kernels kernels;
const Kernels kernels = {"none"};
}  // namespace SSAH_ISA
}  // namespace ssah
"""
# A check that fails for one of these says nothing about the fault.
BROKEN = re.compile(r"SyntaxError|ImportError|ModuleNotFoundError|no tests ran|: error: ")


def copy_to(tree: Path) -> None:
    """The files of the checkout and its extension, with their times."""
    tree.mkdir(parents=True, exist_ok=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    pack = ["tar", "-c", "--null", "-T", "-"]
    archive = subprocess.run(pack, cwd=ROOT, input=names, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=tree, input=archive, check=True)
    for library in (ROOT / "ssah_kernels").glob("_C*.so"):
        shutil.copy2(library, tree / "ssah_kernels")
    setup = tree / "setup.py"
    setup.write_text(setup.read_text().replace('"-O3"', '"-O1"'))  # compiles in half the time


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


def keep_one_instruction_set(tree: Path) -> None:
    """Leave the kernels alone that this processor chooses: a third of the compiler's work."""
    ask = "from ssah_kernels.backends import cpu; print(cpu.facts()['isa'])"
    chosen = python(tree, "-c", ask)[1].split()[-1]
    for file in (tree / "csrc" / "cpu" / "isa").glob("*.cpp"):
        if file.stem != chosen:
            file.write_text(file.read_text().replace('#include "kernels.h"\n', NO_KERNELS))


def build(tree: Path) -> None:
    done, said = python(tree, "setup.py", "--quiet", "build_ext", "--inplace")
    if not done:
        raise SystemExit(f"the extension does not build:\n{said[-3000:]}")


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
        passed, said = python(tree, *shlex.split(mutation.check))
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
    tree: Path = options.folder.resolve()
    chosen = options.only or range(1, len(MUTATIONS) + 1)
    # Those that need a build come one after the other, so that the rest meet a sound extension.
    order = sorted(chosen, key=lambda number: MUTATIONS[number - 1].rebuilds)
    copy_to(tree)
    keep_one_instruction_set(tree)
    sound: dict[str, bool] = {}
    failed = 0
    for number in order:
        mutation, start = MUTATIONS[number - 1], time.monotonic()
        if mutation.check not in sound:
            if mutation.rebuilds:
                build(tree)
            sound[mutation.check], said = python(tree, *shlex.split(mutation.check))
        outcome = (
            verdict(tree, mutation) if sound[mutation.check] else f"CHECK FAILS: {said[-900:]}"
        )
        failed += outcome != "caught"
        line = mutation.old.strip().splitlines()[0]
        seconds = time.monotonic() - start
        print(f"{number:3} {outcome:9} {seconds:4.0f} s  {mutation.file}: {line}", flush=True)
    print(f"{len(order) - failed} of {len(order)} caught")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
