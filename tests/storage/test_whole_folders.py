"""A folder appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssah.storage import whole_folder


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with whole_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("2")
    assert (tmp_path / "empty" / "a").read_text() == "2"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    full, file, late = (tmp_path / name for name in ("full", "file", "late"))
    full.mkdir()
    (full / "theirs").write_text("1")
    file.write_text("1")
    for path in (full, file):
        with pytest.raises(FileExistsError, match="must be new or empty"):
            whole_folder(path).__enter__()

    for place in ("", ".", ".."):
        with pytest.raises(ValueError, match="must end with the name of what is written"):
            whole_folder(place).__enter__()

    def somebody_is_faster() -> None:
        with whole_folder(late) as folder:
            (folder / "a").write_text("1")
            late.mkdir()
            (late / "theirs").write_text("2")

    with pytest.raises(OSError, match="late"):
        somebody_is_faster()
    assert [path.name for path in late.iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "late"]
