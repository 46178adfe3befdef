"""Interpolating, keeping and merging against element-by-element arithmetic in Python's floats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tuned import FAMILIES, assert_same_state, pair, tuned_from

from ssah import deltas
from ssah.deltas import arithmetic, put_weights

State = dict[str, Tensor]


def state(*rows: list[float], dtype: torch.dtype = torch.float32) -> State:
    """Small tensors under the names a, b, c, ..."""
    return {chr(97 + i): torch.tensor(row, dtype=dtype) for i, row in enumerate(rows)}


def values(found: Any) -> list[float]:
    return [x for tensor in found.values() for x in tensor.flatten().tolist()]


def by_hand(
    base: list[float], tuned: list[list[float]], how: str, scales: list[float]
) -> list[float]:
    """What the head of arithmetic.py says, one element at a time."""
    result = []
    for i, b in enumerate(base):
        own = [scale * (each[i] - b) for scale, each in zip(scales, tuned, strict=True)]
        total = sum(own)
        if how == "ties":
            agreed = [d for d in own if d * total > 0]
            change = sum(agreed) / len(agreed) if agreed else 0.0
        else:
            change = total if how == "sum" else total / len(own)
        result.append(b + change)
    return result


@pytest.mark.parametrize(
    ("name", "alpha"), zip(FAMILIES, (0.25, -0.5, 1.5, 0.9), strict=True), ids=FAMILIES
)
def test_interpolation_is_the_line_through_both(name: str, alpha: float) -> None:
    base, tuned = pair(name)
    found: Any = deltas.interpolate(base, tuned, alpha)
    for key, tensor in tuned.state_dict().items():
        b, t = (each.state_dict()[key].numpy().astype(np.float64) for each in (base, tuned))
        expected = ((1 - alpha) * b + alpha * t).astype(np.float32)
        torch.testing.assert_close(found[key], torch.from_numpy(expected), rtol=2e-7, atol=1e-9)
        assert found[key].data_ptr() != tensor.data_ptr()
    tuned.load_state_dict(found)  # strictly: all names are there


def test_a_model_is_given_weights_and_what_changed_is_counted() -> None:
    base, tuned = pair("llama_tied")
    made: Any = deltas.interpolate(base, tuned, 1.0)
    made["model.norm.weight"] = base.state_dict()["model.norm.weight"].clone()
    made["model.norm.weight"][:3] += 1
    expected = 0
    for name, own in base.named_parameters():  # the head is tied, and counts once
        own, new = (each.detach().flatten().tolist() for each in (own, made[name]))
        expected += sum(a != b for a, b in zip(own, new, strict=True))
    share = put_weights(base, made)
    assert share == expected / sum(own.numel() for own in base.parameters())
    assert 0 < share < 1
    assert_same_state(dict(base.state_dict()), made)
    with pytest.raises(TypeError, match="made is the folder 'runs/half', must be a state dict"):
        put_weights(base, Path("runs/half"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ends_have_the_bits_of_both_models(dtype: torch.dtype) -> None:
    base, tuned = pair("llama_tied", dtype)
    with torch.no_grad():  # magnitudes far apart, and both zeros
        base.get_parameter("model.norm.weight")[:4] = torch.tensor([1.0, 1e-30, -0.0, 0.0])
        tuned.get_parameter("model.norm.weight")[:4] = torch.tensor([1e-30, 1.0, 0.0, -0.0])
    assert_same_state(deltas.interpolate(base, tuned, 0), base.state_dict())  # type: ignore[arg-type]
    assert_same_state(deltas.interpolate(base, tuned, 1), tuned.state_dict())  # type: ignore[arg-type]
    kept: Any = deltas.keep(base, tuned, 1.0)
    assert_same_state(kept, dict(tuned.state_dict()))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3), min_size=2, max_size=5
    ),
    st.sampled_from(["sum", "mean", "ties"]),
    st.lists(st.floats(-2, 2, width=16), min_size=4, max_size=4),
    st.booleans(),
)
def test_merges_are_what_the_formula_says(
    rows: list[list[float]], how: Any, drawn: list[float], one: bool
) -> None:
    base, *tuned = rows
    scales = drawn[:1] * len(tuned) if one else drawn[: len(tuned)]
    found = deltas.merge(
        state(base, dtype=torch.float64),
        [state(row, dtype=torch.float64) for row in tuned],
        how=how,
        scale=scales[0] if one else scales,
    )
    assert values(found) == pytest.approx(by_hand(base, tuned, how, scales), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("how", "expected"), [("sum", 1.25), ("mean", 13 / 12), ("ties", 1.375)])
def test_the_worked_example(how: Any, expected: float) -> None:
    base, tuned = state([1.0]), [state([1.25]), state([1.125]), state([0.75])]
    assert values(deltas.merge(base, tuned, how=how, scale=2)) == pytest.approx([expected])


def largest_by_sorting(base: State, tuned: State, share: float, names: list[str]) -> State:
    """What is kept, by sorting (magnitude, then place) of all elements."""
    found = []
    for name in sorted(names):
        b, t = base[name].flatten().tolist(), tuned[name].flatten().tolist()
        found += [
            (-abs(np.float32(y - x)), name, i) for i, (x, y) in enumerate(zip(b, t, strict=True))
        ]
    kept = sorted(found, key=lambda each: each[0])[: math.floor(share * len(found) + 0.5)]
    result = {name: base[name].clone() for name in names}
    for _, name, i in kept:
        result[name].view(-1)[i] = tuned[name].view(-1)[i]
    return result


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.5, 3.0, 1e-40]), min_size=1, max_size=9),
        min_size=1,
        max_size=3,
    ),
    st.floats(0.01, 1),
    st.sampled_from([2, 3, arithmetic.CHUNK]),
    st.sampled_from(["model", "tensor"]),
)
def test_the_largest_are_kept_and_ties_go_to_the_lower_index(
    rows: list[list[float]], share: float, chunk: int, scope: Any
) -> None:
    tuned = state(*rows)
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    # In another order than by name: the order of files must not matter.
    base, given_as = dict(reversed(base.items())), dict(reversed(tuned.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "CHUNK", chunk)
        found: Any = deltas.keep(base, given_as, share, scope=scope)
    together = [list(tuned)] if scope == "model" else [[name] for name in tuned]
    for names in together:
        expected = largest_by_sorting(base, tuned, share, names)
        for name in names:
            assert found[name].tolist() == expected[name].tolist()


def test_ties_trims_each_model_by_its_own_magnitudes() -> None:
    base = state([0.0, 0.0, 0.0, 0.0])
    tuned = [state([4.0, -3.0, 0.5, 0.25]), state([-1.0, -0.75, 0.5, 0.25])]
    # Half of each: 4 and -3; -1 and -0.75. Signs of the sums: +, -.
    found = deltas.merge(base, tuned, how="ties", share=0.5)
    assert values(found) == [4.0, (-3 - 0.75) / 2, 0.0, 0.0]


def test_random_elements_are_kept_with_their_probability_and_rescaled() -> None:
    base, tuned = {"a": torch.zeros(200, 100)}, {"a": torch.full((200, 100), 2.0)}
    found: Any = deltas.keep(base, tuned, 0.25, by="random", rescale=True, seed=3)
    assert found["a"].unique().tolist() == [0.0, 8.0]  # 2 / 0.25
    n = 20_000
    assert abs(found["a"].ne(0).sum() - 0.25 * n) < 5 * math.sqrt(n * 0.25 * 0.75)
    again: Any = deltas.keep(base, tuned, 0.25, by="random", rescale=True, seed=3)
    other: Any = deltas.keep(base, tuned, 0.25, by="random", rescale=True, seed=4)
    assert found["a"].equal(again["a"])
    assert not found["a"].equal(other["a"])


def test_draws_differ_between_tensors_and_models_and_not_with_their_order() -> None:
    base = {name: torch.zeros(64) for name in "ab"}
    tuned = {name: torch.ones(64) for name in "ab"}
    found: Any = deltas.keep(base, tuned, 0.5, by="random")
    assert not found["a"].equal(found["b"])
    turned: Any = deltas.keep(base, dict(reversed(tuned.items())), 0.5, by="random")
    assert all(turned[name].equal(found[name]) for name in "ab")
    both: Any = deltas.merge(base, [tuned, tuned], how="sum", share=0.5, by="random")
    assert both["a"].unique().tolist() == [0.0, 1.0, 2.0]


def test_what_training_left_alone_keeps_its_bits() -> None:
    base, tuned = pair("llama_tied", torch.bfloat16)
    others = [tuned, tuned_from(tuned, seed=2)]
    found: Any = deltas.merge(base, others, how="mean", scale=0.7)
    still = 0
    for name, before in base.state_dict().items():
        same = torch.stack([each.state_dict()[name] == before for each in others]).all(0)
        assert found[name][same].equal(before[same])
        still += int(same.sum())
    assert still > 1000


def test_the_dtype_is_that_of_the_tuned_model_and_integers_are_its_own() -> None:
    base = {"a": torch.tensor([1.0, 1.0 + 2**-20]), "n": torch.tensor([1])}
    tuned = {"a": torch.tensor([2.0, 2.0], dtype=torch.bfloat16), "n": torch.tensor([7])}
    for found in (deltas.interpolate(base, tuned, 0.5), deltas.interpolate(base, tuned, 0)):
        assert found["a"].dtype == torch.bfloat16  # type: ignore[index]
        assert found["n"].tolist() == [7]  # type: ignore[index]
    assert deltas.interpolate(base, tuned, 0)["a"].tolist() == [1.0, 1.0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, t: deltas.interpolate(b, t, math.nan), "alpha is nan, must be a finite"),
        (lambda b, t: deltas.interpolate(b, t, "0.5"), "alpha is str, must be a number"),
        (lambda b, t: deltas.keep(b, t, 0), "share is 0; it must be greater than 0"),
        (lambda b, t: deltas.keep(b, t, 1.1), r"share is 1\.1; it must be .* at most 1"),
        (lambda b, t: deltas.keep(b, t, 0.5, by="size"), "by is 'size'; it must be one of"),
        (lambda b, t: deltas.keep(b, t, 0.5, scope="layer"), "scope is 'layer'; it must be one of"),
        (lambda b, t: deltas.merge(b, [t], how="median"), "how is 'median'; it must be one of"),
        (lambda b, t: deltas.merge(b, [t], scale=math.inf), "scale is inf, must be a finite"),
        (lambda b, t: deltas.merge(b, [t], scale=[1, 2]), "scale has 2 numbers; it must have one"),
        (lambda b, t: deltas.merge(b, []), "tuned is empty"),
        (lambda b, t: deltas.merge(b, [t, {"a": t["a"]}]), r"'tuned\[1\]' lacks 1 tensors .*'b'"),
        (
            lambda b, t: deltas.keep({**b, "c": b["a"].clone()}, t, 0.5),
            "'tuned' lacks 1 tensors .*'c'",
        ),
        (lambda b, t: deltas.interpolate({**b, "a": b["a"][:1]}, t, 1), r"'a' is \[2\] in 'tuned'"),
        (lambda b, t: deltas.interpolate({**b, "a": 1.0}, t, 1), "base has a float under 'a'"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    base = state([1.0, 2.0], [3.0])
    with pytest.raises((ValueError, TypeError), match=message):
        call(base, state([1.5, 2.5], [3.0]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(wrong: float) -> None:
    base, tuned = state([1.0], [2.0, 3.0]), state([1.0], [2.0, wrong])
    for call in (
        lambda: deltas.interpolate(base, tuned, 0.5),
        lambda: deltas.keep(base, tuned, 0.5),
        lambda: deltas.merge(tuned, [base], how="ties"),
    ):
        with pytest.raises(FloatingPointError, match="tensor 'b' is NaN or infinite"):
            call()
