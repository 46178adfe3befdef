"""The table of runs/mutations.sh keeps up with the sources."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_text_stands_once() -> None:
    path = ROOT / "runs" / "mutation_table.py"
    spec = importlib.util.spec_from_file_location("mutation_table", path)
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = table  # where its dataclass looks for types
    spec.loader.exec_module(table)
    assert len(table.MUTATIONS) >= 40
    for mutation in table.MUTATIONS:
        found = (ROOT / mutation.file).read_text().count(mutation.old)
        assert found == 1, f"{mutation.file} has {found} times: {mutation.old}"
        assert mutation.new != mutation.old
