"""What a loader yields: what is refused, what padding and types change, and which data it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scores import ragged
from tiny_models import build, collate, rows
from torch import Tensor

from ssah.attribution import METRICS, attribute

ONE = {"input_ids": torch.tensor([[5]])}
TWO = {"input_ids": torch.tensor([[5, 6]])}


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "yielded no batch"),
        (TWO, {}, TypeError, "yielded a str as batch 0"),
        ([TWO["input_ids"]], {}, TypeError, "yielded a Tensor as batch 0"),
        ([{"ids": 1}], {}, ValueError, r"keys \['ids'\], must have 'input_ids'"),
        ([{"input_ids": [[1]]}], {}, TypeError, "input_ids is a list"),
        ([{"input_ids": torch.tensor([1])}], {}, TypeError, r"shape \(1,\)"),
        ([TWO, {"input_ids": torch.rand(1, 2)}], {}, TypeError, "batch 1: .*float32"),
        ([{**TWO, "labels": torch.tensor([[1]])}], {}, ValueError, r"labels have shape \(1, 1\)"),
        (
            [{**TWO, "attention_mask": torch.ones(1, 3)}],
            {},
            ValueError,
            r"attention_mask is of shape \(1, 3\)",
        ),
        ([{**TWO, "attention_mask": {"full": 1}}], {}, ValueError, "attention_mask is dict"),
        ([TWO], {"tokens": "labels"}, ValueError, "batch 0 has no labels"),
        ([{**TWO, "labels": TWO["input_ids"]}, TWO], {}, ValueError, "batch 1 has no labels"),
        ([{**TWO, "labels": torch.full((1, 2), -100)}], {}, ValueError, "has the label -100"),
        ([{**TWO, "attention_mask": torch.zeros(1, 2)}], {}, ValueError, "is padding"),
        ([ONE], {}, ValueError, "single token that counts"),
        ([ONE], {"metric": "taylor"}, ValueError, "no token to predict"),
        (
            [TWO],
            {"metric": "hessian"},
            ValueError,
            "metric is 'hessian'; it must be one of",
        ),
        ([TWO], {"tokens": "some"}, ValueError, "tokens is 'some'; it must be one of auto"),
        ([TWO], {"modules": ()}, ValueError, "modules is"),
    ],
)
def test_what_is_wrong_is_said(
    batches: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attribute(build("llama"), batches, **options)


def test_a_single_token_has_a_norm() -> None:
    result = attribute(build("llama"), [ONE], metric="norm")
    assert all(score.isfinite().all() for score in result.scores.values())
    assert all(variance.isnan().all() for variance in result.variance.values())


def test_the_fingerprint_is_of_the_data() -> None:
    model = build("llama")
    data = rows()
    first = attribute(model, [collate(data)]).data_fingerprint
    assert attribute(model, [collate(data, side="left")]).data_fingerprint == first
    assert attribute(model, [collate(data[::-1])]).data_fingerprint == first
    assert attribute(model, [collate(rows(seed=1))]).data_fingerprint != first
    assert attribute(model, [collate(data, labels=False)]).data_fingerprint != first

    class Loader(list[dict[str, Tensor]]):
        fingerprint = "abc"

    assert attribute(model, Loader([collate(data)])).data_fingerprint == "abc"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("labels", -1, r"batch 0: labels\[1, 2\] is -1, must be from 0 to .* \(or -100"),
        ("labels", 10**6, r"labels\[1, 2\] is 1000000"),
        ("input_ids", -3, r"input_ids\[1, 2\] is -3"),
        ("input_ids", 10**6, r"input_ids\[1, 2\] is 1000000"),
    ],
)
def test_tokens_out_of_range_are_named(metric: str, key: str, value: int, words: str) -> None:
    batch = ragged()[0]
    batch[key][1, 2] = value
    with pytest.raises(ValueError, match=words):
        attribute(build("llama"), [batch], metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_a_padding_token_without_an_embedding_changes_nothing(metric: str) -> None:
    model, expected = build("llama"), attribute(build("llama"), ragged(), metric=metric)
    batches = ragged()
    for batch in batches:
        batch["input_ids"][batch["attention_mask"] == 0] = 10**6
    result = attribute(model, batches, metric=metric)
    assert result.data_fingerprint == expected.data_fingerprint
    assert all(torch.equal(result.scores[name], x) for name, x in expected.scores.items())


def test_input_ids_of_other_types() -> None:
    model, batch = build("llama"), ragged()[0]
    expected = attribute(model, [batch]).scores
    for dtype in (torch.int32, torch.uint8, torch.int16):
        scores = attribute(model, [{**batch, "input_ids": batch["input_ids"].to(dtype)}]).scores
        assert all(torch.equal(scores[name], x) for name, x in expected.items())
    with pytest.raises(TypeError, match="input_ids is a bool tensor"):
        attribute(model, [{**batch, "input_ids": batch["attention_mask"].bool()}])
    with pytest.raises(ValueError, match="at least one row"):
        attribute(model, [{key: value[:0] for key, value in batch.items()}])
