"""The page of what works and what is refused: each of its rows, and that it says what they say."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import training_matrix
from matrix.rows import ROWS, Row

CASES = [
    pytest.param(
        row,
        id=row.situation.replace("`", ""),
        marks=[pytest.mark.exhaustive] if row.exhaustive else [],
    )
    for row in ROWS
    if callable(row.proof)
]


@pytest.mark.parametrize("row", CASES)
def test_each_row_is_as_it_says(row: Row, tmp_path: Path) -> None:
    row.check(tmp_path)


def test_the_tests_that_rows_name_are_there_and_run() -> None:
    nodes = [row.proof for row in ROWS if isinstance(row.proof, str)]
    assert [why for node in nodes if (why := training_matrix.missing(node))] == []


def test_a_row_that_proves_nothing_is_found() -> None:
    here = "tests/training/test_matrix.py::test_each_row_is_as_it_says"
    found = training_matrix.missing
    assert found(f"{here}[plan.optimizer()]") is None
    assert found(f"{here}[of nothing]") == "test_each_row_is_as_it_says has no case of nothing"
    assert "has no test" in str(found("tests/training/test_matrix.py::test_gone"))
    assert "no file" in str(found("tests/training/test_gone.py::test_gone"))
    assert "is skipped" in str(
        found("tests/training/test_trainers.py::test_real_model_under_sft_trainer")
    )


def test_words_of_refusals_are_what_tests_look_for_or_what_the_library_says() -> None:
    """Of a row that another test shows: its message stands in that file, or in the library."""
    own = "".join(_unwrapped(path) for path in (training_matrix.ROOT / "ssah").rglob("*.py"))
    for row in ROWS:
        if isinstance(row.proof, str) and row.message:
            test = _unwrapped(training_matrix.ROOT / row.proof.partition("::")[0])
            assert row.message in test or row.message in own, row.situation


def _unwrapped(path: Path) -> str:
    """The text of a file, with each of its strings in one piece and nothing escaped."""
    text = re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8"))
    return text.replace("\\", "")


def test_the_page_says_what_the_rows_say() -> None:
    page = (training_matrix.ROOT / "docs" / "training" / "matrix.md").read_text(encoding="utf-8")
    write = "python tests/helpers/training_matrix.py > docs/training/matrix.md"
    assert page == training_matrix.page(), f"write it anew: {write}"
    assert len(ROWS) >= 80
    assert {row.chapter for row in ROWS} == set(training_matrix.CHAPTERS)
    twice = [name for name, n in Counter((r.chapter, r.situation) for r in ROWS).items() if n > 1]
    assert twice == []
