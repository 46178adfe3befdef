"""The table of runs/mutations.sh keeps up with the sources."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_text_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "runs")
    mutations = importlib.import_module("mutation_table").MUTATIONS
    assert len(mutations) >= 40
    assert len({mutation.name for mutation in mutations}) == len(mutations)  # as they are recorded
    for mutation in mutations:
        found = (ROOT / mutation.file).read_text().count(mutation.old)
        assert found == 1, f"{mutation.file} has {found} times: {mutation.old}"
        assert mutation.new != mutation.old
