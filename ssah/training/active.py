"""Which plans are in force, and what is looked at before any optimiser steps.

Example: ``optimizer = AdamW(model.parameters())`` was made before ``freeze(model, units)``. It
holds weights that the plan has replaced by slices, so that its steps would train nothing of them.
Its first ``step`` under the plan raises, and says what to do.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ssah.training.installed import Installed
from ssah.training.optimizer import PlanAdamW, other_plan

__all__ = ["ACTIVE", "PLAN", "check_unplanned", "watch_optimizers"]

PLAN = "_ssah_plan"  # the attribute of a model that has its plan: a copy of the model copies it

# Plans that are in force; a closed plan leaves, a forgotten one vanishes.
ACTIVE: weakref.WeakSet[Installed] = weakref.WeakSet()


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
        register_optimizer_step_pre_hook(_check_step)
        _watching = True
    ACTIVE.add(plan)


def _check_step(optimizer: Optimizer, *_: Any) -> None:
    """Before every step of any optimiser: does it hold what a plan has taken away?"""
    marks = {group["plan"] for group in optimizer.param_groups if "plan" in group}
    if marks and isinstance(optimizer, PlanAdamW):
        _check_own_plan(optimizer, marks)
    if not ACTIVE:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for plan in list(ACTIVE):
        stale = [name for name, p in plan.replaced() if id(p) in held]
        if stale:
            raise RuntimeError(
                f"the optimiser holds {len(stale)} parameters that the plan has replaced (first: "
                f"{stale[0]!r}), so that it would train nothing of them: make it after freeze() "
                "or train_only(), from plan.parameters() or with plan.optimizer()"
            )
        if any(id(p) in held for _, p in plan.parameters()):
            # Sharded weights are not split: only the plan's optimiser knows what of them trains.
            if plan.sharded and not isinstance(optimizer, PlanAdamW):
                raise TypeError(
                    f"the optimiser is a {type(optimizer).__name__}, which would move frozen "
                    "entries of a sharded model; it must be plan.optimizer()"
                )
            if marks - {plan.fingerprint}:
                raise other_plan(marks, {plan.fingerprint})
            plan.last_optimizer = weakref.ref(optimizer)


def _check_own_plan(optimizer: PlanAdamW, marks: set[str]) -> None:
    """A plan's own optimiser steps only while what it holds is what trains under that plan.

    Args:
        optimizer: about to step.
        marks: fingerprints of the plans that it was made for.
    """
    # Of the model, not of the plan alone: what is frozen is in no optimiser of a plan, and asking
    # each parameter whether it trains would take milliseconds a step.
    models = [plan.model for plan in ACTIVE if plan.fingerprint in marks]
    of_plans = {id(p) for model in models for p in model.parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    lost = sum(id(p) not in of_plans for p in params)
    if lost:
        raise RuntimeError(
            f"{lost} of the optimiser's {len(params)} parameters train under no plan in force: "
            "its plan was closed, or made for another model. Make a plan, and the optimiser with "
            "plan.optimizer(), before the next step"
        )
