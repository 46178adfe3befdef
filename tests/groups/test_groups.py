"""Classification against plain Python loops, its errors, `top`, summaries and files."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import pytest
import torch
from group_scores import Scores, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssah.groups import GROUPS, UnitGroups, classify
from ssah.units import UnitSet

Unit = tuple[str, int]


# --------------------------------------------------------------- the oracle: loops and sorted()


def count(share: float, n: int) -> int:
    return math.floor(share * n + 0.5)


def oracle_normalized(scores: Scores, normalize: str) -> Scores:
    result = {}
    for name, values in scores.items():
        if normalize == "none":
            result[name] = values
        elif normalize == "rank":
            order = sorted(range(len(values)), key=lambda i: (values[i], i))
            result[name] = [
                order.index(i) / (len(values) - 1) if len(values) > 1 else 0.0
                for i in range(len(values))
            ]
        else:
            mean, deviation = statistics.fmean(values), statistics.pstdev(values)
            result[name] = [(v - mean) / deviation if deviation > 0 else 0.0 for v in values]
    return result


def oracle_classes(
    safety: Scores, utility: Scores, shares: dict[str, float], scope: str
) -> dict[str, set[Unit]]:
    blocks = [list(safety)] if scope == "model" else [[name] for name in safety]
    groups: dict[str, set[Unit]] = {group: set() for group in GROUPS}
    for block in blocks:
        units = [(name, j) for name in block for j in range(len(safety[name]))]
        left, n = list(units), len(units)

        def by(sign: int, other: int, left: list[Unit]) -> list[Unit]:
            # sorted() is stable: ties stay in model order, then unit order
            return sorted(
                left, key=lambda u: sign * (safety[u[0]][u[1]] + other * utility[u[0]][u[1]])
            )

        for group, sign, other in (("ru", 1, 1), ("scu", -1, -1), ("ucu", 1, -1)):
            taken = by(sign, other, left)[: count(shares[group], n)]
            groups[group] |= set(taken)
            left = [unit for unit in left if unit not in taken]
        groups["cu"] |= set(left)
    return groups


def as_sets(groups: UnitGroups) -> dict[str, set[Unit]]:
    return {
        group: {(name, j) for name in units for j in units[name].tolist()}
        for group, units in groups.items()
    }


def lists(scores: dict[str, Tensor]) -> Scores:
    return {name: values.tolist() for name, values in scores.items()}


# few distinct integers, so that sums and differences tie often, and exactly
TYING = st.integers(0, 5).map(float)
VALUES = (TYING, st.floats(0, 1e6))


@st.composite
def problems(draw: Any) -> tuple[Scores, Scores, dict[str, float]]:
    value = draw(st.sampled_from(VALUES))
    names = draw(st.lists(st.sampled_from(["l.10", "l.2", "l.0"]), min_size=1, unique=True))
    sizes = {name: draw(st.integers(1, 12)) for name in names}
    safety, utility = (
        {name: draw(st.lists(value, min_size=n, max_size=n)) for name, n in sizes.items()}
        for _ in range(2)
    )
    parts = draw(st.lists(st.integers(0, 20), min_size=4, max_size=4))
    whole = max(sum(parts), 1)
    return safety, utility, {g: parts[i] / whole for i, g in enumerate(("scu", "ucu", "ru"))}


SCOPE = st.sampled_from(["module", "model"])
NORMALIZE = st.sampled_from(["none", "zscore", "rank"])
fast = settings(max_examples=150, deadline=None)


@fast
@given(problems(), SCOPE, NORMALIZE)
def test_classify_equals_loops(
    problem: tuple[Scores, Scores, dict[str, float]], scope: Any, normalize: Any
) -> None:
    safety, utility, shares = problem
    groups = classify(tensors(safety), tensors(utility), **shares, scope=scope, normalize=normalize)
    ranked = []
    for mine, raw in zip(groups._ranked, (safety, utility), strict=True):
        expected = oracle_normalized(raw, normalize)
        for name, values in expected.items():
            if normalize == "zscore":
                assert mine[name].tolist() == pytest.approx(values, rel=1e-9, abs=1e-9)
            else:
                assert mine[name].tolist() == values
        # z-scores may differ in the last bit, which would break ties otherwise
        ranked.append(lists(mine) if normalize == "zscore" else expected)
    expected_groups = oracle_classes(*ranked, shares, scope)
    assert as_sets(groups) == expected_groups
    everything = [unit for units in as_sets(groups).values() for unit in units]
    assert len(everything) == len(set(everything)) == sum(map(len, safety.values()))


@pytest.mark.parametrize(("n", "units"), [(2, 1), (6, 2), (10, 3), (14, 4), (18, 5)])
def test_half_a_unit_counts_as_one(n: int, units: int) -> None:
    """A quarter of 2 units is half of one, of 10 units two and a half."""
    safety, utility = ({"l": torch.arange(n) + i} for i in (1.0, 2.0))
    assert len(classify(safety, utility, scu=0, ucu=0, ru=0.25)["ru"]) == units


@fast
@given(problems(), SCOPE, NORMALIZE, st.sampled_from(GROUPS), st.floats(0, 1))
def test_top_equals_loops(
    problem: tuple[Scores, Scores, dict[str, float]],
    scope: Any,
    normalize: Any,
    group: str,
    part: float,
) -> None:
    safety, utility, shares = problem
    groups = classify(tensors(safety), tensors(utility), **shares, scope=scope, normalize=normalize)
    share = shares[group] if group != "cu" else 1 - math.fsum(shares.values())
    fraction = max(share, 0.0) * part
    s, u = (lists(mine) for mine in groups._ranked)
    key = {
        "safety": lambda n, j: s[n][j],
        "utility": lambda n, j: u[n][j],
        "difference": lambda n, j: s[n][j] - u[n][j],
        "sum": lambda n, j: s[n][j] + u[n][j],
        "group": {
            "scu": lambda n, j: s[n][j] - u[n][j],
            "ucu": lambda n, j: u[n][j] - s[n][j],
            "ru": lambda n, j: -(s[n][j] + u[n][j]),
            "cu": lambda n, j: s[n][j],
        }[group],
    }
    for by, value in key.items():
        expected: set[Unit] = set()
        for block in [list(s)] if scope == "model" else [[name] for name in s]:
            members = [(n, j) for n in block for j in groups[group][n].tolist()]
            members.sort(key=lambda unit: -value(*unit))
            expected |= set(members[: count(fraction, sum(len(s[n]) for n in block))])
        top = groups.top(group, fraction, by=by)  # type: ignore[arg-type]
        assert {(n, j) for n in top for j in top[n].tolist()} == expected
        assert top.sizes == groups["cu"].sizes


def test_top_by_group_is_what_smaller_shares_would_give() -> None:
    generator = torch.Generator().manual_seed(0)
    safety, utility = (
        {name: torch.rand(200, generator=generator) for name in ("a", "b")} for _ in range(2)
    )
    shares = {"scu": 0.1, "ucu": 0.1, "ru": 0.2}
    groups = classify(safety, utility, scope="model", **shares)
    for group in shares:
        smaller = classify(safety, utility, scope="model", **{**shares, group: 0.03})
        assert groups.top(group, 0.03, by="group") == smaller[group]


# ------------------------------------------------------------------- worked examples and limits


def test_worked_example() -> None:
    safety = {"a": torch.tensor([9.0, 1, 0, 5, 5, 0, 5, 2, 8, 0])}
    utility = {"a": torch.tensor([1.0, 9, 0, 5, 5, 1, 5, 8, 0, 0])}
    groups = classify(safety, utility, scu=0.15, ucu=0.2, ru=0.2)
    # floor(0.15 * 10 + 0.5) = 2; the lowest sums are units 2 and 9
    assert {group: units["a"].tolist() for group, units in groups.items()} == {
        "scu": [0, 8],
        "ucu": [1, 7],
        "ru": [2, 9],
        "cu": [3, 4, 5, 6],
    }
    assert groups.top("cu", 0.2)["a"].tolist() == [3, 4]
    assert groups.top("cu", 0.1, by="difference")["a"].tolist() == [3]
    assert groups.top("ucu", 0.1, by="utility")["a"].tolist() == [1]
    assert groups.labels("a").tolist() == [0, 1, 2, 3, 3, 3, 3, 1, 0, 2]


def test_order_of_modules_breaks_ties_across_the_model() -> None:
    same = {"layers.2": torch.ones(2), "layers.10": torch.ones(2)}
    reordered = {"layers.10": torch.ones(2), "layers.2": torch.ones(2)}
    for safety, first in ((same, "layers.2"), (reordered, "layers.10")):
        groups = classify(safety, same, scu=0.0, ucu=0.0, ru=0.5, scope="model")
        assert groups["ru"][first].tolist() == [0, 1]
        assert len(groups["ru"]) == 2


def test_scopes_and_normalisation_differ_as_documented() -> None:
    safety = {"small": torch.tensor([1.0, 2, 3, 4]), "large": torch.tensor([10.0, 20, 30, 40])}
    nothing = {name: torch.zeros(4) for name in safety}
    shares = {"scu": 0.25, "ucu": 0.0, "ru": 0.0}
    plain: dict[str, Any] = {"normalize": "none"}
    by_module = classify(safety, nothing, **shares, **plain, scope="module")
    assert as_sets(by_module)["scu"] == {("small", 3), ("large", 3)}
    by_model = classify(safety, nothing, **shares, **plain, scope="model")
    assert as_sets(by_model)["scu"] == {("large", 2), ("large", 3)}
    # with ranks, equal scores stand in order of their index, so that `nothing` would not be level
    level_utility = {name: torch.tensor([0.0, 3, 2, 1]) for name in safety}
    for normalize, utility in (("zscore", nothing), ("rank", level_utility)):
        level = classify(safety, utility, **shares, scope="model", normalize=normalize)
        assert as_sets(level)["scu"] == {("small", 3), ("large", 3)}


@pytest.mark.parametrize("normalize", ["none", "zscore", "rank"])
@pytest.mark.parametrize("scope", ["module", "model"])
def test_one_unit_and_equal_scores(scope: Any, normalize: Any) -> None:
    scores = {"one": torch.tensor([3.0]), "flat": torch.full((5,), 0.1)}
    groups = classify(scores, scores, scu=0.5, ucu=0.5, ru=0, scope=scope, normalize=normalize)
    assert sum(len(units) for units in groups.values()) == 6
    if normalize != "none":
        assert groups._ranked[0]["one"].tolist() == [0.0]
    if normalize == "zscore":
        assert groups._ranked[0]["flat"].tolist() == [0.0] * 5
    if scope == "module":  # both shares round up to the one unit: the first group takes it
        assert groups["scu"]["one"].tolist() == [0]


def test_zscore_of_tiny_and_large_scores() -> None:
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    expected = (x - x.mean()) / x.std(correction=0)
    for scale in (1e-200, 1.0, 1e200):
        groups = classify({"a": x * scale}, {"a": x}, scu=0, ucu=0, ru=0, normalize="zscore")
        torch.testing.assert_close(groups._ranked[0]["a"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.7, 0.2, 0.1), (0, 0, 0)])
def test_extreme_shares(shares: tuple[float, float, float]) -> None:
    scores = {"a": torch.arange(10.0)}
    groups = classify(scores, scores, scu=shares[0], ucu=shares[1], ru=shares[2])
    assert [len(groups[g]) for g in ("scu", "ucu", "ru")] == [round(10 * f) for f in shares]
    for group in GROUPS:
        assert groups.top(group, len(groups[group]) / 10) == groups[group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_float_type(dtype: torch.dtype) -> None:
    scores = {"a": torch.arange(8, dtype=dtype).requires_grad_()}
    groups = classify(scores, scores, scu=0, ucu=0, ru=0.5)
    assert groups["ru"]["a"].tolist() == [0, 1, 2, 3]
    assert groups.safety["a"].dtype == torch.float64


def test_same_bits_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [{"a": torch.rand(200_000, generator=generator, dtype=torch.float64)} for _ in "su"]
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(classify(*scores, scu=0.1, ucu=0.1, ru=0.1, normalize="zscore"))
    assert results[0] == results[1]
    for one, two in zip(results[0]._ranked, results[1]._ranked, strict=True):
        assert torch.equal(one["a"], two["a"])


@pytest.mark.parametrize(("scope", "normalize"), [("module", "none"), ("model", "zscore")])
def test_two_million_units_are_quick(scope: Any, normalize: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    safety, utility = (
        {f"l.{i}": torch.rand(50_000, generator=generator, dtype=torch.float64) for i in range(40)}
        for _ in range(2)
    )
    start = time.process_time()  # what others do on the machine does not count
    groups = classify(
        safety, utility, scu=0.013, ucu=0.133, ru=0.148, scope=scope, normalize=normalize
    )
    top = groups.top("cu", 0.06)
    elapsed = time.process_time() - start
    assert [len(groups[g]) for g in ("scu", "ucu", "ru")] == [26_000, 266_000, 296_000]
    assert len(top) == 120_000
    assert elapsed < 10, "far from linear in the number of units"


def test_the_algebra_of_sets_over_different_scopes() -> None:
    one = UnitSet({"a": [0, 2], "b": [1]}, {"a": 3, "b": 2})
    other = UnitSet({"c": [0], "b": [0, 1]}, {"c": 1, "b": 2})
    assert {name: index.tolist() for name, index in (one | other).items()} == {
        "a": [0, 2], "b": [0, 1], "c": [0]
    }  # fmt: skip
    assert {name: index.tolist() for name, index in (other - one).items()} == {
        "c": [0], "b": [0], "a": []
    }  # fmt: skip
    assert one == UnitSet({"a": [2, 0], "b": [1]}, {"b": 2, "a": 3})
    assert one != UnitSet({"a": [2, 1], "b": [1]}, {"b": 2, "a": 3})
    assert one.complement() | one == UnitSet({"a": [0, 1, 2], "b": [0, 1]}, one.sizes)


def test_sizes_of_a_set_are_numbers_of_units() -> None:
    with pytest.raises(ValueError, match="sizes has -3 units for 'a', must have 0 or more"):
        UnitSet({}, {"a": -3})
    with pytest.raises(TypeError):
        UnitSet({}, {"a": 2.5})
