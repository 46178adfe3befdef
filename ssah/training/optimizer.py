"""The optimiser of a plan: its groups, its checks, and the importance it accumulates."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ssah_kernels.optim import MaskedAdamW
from ssah_kernels.sharded import Dim, is_sharded

if TYPE_CHECKING:
    from ssah.training.plan import UpdatePlan

__all__ = ["PlanAdamW", "UnitImportance", "watch_optimizers"]

# Plans that are in force; a closed plan leaves, a forgotten one vanishes.
ACTIVE: weakref.WeakSet[UpdatePlan] = weakref.WeakSet()


class PlanAdamW(MaskedAdamW):
    """:class:`~ssah_kernels.optim.MaskedAdamW` over the parameters of a plan.

    Its groups carry the plan's fingerprint, so that a checkpoint of another plan is refused.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume. Refuses, with ValueError, the state of another plan."""
        own = {group.get("plan") for group in self.param_groups}
        theirs = {group.get("plan") for group in state_dict["param_groups"]}
        if own != theirs:
            raise ValueError(_other_plan(theirs, own))
        super().load_state_dict(state_dict)


def _other_plan(theirs: Iterable[Any], own: Iterable[Any]) -> str:
    saved, current = (", ".join(sorted(str(f)[:12] for f in each)) for each in (theirs, own))
    return (
        f"the optimiser state was saved under another plan (fingerprint {saved}, this one is "
        f"{current}): resume with the same model, the same units and the same also=, or start "
        "a new optimiser"
    )


def _check_step(optimizer: Optimizer, *_: Any) -> None:
    """Before every step of any optimiser: does it hold what a plan has taken away?"""
    _check_own_plan(optimizer)
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
        if any(id(p) in held for p in plan.parameters()):
            if plan.ranks is not None and not isinstance(optimizer, PlanAdamW):
                raise TypeError(
                    f"the optimiser is a {type(optimizer).__name__}, which would move frozen "
                    "entries of a sharded model; it must be plan.optimizer()"
                )
            marks = {group["plan"] for group in optimizer.param_groups if "plan" in group}
            if marks - {plan.fingerprint}:
                raise ValueError(_other_plan(marks, [plan.fingerprint]))
            plan.last_optimizer = weakref.ref(optimizer)


def _check_own_plan(optimizer: Optimizer) -> None:
    """A plan's own optimiser steps only while what it holds is what trains under that plan."""
    marks = {group["plan"] for group in optimizer.param_groups if "plan" in group}
    if not marks or not isinstance(optimizer, PlanAdamW):
        return
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


_watching = False


def watch_optimizers(plan: UpdatePlan) -> None:
    """Check the optimisers that step while ``plan`` is in force."""
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_check_step)
        _watching = True
    ACTIVE.add(plan)


def param_groups(plan: UpdatePlan, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of what trains, with and without decay, with the dimension that units run along."""
    # Slices are unit-major; of a parameter that trains whole, units may run along dimension 1.
    dims: dict[int, Dim] = {
        id(p): plan.entries[name].dims[0]
        for name, p, _, _ in plan.trained_slices()
        if name.rpartition(".")[0] not in plan.masked and p.dim() > 1
    }
    # A sharded parameter is not split: the optimiser selects what trains.
    indices = {}
    n_dims = {id(p): p.dim() for p in plan.parameters()}
    for name, p, index, size in plan.trained_slices():
        entries = plan.entries[name]
        if is_sharded(p) and len(index) < size:
            indices[id(p)], dims[id(p)] = index, entries.along
            n_dims[id(p)] -= entries.experts  # experts' biases are biases
    groups = []
    for decays in (True, False):
        parameters = [p for p in plan.parameters() if (n_dims[id(p)] > 1) == decays]
        if parameters:
            groups.append(
                {
                    "params": parameters,
                    "weight_decay": weight_decay if decays else 0.0,
                    "indices": [indices.get(id(p)) for p in parameters],
                    "dims": [dims.get(id(p), 0) for p in parameters],
                    "plan": plan.fingerprint,
                }
            )
    return groups


@dataclass(frozen=True, eq=False)
class UnitImportance:
    """Importance of the trained units from the gradients of their own weights.

    Attributes:
        signed: B's name -> float64 ``[n_units]``, the sum over steps and over the unit's weights
            of p * g (before the update, gradients before clipping); 0 where nothing trains.
        squared: likewise of (p * g)^2.
    """

    signed: dict[str, Tensor]
    squared: dict[str, Tensor]


def unit_importance(plan: UpdatePlan, optimizer: Any) -> UnitImportance:
    """Collect what ``optimizer`` accumulated, unit by unit."""
    tracked = getattr(optimizer, "optimizer", optimizer).importance()
    experts = {
        owned.param
        for module in plan.modules.values()
        for owned in (*module.inputs, module.output)
        if owned.expert is not None
    }
    by_entry: dict[str, list[Tensor]] = {}
    for name, param, index, size in plan.trained_slices():
        if param in tracked and name in experts and name.rpartition(".")[0] not in plan.masked:
            raise RuntimeError(
                f"{name!r} trains whole, as one parameter of three dimensions: the importance of "
                "its units is not known"
            )
        if param in tracked:
            sums = by_entry.setdefault(
                name, [torch.zeros(size, dtype=torch.float64) for _ in range(2)]
            )
            for total, value in zip(sums, tracked[param], strict=True):
                total[index] = value.cpu()
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, module in plan.modules.items():
        for i, result in enumerate(results):
            result[name] = torch.zeros(module.n_units, dtype=torch.float64)
            for owned in (*module.inputs, module.output):
                if owned.param in by_entry:
                    result[name] += by_entry[owned.param][i][owned.entries]
    return UnitImportance(*results)
