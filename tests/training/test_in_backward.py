"""Updates inside ``backward()``: the bits of the ordinary optimiser, and no gradient left alive.

The ordinary optimiser, whose own tests judge it by dense training in float64, is what results are
compared with; norms are taken from gradients of a second model, in float64.
"""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_models
import torch
from plans import assert_equal, draw, loss_of, make, snapshot
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ssah.training import UpdatePlan, freeze, plan_of
from ssah_kernels.optim import MaskedAdamW

LR = 1e-2


def run(
    plan: UpdatePlan, optimizer: torch.optim.Optimizer, steps: range = range(3)
) -> dict[str, Tensor]:
    """The model's state after some steps, with a rate that falls."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for seed in steps:
        optimizer.zero_grad()
        loss_of(plan.model, seed).backward()
        optimizer.step()
        schedule.step()
    return snapshot(plan.model)


def twins(family: str = "llama", mode: str = "freeze", **cast: Any) -> list[UpdatePlan]:
    models = [tiny_models.build(family).to(**cast) for _ in range(2)]
    return [make(model, mode, draw(model)) for model in models]


def alive(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is not None]


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama_tied", "freeze", {}),
    ("llama_bias", "train_only", {"track_importance": True, "betas": (0.8, 0.95)}),
    ("gpt2", "freeze", {"maximize": True}),
    ("mixtral", "train_only", {}),
]


@pytest.mark.parametrize(("family", "mode", "options"), CASES)
def test_the_bits_are_those_of_the_ordinary_optimiser(
    family: str, mode: str, options: dict[str, Any]
) -> None:
    ordinary, own = twins(family, mode)
    reference = ordinary.optimizer(LR, weight_decay=0.1, **options)
    wanted = run(ordinary, reference)
    optimizer = own.optimizer(LR, weight_decay=0.1, in_backward=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # schedules warn where they see no step before theirs
        assert_equal(run(own, optimizer), wanted)
    own.verify()
    assert alive(own.model) == []
    if "track_importance" in options:
        for name, value in ordinary.importance().signed.items():
            assert torch.equal(own.importance().signed[name], value), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_the_bits_are_those_of_the_ordinary_optimiser_in_every_family(
    family: str, mode: str
) -> None:
    ordinary, own = twins(family, mode)
    wanted = run(ordinary, ordinary.optimizer(LR))
    assert_equal(run(own, own.optimizer(LR, in_backward=True)), wanted)


@pytest.mark.parametrize("rounding", ["nearest", "remainder", "stochastic"])
def test_bfloat16_has_the_bits_of_a_group_for_each_parameter(rounding: str) -> None:
    ordinary, own = twins(dtype=torch.bfloat16)
    groups = [
        {**group, "params": [p], "indices": [index], "dims": [dim]}
        for group in ordinary.param_groups(0.1)
        for p, index, dim in zip(group["params"], group["indices"], group["dims"], strict=True)
    ]
    wanted = run(ordinary, MaskedAdamW(groups, lr=LR, rounding=rounding))
    optimizer = own.optimizer(LR, weight_decay=0.1, rounding=rounding, in_backward=True)
    assert_equal(run(own, optimizer), wanted)


def test_one_gradient_at_most_is_alive() -> None:
    (plan, _) = twins()
    optimizer = plan.optimizer(LR, in_backward=True)
    most = []
    for p in plan.parameters():
        # These run after the optimiser's: of what has arrived nothing may be left.
        p.register_post_accumulate_grad_hook(lambda _: most.append(len(alive(plan.model))))
    loss_of(plan.model).backward()
    assert len(most) == len(list(plan.parameters()))
    assert max(most) == 0
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


# --------------------------------------------------------------------------------- what is refused


def refused(plan: UpdatePlan, match: str, act: Any, kind: type[Exception] = RuntimeError) -> None:
    """``act`` raises, changes nothing, and leaves no gradient."""
    before = snapshot(plan.model)
    with pytest.raises(kind, match=match):
        act()
    assert_equal(snapshot(plan.model), before)
    assert alive(plan.model) == []


def test_gradients_that_are_accumulated_are_refused() -> None:
    (plan, _) = twins()
    optimizer = plan.optimizer(LR, in_backward=True)
    loss_of(plan.model).backward()
    second = "has a second gradient since the last optimizer.step"
    refused(plan, second, loss_of(plan.model, 1).backward)
    optimizer.step()
    loss = loss_of(plan.model, 2)
    loss.backward(retain_graph=True)  # by itself it keeps memory, and nothing more
    refused(plan, f"{second}|modified by an inplace operation", loss.backward)


def test_a_graph_of_gradients_is_refused() -> None:
    model = tiny_models.build("llama")
    # Nothing is split: of what is, second derivatives are refused before.
    plan = freeze(model, keep=["*embed*"])
    optimizer = plan.optimizer(LR, in_backward=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that such graphs are held for long
        refused(plan, "create_graph=True", lambda: loss_of(model).backward(create_graph=True))
    assert not optimizer.state


def test_a_step_without_an_update_is_refused() -> None:
    (plan, other) = twins()
    optimizer = plan.optimizer(LR, in_backward=True)
    refused(plan, "none of the optimiser's .* has a gradient", optimizer.step)
    loss_of(other.model).backward()
    refused(plan, "another model than the plan's", optimizer.step)
    run(plan, optimizer)
    refused(plan, "none of the optimiser's .* has a gradient", optimizer.step)
    for p in plan.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="were put there by hand"):
        optimizer.step()


def test_a_closed_plan_is_an_ordinary_model_again() -> None:
    (plan, _) = twins()
    optimizer = plan.optimizer(LR, in_backward=True)
    run(plan, optimizer)
    plan.close()
    loss_of(plan.model).backward()
    assert alive(plan.model) == [name for name, _ in plan.model.named_parameters()]
    with pytest.raises(RuntimeError, match="train under no plan in force"):
        optimizer.step()


def test_clipping_inside_the_update_is_refused() -> None:
    (plan, _) = twins()
    ordinary = plan.optimizer(LR)
    with pytest.raises(ValueError, match=r"max_norm is 1\.0.*clipped_backward"):
        plan.optimizer(LR, max_norm=1.0, in_backward=True)
    run(plan, ordinary)  # no hook of it is there
    assert alive(plan.model)


def test_a_scaler_of_gradients_is_refused() -> None:
    (plan, _) = twins()
    optimizer = plan.optimizer(LR, in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(plan.model)).backward()
    refused(plan, "GradScaler steps with .*in_backward=True", lambda: scaler.step(optimizer))


def test_the_original_values_are_not_updated() -> None:
    (plan, _) = twins()
    plan.keep_originals()
    optimizer = plan.optimizer(LR, in_backward=True)
    run(plan, optimizer)
    loss = loss_of(plan.model)
    with plan.disabled():
        refused(plan, r"inside plan\.disabled\(\)", loss.backward)


# ------------------------------------------------------------------------------------- whose it is


def test_the_last_optimiser_that_was_made_updates() -> None:
    (plan, other) = twins()
    first = plan.optimizer(LR, in_backward=True)
    second = plan.optimizer(LR, in_backward=True)
    assert_equal(run(plan, second), run(other, other.optimizer(LR)))
    refused(plan, "none of the optimiser's", first.step)
    ordinary = plan.optimizer(LR)
    loss_of(plan.model).backward()
    assert len(alive(plan.model)) == len(list(plan.parameters()))
    ordinary.step()
    ordinary.zero_grad()
    third = plan.optimizer(LR, in_backward=True)
    del first, second, third
    gc.collect()
    loss_of(plan.model).backward()  # nobody updates: gradients stay, as in any model
    assert len(alive(plan.model)) == len(list(plan.parameters()))


def test_a_copy_of_the_model_is_not_updated() -> None:
    (plan, _) = twins()
    optimizer = plan.optimizer(LR, in_backward=True)
    twin = copy.deepcopy(plan.model)
    before = snapshot(twin)
    loss_of(twin).backward()
    assert_equal(snapshot(twin), before)
    own = plan_of(twin)
    assert own is not None
    assert len(alive(twin)) == len(list(own.parameters()))
    assert_equal(run(own, own.optimizer(LR, in_backward=True)), run(plan, optimizer))


def test_state_goes_on_in_either_kind_of_optimiser() -> None:
    (ordinary, own) = twins()
    first = ordinary.optimizer(LR)
    run(ordinary, first, range(2))
    own.model.load_state_dict(ordinary.model.state_dict())
    second = own.optimizer(1.0, in_backward=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_equal(run(own, second, range(2, 4)), run(ordinary, first, range(2, 4)))
    back = ordinary.optimizer(1.0)
    back.load_state_dict(copy.deepcopy(second.state_dict()))
    assert_equal(run(ordinary, back, range(4, 6)), run(own, second, range(4, 6)))


def test_a_group_that_is_added_is_updated() -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model), keep=["*norm*"])
    optimizer = plan.optimizer(LR, in_backward=True)
    norm = model.model.norm.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [norm], "lr": 0.5, "plan": plan.fingerprint})
    before = norm.detach().clone()
    loss_of(model).backward()
    optimizer.step()
    # Without decay, the first step of Adam is lr times the sign of the gradient.
    assert torch.allclose((norm - before * (1 - 0.5 * 0.01)).abs(), torch.tensor(0.5), rtol=1e-3)


# ---------------------------------------------------------------------------------- other passes


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_closure_and_checkpointed_activations_give_the_same_bits(reentrant: bool) -> None:
    (ordinary, own) = twins("llama_tied")
    wanted = run(ordinary, ordinary.optimizer(LR), range(2))
    optimizer = own.optimizer(LR, in_backward=True)
    own.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    own.model.train()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for seed in range(2):

        def closure(seed: int = seed) -> Tensor:
            loss = loss_of(own.model, seed)
            loss.backward()
            return loss.detach()

        assert float(optimizer.step(closure)) > 0
        schedule.step()
    assert_equal(snapshot(own.model), wanted)


def with_dropout(family: str = "gpt2") -> PreTrainedModel:
    model = tiny_models.build(family).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    return model


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_by_two_passes_is_exact(max_norm: float) -> None:
    models = [with_dropout() for _ in range(2)]
    dense, own = (freeze(model, draw(model)) for model in models)
    adamw = dense.optimizer(LR)
    optimizer = own.optimizer(LR, in_backward=True)
    for seed in range(2):
        torch.manual_seed(seed)
        adamw.zero_grad()
        loss_of(dense.model, seed).backward()
        squares = [float(g) ** 2 for p in dense.parameters() for g in p.grad.flatten()]  # type: ignore[union-attr]
        norm = sum(squares) ** 0.5
        for p in dense.parameters():
            p.grad *= min(1.0, max_norm / (norm + 1e-6))
        adamw.step()
        torch.manual_seed(seed)
        found = optimizer.clipped_backward(loss_of(own.model, seed), max_norm)
        assert float(found) == pytest.approx(norm, rel=1e-6)
        assert alive(own.model) == []
        optimizer.step()
    wanted = snapshot(dense.model)
    for name, value in snapshot(own.model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_clipping_by_nothing_is_refused() -> None:
    (plan, other) = twins()
    optimizer = plan.optimizer(LR, in_backward=True)
    loss = loss_of(plan.model)
    refused(plan, "max_norm is 0", lambda: optimizer.clipped_backward(loss, 0), ValueError)
    elsewhere = loss_of(other.model)
    refused(plan, "another model", lambda: optimizer.clipped_backward(elsewhere, 1.0))


# ---------------------------------------------------------------------------------- several ranks


def on_two_ranks(rank: int, n: int, folder: Path) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    optimizer = plan.optimizer(LR, in_backward=True)
    parallel = DistributedDataParallel(model)
    refused(
        plan,
        "inside DistributedDataParallel",
        lambda: ranks.train(parallel, optimizer, range(1), rank, n),
    )
    whole = [tiny_models.build("mixtral") for _ in range(2)]
    units = draw(whole[0])
    (own, ordinary) = (freeze(ranks.shard(each, n), units) for each in whole)
    optimizer = own.optimizer(LR, in_backward=True)
    ranks.train(own.model, optimizer, range(2), rank, n)
    assert alive(own.model) == []
    ranks.train(ordinary.model, ordinary.optimizer(LR), range(2), rank, n)
    own.verify()
    wanted = dict(ordinary.model.named_parameters())
    for name, p in own.model.named_parameters():
        assert torch.equal(p.to_local(), wanted[name].to_local()), name  # type: ignore[operator]
    loss = ranks.loss_on(own.model, ranks.rows_of(2, rank, n))
    with pytest.raises(ValueError, match="model is sharded"):
        optimizer.clipped_backward(loss, 1.0)


def test_ranks_are_refused_or_train_as_with_the_ordinary_optimiser(tmp_path: Path) -> None:
    ranks.start(on_two_ranks, 2, tmp_path)
