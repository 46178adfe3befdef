"""SN-Tune: its units by loops over requests, and its training on refusals by hand, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_chat
import torch
from ablatable import assert_same_bits, bits
from in_float64 import InFloat64
from plans import masks
from tiny_models import build, collate, rows
from torch import Tensor, nn
from trained_by_hand import (
    Weights,
    assert_trained_alike,
    by_hand,
    loss_of_batches,
    parameters,
    without_dropout,
)
from transformers import PreTrainedModel

import ssah
from ssah.data import encoded_rows, schedule
from ssah.methods import Edited, Inputs, method
from ssah.methods.consistent_units import SNTune
from ssah.units import UnitSet

SAFETY, UTILITY = rows((9, 7, 8, 6), seed=1), rows((8, 10, 7, 5), seed=3)
MODELS = ["llama", "gpt2"]  # shared key/value heads; Conv1D
SETTINGS: dict[str, Any] = {"share": 0.4, "refusals": 3, "epochs": 2, "lr": 1e-3, "batch_size": 2}


def inputs(model: PreTrainedModel) -> Inputs:
    safety = [collate(SAFETY[:2], side="left"), collate(SAFETY[2:])]
    utility = [collate(UTILITY)]
    return Inputs(model, safety=safety, utility=utility, tokenizer=tiny_chat.word_tokenizer())


def written(model: PreTrainedModel, ids: Tensor) -> dict[str, list[float]]:
    """How much each unit of a module writes at one row: the mean over its tokens, by loops."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0][0].detach()})
        )
        for name in ssah.find_modules(model)
    ]
    model(ids[None])
    for handle in handles:
        handle.remove()
    found = {}
    for name, x in seen.items():
        down = model.get_submodule(name)
        b = down.weight.detach()
        b = b.T if isinstance(down, nn.Linear) else b  # [units, out]
        found[name] = [
            sum(float((token[j] * b[j]).pow(2).sum()) for token in x) / len(x)
            for j in range(len(b))
        ]
    return found


def consistent(model: PreTrainedModel, data: list[Any], share: float) -> set[tuple[str, int]]:
    """What is in the top share of its module at every row."""
    of_rows = []
    for ids, _ in data:
        chosen = set()
        for name, values in written(model, ids).items():
            order = sorted(range(len(values)), key=lambda j: (-values[j], j))
            chosen |= {(name, j) for j in order[: math.floor(share * len(values) + 0.5)]}
        of_rows.append(chosen)
    return set.intersection(*of_rows)


@pytest.mark.parametrize("name", [*MODELS, "llama_bias"])
def test_units_are_those_that_every_request_has(name: str) -> None:
    model = build(name, dtype=torch.float64)
    safety, foundation = (consistent(model, data, 0.5) for data in (SAFETY, UTILITY))
    assert 0 < len(safety & foundation) < len(safety)
    for which, expected in (("sn-tune", safety), ("rsn-tune", safety - foundation)):
        tuning = method(which, share=0.5)
        assert isinstance(tuning, SNTune)
        units = tuning.units(inputs(model))
        assert {(key, j) for key, own in units.items() for j in own.tolist()} == expected
    with pytest.raises(ValueError, match=r"share is 0\.001, and no unit is in it for every"):
        method("sn-tune", share=0.001).find(inputs(model))


def expected_of(model: PreTrainedModel, units: UnitSet, start: Weights) -> Weights:
    """The weights after training these units by hand, on rows that are evenly spread."""
    encoded = encoded_rows(inputs(model).safety or ())
    chosen = [encoded[0], encoded[1], encoded[2]]  # of four, 0, 4 / 3 and 8 / 3
    order = schedule([chosen], 2, 4, 0)  # two passes of two batches
    loss = loss_of_batches(without_dropout(model.config.model_type), order, 2)
    return by_hand(start, loss, 4, 1e-3, trains=masks(model, units, "train"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["sn-tune", "rsn-tune"])
def test_they_learn_refusals_and_nothing_else_moves(name: str, which: str) -> None:
    model = without_dropout(name)
    before, start = bits(model), parameters(model)
    tuning = method(which, **SETTINGS)
    assert isinstance(tuning, SNTune)
    units = tuning.units(inputs(model))
    found = tuning.find(inputs(model))
    assert isinstance(found, Edited)
    assert found.facts == {"units": len(units)}
    with InFloat64():
        made = found.write()
        control = found.control(5).write()
    assert_same_bits(model, before)
    for own, chosen in ((made, units), (control, UnitSet.random(units, seed=5))):
        assert isinstance(own, dict)
        assert list(own) == list(model.state_dict())
        assert_trained_alike(own, expected_of(model, chosen, start), start, moved=1e-3)
        for key, mask in masks(model, chosen, "train").items():
            assert own[key][mask == 0].equal(start[key][mask == 0]), key


def test_a_training_that_the_dtype_does_not_show_is_refused() -> None:
    model = build("llama", dtype=torch.bfloat16)
    found = method("sn-tune", share=0.4, lr=1e-12).find(inputs(model))
    assert isinstance(found, Edited)
    with pytest.raises(ValueError, match=r"by as much as torch\.bfloat16 can show; raise"):
        found.write()
