"""The hash of a model's weights: taken once, and again when they have changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from torch import nn

import ssah.models.weights
from ssah.interventions import ablate
from ssah.models import cheap_weights_hash, weights_hash
from ssah.units import UnitSet, find_modules


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose weights were hashed."""
    seen: list[nn.Module] = []

    def counting(model: nn.Module) -> str:
        seen.append(model)
        return weights_hash(model)

    monkeypatch.setattr(ssah.models.weights, "weights_hash", counting)
    return seen


def test_what_has_not_changed_is_hashed_once(hashed: list[nn.Module]) -> None:
    model = tiny_models.build("llama")
    first = cheap_weights_hash(model)
    with torch.no_grad():
        model(**tiny_models.collate(tiny_models.rows()))
    assert cheap_weights_hash(model) == first == weights_hash(model)
    assert len(hashed) == 1
    assert cheap_weights_hash(tiny_models.build("llama")) == first
    assert len(hashed) == 2


def step(weight: nn.Parameter) -> None:
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 0] = 1.0
    torch.optim.SGD([weight], lr=0.1).step()


def add_one(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0, 0] += 1.0


def scale_data(weight: nn.Parameter) -> None:
    weight.data.mul_(1.5)


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone()
    weight.data[0, 0] += 1.0


@pytest.mark.parametrize("change", [step, add_one, scale_data, replace_data])
def test_what_has_changed_is_hashed_again(change: Callable[[nn.Parameter], None]) -> None:
    model = tiny_models.build("llama")
    before = cheap_weights_hash(model)
    change(model.model.layers[1].mlp.down_proj.weight)
    after = cheap_weights_hash(model)
    assert after != before
    assert after == weights_hash(model)


def test_units_that_are_ablated_are_other_weights_meanwhile() -> None:
    model = tiny_models.build("llama")
    before = cheap_weights_hash(model)
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    with ablate(model, UnitSet({next(iter(sizes)): [3]}, sizes)):
        assert cheap_weights_hash(model) == weights_hash(model) != before
    assert cheap_weights_hash(model) == before


def test_tensors_without_a_version_are_hashed_each_time(hashed: list[nn.Module]) -> None:
    with torch.inference_mode():
        model = tiny_models.build("llama")
    assert cheap_weights_hash(model) == cheap_weights_hash(model)
    assert len(hashed) == 2
