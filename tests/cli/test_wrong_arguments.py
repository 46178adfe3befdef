"""What is no request, no count and no mask is refused by name, before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_chat
import torch

import ssah
from ssah.data import encode, load_requests, load_rows, make_loader
from ssah.evaluation import coherence, generate, judge, refusal_margin
from ssah.evaluation.perplexity import perplexity

ROWS = [{"prompt": "a", "completion": "b"}] * 3
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model(), tiny_chat.tokenizer()


@pytest.mark.parametrize("given", ["how", {"prompt": "how"}])
@pytest.mark.parametrize("measure", [refusal_margin, generate, ssah.probe, perplexity])
def test_one_text_is_no_list_of_texts(chat, measure, given):
    with pytest.raises(ValueError, match=r"(a string|one row), must be a list of strings or rows"):
        measure(*chat, given)


def test_one_answer_is_no_list_of_answers(chat):
    with pytest.raises(ValueError, match="answers is a string, must be a list"):
        coherence(*chat, "how", ["why"])
    with pytest.raises(ValueError, match="answers is a string, must be a list of strings"):
        judge("qi2023")(["h", "o", "w"], "why")


@pytest.mark.parametrize("value", [1.5, float("nan"), "2", True])
def test_counts_are_whole_numbers(chat, value, tmp_path):
    model, tokenizer = chat
    (tmp_path / "a.txt").write_text("Why?\n")
    for name, call in (
        ("batch_size", lambda: make_loader(ROWS, tokenizer, batch_size=value)),
        ("max_tokens_per_batch", lambda: make_loader(ROWS, tokenizer, max_tokens_per_batch=value)),
        ("max_length", lambda: encode(ROWS, tokenizer, max_length=value)),
        ("limit", lambda: load_rows(ROWS, limit=value)),
        ("limit", lambda: load_requests(tmp_path / "a.txt", limit=value)),
        ("max_new_tokens", lambda: generate(model, tokenizer, ["a"], max_new_tokens=value)),
        ("batch_size", lambda: generate(model, tokenizer, ["a"], batch_size=value)),
        ("tokens", lambda: ssah.probe(model, tokenizer, ["a", "b"], tokens=value)),
    ):
        with pytest.raises(TypeError, match=rf"{name} is .*, must be a whole number"):
            call()
    assert len(load_rows(ROWS, limit=np.int64(2))) == 2


@pytest.mark.parametrize("value", [float("nan"), 0.5, -1e9, 2])
def test_a_mask_is_0_or_1(chat, value):
    mask = torch.tensor([[1.0, value, 1.0]])
    with pytest.raises(ValueError, match=r"batch 0: attention_mask\[0, 1\] is .*must be 0 .* or 1"):
        ssah.attribute(chat[0], [{"input_ids": IDS, "attention_mask": mask}])


def test_position_ids_have_the_shape_of_the_tokens(chat):
    batch = {"input_ids": IDS, "position_ids": torch.arange(4)[None]}
    with pytest.raises(ValueError, match=r"position_ids have shape \(1, 4\), must have that of"):
        ssah.attribute(chat[0], [batch])


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (None, "must be a string or a row"),
        ({"messages": "hi"}, "'messages' must be a list of turns"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must have a string 'content'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the request is empty"),
    ],
)
def test_requests_are_texts_or_rows(chat, request_, what):
    with pytest.raises(ValueError, match=rf"requests\[1\]: .*{what}"):
        generate(*chat, ["Why?", request_], max_new_tokens=1)
    with pytest.raises(TypeError, match="system_prompt must be a string or None"):
        generate(*chat, ["Why?"], system_prompt=3, max_new_tokens=1)


def test_what_json_cannot_hold_is_named(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.jsonl:1: invalid JSON"):
        load_rows(tmp_path / "deep.jsonl")
    with pytest.raises(ValueError, match="whose range has a number that is too large"):
        load_rows(f"{tmp_path / 'deep.jsonl'}[{10**30}:]")
