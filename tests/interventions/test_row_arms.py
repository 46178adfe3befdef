"""Arms in one batch equal ablations one by one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ablatable import assert_same_bits, bits, gpt2, some_units
from in_float64 import InFloat64
from tiny_models import EXPERTS, FAMILIES, build, collate, rows
from torch import Tensor
from transformers import PreTrainedModel

import ssah
from ssah.interventions import Scale, Zero, fusing, intervene
from ssah.training import freeze
from ssah.units import UnitSet
from ssah_kernels import backends, ops

CHOSEN = ["llama", "gpt2", "mixtral", "gemma3", "opt", "qwen2_moe"]
# In float64 these give NaN by themselves where a row begins with padding.
RIGHT_ALONE = ("bloom", "gemma2")
# These choose experts in float32, where a batch of another size is rounded otherwise.
FLOAT32_ROUTERS = ("deepseek_v3", "glm4_moe")
REST = sorted({*FAMILIES, *EXPERTS} - {*CHOSEN})


@pytest.fixture(autouse=True)
def small_products_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_WORTH_FUSING", 0)


def batch(side: str = "left") -> dict[str, Tensor]:
    return collate(rows((9, 4, 7)), side=side, labels=False)


def selections(model: PreTrainedModel) -> list[Any]:
    many = some_units(model, 0.5, seed=1)
    first = next(iter(many))
    return [None, many, UnitSet({first: [2, 5]}, many.sizes), Scale(many, -0.3), Zero(many)]


def one_by_one(model: PreTrainedModel, chosen: list[Any], data: dict[str, Tensor]) -> Tensor:
    found = []
    for arm in chosen:
        changes = [] if arm is None else [Zero(arm) if isinstance(arm, UnitSet) else arm]
        with intervene(model, *changes), torch.no_grad():
            found.append(model(**data).logits)
    return torch.stack(found)  # [arms, rows, tokens, vocabulary]


@pytest.mark.parametrize(
    "name", [*CHOSEN, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in REST)]
)
def test_arms_equal_ablations_one_by_one(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before, chosen = bits(model), selections(model)
    for side in ("right",) if name in RIGHT_ALONE else ("left", "right"):
        data = batch(side)
        with InFloat64() if name in FLOAT32_ROUTERS else nullcontext():
            expected = one_by_one(model, chosen, data)
            with ssah.arms(model, chosen) as run, torch.no_grad():
                got = run.split(model(**run.repeat(data)).logits)
        attended = data["attention_mask"].bool()
        torch.testing.assert_close(got[:, attended], expected[:, attended], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(got[0, attended], got[1, attended])
    assert_same_bits(model, before)
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_greedy_tokens_are_those_of_ablations_one_by_one(name: str) -> None:
    model, data = build(name), batch()
    chosen = [None, some_units(model, 0.4, seed=1), some_units(model, 0.4, seed=2)]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = None
    expected = [model.generate(**data, **options)]
    for units in chosen[1:]:
        assert units is not None
        with ssah.ablate(model, units):
            expected.append(model.generate(**data, **options))
    with ssah.arms(model, chosen) as run:
        got = run.split(model.generate(**run.repeat(data), **options))
    assert torch.equal(got, torch.stack(expected))
    assert not torch.equal(got[0], got[1])


def calls_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The type of each product that ``gated_product`` is given from now on."""
    seen: list[torch.dtype] = []
    operator = ops.gated_product

    def product(gate: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(gate.dtype)
        return operator(gate, *args, **kwargs)

    monkeypatch.setattr(ops, "gated_product", product)
    return seen


def logits_in_arms(model: PreTrainedModel, units: UnitSet, data: dict[str, Tensor]) -> Tensor:
    with ssah.arms(model, [None, units]) as run, torch.no_grad():
        run.assign([0, 1, 1])
        return model(**data).logits


def test_a_gated_ffn_takes_its_factors_in_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of_the_operator(monkeypatch)
    model, data = build("llama", dtype=torch.float64), batch()
    logits_in_arms(model, some_units(model), data)
    assert seen == [torch.float64] * model.config.num_hidden_layers
    elements = 3 * 9 * model.config.intermediate_size  # of a product: rows, tokens, units
    for fewest, calls in ((elements, model.config.num_hidden_layers), (elements + 1, 0)):
        seen.clear()
        monkeypatch.setattr(fusing, "_WORTH_FUSING", fewest)
        logits_in_arms(model, some_units(model), data)
        assert len(seen) == calls


def test_16_bits_are_those_of_the_model() -> None:
    """It rounds act(gate), and again act(gate) * up; the operator rounds once."""
    model, data = build("llama", dtype=torch.bfloat16), batch()
    units = some_units(model)
    intact, ablated = one_by_one(model, [None, units], data)
    got = logits_in_arms(model, units, data)
    assert torch.equal(got[0], intact[0])
    assert torch.equal(got[1:], ablated[1:])


def test_a_hook_on_the_activation_counts_before_and_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of_the_operator(monkeypatch)
    model, data = build("llama", dtype=torch.float64), batch()
    units = some_units(model)
    activation: Any = model.get_submodule("model.layers.0.mlp.act_fn")

    def twice(*_: Any) -> Tensor:
        return 2 * _[-1]

    hook = activation.register_forward_hook(twice)
    intact, ablated = one_by_one(model, [None, units], data)
    before = logits_in_arms(model, units, data)
    hook.remove()
    with ssah.arms(model, [None, units]) as run, torch.no_grad():
        run.assign([0, 1, 1])
        hook = activation.register_forward_hook(twice)
        inside = model(**data).logits
        hook.remove()
    for got in (before, inside):
        torch.testing.assert_close(got[0], intact[0])
        torch.testing.assert_close(got[1:], ablated[1:])
    assert len(seen) == 2 * (model.config.num_hidden_layers - 1)  # all layers but the hooked one


def test_no_kernel_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama", dtype=torch.float64), batch()
    units = some_units(model)
    expected = logits_in_arms(model, units, data)
    seen = calls_of_the_operator(monkeypatch)
    monkeypatch.setattr(backends, "missing", lambda *_: "not built")
    torch.testing.assert_close(logits_in_arms(model, units, data), expected)
    assert seen == []


def test_gradients_are_those_of_the_ablated_model() -> None:
    model, data = build("llama", dtype=torch.float64), batch()
    units = some_units(model)
    weight = model.get_input_embeddings().weight
    with intervene(model, Zero(units)):
        model(**data).logits.square().sum().backward()
    expected, weight.grad = weight.grad, None
    with ssah.arms(model, [None, units]) as run:
        run.assign([1] * 3)
        with torch.inference_mode():
            model(**data)  # what it leaves must serve a pass with gradients too
        model(**data).logits.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_rows_have_any_arm() -> None:
    model, data = build("llama", dtype=torch.float64), batch()
    units = some_units(model)
    expected = one_by_one(model, [None, units], data)
    with ssah.arms(model, [None, units]) as run, torch.no_grad():
        for arm in ([1, 0, 1], [0, 1, 0]):
            run.assign(arm)
            got = model(**data).logits
            torch.testing.assert_close(got, expected[torch.tensor(arm), torch.arange(3)])


def test_arms_nest_with_each_other_and_with_interventions() -> None:
    model, data = build("llama", dtype=torch.float64), batch()
    first, second = some_units(model, 0.3, 1), some_units(model, 0.3, 2)
    with ssah.ablate(model, first | second), torch.no_grad():
        expected = model(**data).logits
    with torch.no_grad(), ssah.arms(model, [first]) as outer:
        outer.assign([0] * 3)
        with ssah.arms(model, [second]) as inner:
            inner.assign([0] * 3)
            torch.testing.assert_close(model(**data).logits, expected)
        with ssah.ablate(model, second):
            torch.testing.assert_close(model(**data).logits, expected)
        with pytest.raises(ValueError, match=r"inside `with ssah\.arms"):
            freeze(model, first)


def test_what_cannot_be_run_in_arms_is_refused() -> None:
    model, data = build("llama"), batch()
    units = some_units(model)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "selections is empty"),
        ([None, "scu"], TypeError, "units is str; it must be a UnitSet"),
        ([Zero("model.norm.weight")], TypeError, "units is str"),
        ([some_units(gpt2())], ValueError, "modules that the model LlamaForCausalLM lacks"),
    ]
    for given, error, message in wrong:
        with pytest.raises(error, match=message):
            ssah.arms(model, given)
    with ssah.arms(model, [None, units]) as run, torch.no_grad():
        with pytest.raises(ValueError, match="none assigned, the batch has 3 rows"):
            model(**data)
        with pytest.raises(ValueError, match=r"arm is \[0, 2\]; must be .* from 0 to 1"):
            run.assign([0, 2])
        run.assign([0, 1])
        with pytest.raises(ValueError, match="2 assigned, the batch has 3 rows"):
            model(**data)
        with pytest.raises(ValueError, match="rows; must be tensors of equally many"):
            run.repeat({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(1, 3)})
        with pytest.raises(ValueError, match="3 rows; must be a multiple of 2 arms"):
            run.split(torch.ones(3, 1))
