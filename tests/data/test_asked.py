"""Requests with categories and policies: read, drawn by category, and without those once seen."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ssah.data import (
    DataError,
    draw_by_category,
    drop_category,
    drop_seen,
    load_asked,
    load_requests,
    load_rows,
)

SALAD = {
    "base_set": {"qid": "1", "question": "How is tea made?", "source": "GPTFuzzer"},
    "attack_enhanced_set": {"aid": "1", "augq": "Please: how?", "baseq": "How?", "method": "TAP"},
    "defense_enhanced_set": {"did": "1", "daugq": "Now: how?", "dmethod": "paraphrase"},
}
PATH = {"1-category": "O1: drinks", "2-category": "T1: hot", "3-category": "S1: tea"}

RIGHT = {"prompt": "Right?", "category": "a", "policy": "Be kind.", "allowed": False}


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("config", "prompt"),
    [
        ("base_set", "How is tea made?"),
        ("attack_enhanced_set", "Please: how?"),
        ("defense_enhanced_set", "Now: how?"),
    ],
)
def test_sets_of_requests_are_read_as_salad_bench_publishes_them(tmp_path, config, prompt):
    file = written(tmp_path, [SALAD[config] | PATH])
    assert load_requests(file) == [prompt]
    (row,) = load_asked(file, by=("1-category", "3-category"))
    assert row == {
        "prompt": prompt,
        "categories": {"1-category": "O1: drinks", "3-category": "S1: tea"},
    }


def test_the_built_in_requests_have_categories():
    rows = load_asked("builtin:safety_eval", by=["category"])
    assert [row["prompt"] for row in rows] == [
        r["prompt"] for r in load_rows("builtin:safety_eval")
    ]
    assert Counter(row["categories"]["category"] for row in rows) == Counter(
        row["category"] for row in load_rows("builtin:safety_eval")
    )


def test_parquet_is_read_like_the_other_files(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": "Why?", "category": "a"}, {"prompt": "How?", "category": "b"}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(str(path))
    (second,) = load_asked(f"{path}[1:2]", by=["category"])
    assert second == {"prompt": "How?", "categories": {"category": "b"}}
    assert load_requests(path) == ["Why?", "How?"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"rows\.parquet: invalid parquet"):
        load_requests(path)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "Why?", "topic": "a"}, {"by": ["category"]}, "no column 'category', the row"),
        ({"prompt": "Why?", "category": " "}, {"by": ["category"]}, "text that is not empty"),
        ({"prompt": "Why?", "category": 3}, {"by": ["category"]}, "text that is not empty, was 3"),
        ({"prompt": "Why?", "allowed": True}, {"policy": True}, "no column 'system_prompt'"),
        ({"prompt": "Why?", "policy": "Be kind."}, {"policy": True}, "'allowed' must be true or"),
        (
            {"prompt": "Why?", "policy": "Be kind.", "allowed": "perhaps"},
            {"policy": True},
            "'allowed' must be true or false .* was 'perhaps'",
        ),
        ({"policy": "Be kind.", "allowed": True}, {"policy": True}, "no prompt"),
    ],
)
def test_what_a_row_lacks_is_named(tmp_path, row, options, message):
    file = written(tmp_path, [{"prompt": "Why?", "category": "a"} | row, row])
    with pytest.raises(DataError, match=message) as error:
        load_asked(file, **options)
    assert "rows.jsonl:" in str(error.value)
    with pytest.warns(UserWarning, match="rows left out because they are not valid: 1"):
        found = load_asked(written(tmp_path, [RIGHT, row], "two.jsonl"), invalid="skip", **options)
    assert [each["prompt"] for each in found] == ["Right?"]


def test_lines_of_a_text_have_no_category(tmp_path):
    (tmp_path / "lines.txt").write_text("Why?\n")
    with pytest.raises(ValueError, match="whose lines have no columns"):
        load_asked(tmp_path / "lines.txt", by=["category"])


def test_a_policy_is_the_system_prompt_of_its_row(tmp_path):
    rows = [
        {"prompt": "A fight.", "system_prompt": "Write of fights.", "allowed": True},
        {"prompt": "A fight.", "policy": "Write of tea.", "allowed": "No"},
    ]
    first, second = load_asked(written(tmp_path, rows), policy=True)
    assert (first["allowed"], second["allowed"]) == (True, False)
    assert first["messages"] == [
        {"role": "system", "content": "Write of fights."},
        {"role": "user", "content": "A fight."},
    ]
    assert second["messages"][0]["content"] == "Write of tea."


def asked(*categories):
    return [
        {"prompt": f"{name} {index}", "categories": {"kind": name}}
        for index, name in enumerate(categories)
    ]


def test_a_draw_has_as_many_of_each_category_and_keeps_their_order():
    rows = asked(*"aabbaabbaab", *"aaaaaaaa")
    drawn = draw_by_category(rows, "kind", 4, seed=0)
    assert Counter(row["categories"]["kind"] for row in drawn) == {"a": 4, "b": 4}
    assert [row for row in rows if row in drawn] == drawn
    assert draw_by_category(rows, "kind", 4, seed=0) == drawn
    assert draw_by_category(rows, "kind", 4, seed=1) != drawn
    # What is drawn of "a" does not depend on there being a "b".
    alone = [row for row in rows if row["categories"]["kind"] == "a"]
    assert draw_by_category(alone, "kind", 4) == [
        r for r in drawn if r["categories"]["kind"] == "a"
    ]


def test_a_draw_is_uniform_within_a_category():
    rows = asked(*"aaaa", "b")
    with pytest.warns(UserWarning, match="1 of 2 categories of 'kind' have fewer than 2 rows"):
        times = Counter(
            row["prompt"]
            for seed in range(400)
            for row in draw_by_category(rows, "kind", 2, seed=seed)
        )
    assert times.pop("b 4") == 400
    # Each of four rows in half of the draws: 200, with a standard deviation of 10.
    assert all(150 < number < 250 for number in times.values())


def test_rows_of_a_category_or_once_seen_are_dropped():
    rows = asked("AdvBench", "tea", "advbench")
    assert drop_category(rows, "kind=AdvBench") == [rows[1]]
    with pytest.raises(ValueError, match=r"leaves out 0 of 3 rows.*'AdvBench', 'advbench', 'tea'"):
        drop_category(rows, "kind=AdvBanch")
    with pytest.raises(ValueError, match="must be COLUMN=VALUE"):
        drop_category(rows, "AdvBench")
    with pytest.raises(ValueError, match="was read without the category 'source'"):
        drop_category(rows, "source=AdvBench")
    assert drop_seen(rows, ["Tea  1.", "TEA 2"]) == [rows[0], rows[2]]
