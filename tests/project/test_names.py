"""Every name of this library that the documentation, a docstring or a message gives is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Operators are torch.ops.ssah.*; what follows an underscore is private; a file is no name.
NAME = re.compile(r"(?<![\w./-])(?:ssah|ssah_kernels)(?:\.[A-Za-z]\w*)+(?!\w|/|\.(?:md|so|py)\b)")
IMPORT = re.compile(r"\s*(from|import) ")
# In a process of its own, where nothing but `import ssah` has been done.
SCRIPT = """
import sys
import ssah, ssah_kernels
places = {"ssah": ssah, "ssah_kernels": ssah_kernels}
for name in sys.stdin.read().split():
    place, *rest = name.split(".")
    thing = places[place]
    try:
        for part in rest:
            thing = getattr(thing, part)
    except AttributeError as error:
        print(f"{name}: {error}")
"""


def missing(names: set[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        # The longest first: what is inside a room must not be there only since another came first.
        input="\n".join(sorted(names, key=lambda name: (-name.count("."), name))),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def names_in(text: str) -> set[str]:
    return set(NAME.findall(text))


def test_every_name_that_people_are_given_is_there() -> None:
    """Those of the documentation, of docstrings and messages, and every public submodule."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    # A recipe has its reader write a file, which its block names first: it is not there yet.
    files = re.findall(r"^ *# (ssah/[\w/]+)\.py$", text, flags=re.MULTILINE)
    documented = names_in(text) - {file.replace("/", ".") for file in files}
    assert {
        "ssah.attribute",
        "ssah.training.plan_of",
        "ssah.models.load_model",
    } <= documented
    source = (path.read_text().splitlines() for path in (ROOT / "ssah").rglob("*.py"))
    lines = (line for each in source for line in each)
    written = names_in("\n".join(line for line in lines if not IMPORT.match(line)))
    assert "ssah.distributed.deal" in written
    submodules = {p.stem for p in (ROOT / "ssah").glob("[a-z]*.py")}
    submodules |= {p.parent.name for p in (ROOT / "ssah").glob("[a-z]*/__init__.py")}
    # Names that are not there show that the others were looked for.
    no_names = {"ssah.nothing", "ssah._private", "ssah.training.nothing"}
    found = missing(documented | written | {f"ssah.{name}" for name in submodules} | no_names)
    assert {line.partition(":")[0] for line in found} == no_names, found
    assert "ssah.nothing: module 'ssah' has no attribute 'nothing'" in found
