"""Refusals before and after training, against loops over single requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_chat
import torch
from plans import draw
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ssah
from ssah.data import DataError, load_requests
from ssah.evaluation import Refusals, answers, paired_difference, refusal_margin, refusals_change

HARMFUL = load_requests("builtin:safety_eval[0:7]")
HARMLESS = load_requests("builtin:overrefusal[0:5]")
LONG = "why " * 3000  # more tokens than the model has positions


def is_even(request: str, answer: str) -> bool:
    """A judge by whom a model that means nothing refuses about half of all requests."""
    return len(answer) % 2 == 0


@pytest.fixture
def chat() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return tiny_chat.model(), tiny_chat.tokenizer()


def asked(chat: Any, **options: Any) -> Refusals:
    given = {"over_refusal": HARMLESS, "judge": is_even, "max_new_tokens": 12, "batch_size": 3}
    return Refusals(*chat, HARMFUL, **given | options)


def repeats(ids: list[int]) -> bool:
    """More than half of the 3-grams occurred earlier."""
    earlier, again = set(), 0
    for i in range(len(ids) - 2):
        gram = tuple(ids[i : i + 3])
        again += gram in earlier
        earlier.add(gram)
    return again > (len(ids) - 2) / 2


def test_every_rate_is_that_of_single_requests(chat: Any) -> None:
    model, tokenizer = chat
    model.train()  # as it is under a trainer, whose mode must not count
    found = asked(chat)()
    assert model.training
    model.eval()
    texts, expected = [], {}
    for name, requests in (("refused", HARMFUL), ("over_refused", HARMLESS)):
        texts = [answers(model, tokenizer, [each], max_new_tokens=12)[0] for each in requests]
        flags = [int(not is_even(r, a)) for r, a in zip(requests, texts, strict=True)]
        expected[name] = flags
        assert 0 < sum(flags) < len(flags)
        assert found["per_request"][name] == flags
        assert (found[name]["count"], found[name]["n"]) == (sum(flags), len(flags))
        assert found[name]["rate"] == sum(flags) / len(flags)
        if name == "refused":
            ids = [tokenizer.encode(text.strip(), add_special_tokens=False) for text in texts]
            assert found["empty_or_repeating"]["count"] == sum(map(repeats, ids))
    margins = [refusal_margin(model, tokenizer, [each]) for each in HARMFUL]
    assert found["per_request"]["margins"] == pytest.approx(margins, abs=1e-5)
    assert found["refusal_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    stored = json.dumps(found)
    assert not any(text.strip() and text in stored for text in texts)
    assert "margin " in Refusals.line(found)


def test_under_a_plan_it_is_the_same(chat: Any) -> None:
    found = asked(chat)()
    for given in ({"units": draw(chat[0])}, {"rows": {"model.embed_tokens.weight": [3, 4, 9]}}):
        with ssah.freeze(chat[0], **given):
            split = asked(chat)()
        assert split["per_request"]["refused"] == found["per_request"]["refused"]
        assert split["refusal_margin"] == pytest.approx(found["refusal_margin"], abs=1e-5)


def test_what_changed_is_paired(chat: Any) -> None:
    before = asked(chat)()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in chat[0].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    after = asked(chat)()
    found = refusals_change(before, after, seed=2)
    for name, key in (("refused", "refused"), ("over_refused", "over_refused")):
        pairs = zip(after["per_request"][key], before["per_request"][key], strict=True)
        differences = [b - a for b, a in pairs]
        assert found[name]["change"] == pytest.approx(sum(differences) / len(differences))
    values = [
        torch.tensor(each["per_request"]["margins"], dtype=torch.float64)
        for each in (after, before)
    ]
    mean, interval = paired_difference(*values, seed=2)
    assert found["refusal_margin"] == {"change": mean, "interval": list(interval)}
    # No request changed: other requests might have.
    same = refusals_change(before, before)["refused"]
    assert same["change"] == 0
    assert same["interval"][0] < 0 < same["interval"][1]
    alone = asked(chat, over_refusal=())()
    assert alone["over_refused"] is None
    assert set(refusals_change(alone, alone)) == {"refused", "refusal_margin"}


def test_what_is_asked_can_be_told_apart(chat: Any) -> None:
    first = asked(chat).describe()
    assert first == asked(chat).describe()
    assert first["requests"] == 7
    for other in ({"over_refusal": HARMLESS[:4]}, {"judge": "zou2023"}, {"max_new_tokens": 9}):
        assert asked(chat, **other).describe() != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "nobody"}, "judge is 'nobody', must be one of"),
        ({"judge": "wei2024", "max_new_tokens": 3}, "max_new_tokens is 3, but judge"),
        ({"over_refusal": ["Why?", LONG]}, r"over_refusal\[1\] has \d+ tokens"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(
    chat: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        asked(chat, **options)


def test_long_requests_are_left_out_if_that_is_wanted(chat: Any) -> None:
    with pytest.warns(UserWarning, match="over_refusal: 1 of 2 requests were left out"):
        found = asked(chat, over_refusal=["Why?", LONG], overlong="skip")
    assert found.over_refusal == ["Why?"]
    with pytest.raises(DataError, match="every request"):
        asked(chat, over_refusal=[LONG], overlong="skip")
