"""Perplexity against direct computations."""

from __future__ import annotations

import math

import pytest
import tiny_chat
import torch

from ssah.data import load_rows, make_loader
from ssah.evaluation import (
    Perplexity,
    utility_loss,
)
from ssah.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model(), tiny_chat.tokenizer()


def test_perplexity_of_answers_is_exp_of_the_utility_loss(chat):
    model, tokenizer = chat
    rows = load_rows("builtin:utility_eval", limit=7)
    found = perplexity(model, tokenizer, rows, batch_size=3)
    loss = utility_loss(model, make_loader(rows, tokenizer))
    words = sum(len(row["completion"].split()) for row in rows)
    assert found.words == words
    assert found.nats / found.tokens == pytest.approx(loss, rel=1e-6)
    assert found.per_token == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.per_word == pytest.approx(math.exp(loss * found.tokens / words), rel=1e-5)
    assert found.to_dict()["loss"] == pytest.approx(loss, rel=1e-6)
    assert perplexity(model, tokenizer, rows, max_length=40).words < words  # what is kept of them


@pytest.mark.parametrize("max_length", [7, 512])
def test_every_token_of_a_text_is_predicted_once(chat, max_length):
    model, tokenizer = chat
    texts = [
        "The lamp had not gone out in ninety years.",
        "Only the keeper was missing, of course.",
    ]
    nats, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        count += len(ids)
        for start in range(0, len(ids), max_length - 1):
            before = [ids[start - 1] if start else tokenizer.eos_token_id]
            window = ids[start : start + max_length - 1]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([before + window])).logits[0].double()
            log_probs = logits.log_softmax(-1)
            nats -= sum(log_probs[k, token].item() for k, token in enumerate(window))
    found = perplexity(model, tokenizer, texts, max_length=max_length)
    assert (found.tokens, found.words) == (count, 16)
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_a_perplexity_beyond_all_numbers_is_infinite_and_none_in_json():
    found = Perplexity(nats=3000.0, tokens=300, words=3)
    assert found.per_word == math.inf
    assert found.to_dict()["word_perplexity"] is None
    assert found.to_dict()["token_perplexity"] == pytest.approx(math.exp(10))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "data is empty"),
        (["  "], {}, "no word to predict"),
        (["a", {"prompt": "a", "completion": "b"}], {}, "both strings and rows"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
        (["a"], {"max_length": 1}, "max_length is 1, must be at least 2"),
    ],
)
def test_perplexity_refuses(chat, data, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(*chat, data, **options)
