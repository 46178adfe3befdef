"""Utility loss and refusal margin against a direct computation, one sequence at a time."""

from __future__ import annotations

import pytest
import tiny_chat
import torch
from tiny_models import FAMILIES, build, collate, rows

from ssah.attribution import attribute
from ssah.data import load_rows, make_loader
from ssah.evaluation import (
    COMPLIANCE,
    REFUSAL,
    Measures,
    ablations,
    refusal_margin,
    refusal_margins,
    response_log_probs,
    utility_loss,
)
from ssah.groups import classify

IGNORED = -100


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.model(), tiny_chat.tokenizer()


def direct_log_prob(model, ids, start):
    """Sum of log p of ids[start:], float64, from one unpadded forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(log_probs[t - 1, ids[t]].item() for t in range(start, len(ids)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_is_that_of_every_row_by_itself(name, side):
    model = build(name)
    data = rows()
    total, count = 0.0, 0
    for ids, labels in data:
        start = int((labels != IGNORED).nonzero()[0])
        total -= direct_log_prob(model, ids.tolist(), start)
        count += len(ids) - start
    loader = [collate(data[:3], side=side), collate(data[3:], side=side)]
    assert utility_loss(model, loader) == pytest.approx(total / count, rel=1e-5)


def test_loss_does_not_depend_on_the_batching(chat):
    model, tokenizer = chat
    data = load_rows("builtin:utility_eval", limit=9)
    losses = [
        utility_loss(model, make_loader(data, tokenizer, batch_size=size)) for size in (1, 4, 9)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_evaluation_leaves_the_model_as_it_was(chat):
    model, tokenizer = chat
    model.train()
    try:
        utility_loss(model, make_loader("builtin:utility_eval", tokenizer, limit=2))
        assert model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    finally:
        model.eval()


def test_loss_refuses_what_has_no_response(chat):
    model, tokenizer = chat
    batch = next(iter(make_loader("builtin:utility_eval", tokenizer, limit=2)))
    with pytest.raises(ValueError, match="no response token"):
        utility_loss(model, [])
    with pytest.raises(ValueError, match="no response token"):
        utility_loss(model, [{**batch, "labels": torch.full_like(batch["labels"], IGNORED)}])
    with pytest.raises(ValueError, match="no labels"):
        utility_loss(model, [{"input_ids": batch["input_ids"]}])


def test_infinite_log_probabilities_are_reported(chat):
    model, tokenizer = chat
    loader = make_loader("builtin:utility_eval", tokenizer, limit=2)
    weight = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="batch 0"):
            utility_loss(model, loader)
    finally:
        model.lm_head.weight.data.copy_(weight)


def test_log_probs_come_one_a_row(chat):
    model, tokenizer = chat
    loader = make_loader("builtin:safety_eval", tokenizer, limit=3, batch_size=3)
    ((log_probs, count),) = response_log_probs(model, loader)
    batch = next(iter(loader))
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        start = int((batch["labels"][row] != IGNORED).nonzero()[0])
        expected = direct_log_prob(model, batch["input_ids"][row, :length].tolist(), start)
        assert log_probs[row].item() == pytest.approx(expected, rel=1e-5)
        assert count[row] == length - start


# ----------------------------------------------------------------------------------------- margin


def direct_margin(model, tokenizer, request, refusal, compliance):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
    )
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    means = []
    for opening in (refusal, compliance):
        tail = tokenizer(opening, add_special_tokens=False)["input_ids"]
        means.append(direct_log_prob(model, head + tail, len(head)) / len(tail))
    return means[0] - means[1]


@pytest.mark.parametrize("openings", [(REFUSAL, COMPLIANCE), ("No.", "Of course, gladly!")])
def test_margin_is_mean_log_probability_of_refusal_minus_compliance(chat, openings):
    model, tokenizer = chat
    requests = [row["prompt"] for row in load_rows("builtin:safety_eval", limit=5)]
    refusal, compliance = openings
    expected = [direct_margin(model, tokenizer, r, *openings) for r in requests]
    for batch_size in (1, 3, 16):
        actual = refusal_margins(
            model,
            tokenizer,
            requests,
            refusal=refusal,
            compliance=compliance,
            batch_size=batch_size,
        )
        assert actual.dtype == torch.float64
        assert actual.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    mean = refusal_margin(model, tokenizer, requests, refusal=refusal, compliance=compliance)
    assert mean == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_margin_changes_sign_with_the_openings_and_is_zero_for_a_uniform_model(chat):
    model, tokenizer = chat
    requests = ["Tell me a secret.", "How?"]
    there = refusal_margins(model, tokenizer, requests)
    back = refusal_margins(model, tokenizer, requests, refusal=COMPLIANCE, compliance=REFUSAL)
    torch.testing.assert_close(there, -back)
    weight = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.data.zero_()
        assert refusal_margins(model, tokenizer, requests).abs().max() < 1e-6
    finally:
        model.lm_head.weight.data.copy_(weight)


def test_margin_takes_rows_and_conversations(chat):
    model, tokenizer = chat
    row = {"prompt": "How?", "completion": "Never mind."}
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Never mind."}]
    plain, of_row, of_turns, open_ended = refusal_margins(
        model, tokenizer, ["How?", row, {"messages": turns}, {"messages": turns[:1]}]
    ).tolist()
    assert of_row == of_turns == open_ended == pytest.approx(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": []}, "requests is empty"),
        ({"refusal": " "}, "refusal is ' '"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 12}, "max_length must be"),
    ],
)
def test_margin_refuses_by_name(chat, options, message):
    model, tokenizer = chat
    with pytest.raises(ValueError, match=message):
        refusal_margins(model, tokenizer, **{"requests": ["Tell me how."], **options})


# -------------------------------------------------------------------------------------- ablations


def test_ablations_measure_the_model_without_the_units_and_put_them_back(chat):
    model, tokenizer = chat
    loaders = [make_loader(f"builtin:{n}", tokenizer, limit=6) for n in ("safety", "utility")]
    groups = classify(*(attribute(model, x) for x in loaders), scu=0.1, ucu=0.1, ru=0.2)
    requests = load_rows("builtin:safety_eval", limit=4)
    measures = Measures(model, tokenizer, loader=loaders[1], requests=requests)
    before = [p.detach().clone() for p in model.parameters()]
    found = list(ablations(measures, groups, ["scu", "cu"], random=True, seed=1))
    after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [(row["group"], row["random"]) for row in found] == [
        (None, False),
        ("scu", False),
        ("scu", True),
        ("cu", False),
        ("cu", True),
    ]
    assert found[1]["units"] == found[2]["units"] == len(groups["scu"])
    assert found[0]["utility_loss"] == utility_loss(model, loaders[1])
    margins = refusal_margins(model, tokenizer, requests)
    assert found[0]["refusal_margin"] == pytest.approx(float(margins.mean()))
    assert found[0]["refuses"] == float((margins > 0).double().mean())
    assert len({row["utility_loss"] for row in found}) == 5


def test_every_family_can_be_evaluated():
    for name in FAMILIES:
        assert utility_loss(build(name), [collate(rows())]) > 0
