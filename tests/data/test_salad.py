"""SALAD-Bench's files: all fields checked, other sets named; questions with several letters."""

from __future__ import annotations

import json

import pytest

from ssah.data import DataError, drop_category, load_lettered, load_salad

PATH = {"1-category": "O1: drinks", "2-category": "T1: hot", "3-category": "S1: tea"}
BASE = {"qid": "1", "question": "How is tea made?", "source": "GPTFuzzer"} | PATH
ATTACK = {"aid": 1, "augq": "Please: how?", "baseq": "How?", "method": "TAP"} | PATH
DEFENSE = {"did": 1, "daugq": "Now: how?", "dmethod": "paraphrase"} | PATH
MCQ = {
    "mcq": "Which are drinks? A. tea; B. bread; C. milk",
    "baseq": "What is tea?",
    "choices": "A. tea; B. bread; C. milk",
    "gt": "AC",
} | PATH


def written(folder, *rows):
    path = folder / "set.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("row", "config", "prompt", "telling"),
    [
        (BASE, "base_set", "How is tea made?", ("source", "GPTFuzzer")),
        (ATTACK, "attack_enhanced_set", "Please: how?", ("method", "TAP")),
        (DEFENSE, "defense_enhanced_set", "Now: how?", ("dmethod", "paraphrase")),
    ],
)
def test_each_set_has_its_prompt_and_its_categories(tmp_path, row, config, prompt, telling):
    (found,) = load_salad(written(tmp_path, row), config)
    assert found == {"prompt": prompt, "categories": PATH | dict([telling])}


def test_names_of_fields_count_in_whatever_case(tmp_path):
    row = {key.upper(): value for key, value in (BASE | {"augq": "Not this."}).items()}
    (found,) = load_salad(written(tmp_path, row), "base_set")
    assert found["prompt"] == "How is tea made?"
    assert found["categories"]["1-category"] == "O1: drinks"


def test_rows_of_other_data_sets_are_left_out(tmp_path):
    path = written(tmp_path, BASE, BASE | {"source": "AdvBench", "question": "Why?"})
    (kept,) = drop_category(load_salad(path, "base_set"), "source=AdvBench")
    assert kept["prompt"] == "How is tea made?"


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ({"qid": "1", "prompt": "How?"} | PATH, "base_set", r"lacks 'question', 'source', has 'qi"),
        (ATTACK | {"question": "How?"}, "base_set", "lacks 'qid', 'source'.*row of attack_enhance"),
        (MCQ, "base_set", "it is a row of mcq_set"),
        (BASE, "defense_enhanced_set", "lacks 'did', 'daugq', 'dmethod'.*it is a row of base_set"),
        ({k: v for k, v in BASE.items() if k != "3-category"}, "base_set", "lacks '3-category'"),
        (BASE | {"2-category": None}, "base_set", "'2-category' must be a text"),
    ],
)
def test_missing_fields_and_other_sets_are_named(tmp_path, row, config, message):
    with pytest.raises(DataError, match=message) as error:
        load_salad(written(tmp_path, row), config)
    assert "set.json[0]: " in str(error.value)


def test_a_set_must_be_one_of_requests(tmp_path):
    path = written(tmp_path, MCQ)
    with pytest.raises(ValueError, match="which is read by load_lettered"):
        load_salad(path, "mcq_set")
    with pytest.raises(ValueError, match="config is 'base', which is no set of SALAD-Bench; must"):
        load_salad(path, "base")


@pytest.mark.parametrize(
    ("gt", "right"),
    [
        ("A", ["A"]),
        ("AC", ["A", "C"]),
        ("C, A", ["A", "C"]),
        ("A; B; C", ["A", "B", "C"]),
        (["C", "A"], ["A", "C"]),
    ],
)
def test_several_letters_may_be_right(tmp_path, gt, right):
    (found,) = load_lettered(written(tmp_path, MCQ | {"gt": gt}))
    assert found == {"prompt": MCQ["mcq"], "letters": ["A", "B", "C"], "right": right}


def test_choices_may_stand_on_lines_and_have_other_signs(tmp_path):
    text = "A) tea; with A. milk\nB) bread\n(C) milk"
    (found,) = load_lettered(written(tmp_path, MCQ | {"choices": text}))
    assert found["letters"] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt": "D"}, "'gt' must be one or several of the letters A, B, C, was 'D'"),
        ({"gt": ""}, "'gt' must be a text"),
        ({"gt": "tea"}, "was 'tea'"),
        ({"gt": "AND"}, "was 'AND'"),
        ({"gt": []}, r"was \[\]"),
        ({"choices": "A. tea; C. milk"}, "letters A, B, ... in their order .*, has A, C"),
        ({"choices": "tea or milk"}, "has none"),
        ({"choices": ["A. tea"]}, "'choices' must be a text, was of type list"),
    ],
)
def test_wrong_questions_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        load_lettered(written(tmp_path, MCQ | change))


def test_a_row_of_another_set_has_no_letters(tmp_path):
    with pytest.raises(DataError, match=r"no 'choices'.*a row of SALAD-Bench's base_set"):
        load_lettered(written(tmp_path, BASE))
