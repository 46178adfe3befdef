"""The greedy search against a search written out, and the screen against finite differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ablatable import assert_same_bits, bits, some_units
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import PreTrainedModel

import ssah
from ssah.evaluation import (
    effects,
    first_order_effects,
    greedy_search,
    left_subspace_angles,
    ranking_agreement,
)
from ssah.interventions import Scale
from ssah.units import UnitSet, layers_path

BATCHES = [collate(rows((9, 5)), side="left"), collate(rows((7,), seed=1))]


def log_prob(model: PreTrainedModel) -> float:
    """Of the responses: the mean over rows, in nats."""
    total = 0.0
    for ids, labels in (*rows((9, 5)), *rows((7,), seed=1)):
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)  # [length, vocabulary]
        total += sum(float(log_p[t - 1, ids[t]]) for t in range(len(ids)) if labels[t] != -100)
    return total / 3


def heads(model: PreTrainedModel, size: int) -> list[UnitSet]:
    """Query heads, as the columns of O that they own."""
    sizes = {name: each.n_units for name, each in ssah.find_modules(model, "attention").items()}
    return [
        UnitSet({name: range(start, start + size)}, sizes)
        for name, n in sizes.items()
        for start in range(0, n, size)
    ]


def searched(model: PreTrainedModel, candidates: list[UnitSet], rounds: int) -> list[list[float]]:
    """By how much the log-probability falls, of each round and candidate; by ablations."""
    intact, out, table = log_prob(model), [], []
    for _ in range(rounds):
        row = []
        for i, candidate in enumerate(candidates):
            units = candidate
            for j in out:
                units = units | candidates[j]
            with ssah.ablate(model, units):
                row.append(math.nan if i in out else intact - log_prob(model))
        out.append(max((i for i in range(len(row)) if i not in out), key=lambda i: row[i]))
        table.append(row)
    return table


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_search_equals_one_written_out(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before, candidates = bits(model), heads(model, 12)  # 2 layers of 4 heads
    found = greedy_search(model, BATCHES, candidates, effect="log_prob", rounds=3, arms_at_once=5)
    expected = torch.tensor(searched(model, candidates, 3), dtype=torch.float64)
    torch.testing.assert_close(found.tried, expected, rtol=1e-8, atol=1e-9, equal_nan=True)
    best = [int(row.nan_to_num(-math.inf).argmax()) for row in expected]
    assert found.chosen == tuple(best)
    assert len(set(best)) == 3
    assert found.effect.tolist() == [
        row[i] for row, i in zip(found.tried.tolist(), best, strict=True)
    ]
    assert_same_bits(model, before)


def test_what_does_most_together_is_found_by_other_measures() -> None:
    model = build("mixtral", dtype=torch.float64)
    candidates = [some_units(model, 0.1, seed=seed) for seed in range(4)]
    options: dict[str, Any] = {"layers": [1], "positions": "response"}
    for effect in ("kl", "l2", "cosine_distance"):
        found = greedy_search(model, BATCHES, candidates, effect=effect, rounds=2, **options)
        one = effects(model, BATCHES, candidates, **options).mean(effect)
        first = max(range(4), key=lambda i: float(one[i]))
        both = effects(
            model, BATCHES, [candidates[first] | each for each in candidates], **options
        ).mean(effect)
        second = max((i for i in range(4) if i != first), key=lambda i: float(both[i]))
        assert found.chosen == (first, second)
        assert found.effect.tolist() == pytest.approx([float(one[first]), float(both[second])])


@pytest.mark.parametrize(("name", "rank"), [("llama", 1), ("gpt2", 2)])
def test_angles_are_those_of_the_states_of_all_rows(name: str, rank: int) -> None:
    model = build(name, dtype=torch.float64)
    candidates = heads(model, 12)[:5]
    data = [ids[:4] for ids, _ in (*rows((9, 9)), *rows((9, 9), seed=1))]  # prompts of 4 tokens
    layer = model.get_submodule(layers_path(model))[1]

    def left() -> Any:
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(
            lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
        )
        with torch.no_grad():
            for ids in data:
                model(ids[None])
        hook.remove()
        return np.linalg.svd(torch.stack(seen).numpy())[0][:, :rank]  # [rows, rank]

    intact, expected = left(), []
    for units in candidates:
        with ssah.ablate(model, units):
            cosines = np.linalg.svd(intact.T @ left(), compute_uv=False)
        expected.append(float(np.arccos(cosines.clip(-1, 1)).sum()))
    loader = [collate(rows((9, 9)), side="left"), collate(rows((9, 9), seed=1))]
    options: dict[str, Any] = {"rank": rank, "arms_at_once": 3}
    found = left_subspace_angles(model, loader, candidates, layer=1, **options)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert min(expected) > 1e-4
    search = greedy_search(
        model, loader, candidates, effect="subspace_angle", layers=[1], rounds=1, **options
    )
    assert search.tried[0].tolist() == found.tolist()
    with pytest.raises(ValueError, match="must be from 1 to 4, which the vectors span"):
        left_subspace_angles(model, loader, candidates, layer=1, rank=5)


def test_it_stops_at_too_little_gain_and_when_all_have_joined() -> None:
    model = build("llama", dtype=torch.float64)
    candidates = heads(model, 24)[:3]
    every = greedy_search(model, BATCHES, candidates, effect="log_prob", rounds=9)
    assert sorted(every.chosen) == [0, 1, 2]
    assert every.tried.shape == (3, 3)
    gains = every.effect.diff(prepend=torch.zeros(1, dtype=torch.float64))
    worst = int(gains.argmin())  # the first round that gains less than all before
    limit = float(gains[worst]) + 1e-6
    assert all(float(gain) >= limit for gain in gains[:worst])
    stopped = greedy_search(model, BATCHES, candidates, effect="log_prob", rounds=9, min_gain=limit)
    assert stopped.chosen == every.chosen[:worst]
    assert len(stopped.tried) == worst + 1


def test_a_search_goes_on_from_the_rounds_that_are_kept(tmp_path: Path) -> None:
    model = build("llama")
    candidates = heads(model, 12)
    whole = greedy_search(model, BATCHES, candidates, rounds=3)

    class Breaking(list[Any]):
        """A loader that fails in its fourth iteration: in the round after the first one."""

        reads = 0

        def __iter__(self) -> Iterator[Any]:
            self.reads += 1
            if self.reads == 4:  # data for the folder, then a round each
                raise OSError("the disk is gone")
            return super().__iter__()

    loader = Breaking(BATCHES)
    with pytest.raises(OSError, match="the disk is gone"):
        greedy_search(model, loader, candidates, rounds=3, resume_dir=tmp_path)
    done: list[int] = []
    options: dict[str, Any] = {"resume_dir": tmp_path, "advance": done.append}
    found = greedy_search(model, BATCHES, candidates, rounds=3, **options)
    assert done == [2, 3]
    assert found.chosen == whole.chosen
    assert torch.equal(found.tried.nan_to_num(), whole.tried.nan_to_num())
    fewer = greedy_search(model, BATCHES, candidates, rounds=2, **options)
    assert done == [2, 3]
    assert fewer.chosen == whole.chosen[:2]
    assert torch.equal(fewer.tried.nan_to_num(), whole.tried[:2].nan_to_num())
    for changed, key in (
        ({"candidates": candidates[::-1]}, "candidates"),
        ({"loader": BATCHES[:1]}, "data"),
        ({"effect": "log_prob"}, "effect"),
        ({"layers": [0]}, "hidden"),
        ({"model": build("llama", seed=1)}, "weights"),
    ):
        call = {"model": model, "loader": BATCHES, "candidates": candidates, **changed}
        with pytest.raises(ValueError, match=f"unfinished run with {key}"):
            greedy_search(**call, **options)


def test_searches_that_cannot_be_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    candidates = heads(model, 12)
    with pytest.raises(ValueError, match="candidates is empty"):
        greedy_search(model, BATCHES, [])
    with pytest.raises(ValueError, match="rounds is 0"):
        greedy_search(model, BATCHES, candidates, rounds=0)
    with pytest.raises(ValueError, match="effect is 'loss'; it must be one of"):
        greedy_search(model, BATCHES, candidates, effect="loss")
    with pytest.raises(ValueError, match="which can be read once"):
        greedy_search(model, iter(BATCHES), candidates)
    with pytest.raises(ValueError, match="which needs layers"):
        greedy_search(model, BATCHES, candidates, effect="l2")
    with pytest.raises(ValueError, match="must have one layer and one position"):
        greedy_search(model, BATCHES, candidates, effect="subspace_angle", layers=[0, 1])
    with pytest.raises(ValueError, match="which can be read once"):
        left_subspace_angles(model, iter(BATCHES), candidates, layer=0)
    with pytest.raises(ValueError, match=r"layers is \[5\]"):
        left_subspace_angles(model, BATCHES, candidates, layer=5)
    with pytest.raises(ValueError, match="units has modules that the model"):
        greedy_search(model, BATCHES, [UnitSet({"other": [0]}, {"other": 2})])


# Of experts that few tokens reach.
@pytest.mark.filterwarnings("ignore:.*experts that fewer than two")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_first_order_effects_are_finite_differences(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    selections = [some_units(model, share, seed=1) for share in (0.02, 0.3)]
    found = first_order_effects(model, BATCHES, selections)
    # Norms compute in float32, and the difference must be far above its rounding. But at a larger
    # step a token goes to another expert, which no slope knows of.
    step = 0.002 if name == "mixtral" else 0.02
    for units, fall in zip(selections, found.tolist(), strict=True):
        slope = 0.0
        for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # exact up to the fourth order
            with ssah.intervene(model, Scale(units, 1 + steps * step)):
                slope += weight * log_prob(model) / (12 * step)
        assert fall == pytest.approx(slope, rel=1e-3, abs=5e-4)
    nothing = UnitSet({}, selections[0].sizes)
    assert first_order_effects(model, BATCHES, [nothing]).tolist() == [0.0]
    assert_same_bits(model, before)


def test_a_screen_needs_responses() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="batch 0 has no labels"):
        first_order_effects(model, [collate(rows(), labels=False)], [some_units(model)])
    with pytest.raises(ValueError, match="selections is empty"):
        first_order_effects(model, BATCHES, [])


def test_agreement_of_rankings_is_counted_out() -> None:
    screened: Tensor = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0])
    measured = torch.tensor([0.3, 0.2, 0.1, 0.0, 0.4], dtype=torch.float64)
    found = ranking_agreement(screened, measured, 3)
    # 5 > 3 > 2 > 1 > 0 against 0.4 > 0.3 > 0.2 > 0.1 > 0: the third and the fourth are exchanged.
    assert found.spearman == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert (found.overlap, found.chance) == (pytest.approx(2 / 3), pytest.approx(3 / 5))
    overlaps = []
    for order in permutations(range(4)):
        drawn = ranking_agreement(measured[list(order)], measured[:4], 2)
        overlaps.append(drawn.overlap)
    assert sum(overlaps) / len(overlaps) == pytest.approx(drawn.chance) == pytest.approx(2 / 4)
    for wrong, k, message in (
        (screened[:3], 2, r"screened is \[3\], measured \[5\] and k 2"),
        (screened, 6, "k no more than that"),
        (torch.zeros(5), 2, "screened has one value 5 times"),
    ):
        with pytest.raises(ValueError, match=message):
            ranking_agreement(wrong, measured, k)
