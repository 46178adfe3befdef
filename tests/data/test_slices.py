"""Slices of files by name, and requests, which need no responses."""

from __future__ import annotations

import json

import pytest

from ssah.data import DataError, load_requests, load_rows


def test_a_range_of_rows_is_a_slice(tmp_path):
    rows = load_rows("builtin:safety")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_rows(f"{path}[3:7]") == rows[3:7]
    assert load_rows(f"{path}[3:]") == rows[3:]
    assert load_rows("builtin:safety[:5]") == rows[:5]
    assert load_rows(f"{path}[3:7]", limit=2) == rows[3:5]
    with pytest.raises(ValueError, match="must end after its start"):
        load_rows(f"{path}[7:7]")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(f"{path}[100000:]")


def test_a_file_may_have_the_name_of_a_range(tmp_path):
    path = tmp_path / "rows[0:1]"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    assert len(load_rows(str(path))) == 2


def test_requests_need_no_responses(tmp_path):
    text = tmp_path / "requests.txt"
    text.write_text("first\n\n  second  \nthird\n")
    assert load_requests(text) == ["first", "second", "third"]
    assert load_requests(f"{text}[1:]", limit=1) == ["second"]
    lines = tmp_path / "requests.jsonl"
    rows = (
        {"prompt": "a"},
        {"instruction": "b", "input": "c", "output": "d"},
        {"messages": [{"role": "user", "content": "e"}]},
        {"prompt": "f", "completion": None},
    )
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_requests(lines) == ["a", "b\n\nc", "e", "f"]
    assert load_requests("builtin:safety[0:2]") == [
        row["prompt"] for row in load_rows("builtin:safety", limit=2)
    ]
    with pytest.raises(FileNotFoundError):
        load_requests(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="has no requests"):
        load_requests(f"{text}[5:]")
