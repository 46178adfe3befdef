"""docs/training/matrix.md, from the rows that tests prove.

Write it anew with ``python tests/helpers/training_matrix.py > docs/training/matrix.md``.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matrix import models, optimizers, shown, trainers
from matrix.rows import ROWS

ROOT = Path(__file__).parents[2]
CHAPTERS = (
    trainers.TRAINER,
    trainers.TRL,
    shown.LORA,
    optimizers.LOOP,
    optimizers.AROUND,
    models.USE,
    models.OTHERS,
    shown.SAVED,
)
OPENING = """\
# What works with a plan, and what is refused

Suppose that you train with GRPO, that vLLM generates, and that some units must not move. Look for
GRPO below: it works after one more line.

Each row of these tables is a test, and the tables are written from the tests. What moved is judged
by a mask that is made from the units alone. What is refused is an error, in the words that stand
there. Rows about `verify` and callbacks notice afterwards what something else has done. All others
refuse before a weight changes.

How to do it is on the [page for your trainer](index.md#which-page) and on that about
[several processes](../scaling.md). All other refusals are on the page about
[limits](../limits.md).
"""


def page() -> str:
    """The whole page."""
    parts = [OPENING]
    for chapter in CHAPTERS:
        rows = [row for row in ROWS if row.chapter == chapter]
        # What works comes first, and first of all what has tests of its own.
        rows.sort(key=lambda row: (row.outcome == "refused", callable(row.proof)))
        lines = [row.line() for row in rows]
        head = ["| what you do | outcome | what there is to know |", "|---|---|---|"]
        parts.append("\n".join([f"## {chapter}", "", *head, *lines, ""]))
    return "\n".join(parts)


def missing(node: str) -> str | None:
    """Why the test of a node id proves nothing here; None: it is there, and runs."""
    path, _, name = node.partition("::")
    name, _, case = name.partition("[")
    if not (ROOT / path).is_file():
        return f"there is no file {path}"
    try:
        module = _load(ROOT / path)
    except pytest.skip.Exception as skipped:
        return f"{path} is skipped: {skipped}"
    test = getattr(module, name, None)
    if not callable(test):
        return f"{path} has no test {name}"
    marks = [*_marks(module), *_marks(test)]
    for mark in marks:
        if mark.name in ("skip", "real", "gpu") or (mark.name == "skipif" and mark.args[0]):
            return f"{node} is skipped here"
    source = inspect.getsource(test)
    if "pytest.skip(" in source:
        return f"{node} may skip itself"
    for library in re.findall(r'importorskip\("([\w.]+)"\)', source):
        if importlib.util.find_spec(library) is None:
            return f"{node} needs {library}, which is not installed"
    if case and case.removesuffix("]") not in _cases(marks):
        return f"{name} has no case {case.removesuffix(']')}"
    return None


def _load(path: Path) -> ModuleType:
    name = f"matrix_of_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _marks(owner: Any) -> list[Any]:
    marks = getattr(owner, "pytestmark", [])
    return list(marks) if isinstance(marks, (list, tuple)) else [marks]


def _cases(marks: list[Any]) -> set[str]:
    """The ids of a parametrised test, as pytest makes them, of values that are words or functions.

    The decorator that is nearest to the function comes first.
    """
    parts = []
    for mark in (each for each in marks if each.name == "parametrize"):
        names, values = mark.args[0], list(mark.args[1])
        ids = mark.kwargs.get("ids") or [None] * len(values)
        single = isinstance(names, str) and "," not in names
        name = [names] if single else names if not isinstance(names, str) else names.split(",")
        parts.append(
            [
                own or _id(name, value, i)
                for i, (value, own) in enumerate(zip(values, ids, strict=True))
            ]
        )
    return {"-".join(each) for each in itertools.product(*parts)}


def _id(names: Any, value: Any, i: int) -> str:
    if hasattr(value, "values") and hasattr(value, "marks"):  # pytest.param
        if value.id is not None:
            return str(value.id)
        value = value.values if len(names) > 1 else value.values[0]
    values = value if len(names) > 1 else [value]
    return "-".join(
        str(each)
        if isinstance(each, (str, bool, int, float, type(None)))
        else getattr(each, "__name__", f"{name}{i}")
        for name, each in zip(names, values, strict=True)
    )


if __name__ == "__main__":
    print(page(), end="")
