"""Choices of weights by score, against sorts of numpy, and their set algebra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssah.attribution import WeightAttribution, consistent, set_difference
from ssah.attribution.weights import choosing
from ssah.units import BitMask

SHAPES = {"a": (5, 7), "b.experts": (3, 4, 5), "c": (6, 4)}


def attribution(scores: dict[str, Tensor], data: str = "one") -> WeightAttribution:
    """Of scores; ``c`` is [in, out]."""
    return WeightAttribution(
        scores=scores,
        metric="snip",
        tokens="labels",
        count=3,
        transposed=("c",),
        model_name="tiny",
        units_hash="u",
        weights_hash="w",
        data_fingerprint=data,
    )


def drawn(seed: int, values: int) -> dict[str, Tensor]:
    """Scores among few or many values, zeros too: ties everywhere, or nearly none."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randint(0, values, shape, generator=generator) / 7.0) ** 3
        for name, shape in SHAPES.items()
    }


def first_by_sort(scores: np.ndarray, share: float, lowest: bool) -> np.ndarray:
    """Of a vector; a stable sort leaves equal scores in the order of their indices."""
    order = np.argsort(scores if lowest else -scores, kind="stable")
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[order[: int(np.floor(share * len(scores) + 0.5))]] = True
    return chosen


def by_sort(
    scores: dict[str, Tensor], share: float, per: str, lowest: bool
) -> dict[str, np.ndarray]:
    values = {name: score.numpy().astype(np.float64) for name, score in scores.items()}
    if per == "model":
        flat = np.concatenate([value.reshape(-1) for value in values.values()])
        pieces = np.split(
            first_by_sort(flat, share, lowest), np.cumsum([v.size for v in values.values()])[:-1]
        )
        return {n: p.reshape(SHAPES[n]) for n, p in zip(values, pieces, strict=True)}
    found = {}
    for name, value in values.items():
        matrices = value if value.ndim == 3 else value[None]
        chosen = []
        for matrix in matrices:
            if per == "matrix":
                chosen.append(
                    first_by_sort(matrix.reshape(-1), share, lowest).reshape(matrix.shape)
                )
            else:
                outputs = matrix.T if name == "c" else matrix
                rows = np.stack([first_by_sort(row, share, lowest) for row in outputs])
                chosen.append(rows.T if name == "c" else rows)
        found[name] = np.stack(chosen).reshape(SHAPES[name])
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    values=st.sampled_from([1, 3, 20, 10**6]),
    share=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)),
    per=st.sampled_from(["row", "matrix", "model"]),
    lowest=st.booleans(),
    at_once=st.sampled_from([1, 8, 1 << 22]),
)
def test_choices_are_those_of_a_sort(
    seed: int, values: int, share: float, per: str, lowest: bool, at_once: int
) -> None:
    scores = drawn(seed, values)
    result = attribution(scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "_AT_ONCE", at_once)
        found = (result.bottom if lowest else result.top)(share, per)
    expected = by_sort(scores, share, per, lowest)
    for name in SHAPES:
        assert found[name].to_mask().numpy().tolist() == expected[name].tolist()


def test_a_set_difference_takes_what_is_high_for_safety_alone() -> None:
    safety, utility = attribution(drawn(1, 50)), attribution(drawn(2, 50), "two")
    found = set_difference(safety, utility, 0.4, 0.3, per="row")
    kept, general = (
        by_sort(dict(each.scores), share, "row", False)
        for each, share in ((safety, 0.4), (utility, 0.3))
    )
    for name, mask in found.items():
        assert mask.to_mask().numpy().tolist() == (kept[name] & ~general[name]).tolist()
        assert 0 < mask.count < kept[name].sum()
    with pytest.raises(ValueError, match=r"same data"):
        set_difference(safety, safety, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"different weights"):
        set_difference(safety, replace(utility, weights_hash="other"), 0.1, 0.1)
    with pytest.raises(ValueError, match=r"differ in metric"):
        set_difference(safety, replace(utility, metric="wanda"), 0.1, 0.1)


@pytest.mark.parametrize("at_least", [1, 2, 3, 5, None])
def test_consistent_weights_are_counted_one_by_one(at_least: int | None) -> None:
    masks = [drawn(seed, 2)["a"] > 0 for seed in range(5)]
    found = consistent([{"a": BitMask.of(mask)} for mask in masks], at_least)
    count = sum(mask.int() for mask in masks)
    assert torch.equal(found["a"].to_mask(), count >= (5 if at_least is None else at_least))


def test_wrong_shares_and_choices_are_refused() -> None:
    result, masks = attribution(drawn(0, 5)), {"a": BitMask.of(torch.ones(2, 2, dtype=torch.bool))}
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share is .*from 0 to 1"):
            result.top(share)
    with pytest.raises(ValueError, match=r"per is 'layer'"):
        result.top(0.1, per="layer")
    with pytest.raises(ValueError, match=r"at_least is 3; it must be from 1 to 2"):
        consistent([masks, masks], 3)
    with pytest.raises(ValueError, match=r"over the same parameters"):
        consistent([masks, {}])


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_scores_that_have_no_order_are_refused(value: float) -> None:
    scores = drawn(0, 5)
    scores["b.experts"][1, 2, 3] = value
    for per in ("row", "matrix", "model"):
        with pytest.raises(ValueError, match=r"scores of 'b\.experts' are .*none below 0"):
            attribution(scores).top(0.1, per)
