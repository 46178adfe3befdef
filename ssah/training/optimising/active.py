"""Which plans are in force, and what is looked at before any optimiser steps.

Example: ``optimizer = AdamW(model.parameters())`` was made before ``freeze(model, units)``. It
holds weights that the plan has replaced by slices, so that its steps would train nothing of them.
Its first ``step`` under the plan raises, and says what to do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ssah.training.installing import Installed, follow
from ssah.training.optimising.optimizer import PlanAdamW, other_plan
from ssah.training.optimising.stepping import check_state, check_trains, lost

PLAN = "_ssah_plan"  # the attribute of a model that has its plan: a copy of the model copies it

# Plans that are in force; a closed plan leaves, a forgotten one vanishes.
ACTIVE: weakref.WeakSet[Installed] = weakref.WeakSet()

# Slices of closed plans that somebody holds still, by their id: they are in no model.
CLOSED: dict[int, weakref.ref[Tensor]] = {}

# Optimiser -> the state whose shapes were looked at (loading a checkpoint makes another one), and
# how many elements its parameters had.
_CHECKED: weakref.WeakKeyDictionary[Optimizer, tuple[Any, int]] = weakref.WeakKeyDictionary()


def check_unplanned(model: nn.Module) -> None:
    """Refuse, with ValueError, a model that has a plan in force."""
    if vars(model).get(PLAN) is not None:
        raise ValueError("model has an active plan already: close it first (plan.close())")


_watching = False


def watch_optimizers(plan: Installed) -> None:
    """Check the optimisers that step while a plan is in force, by what it has installed."""
    global _watching
    if not _watching:
        # Of the process, and never taken away: it costs nothing where no plan is in force.
        register_optimizer_step_pre_hook(check_step)
        _watching = True
    ACTIVE.add(plan)


def has_twin(plan: Installed) -> bool:
    """Whether a copy of its model has a copy of this plan in force."""
    return any(each is not plan and each.fingerprint == plan.fingerprint for each in ACTIVE)


def retire(slices: Iterable[Tensor]) -> None:
    """The slices of what a plan had split, of any shape, are in no model any more."""
    for parameter in slices:
        key = id(parameter)
        CLOSED[key] = weakref.ref(parameter, partial(_forget, key))


def _forget(key: int, _: Any) -> None:
    CLOSED.pop(key, None)  # the id may soon be another tensor's


def check_step(optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Before every step of any optimiser: does it train what a plan has, and something at all?

    A few look-ups for each tensor, and nothing that waits for a device.
    """
    marks = {group["plan"] for group in optimizer.param_groups if "plan" in group}
    if not (ACTIVE or CLOSED or marks):
        return
    for waiting in [plan for plan in ACTIVE if plan.waiting]:
        follow(waiting)  # a checkpoint's optimiser may be loaded, with a step, before anything runs
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    closed = len(held.keys() & CLOSED.keys())
    if closed:
        raise lost(closed, len(held))
    plans = [plan for plan in ACTIVE if _concerns(plan, optimizer, held, marks)]
    if not (plans or marks):
        return
    if not plans:
        raise lost(len(held), len(held))
    _check_held(optimizer, held, plans, marks)
    # A closure makes the gradients after this; an update in the backward pass has used them up.
    closure = len(args) > 1 or options.get("closure") is not None
    if not closure and not getattr(optimizer, "in_backward", False):
        check_trains(held.values())
    # Shapes change as state is loaded, or as a parameter is given other data (more tokens).
    size = sum(map(Tensor.numel, held.values()))
    state, at = _CHECKED.get(optimizer, (None, 0))
    if state is not optimizer.state or size != at:
        check_state(optimizer)
        _CHECKED[optimizer] = optimizer.state, size


def _check_held(
    optimizer: Optimizer, held: Mapping[int, Tensor], plans: list[Installed], marks: set[str]
) -> None:
    """Refuse parameters that train under no plan: all of a plan's own optimiser, else its slices.

    Args:
        held: id -> parameter of the optimiser.
        plans: those in force of which it holds something.
        marks: fingerprints of the plans that it was made for.
    """
    trained = set().union(*(plan.trained() for plan in plans))
    moved = set().union(*(plan.moved() for plan in plans))
    strange = held.keys() - trained if isinstance(optimizer, PlanAdamW) else set()
    strange |= held.keys() & moved
    if strange:
        # The slow way, for what was moved within the model, or was added to it since.
        models = [plan.model for plan in ACTIVE if plan.fingerprint in marks or plan in plans]
        strange -= {id(p) for model in models for p in model.parameters()}
    if strange:
        raise lost(len(strange), len(held))


def _concerns(
    plan: Installed, optimizer: Optimizer, held: Mapping[int, Tensor], marks: set[str]
) -> bool:
    """Whether the optimiser holds something that trains under ``plan``.

    Raises:
        RuntimeError, TypeError, ValueError: it holds what the plan has replaced, is not the plan's
            though the model is sharded, or has the state of another plan.
    """
    if not held.keys().isdisjoint(plan.taken()):
        stale = [name for key, name in plan.taken().items() if key in held]
        raise RuntimeError(
            f"the optimiser holds {len(stale)} parameters that the plan has replaced (first: "
            f"{stale[0]!r}), so that it would train nothing of them: make it after freeze() "
            "or train_only(), from plan.parameters() or with plan.optimizer()"
        )
    if held.keys().isdisjoint(plan.trained()):
        return False
    # Sharded weights are not split: only the plan's optimiser knows what of them trains.
    if plan.sharded and not isinstance(optimizer, PlanAdamW):
        raise TypeError(
            f"the optimiser is a {type(optimizer).__name__}, which would move frozen "
            "entries of a sharded model; it must be plan.optimizer()"
        )
    if marks - {plan.fingerprint}:
        raise other_plan(marks, {plan.fingerprint})
    _check_prepared(plan)
    plan.last_optimizer = weakref.ref(optimizer)
    return True


def _check_prepared(plan: Installed) -> None:
    """Refuse the first step of a trainer that would read slices where it expects weights."""
    name = plan.unprepared_for
    # A copy of the model has the same slices: as the reference it can be paired with it.
    if name is None or (name == "sync_ref_model" and has_twin(plan)):
        return
    raise RuntimeError(
        f"args.{name} is True, which reads whole weights, and the trainer was not prepared for the "
        "plan: call ssah.training.prepare_trainer(plan, trainer) before trainer.train()"
    )
