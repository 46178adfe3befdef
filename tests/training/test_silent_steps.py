"""Steps that would train nothing, something else, or beyond the end of a tensor.

Each test is judged by a mask made from the modules alone (``plans.masks``) or by training without a
plan, never by ``verify``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from plans import assert_equal, draw, loss_of, masks, snapshot
from torch import Tensor, nn
from transformers import Adafactor, PreTrainedModel

from ssah.training import freeze
from ssah.units import UnitSet
from ssah_kernels.optim import MaskedAdamW, MaskedSGD

FACTORIES = {
    "plan": lambda plan: plan.optimizer(lr=1e-2),
    "groups": lambda plan: torch.optim.AdamW(plan.param_groups(), lr=1e-2),
    "fused": lambda plan: torch.optim.AdamW(plan.parameters(), lr=1e-2, fused=True),
    "sgd": lambda plan: torch.optim.SGD(plan.parameters(), lr=1e-2, momentum=0.9),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", FACTORIES.values(), ids=FACTORIES)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def assert_frozen_stayed(
    model: PreTrainedModel, before: dict[str, Tensor], trains: dict[str, Tensor]
) -> None:
    now = model.state_dict()
    for name, mask in trains.items():
        still = mask == 0
        assert torch.equal(now[name][still], before[name][still]), name
    assert any(not torch.equal(now[name], before[name]) for name in trains)


def mlp(units: UnitSet) -> UnitSet:
    return UnitSet({n: i for n, i in units.items() if "mlp" in n}, units.sizes)


# ------------------------------------------------------------------------------ nothing would train


@every_optimizer
def test_an_optimiser_of_another_model_is_refused(make_optimizer: Any) -> None:
    first, second = tiny_models.build("llama"), tiny_models.build("llama")
    freeze(first, draw(first))
    plan = freeze(second, draw(second))
    optimizer = make_optimizer(plan)
    loss_of(first).backward()
    before = snapshot(second)
    with pytest.raises(RuntimeError, match=r"has a gradient.*another model than the plan's"):
        optimizer.step()
    assert_equal(snapshot(second), before)
    step(second, optimizer)
    assert any(not torch.equal(value, before[n]) for n, value in second.state_dict().items())


@every_optimizer
def test_adapters_that_take_all_gradients_are_named(make_optimizer: Any) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, mlp(draw(model)))
    optimizer = make_optimizer(plan)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    loss_of(peft_model).backward()
    with pytest.raises(RuntimeError, match=r"has a gradient.*requires_grad=False.*peft"):
        optimizer.step()


def test_gradients_that_a_closure_makes_are_waited_for() -> None:
    model = tiny_models.build("llama")
    trains, before = masks(model, draw(model), "freeze"), snapshot(model)
    plan = freeze(model, draw(model))
    optimizer = torch.optim.LBFGS(plan.parameters(), lr=1e-2, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    optimizer.step(closure=closure)
    assert_frozen_stayed(model, before, trains)


@every_optimizer
def test_an_optimiser_that_outlives_its_plan_is_refused(make_optimizer: Any) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    optimizer = make_optimizer(plan)
    step(model, optimizer)
    plan.close()
    before = snapshot(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="train under no plan in force"):
        optimizer.step()
    assert_equal(snapshot(model), before)
    other = freeze(model, draw(model, seed=4))
    loss_of(model).backward()
    with pytest.raises((RuntimeError, ValueError), match=r"train under no plan|another plan"):
        optimizer.step()
    other.close()


@every_optimizer
def test_a_parameter_that_the_model_has_no_longer_is_refused(make_optimizer: Any) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    optimizer = make_optimizer(plan)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.detach() * 2)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="other parameters in their place"):
        optimizer.step()


# --------------------------------------------------------------------------------- state that fits


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("source", ["dense", "other units"])
def test_state_of_other_shapes_is_refused(options: dict[str, bool], source: str) -> None:
    model = tiny_models.build("llama")
    if source == "dense":
        old = torch.optim.AdamW(model.parameters(), **options)
        step(model, old)
        loaded_model = model
    else:
        plan = freeze(model, draw(model, 0.1))
        old = torch.optim.AdamW(plan.parameters(), **options)
        step(model, old)
        loaded_model = tiny_models.build("llama")
    plan = freeze(loaded_model, draw(loaded_model, 0.3))
    new = torch.optim.AdamW(plan.parameters(), **options)
    new.load_state_dict(old.state_dict())
    before = snapshot(loaded_model)
    loss_of(loaded_model).backward()
    with pytest.raises(ValueError, match=r"exp_avg has shape .*was saved with other units"):
        new.step()
    assert_equal(snapshot(loaded_model), before)


@pytest.mark.parametrize("fused", [False, True])
def test_state_of_a_parameter_that_has_grown_is_refused(fused: bool) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    optimizer = torch.optim.AdamW(plan.parameters(), fused=fused)
    step(model, optimizer)
    model.resize_token_embeddings(140)  # the same parameter, with more rows
    optimizer.zero_grad()
    loss_of(model).backward()
    with pytest.raises(ValueError, match="exp_avg has shape"):
        optimizer.step()


def test_state_of_the_same_plan_and_factored_state_step() -> None:
    model = tiny_models.build("llama")
    trains, before = masks(model, draw(model), "freeze"), snapshot(model)
    plan = freeze(model, draw(model))
    kinds: dict[str, Any] = {
        "fused": lambda: torch.optim.AdamW(plan.parameters(), fused=True),
        "torch's Adafactor": lambda: torch.optim.Adafactor(plan.parameters()),
        "Adafactor": lambda: Adafactor(plan.parameters()),
        "ASGD": lambda: torch.optim.ASGD(plan.parameters()),
        "Rprop": lambda: torch.optim.Rprop(plan.parameters()),
        "Adamax": lambda: torch.optim.Adamax(plan.parameters()),
    }
    for kind in kinds.values():
        optimizer = kind()
        step(model, optimizer)
        again = kind()
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(model, again)
    assert_frozen_stayed(model, before, trains)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "sgd without momentum"])
def test_a_checkpoint_of_torch_goes_on_bit_for_bit_as_near_as_rounding(
    kind: str, options: dict[str, bool]
) -> None:
    model = tiny_models.build("llama")
    own: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    if kind.startswith("sgd"):
        own["momentum"] = 0.9 if kind == "sgd" else 0.0
    theirs, ours = (
        (torch.optim.AdamW, MaskedAdamW)
        if kind == "adamw"
        else (
            torch.optim.SGD,
            MaskedSGD,
        )
    )
    dense = copy.deepcopy(model)
    old = theirs(dense.parameters(), **own, **options)
    for seed in range(3):
        step(dense, old, seed)
    model.load_state_dict(dense.state_dict())
    new = ours(model.parameters(), lr=0.5)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert new.param_groups[0]["lr"] == 1e-2
    for seed in range(3):
        step(dense, old, 3 + seed)
        step(model, new, 3 + seed)
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert float(next(iter(new.state.values()), {"step": 3})["step"]) >= 3
    new.load_state_dict(copy.deepcopy(new.state_dict()))


def test_a_checkpoint_of_another_update_is_refused() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    for other, why in (
        (torch.optim.AdamW([p], amsgrad=True), "amsgrad is True"),
        (torch.optim.Adam([p]), "decoupled_weight_decay is False"),
        (torch.optim.Adagrad([p]), "state that MaskedAdamW does not know"),
    ):
        other.step()
        with pytest.raises(ValueError, match=why):
            MaskedAdamW([p]).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="does not know"):
        MaskedSGD([p]).load_state_dict(MaskedAdamW([p]).state_dict() | _stepped(p))


def _stepped(p: nn.Parameter) -> dict[str, Any]:
    optimizer = MaskedAdamW([p])
    optimizer.step()
    return optimizer.state_dict()
