"""Letters by their likelihood, against full forward passes and loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny_chat
from transformers import GPT2Config, GPT2LMHeadModel

from ssah.evaluation import letter_log_probs, letter_scores, wilson, without_bias

QUESTIONS = [
    {"prompt": "Tea? A. yes; B. no", "letters": ["A", "B"], "right": ["A"]},
    {
        "prompt": "Drinks? A. tea; B. bread; C. milk",
        "letters": ["A", "B", "C"],
        "right": ["A", "C"],
    },
    {"prompt": "None? A. tea; B. bread", "letters": ["A", "B"], "right": ["B"]},
]


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=800, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0,
        eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [tiny_chat.model, gpt2])
def test_log_probabilities_are_those_of_whole_passes(make):
    model, tokenizer = make(), tiny_chat.tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = letter_log_probs(model, tokenizer, QUESTIONS, batch_size=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    exact = model.double()
    for question, own in zip(QUESTIONS, found, strict=True):
        turns = [{"role": "user", "content": question["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            logits = exact(ids).logits[0, -1]
        for value, letter in zip(own.tolist(), question["letters"], strict=True):
            (token,) = tokenizer(letter, add_special_tokens=False).input_ids
            assert value == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)


def test_scores_are_those_of_loops():
    given = [[-1.0, -3.0], [math.log(0.05), math.log(0.01), math.log(0.04)], [-2.0, -2.0]]
    log_probs = [torch.tensor(each, dtype=torch.float64) for each in given]
    found = letter_scores(log_probs, QUESTIONS)
    # A is chosen; A and C (0.5 and 0.4 of the letters, above 1/3); both, which are alike.
    assert found["flags"] == [1, 1, 0]
    assert found["set_match"]["rate"] == pytest.approx(2 / 3)
    assert found["letters"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert found["letters_interval"][0] < found["letters"] <= found["letters_interval"][1]
    assert found["best"]["count"] == 2  # of two that are alike the first is taken
    assert found["best_chance"] == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3)


def test_the_worked_example_of_the_file():
    (question,) = [QUESTIONS[1]]
    found = letter_scores([torch.tensor([0.5, 0.4, 0.1]).double().log()], [question])
    assert found["flags"] == [0]
    assert found["letters"] == pytest.approx(1 / 3)
    assert found["best"]["count"] == 1
    # One question agrees with itself: the interval is that of how many others might not.
    u = wilson(0, 1)[1]
    assert found["letters_interval"] == pytest.approx([1 / 3 * (1 - u), 1 / 3 + u * 2 / 3])


def test_what_a_model_always_prefers_is_divided_out():
    shares = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]
    given = [torch.tensor(each).double().log() - 3 for each in shares]  # not all of the mass
    found = [own.exp().tolist() for own in without_bias(given)]
    for group in ((0, 1), (2, 3)):
        for i in group:
            ratios = []
            for letter in range(len(shares[i])):
                mean = sum(shares[k][letter] for k in group) / len(group)
                ratios.append(shares[i][letter] / mean)
            assert found[i] == pytest.approx([ratio / sum(ratios) for ratio in ratios])
    assert [round(value, 2) for value in (found[0][0], found[1][1])] == [0.69, 0.63]  # as told
    # A model that says the same to everything has nothing left.
    assert without_bias(given[:1])[0].exp().tolist() == pytest.approx([0.5, 0.5])


def test_another_number_of_letters_is_refused():
    with pytest.raises(ValueError, match="one value for each letter"):
        letter_scores([torch.zeros(2)], QUESTIONS[1:2])
