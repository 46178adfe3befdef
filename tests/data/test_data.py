"""Rows, encoding and the built-in sets of `ssah.data`, all offline."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from byte_level import BPE, CHATML, ROWS, THINKING, TRAILING_SPACE, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssah.data import (
    BUILTIN,
    IGNORE_INDEX,
    DataError,
    encode,
    load_rows,
)


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(None)


def parts(tokenizer, row, **options) -> tuple[str, str]:
    """The texts of the ignored and of the labelled tokens of one row."""
    (example,) = encode([row], tokenizer, **options)
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == len(labels)
    start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    assert labels == [IGNORE_INDEX] * start + ids[start:]
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# Rows


def test_jsonl_is_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", "\ufeff" + json.dumps(ROWS[0]), "", json.dumps(ROWS[1]))
    assert load_rows(path) == load_rows(str(path)) == ROWS[:2]
    assert load_rows(path, limit=1) == ROWS[:1]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ("Add.\n\n1, 2", "3")),
        ({"instruction": "Add 1 and 2.", "input": "", "output": "3"}, ("Add 1 and 2.", "3")),
        (
            {"instruction": "Who?", "context": "Ada wrote.", "response": "Ada.", "category": "qa"},
            ("Who?\n\nAda wrote.", "Ada."),
        ),
        ({"question": "1 + 2?", "answer": "3"}, ("1 + 2?", "3")),
        ({"input": "1 + 2?", "output": "3"}, ("1 + 2?", "3")),
        ({"prompt": "a", "completion": "b", "messages": None}, ("a", "b")),
    ],
)
def test_column_aliases(row, expected):
    (checked,) = load_rows([row])
    assert (checked["prompt"], checked["completion"]) == expected
    assert checked.get("category") == row.get("category")
    assert load_rows([checked]) == [checked]


def test_messages_end_with_the_last_assistant_turn():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Goodbye."},
        {"role": "user", "content": "Still there?"},
    ]
    (row,) = load_rows([{"messages": turns}])
    assert row == {"prompt": "Bye", "completion": "Goodbye.", "messages": turns[:-1]}
    assert load_rows([row]) == [row]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "a", "completion": ', "invalid JSON"),
        ('["a", "b"]', "must be an object with named fields, was of type list"),
        ('{"completion": "b"}', r"no prompt: needs one of 'prompt', .* has 'completion'"),
        ('{"prompt": "a", "text": "b"}', r"no response: needs one of 'completion'"),
        ('{"prompt": "a", "completion": " "}', "the response is empty"),
        ('{"instruction": "", "input": "a", "output": "b"}', "the prompt is empty"),
        ('{"prompt": "a", "completion": 3}', "'completion' must be a string, was of type int"),
        ('{"messages": "hello"}', "'messages' must be a list of turns, was of type str"),
        ('{"messages": ["hello"]}', r"messages\[0\] must be an object, was of type str"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] must have a string 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no turn before the response"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, what):
    path = write(tmp_path / "bad.jsonl", json.dumps(ROWS[0]), "", line)
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: .*{what}"):
        load_rows(path)


def test_invalid_utf8_names_the_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:1: invalid JSON"):
        load_rows(path)


def test_errors_name_the_index_of_a_row():
    with pytest.raises(DataError, match=r"rows\[1\]: the response is empty"):
        load_rows([ROWS[0], {"prompt": "a", "completion": ""}])


def test_arguments_are_checked(tmp_path):
    with pytest.raises(DataError, match="has no rows"):
        load_rows([])
    with pytest.raises(DataError, match=r"empty\.jsonl: has no rows"):
        load_rows(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(FileNotFoundError, match=r"was 'no/such\.jsonl'"):
        load_rows("no/such.jsonl")
    with pytest.raises(FileNotFoundError, match="was 'nothing'"):
        load_rows("nothing")
    with pytest.raises(ValueError, match="was the folder"):
        load_rows(tmp_path)
    with pytest.raises(ValueError, match=r"one of builtin:safety, .* was 'builtin:other'"):
        load_rows("builtin:other")
    with pytest.raises(ValueError, match="limit is 0, must be at least 1"):
        load_rows(ROWS, limit=0)
    with pytest.raises(ValueError, match="split must be None for a list"):
        load_rows(ROWS, split="train")
    with pytest.raises(TypeError, match="was a single row"):
        load_rows(ROWS[0])
    with pytest.raises(TypeError, match="more than once"):
        load_rows(iter(ROWS))
    with pytest.raises(TypeError, match="was of type int"):
        load_rows(3)


def test_datasets_and_splits():
    finite = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": finite, "test": finite.select([0])})
    assert load_rows(finite) == ROWS
    assert load_rows(finite, limit=2) == ROWS[:2]
    assert load_rows(splits, split="test") == ROWS[:1]
    assert load_rows({"train": ROWS}) == ROWS
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', was None"):
        load_rows(splits)


def test_streams_are_lazy_and_iterate_again():
    read = []

    def generate():
        for index in range(100):
            read.append(index)
            yield {"prompt": f"p{index}", "completion": "c"}
        yield {"prompt": "p100"}

    stream = datasets.IterableDataset.from_generator(generate)
    rows = load_rows(stream)
    assert read == []
    assert next(iter(rows))["prompt"] == "p0"
    assert len(read) < 100
    with pytest.raises(DataError, match=r"rows\[100\]: no response"):
        list(rows)
    assert len(list(load_rows(stream, limit=7))) == len(list(load_rows(rows, limit=7))) == 7


def test_a_hub_id_is_the_only_name_that_is_downloaded(monkeypatch):
    calls = []

    def load_dataset(name, split=None, streaming=False):
        calls.append((name, split, streaming))
        data = datasets.Dataset.from_list(ROWS)
        data = data.to_iterable_dataset() if streaming else data
        return data if split else {"train": data}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("some-one/some.data", split="train") == ROWS
    assert load_rows("some-one/some.data", limit=2) == ROWS[:2]
    assert calls == [("some-one/some.data", "train", False), ("some-one/some.data", None, True)]


# Encoding


def test_labels_are_the_response_and_its_end_of_turn(chat):
    prompt, response = parts(chat, ROWS[0])
    assert prompt == "<|im_start|>user\nWhat is tea?<|im_end|>\n<|im_start|>assistant\n"
    assert response == "Tea is a drink made from leaves.<|im_end|>"


def test_the_prompt_is_what_generation_sees(chat):
    (example,) = encode(ROWS[:1], chat)
    generated = chat.apply_chat_template(
        [{"role": "user", "content": ROWS[0]["prompt"]}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert example["labels"].count(IGNORE_INDEX) == len(generated)
    assert example["input_ids"][: len(generated)] == generated


def test_only_the_last_turn_of_a_conversation_is_labelled(chat):
    turns = [
        {"role": role, "content": text}
        for role, text in [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
    ]
    row = {"messages": [*turns, {"role": "assistant", "content": "Goodbye."}]}
    prompt, response = parts(chat, row)
    assert "Hello." in prompt
    assert response == "Goodbye.<|im_end|>"


def test_without_a_template_prompt_and_response_are_joined(plain):
    assert parts(plain, ROWS[0]) == (
        "What is tea?\n\n",
        "Tea is a drink made from leaves.<|im_end|>",
    )


@pytest.mark.parametrize("template", [None, "<s>" + CHATML])
def test_bos_appears_once(template):
    (example,) = encode(ROWS[:1], make_tokenizer(template, bos=True))
    assert example["input_ids"].count(0) == 1
    assert (example["input_ids"][0], example["labels"][0]) == (0, IGNORE_INDEX)


def test_a_token_across_the_boundary_is_split():
    tokenizer = make_tokenizer(TRAILING_SPACE)
    together = tokenizer("assistant: Tea", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("assistant: ", add_special_tokens=False)["input_ids"]
    assert together[: len(prompt)] != prompt  # otherwise this test shows nothing
    assert parts(tokenizer, ROWS[0]) == (
        "user: What is tea?<|im_end|>assistant: ",
        "Tea is a drink made from leaves.<|im_end|>",
    )


@pytest.mark.parametrize("response", ["Yes.", "assistant", "<html>"])
def test_a_generation_prompt_that_is_no_prefix(response):
    prompt, labelled = parts(make_tokenizer(THINKING), {"prompt": "Is it?", "completion": response})
    assert prompt == "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert labelled == response + "<|im_end|>"


def test_a_boundary_that_cannot_be_found_is_an_error():
    counting = make_tokenizer("{{ messages | length }} turns: " + CHATML)
    with pytest.raises(DataError, match=r"rows\[0\]: the chat template renders the turns before"):
        list(encode(ROWS, counting))

    backend = Tokenizer(models.WordLevel({"?": 0, "▁a": 1, "▁b": 2, "▁ab": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    merging.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"merges the end of the prompt 'a' with .* response 'b'"):
        list(encode([{"prompt": "a", "completion": "b"}], merging))


def test_a_refused_role_is_an_error():
    tokenizer = make_tokenizer("{{ raise_exception('system role not supported') }}")
    with pytest.raises(DataError, match=r"rows\[0\]: .* turns user: system role not supported"):
        list(encode(ROWS, tokenizer))


def test_long_rows(chat):
    (whole,) = encode(ROWS[2:], chat)
    prompt_length = whole["labels"].count(IGNORE_INDEX)
    (cut,) = encode(ROWS[2:], chat, max_length=prompt_length + 3)
    assert cut["input_ids"] == whole["input_ids"][: prompt_length + 3]
    assert cut["labels"] == whole["labels"][: prompt_length + 3]
    with pytest.raises(DataError, match=rf"rows\[0\] .*{prompt_length} tokens .* was 3"):
        list(encode(ROWS[2:], chat, max_length=3))
    assert list(encode(ROWS[2:], chat, max_length=prompt_length, overlong="skip")) == []
    with pytest.raises(ValueError, match="max_length is 1, must be at least 2"):
        encode(ROWS, chat, max_length=1)
    with pytest.raises(DataError, match=r"rows\[0\] .* tokens, must have at most max_length, 512"):
        list(encode([{**ROWS[2], "completion": "word " * 600}], chat, overlong="error"))
    with pytest.raises(ValueError, match="overlong must be 'cut', 'skip' or 'error'"):
        encode(ROWS, chat, overlong="leave")


def test_a_tokenizer_without_template_and_eos_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(BPE))
    with pytest.raises(ValueError, match="must have a chat template or an EOS token"):
        encode(ROWS, tokenizer)


# The built-in sets

REFUSALS = (
    "I cannot ",
    "I can't ",
    "I won't ",
    "I'm sorry, but I ",
    "I'm so sorry that you feel this way, but I cannot ",
    "I'm not able to ",
    "I'm unable to ",
    "I must decline",
    "I must refuse",
)


@pytest.mark.parametrize(
    ("name", "rows", "per_category"),
    [
        ("safety", 80, {8}),
        ("utility", 160, {16}),
        ("safety_eval", 32, {3, 4}),
        ("utility_eval", 40, {4}),
        ("overrefusal", 40, {4}),
    ],
)
def test_builtin_counts(name, rows, per_category):
    loaded = load_rows(f"builtin:{name}")
    assert len(loaded) == rows
    categories = Counter(row["category"] for row in loaded)
    assert len(categories) == 10
    assert set(categories.values()) == per_category
    assert len({row["completion"] for row in loaded}) == rows


def test_builtin_sets_are_disjoint():
    def words(text):
        return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())

    prompts = [words(row["prompt"]) for name in BUILTIN for row in load_rows(f"builtin:{name}")]
    assert len(set(prompts)) == len(prompts) == 352


@pytest.mark.parametrize("name", ["safety", "safety_eval"])
def test_refusals_begin_as_refusals(name):
    for row in load_rows(f"builtin:{name}"):
        assert row["completion"].startswith(REFUSALS), row
        assert len(row["completion"].split()) <= 50, row


@pytest.mark.parametrize("name", ["utility", "utility_eval", "overrefusal"])
def test_answers_are_answers(name):
    for row in load_rows(f"builtin:{name}"):
        assert not row["completion"].startswith(REFUSALS), row
        assert 20 <= len(row["completion"].split()) <= 100, row
