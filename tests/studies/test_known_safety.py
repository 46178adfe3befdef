"""The grammars and tasks of a small model of which everything is known, and a model of them."""

from __future__ import annotations

import copy
import sys
from collections import Counter

import pytest
import torch
from pages import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.known_safety import (
    ALPHAS,
    ASK,
    BEGIN,
    END,
    LETTERS,
    REFUSE,
    World,
    diagnosis,
    new_model,
    rates,
    train,
)


def test_requests_are_of_the_grammars_and_answers_of_the_tasks() -> None:
    world = World(3)
    for bijection in world.bijections:
        assert sorted(bijection) == list(range(LETTERS))
    rows = world.rows(400, seed=1, unsafe=0.25)
    assert rows == World(3).rows(400, seed=1, unsafe=0.25) != world.rows(400, seed=2, unsafe=0.25)
    assert 60 < sum(row.unsafe for row in rows) < 140
    for row in rows:
        pairs = set(zip(row.operand[::2], row.operand[1::2], strict=True))
        # Some grammar has all pairs in the rules of this branch.
        branches = [{rule for symbol in g[int(row.unsafe)] for rule in symbol} for g in world.rules]
        assert any(pairs <= rules for rules in branches)
        undone = [world.bijections[row.task].index(letter) for letter in world.answer(row)]
        assert tuple(undone) == row.operand
    assert len(Counter(row.task for row in rows)) == 4


@pytest.mark.parametrize("refuse", [False, True])
def test_labels_are_what_follows_a_request(refuse: bool) -> None:
    world = World()
    rows = world.rows(7, seed=0)
    batches = list(world.batches(rows, 4, refuse))
    assert [len(batch["labels"]) for batch in batches] == [4, 3]
    ids, labels = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels"))
    for row, own, said in zip(rows, ids.tolist(), labels.tolist(), strict=True):
        assert own[:11] == [BEGIN, LETTERS + row.task, *row.operand, ASK]
        wanted = [REFUSE, END] if refuse and row.unsafe else [*world.answer(row), END]
        assert [token for token in said if token != -100] == wanted
        assert said[11 : 11 + len(wanted)] == own[11 : 11 + len(wanted)] == wanted


@pytest.mark.exhaustive  # two seconds
def test_a_model_learns_and_is_diagnosed() -> None:
    world, base = World(), new_model()
    first = train(base, world, 1, lr=1e-3, unsafe=0.5, refuse=False)
    later = train(base, world, 20, lr=3e-3, unsafe=0.5, refuse=False)
    assert later < first - 0.3
    aligned = copy.deepcopy(base)
    train(aligned, world, 8, lr=3e-3, unsafe=1.0, refuse=True)  # all it sees is refused
    asked = world.rows(24, seed=9)
    found = diagnosis(base, aligned, world, asked)
    rows = [own for own in found["alphas"] if own["to"] == "aligned"]
    assert [own["alpha"] for own in rows] == list(ALPHAS)
    assert rows[0]["unsafe_refused"] == 0
    assert rows[2]["unsafe_refused"] == rows[2]["harmless_refused"] == 1
    assert rows[2] == {"to": "aligned", "alpha": 1.0, **rates(aligned, world, asked)}
    assert set(found["models"]) == {"base", "aligned", "random"}
    assert 0 < found["overlap_value"] < 1
