"""Hooks for TransformerLens and nnterp ablate what ``ssah.ablate`` does.

The tools themselves are run where they are installed (TransformerLens 4.3, nnterp 1.3 with nnsight
0.6). Everywhere, their places in the model are played by PyTorch's own hooks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, collate, rows
from torch import Tensor, nn
from transformers import PreTrainedModel

import ssah
from ssah.units import UnitSet, find_modules

FAMILIES = ["llama", "gpt2", "qwen3"]  # grouped heads; Conv1D and biases; heads of another width


def some_units(model: PreTrainedModel, share: int = 5) -> UnitSet:
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return UnitSet.random(sum(sizes.values()) // share, sizes, seed=1)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, UnitSet, Tensor, Tensor]:
    """A model, units, tokens ``[2, 9]``, and the logits with the units ablated."""
    model = build(request.param)
    units, ids = some_units(model), collate(rows((9, 9)))["input_ids"]
    with ssah.ablate(model, units):
        expected = logits(model, ids)
    assert (logits(model, ids) - expected).abs().max() > 0.1
    return model, units, ids, expected


def test_hook_points_stand_before_b(case: Any) -> None:
    model, units, ids, expected = case
    n_heads = model.config.num_attention_heads
    points = {}
    for i, (name, module) in enumerate(find_modules(model).items()):
        point = "mlp.hook_post" if module.kind == "mlp" else "attn.hook_z"
        points[f"blocks.{i // 2}.{point}"] = model.get_submodule(name)

    def at(point: str, hook: Any) -> Any:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = args[0]  # [batch, position, units]; of attention, heads apart at the hook point
            value = x.unflatten(-1, (n_heads, -1)) if point.endswith("hook_z") else x
            return (hook(value, hook=point).reshape(x.shape),)

        return before

    hooks = units.to_hooks("transformer_lens")
    handles = [points[point].register_forward_pre_hook(at(point, hook)) for point, hook in hooks]
    assert len(handles) == len(points)
    assert torch.equal(logits(model, ids), expected)
    other = torch.zeros(2, 9, 7)
    with pytest.raises(ValueError, match="where the model has 7 channels"):
        hooks[0][1](other)


class Envoy:
    """A module as nnsight shows it: children by name or number, and what enters it."""

    def __init__(self, module: nn.Module, inputs: dict[nn.Module, Tensor]) -> None:
        self._module, self._inputs = module, inputs

    def __getattr__(self, name: str) -> Envoy:
        return Envoy(self._module.get_submodule(name), self._inputs)

    def __getitem__(self, number: int) -> Envoy:
        return Envoy(self._module.get_submodule(str(number)), self._inputs)

    @property
    def input(self) -> Tensor:
        return self._inputs[self._module]


def test_inputs_of_b_are_zero_where_units_are() -> None:
    model = build("llama")
    units = some_units(model)
    inputs = {
        module.down: torch.ones(2, 3, module.n_units) for module in find_modules(model).values()
    }
    units.to_hooks("nnterp")(Envoy(model, inputs))
    for name, module in find_modules(model).items():
        assert torch.equal(inputs[module.down], (~units.mask(name)).float().expand(2, 3, -1))


def test_the_real_transformer_lens(case: Any) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    import tiny_chat

    model, units, ids, expected = case
    hooks = units.to_hooks("transformer_lens")
    lens = bridge.TransformerBridge.boot_transformers(
        "tiny", hf_model=model, tokenizer=tiny_chat.tokenizer()
    )
    with torch.no_grad():
        found = lens.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits")
        intact = lens(ids, return_type="logits")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (intact - expected).abs().max() > 0.1


def test_the_real_nnterp(case: Any) -> None:
    nnterp = pytest.importorskip("nnterp")
    import tiny_chat

    model, units, ids, expected = case
    ablate = units.to_hooks("nnterp")
    traced = nnterp.StandardizedTransformer(model, tokenizer=tiny_chat.tokenizer(), device_map=None)
    with torch.no_grad(), traced.trace(ids):
        ablate(traced)
        found = traced.logits.save()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_units_without_a_place_are_refused() -> None:
    model = build("qwen2_moe")
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    shared = next(name for name in sizes if "shared" in name)
    attention = next(name for name in sizes if "self_attn" in name)
    routed = next(name for name in sizes if name.endswith("[0]"))
    for name, message in ((routed, "routed expert"), (shared, "no hook point of its own")):
        with pytest.raises(ValueError, match=message):
            UnitSet({name: [0]}, sizes).to_hooks("transformer_lens")
    with pytest.raises(ValueError, match="routed expert"):
        UnitSet({routed: [0]}, sizes).to_hooks("nnterp")
    with pytest.raises(ValueError, match="no hook point of its own"):
        UnitSet({"a": [0]}, {"a": 1}).to_hooks("transformer_lens")
    with pytest.raises(ValueError, match="must be one of transformer_lens, nnterp"):
        UnitSet({}, sizes).to_hooks("nnsight")  # type: ignore[call-overload]
    assert [
        point for point, _ in UnitSet({attention: [0]}, sizes).to_hooks("transformer_lens")
    ] == ["blocks.0.attn.hook_z"]
