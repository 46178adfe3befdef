"""Files as the field publishes them, columns by name, and what is left out, cut or repeated."""

from __future__ import annotations

import json
import warnings

import pytest
from helpers import tiny_chat

from ssah.data import (
    Counts,
    DataError,
    encode,
    load_requests,
    load_rows,
    make_loader,
    warn_of_shared,
)

ROW = {"prompt": "What is tea?", "completion": "A drink."}
ADVBENCH = 'goal,target\n"Write, in verse, a tutorial","Sure, here is"\nWrite a guide,Sure\n'
JAILBREAKBENCH = """Index,Goal,Target,Behavior,Category,Source
0,Write an article,Sure,Defamation,Libel,Original
"""
HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    "Name the agent,standard,chemical,,,name_the_agent\n"
    'List the steps,contextual,chemical,context,"A text\nof two lines",list_the_steps\n'
)
STRONGREJECT = "category,source,forbidden_prompt\nViolence,custom,Write a threat\n"
XSTEST = "id,prompt,type,label\n1,How do I kill a process?,homonyms,safe\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ADVBENCH, ["Write, in verse, a tutorial", "Write a guide"]),
        (JAILBREAKBENCH, ["Write an article"]),
        (HARMBENCH, ["Name the agent", "A text\nof two lines\n\n---\n\nList the steps"]),
        (STRONGREJECT, ["Write a threat"]),
        (XSTEST, ["How do I kill a process?"]),
    ],
)
def test_requests_as_they_are_published(tmp_path, text, expected):
    path = tmp_path / "requests.csv"
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert load_requests(path) == expected
    assert load_requests(f"{path}[0:1]") == expected[:1]
    tabs = tmp_path / "requests.tsv"
    tabs.write_text("goal\tnote\nOne, two\tx\n")
    assert load_requests(tabs) == ["One, two"]


def test_alpaca_is_a_json_list(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say nothing.", "input": "", "output": ""},
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows, indent=1))
    with pytest.raises(DataError, match=r"alpaca\.json\[1\]: the response is empty \(--skip-inv"):
        load_rows(path)
    counts = Counts()
    with pytest.warns(
        UserWarning, match=r"alpaca\.json: rows left out .* not valid: 1 .*\[1\]: the resp"
    ):
        assert load_rows(path, invalid="skip", counts=counts) == [
            {"prompt": "Add.\n\n1, 2", "completion": "3"}
        ]
    assert counts.invalid == 1
    assert load_rows(f"{path}[:1]") == load_rows(path, limit=1)  # what is not read is not judged
    lines = tmp_path / "lines.json"
    lines.write_text(json.dumps(ROW))
    assert load_rows(lines) == [ROW]


def test_the_target_of_an_attack_is_no_response(tmp_path):
    path = tmp_path / "advbench.csv"
    path.write_text(ADVBENCH)
    message = r"advbench\.csv:2: no response: .*--response-column.*no re.*`ssah refusals` writes"
    with pytest.raises(DataError, match=message):
        load_rows(path)
    rows = load_rows(path, response_column="target")
    assert [row["completion"] for row in rows] == ["Sure, here is", "Sure"]


def test_a_csv_with_semicolons_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt;completion\nHi;Hello.\n")
    with pytest.raises(DataError, match=r"rows\.csv:1: .* is separated by ',', and not by ';'"):
        load_rows(path)


def test_columns_are_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "no", "text": "Hi", "said": "Hello."}) + "\n")
    assert load_rows(path, prompt_column="text", response_column="said") == [
        {"prompt": "Hi", "completion": "Hello."}
    ]
    assert load_requests(path, prompt_column="text") == ["Hi"]
    with pytest.raises(
        DataError, match=r"own\.jsonl:1: no prompt: prompt_column is 'txt', the row"
    ):
        load_requests(path, prompt_column="txt")
    assert len(load_rows("builtin:safety", prompt_column="text")) == 80
    with pytest.raises(DataError) as error:
        load_requests_of(tmp_path, {"body": "Hi"})
    assert "has 'body'" in str(error.value)
    assert "has 'completion'" not in str(error.value)


def load_requests_of(folder, row):
    path = folder / "one.jsonl"
    path.write_text(json.dumps(row))
    return load_requests(path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("prompt,completion\na,b\nc\n", r":3: has 1 cells, must have 2"),
        ("prompt,completion\na,b,c\n", r":2: has 3 cells, must have 2"),
        ('prompt,completion\n"a,b\nc,d\n', r"invalid CSV: unexpected end of data"),
        ("prompt,prompt\na,b\n", r":1: the header names the column 'prompt' twice"),
        ("prompt,completion\n", "has no rows"),
        ("", "has no rows"),
        ("a,b\n1,2\n", r":2: no prompt: .* has 'a', 'b'"),
    ],
)
def test_damaged_csv_is_named(tmp_path, text, what):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"rows\.csv.*{what}"):
        load_rows(path)


def test_a_missing_file_is_no_hub_id():
    with pytest.raises(FileNotFoundError, match=r"an existing file .*was 'runs/rows\.csv'"):
        load_rows("runs/rows.csv")


def test_invalid_rows_of_every_kind_are_left_out_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = [
        "{",
        '["a"]',
        json.dumps({**ROW, "prompt": " "}),
        json.dumps({**ROW, "prompt": "\ud83d"}),
    ]
    path.write_text("\n".join([json.dumps(ROW), *bad, json.dumps({**ROW, "prompt": "Why?"})]))
    counts = Counts()
    with pytest.warns(
        UserWarning, match=r"rows left out .* valid: 4 .*rows\.jsonl:2: invalid JSON"
    ):
        rows = load_rows(path, invalid="skip", counts=counts)
    assert [row["prompt"] for row in rows] == ["What is tea?", "Why?"]
    assert counts.to_dict()["invalid"] == 4
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"has no rows: 1 are not valid"):
        load_rows(path, invalid="skip")
    with pytest.raises(ValueError, match="invalid must be 'error' or 'skip', was 'drop'"):
        load_rows([ROW], invalid="drop")


def test_rows_that_are_cut_are_counted():
    rows = [ROW, {"prompt": "say", "completion": "word " * 600}]
    with pytest.warns(
        UserWarning, match=r"1 of 2 rows are longer than max_length = 512 tokens: .*"
    ):
        loader = make_loader(rows, tiny_chat.tokenizer())
    whole = next(encode(rows[1:], tiny_chat.tokenizer(), max_length=5000))
    assert loader.counts.cut_rows == 1
    assert loader.counts.cut_tokens == len(whole["input_ids"]) - 512
    rows.append({"prompt": "word " * 600, "completion": "x"})
    with pytest.warns(UserWarning, match=r"1 of 3 rows were left out: their prompts"):
        loader = make_loader(rows, tiny_chat.tokenizer(), overlong="skip")
    assert (loader.counts.rows, loader.counts.overlong) == (2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_loader([ROW], tiny_chat.tokenizer()).counts == Counts(rows=1)


def test_repeated_prompts_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (ROW, {**ROW, "completion": "Hm."}, ROW)))
    counts = Counts()
    with pytest.warns(UserWarning, match=r"rows\.jsonl: 2 of 3 rows repeat a prompt .*1 different"):
        load_rows(path, counts=counts)
    assert counts.repeated == 2
    with pytest.warns(UserWarning, match=r"2 of 3 rows repeat a prompt"):
        load_requests(path)
    with pytest.warns(UserWarning, match=r"1 of the 2 different prompts of --requests are also in"):
        assert warn_of_shared("--requests", ["a", "b"], "--safety", ["b", "c"]) == 1
