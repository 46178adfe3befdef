"""What was silently wrong under a plan: it is right now, or it is refused by name.

Each test is judged by a mask made from the modules alone (``plans.masks``) or by a model without a
plan, never by ``verify``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, draw, loss_of, make, masks, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ssah.training import freeze

MODELS = ["llama", "llama_bias", "gpt2", "phi3"]


def halved(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() * 0.5 for name, p in model.named_parameters()}


def half_of_what_trains(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """A model without a plan whose entries that would train are halved."""
    twin = copy.deepcopy(model)
    trains = masks(twin, draw(twin), mode)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.mul_(1 - 0.5 * trains[name])
    return twin


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 3) -> None:
    for seed in range(n):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


# ----------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("name", [*MODELS, "mixtral"])
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_functional_call_computes_with_what_it_lends_and_keeps_nothing(
    name: str, mode: str
) -> None:
    model = tiny_models.build(name)
    expected = half_of_what_trains(model, mode)(**batch()).logits
    make(model, mode)
    before, logits = snapshot(model), model(**batch()).logits
    lent = dict(halved(model).items())
    if mode == "train_only":
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        lent = {key: value for key, value in lent.items() if key in trained}
    found = functional_call(model, lent, (), batch()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_equal(snapshot(model), before)
    assert torch.equal(model(**batch()).logits, logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_gradients_of_torch_func_are_those_of_backward(name: str, mode: str) -> None:
    model = tiny_models.build(name)
    plan = make(model, mode)
    values = {key: p.detach() for key, p in plan.named_parameters()}

    def loss(lent: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, lent, (), batch()).logits[:, :-1]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), batch()["labels"][:, 1:].flatten()
        )

    found = torch.func.grad(loss)(values)
    loss_of(model).backward()
    for key, parameter in plan.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------- other memory, copies


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [
        ("freeze", False),
        ("train_only", False),
        # Seven seconds each; test_ordinary_model.py compiles a model with a plan as well.
        pytest.param("train_only", True, marks=pytest.mark.exhaustive),
        pytest.param("freeze", True, marks=pytest.mark.exhaustive),
    ],
)
def test_swapped_memory_is_what_the_model_computes_with(mode: str, compiled: bool) -> None:
    """As an average of weights is swapped in for an evaluation, and out again."""
    model = tiny_models.build("llama_bias")
    expected = half_of_what_trains(model, mode)(**batch()).logits
    plan = make(model, mode)
    run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    before, logits = snapshot(model), run(**batch()).logits
    backup = {key: p.data for key, p in plan.named_parameters()}
    for p in plan.parameters():
        p.data = p.data * 0.5
    torch.testing.assert_close(run(**batch()).logits, expected, rtol=1e-4, atol=1e-4)
    for key, p in plan.named_parameters():
        p.data = backup[key]
    torch.testing.assert_close(run(**batch()).logits, logits)
    assert_equal(snapshot(model), before)
    with torch.no_grad():
        for p in plan.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(run(**batch()).logits, expected, rtol=1e-4, atol=1e-4)
    plan.close()
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_swap_does_not_stop_training() -> None:
    model = tiny_models.build("llama")
    twin = copy.deepcopy(model)
    ends = []
    for each, swaps in ((model, True), (twin, False)):
        plan = freeze(each, draw(each))
        optimizer = plan.optimizer(lr=1e-2)
        for seed in range(3):
            if swaps:
                for p in plan.parameters():
                    p.data = p.data.clone()
            optimizer.zero_grad()
            loss_of(each, seed).backward()
            optimizer.step()
        plan.verify()
        plan.close()
        ends.append(snapshot(each))
    assert_equal(*ends)


def test_moving_a_model_is_no_swap() -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    model.double().float()
    tensors = [split for part in plan.masked.values() for split in part.split_tensors.values()]
    assert tensors
    assert not any(split.swapped for split in [*tensors])
    twin = copy.deepcopy(model)
    steps(model, plan.optimizer(lr=1e-2), 1)
    assert not torch.equal(model(**batch()).logits, twin(**batch()).logits)


@pytest.mark.parametrize("name", MODELS)
def test_writes_to_a_state_dict_are_warned_of(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """As timm's ModelEmaV2 and many a script average weights."""
    model = tiny_models.build(name)
    plan = freeze(model, draw(model))
    ema = copy.deepcopy(model)
    start = snapshot(ema)
    steps(model, plan.optimizer(lr=1e-2))
    loaded = {key: value.mul_(1) for key, value in ema.state_dict().items()}
    ema.load_state_dict(loaded)  # what was written to comes back: no word
    assert not [each for each in recwarn if "of a state_dict" in str(each.message)]
    with torch.no_grad():
        for average, value in zip(
            ema.state_dict().values(), model.state_dict().values(), strict=True
        ):
            average.copy_(0.9 * average + 0.1 * value)
    with pytest.warns(UserWarning, match=r"of a state_dict\(\) was written to.*AveragedModel"):
        ema(**batch())
    after = snapshot(ema)
    split = [
        f"{owner}.{leaf}" for owner, part in plan.masked.items() for leaf in part.split_tensors
    ]
    assert split
    assert all(torch.equal(after[key], start[key]) for key in split)


def test_an_average_by_parameters_is_that_of_a_model_without_a_plan() -> None:
    model = tiny_models.build("llama")
    dense = copy.deepcopy(model)
    trains = masks(dense, draw(dense), "freeze")
    plan = freeze(model, draw(model))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    expected = {key: p.detach().clone() for key, p in dense.named_parameters()}
    optimizer = plan.optimizer(lr=1e-2)
    for n in range(1, 4):
        steps(model, optimizer, 1)
        averaged.update_parameters(model)
        if n == 1:
            expected = {key: v.detach().clone() for key, v in plan.original_named_parameters()}
        else:
            for key, value in plan.original_named_parameters():
                expected[key] += (value.detach() - expected[key]) / n
    found = averaged.module.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
        still = (trains[key] == 0).expand_as(value)
        assert torch.equal(found[key][still], dense.get_parameter(key).detach()[still]), key
