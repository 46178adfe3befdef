"""Plans that train or keep single weights, chosen by masks of one bit each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import plans
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah import selections
from ssah.selections import weights
from ssah.training import UpdatePlan, attach, freeze, load_update, plan_of, train_only
from ssah.units import BitMask

FAMILIES = ("llama", "llama_tied", "gpt2", "mixtral", "gemma3")


def drawn(model: PreTrainedModel, share: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    """Of every parameter a mask, bool of its shape: embeddings, norms and biases included."""
    g = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(p.shape, generator=g) < share for n, p in model.named_parameters()}
    return {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}


def bits(masks: dict[str, Tensor]) -> dict[str, BitMask]:
    return {name: BitMask.of(mask) for name, mask in masks.items()}


def as_floats(model: PreTrainedModel, masks: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """Which elements train, as `plans.check_moved` takes them."""
    frozen = mode == "freeze"
    result = {n: torch.full_like(p, float(frozen)) for n, p in model.named_parameters()}
    for name, mask in masks.items():
        result[name][mask] = float(not frozen)
    return result


def made(model: PreTrainedModel, masks: dict[str, Tensor], mode: str) -> UpdatePlan:
    return (freeze if mode == "freeze" else train_only)(model, weights(model, bits(masks)))


@pytest.mark.parametrize("mode", ["freeze", "train_only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family: str, mode: str) -> None:
    model = tiny_models.build(family)
    exact = family != "mixtral"  # torch multiplies experts in float32 at most
    model = model.double() if exact else model
    masks = drawn(model)
    loss = plans.loss_of(model)
    loss.backward()
    trains = as_floats(model, masks, mode)
    expected = {n: p.grad[trains[n] > 0] for n, p in model.named_parameters() if trains[n].any()}
    values = {n: p.detach()[trains[n] > 0] for n, p in model.named_parameters()}
    plan = made(model, masks, mode)
    now = plans.loss_of(model)
    assert torch.equal(now, loss)
    now.backward()
    slices = {name: parameter for name, parameter, *_ in plan.trained_slices()}
    assert slices.keys() == expected.keys()
    for name, parameter in slices.items():
        assert torch.equal(parameter.detach().flatten(), values[name])
        near = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(parameter.grad.flatten(), expected[name], **near)


@pytest.mark.parametrize("mode", ["freeze", "train_only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_is_bit_identical_and_the_model_comes_back(family: str, mode: str) -> None:
    model = tiny_models.build(family)
    before, masks = plans.snapshot(model), drawn(model)
    names = [name for name, _ in model.named_parameters()]
    plan = made(model, masks, mode)
    plans.assert_equal(plans.snapshot(model), before)
    plans.train(plan)
    plan.verify()
    trained = plans.snapshot(model)
    plan.close()
    assert [name for name, _ in model.named_parameters()] == names
    plans.assert_equal(plans.snapshot(model), trained)
    plans.check_moved(model, before, as_floats(model, masks, mode))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0.05, 0.95), keep=st.booleans())
def test_fifty_steps_of_adamw(seed: int, share: float, keep: bool) -> None:
    """With decay and momentum that was primed with gradients of everything."""
    torch.manual_seed(seed)
    model = tiny_models.build("llama")
    before, masks = plans.snapshot(model), drawn(model, share, seed)
    mode = "freeze" if keep else "train_only"
    trains = as_floats(model, masks, mode)
    plan = made(model, masks, mode)
    own = [p for _, p in plan.named_parameters()]
    optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.3)
    for p in own:
        state = optimizer.state[p]
        state["step"] = torch.tensor(100.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.randn_like(p), torch.rand_like(p)
    for step in range(50):
        for p in own:  # what a forward pass would cost says nothing about the optimiser
            p.grad = torch.randn_like(p)
        optimizer.step()
        if step % 25 == 0:
            plans.loss_of(model)
    plan.verify()
    plan.close()
    for name, mask in trains.items():
        now, old = model.state_dict()[name], before[name]
        assert torch.equal(now[mask == 0], old[mask == 0]), name
        assert not mask.any() or not torch.equal(now, old)


def test_values_are_those_of_adamw_on_the_chosen_weights() -> None:
    """Five steps, against one written out in float64 on vectors of the chosen weights."""
    model, twin = tiny_models.build("llama").double(), tiny_models.build("llama").double()
    twin.load_state_dict(model.state_dict())
    masks = drawn(model)
    plan = train_only(model, weights(model, bits(masks)))
    optimizer = plan.optimizer(lr=1e-2, weight_decay=0.1)
    state = {name: (torch.zeros_like(twin.get_parameter(name)),) * 2 for name in masks}
    for t in range(1, 6):
        plans.loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()
        twin.zero_grad()
        plans.loss_of(twin, t).backward()
        for name, mask in masks.items():
            p = twin.get_parameter(name)
            m, v = state[name]
            m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
            state[name] = m, v
            decay = 0.1 if p.dim() > 1 else 0.0  # norms do not decay
            new = p.detach() * (1 - 1e-2 * decay)
            new -= 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            p.data[mask] = new[mask]
    plan.close()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_units_and_single_weights_together(mode: str) -> None:
    """A weight is frozen, or trains, where a unit or a mask says so."""
    model = tiny_models.build("llama")
    before, units = plans.snapshot(model), plans.draw(model)
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.rand(before[name].shape, generator=torch.Generator().manual_seed(3)) < 0.2
    norm = torch.arange(len(before["model.norm.weight"])) < 5
    trains = plans.masks(model, units, mode)
    chosen = {name: mask, "model.norm.weight": norm}
    for each, own in chosen.items():
        trains[each][own] = float(mode != "freeze")
    make = freeze if mode == "freeze" else train_only
    shared = "any" if mode == "freeze" else "all"  # of a row of V that several heads read
    plan = make(model, selections.units(model, units, shared=shared) | weights(model, bits(chosen)))
    plans.train(plan)
    plan.verify()
    plan.close()
    plans.check_moved(model, before, trains)


def test_only_what_trains_is_in_the_parameters() -> None:
    model = tiny_models.build("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    mask = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
    mask[0, 3] = mask[2, 1] = True
    values = model.get_parameter(name).detach()[mask].clone()
    train_only(model, weights(model, {name: BitMask.of(mask)}))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, _ in trained] == [f"{name}_trained"]
    assert torch.equal(trained[0][1].detach(), values)
    plans.loss_of(model).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm == pytest.approx(trained[0][1].grad.norm().item() * norm.item() / 1e-3, rel=1e-4)
    assert [p.grad is None for _, p in model.named_parameters()].count(False) == 1


def test_an_update_of_single_weights(tmp_path: Path) -> None:
    model, base = (tiny_models.build("llama") for _ in range(2))
    base.load_state_dict(model.state_dict())
    plan = train_only(model, weights(model, bits(drawn(model))))
    plans.train(plan)
    plan.save_pretrained(tmp_path)
    plan.close()
    names = [each for file in tmp_path.glob("*.safetensors") for each in load_file(file)]
    assert any(each.startswith("bits/") for each in names)
    assert not any(each.startswith("index/") for each in names)  # 64 times as large
    load_update(base, tmp_path)
    plans.assert_equal(plans.snapshot(base), plans.snapshot(model))
    name = "model.layers.0.mlp.up_proj.weight"
    other = tiny_models.build("llama")
    other.load_state_dict(model.state_dict())
    frozen = (~drawn(model)[name]).nonzero()[0]
    other.get_parameter(name).data[tuple(frozen)] += 1
    with pytest.raises(ValueError, match="frozen weights differ"):
        load_update(other, tmp_path)


def test_an_attached_update_comes_off_again(tmp_path: Path) -> None:
    model, base = (tiny_models.build("llama") for _ in range(2))
    before = plans.loss_of(base)
    plan = train_only(model, weights(model, bits(drawn(model))))
    plans.train(plan)
    plan.save_pretrained(tmp_path / "update")
    attached = attach(base, tmp_path / "update")
    assert torch.equal(plans.loss_of(base), plans.loss_of(model))
    attached.detach()
    assert torch.equal(plans.loss_of(base), before)


def test_updates_in_the_backward_pass() -> None:
    runs = []
    for in_backward in (False, True):
        model = tiny_models.build("llama")
        plan = train_only(model, weights(model, bits(drawn(model))))
        optimizer = plan.optimizer(lr=1e-2, in_backward=in_backward)
        for step in range(2):
            optimizer.zero_grad()
            plans.loss_of(model, step).backward()
            optimizer.step()
        plan.verify()
        runs.append(plans.snapshot(model))
    plans.assert_equal(*runs)


def test_the_original_values_come_back_for_a_while() -> None:
    model = tiny_models.build("llama")
    before = plans.loss_of(model)
    plan = train_only(model, weights(model, bits(drawn(model))))
    plan.keep_originals()
    plans.train(plan)
    with plan.disabled():
        assert torch.equal(plans.loss_of(model), before)
    assert not torch.equal(plans.loss_of(model), before)


def test_a_copy_of_the_model_has_a_plan_of_its_own() -> None:
    model = tiny_models.build("llama_tied")
    plan = train_only(model, weights(model, bits(drawn(model))))
    before = plans.snapshot(model)
    twin = plan_of(copy.deepcopy(model))
    assert twin is not None
    plans.train(twin)
    twin.verify()
    plan.verify()
    plans.assert_equal(plans.snapshot(model), before)


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    model = tiny_models.build("llama").train()
    plan = train_only(model, weights(model, bits(drawn(model))))
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        plans.loss_of(model).backward()
        found.append([p.grad.clone() for p in plan.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_importance_of_units_is_refused() -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, weights(model, bits(drawn(model))))
    with pytest.raises(ValueError, match="track_importance is True, and single weights"):
        plan.optimizer(track_importance=True)


def test_resuming_continues_the_run() -> None:
    runs = []
    for resumed in (False, True):
        model = tiny_models.build("llama")
        plan = train_only(model, weights(model, bits(drawn(model))))
        optimizer = plan.optimizer(lr=1e-2)
        for step in range(4):
            if resumed and step == 2:
                values, state = plans.snapshot(model), optimizer.state_dict()
                model = tiny_models.build("llama")
                plan = train_only(model, weights(model, bits(drawn(model))))
                model.load_state_dict(values)
                optimizer = plan.optimizer(lr=1e-2)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            plans.loss_of(model, step).backward()
            optimizer.step()
        runs.append(plans.snapshot(model))
    plans.assert_equal(*runs)


def test_a_change_between_the_passes_is_noticed() -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, weights(model, bits(drawn(model))))
    loss = plans.loss_of(model)
    with torch.no_grad():
        for p in plan.parameters():
            p.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_frozen_weight_that_moved_is_named() -> None:
    model = tiny_models.build("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    mask = drawn(model)[name]
    plan = train_only(model, weights(model, {name: BitMask.of(mask)}))
    values = model.state_dict()[name].clone()
    values[tuple((~mask).nonzero()[0])] += 1
    model.load_state_dict({**model.state_dict(), name: values})
    with pytest.raises(RuntimeError, match=name):
        plan.verify()


WRONG: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "weights is a list"),
    "no mask": ({"model.norm.weight": torch.ones(48, dtype=torch.bool)}, "weights has a Tensor"),
    "no parameter": ({"model.nrm": BitMask.of(torch.ones(3, dtype=torch.bool))}, "model.nrm"),
    "shape": (
        {"model.norm.weight": BitMask.of(torch.ones(3, dtype=torch.bool))},
        r"shape \[3\] for 'model.norm.weight', must have \[48\]",
    ),
}


@pytest.mark.parametrize("which", WRONG)
def test_wrong_masks_are_refused(which: str) -> None:
    model = tiny_models.build("llama")
    before = plans.snapshot(model)
    chosen, message = WRONG[which]
    with pytest.raises((TypeError, ValueError), match=message):
        weights(model, chosen)
    plans.assert_equal(plans.snapshot(model), before)


def test_a_replaced_forward_is_refused() -> None:
    model = tiny_models.build("llama")
    norm: nn.Module = model.model.norm
    norm.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="must be that of its class"):
        train_only(model, weights(model, {"model.norm.weight": BitMask.of(torch.arange(48) < 5)}))
