"""Preferences: texts and turns are the same pairs, whatever reads them; what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_level import CHATML, make_tokenizer

from ssah.data import (
    Counts,
    DataError,
    Reading,
    answered,
    check_preferences,
    encode,
    load_preferences,
)
from ssah.studies.sources import Sources

TEXTS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "more": 1}
SYSTEM = {"role": "system", "content": "A game."}
USER = {"role": "user", "content": "Why?"}
CHOSEN = [{"role": "assistant", "content": "Because."}]
REJECTED = [{"role": "assistant", "content": "No."}]
TURNS = {"prompt": [USER], "chosen": CHOSEN, "rejected": REJECTED}
LONG = {**TURNS, "prompt": [SYSTEM, USER]}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_and_turns_are_the_same_pairs(tmp_path: Path) -> None:
    path = written(tmp_path, TEXTS, TURNS, LONG)
    assert load_preferences(path) == [TURNS, TURNS, LONG]
    assert load_preferences(f"{path}[1:2]") == [TURNS]
    assert check_preferences([TEXTS, LONG]) == [TURNS, LONG]


@pytest.mark.parametrize("template", [CHATML, None])
def test_an_answer_is_encoded_as_the_row_with_it(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    (pair,) = check_preferences([TEXTS])
    rows = [answered(pair, "chosen"), answered(pair, "rejected")]
    expected = [{"prompt": "Why?", "completion": answer} for answer in ("Because.", "No.")]
    assert list(encode(rows, tokenizer)) == list(encode(expected, tokenizer))


def test_a_study_keeps_the_record_of_them(tmp_path: Path) -> None:
    path = written(tmp_path, LONG, {**TEXTS, "rejected": ""})
    sources = Sources(Reading(invalid="skip"))
    with pytest.warns(UserWarning, match="rejected is empty"):
        assert sources.preferences(str(path)) == [LONG]
    record = sources.record["preferences"]
    assert (record["source"], record["rows"], record["invalid"]) == (str(path), 1, 1)
    with pytest.warns(UserWarning, match="requests.*preferences|preferences.*requests"):
        sources.kept("requests", "some", ["Why?"], ["Why?"])  # what was trained on is not measured


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Why?", "chosen": "Because."}, "lacks rejected; a preference must have"),
        ({**TEXTS, "chosen": 3}, "chosen must be a text or a list of turns, was of type int"),
        ({**TEXTS, "chosen": " "}, "chosen is empty"),
        ({**TEXTS, "chosen": "No."}, "are the same, so that none is preferred"),
        ({**TURNS, "prompt": [SYSTEM]}, r"prompt has turns of \['system'\]; they must end with"),
        ({**TURNS, "chosen": [USER, *CHOSEN]}, "chosen has turns of .*; they must be one of"),
        ({**TURNS, "rejected": []}, "rejected has turns of"),
        ({**TURNS, "chosen": [{"role": "assistant"}]}, r"chosen\[0\] must have a string 'content'"),
        ({**TEXTS, "prompt": "\ud800"}, "half of a character"),
        ("Why?", "a row must be an object"),
    ],
)
def test_what_is_no_preference_is_refused(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"preferences\[1\].*{message}"):
        check_preferences([TEXTS, row])


def test_no_row_and_rows_that_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preferences is empty; it must have at least one row"):
        check_preferences([])
    path, counts = written(tmp_path, TEXTS, {"prompt": "Why?"}), Counts()
    with pytest.raises(DataError, match=r"pairs.jsonl:2 lacks chosen and rejected"):
        load_preferences(path)
    with pytest.warns(UserWarning, match="1"):
        assert load_preferences(path, invalid="skip", counts=counts) == [TURNS]
    assert counts.invalid == 1
