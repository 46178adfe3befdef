"""Ablation zeroes columns and nothing else, and puts every bit back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ablatable import (
    MODELS,
    SIZE,
    TOKENS,
    assert_same_bits,
    bits,
    columns,
    gpt2,
    llama,
    logits,
    some_units,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ssah.interventions import ablate, prune
from ssah.interventions.columns import Columns
from ssah.units import UnitSet


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


def test_ablation_zeroes_the_columns_and_nothing_else(model: PreTrainedModel) -> None:
    units, before = some_units(model), bits(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name in units:
            for j in units[name].tolist():
                columns(expected, name)[j] = 0.0
    with ablate(model, units) as yielded:
        assert yielded is model
        assert_same_bits(model, bits(expected))
        assert torch.equal(logits(model), logits(expected))
        assert not torch.equal(logits(model), 0 * logits(model))
    assert_same_bits(model, before)


def test_ablated_units_are_what_does_not_pass(model: PreTrainedModel) -> None:
    """Zero columns of B are zero channels of the activation entering B."""
    units = some_units(model)
    expected = copy.deepcopy(model)
    for name in units:
        keep = (~units.mask(name)).to(model.dtype)
        expected.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, keep=keep: (inputs[0] * keep,)
        )
    with ablate(model, units):
        torch.testing.assert_close(logits(model), logits(expected))


def test_ablation_is_undone_after_an_exception(model: PreTrainedModel) -> None:
    before = bits(model)
    with pytest.raises(KeyError, match="inside"), ablate(model, some_units(model)):
        raise KeyError("inside")
    assert_same_bits(model, before)


def test_ablation_is_undone_when_entering_fails() -> None:
    model = llama()
    before = bits(model)
    units = some_units(model)
    context = ablate(model, units)
    last = model.get_submodule(list(units)[-1])
    whole = last.weight.data
    last.weight.data = whole[:, :1]  # too small for the units' indices
    with pytest.raises((RuntimeError, IndexError)), context:
        pass
    last.weight.data = whole
    assert_same_bits(model, before)


def test_nested_and_overlapping_ablations(model: PreTrainedModel) -> None:
    first, second = some_units(model, 0.5, seed=1), some_units(model, 0.5, seed=2)
    assert len(first & second) > 0
    before = bits(model)
    with ablate(model, first | second):
        both = bits(model)
    with ablate(model, first):
        alone = bits(model)
        with ablate(model, second):
            assert_same_bits(model, both)
        assert_same_bits(model, alone)
        with ablate(model, first):
            assert_same_bits(model, alone)
        assert_same_bits(model, alone)
    assert_same_bits(model, before)


def test_special_values_come_back() -> None:
    model = llama(torch.bfloat16)
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, 1e-40, 3e38, -3e38])
        weight.view(torch.int16)[1, :4] = torch.tensor([0x0001, 0x7F7F, -0x8000, 0x0080]).short()
    before = bits(model)
    with ablate(model, some_units(model).complement() | some_units(model)):
        assert not weight.any()
    assert_same_bits(model, before)


def test_parameters_keep_identity_gradients_and_mode() -> None:
    model = llama().train()
    model.model.layers[0].requires_grad_(False)
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    with ablate(model, some_units(model)):
        model(TOKENS, labels=TOKENS).loss.backward()
        assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == flags[name]
        assert (parameter.grad is not None) == flags[name]
    assert model.training


def test_a_pending_backward_pass_notices() -> None:
    model = llama()
    with ablate(model, some_units(model)):
        loss = model(TOKENS, labels=TOKENS).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model = llama()
    model.requires_grad_(False)
    assert model.model.layers[0].mlp.down_proj.weight.is_inference()
    before = bits(model)
    with ablate(model, some_units(model)):
        assert not torch.equal(bits(model)["model.layers.0.mlp.down_proj.weight"],
                               before["model.layers.0.mlp.down_proj.weight"])  # fmt: skip
    assert_same_bits(model, before)
    with torch.inference_mode(), ablate(model, some_units(model)):
        logits(model)
    assert_same_bits(model, before)


def test_only_touched_columns_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(intermediate_size=4096)
    name = "model.layers.0.mlp.down_proj"
    units = UnitSet({name: [7, 9]}, {name: 4096})
    kept, read = [], Columns.read
    monkeypatch.setattr(Columns, "read", lambda self: kept.append(read(self)) or kept[-1])
    with ablate(model, units):
        assert [tuple(values.shape) for values in kept] == [(16, 2)]


def test_units_of_part_of_the_modules() -> None:
    model = llama()
    before = bits(model)
    name = "model.layers.1.self_attn.o_proj"
    with ablate(model, UnitSet({name: [3]}, {name: 16})):
        changed = [n for n, x in bits(model).items() if not torch.equal(x, before[n])]
        assert changed == [f"{name}.weight"]
    with ablate(model, UnitSet({}, {name: 16})):
        assert_same_bits(model, before)


@pytest.mark.parametrize("take_out", [ablate, prune])
def test_units_of_another_model_are_refused(take_out: Callable[..., Any]) -> None:
    model = llama()
    before = bits(model)
    with pytest.raises(ValueError, match=r"transformer\.h\.0"):
        take_out(model, some_units(gpt2()))
    with pytest.raises(ValueError, match=r"28 units in 'model.layers.0.mlp.down_proj'.* 24"):
        take_out(model, some_units(llama(intermediate_size=28)))
    with pytest.raises(TypeError, match=r"units is dict.*must be a UnitSet"):
        take_out(model, {"scu": some_units(model)})
    assert_same_bits(model, before)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE))
    with pytest.raises(ValueError, match=r"self_attn.o_proj.weight is .* on meta"):
        ablate(model, some_units(model))
