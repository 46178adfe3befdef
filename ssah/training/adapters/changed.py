"""What a change is: pairs of weights before and after, one parameter at a time.

A change is what a plan trained, an update in a folder, a tuned model, or units, heads or layers
that are ablated. Each comes as (name, weight before, weight after), of the parameters in which they
may differ.
"""

from __future__ import annotations

import os
from collections.abc import Generator

from torch import Tensor, nn

from ssah.interventions import ablate, check_not_ablated
from ssah.models import check_plain, check_whole, load_weights
from ssah.selections import Selection, output_parts
from ssah.training.optimising import check_unplanned
from ssah.training.plan import UpdatePlan, plan_of
from ssah.training.updates import is_update, placed_update, read_update
from ssah.units import UnitSet, check_units

# Name, weight before, weight after, [...] each. To be closed: meanwhile the model may be changed.
Weights = Generator[tuple[str, Tensor, Tensor], None, None]
Change = UpdatePlan | UnitSet | Selection | nn.Module | str | os.PathLike[str]


def checked_base(change: Change, base: nn.Module | str | os.PathLike[str] | None) -> nn.Module:
    """The model before, in memory: a plan's own, or ``base``.

    Raises:
        TypeError, ValueError: ``base`` is missing, or given beside a plan, or cannot be changed.
        ModelError: it cannot be loaded.
    """
    if isinstance(change, UpdatePlan):
        if base is not None:
            raise TypeError(
                "base is given beside a plan, which has the weights before: leave base= out, or "
                "pass the plan's model (plan.model) as the change"
            )
        return change.model
    if base is None:
        raise TypeError(
            f"base is None, must be the model before (a model, folder or hub id) where the change "
            f"is a {type(change).__name__}"
        )
    model = check_whole(base if isinstance(base, nn.Module) else load_weights(os.fspath(base)))
    check_unplanned(model)
    check_not_ablated(model, "to be the base of an adapter")
    check_plain(model, "to be the base of an adapter")
    away = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if away is not None:
        raise ValueError(
            f"{away!r} of the base model is not in memory (offloaded), must be: load the model "
            "whole, device_map='cpu' for instance"
        )
    return model


def changed_weights(change: Change, base: nn.Module) -> Weights:
    """Name, weight before and weight after, ``[...]`` each, of what ``change`` may have changed.

    Args:
        change: a plan, units or a selection to ablate, a tuned model, or the folder (or hub id) of
            an update or of a tuned model.
        base: the model before, as of :func:`checked_base`.

    Raises:
        TypeError, ValueError: they do not belong together; see `load_update` and `ablate`.
    """
    if isinstance(change, UpdatePlan):
        return _trained(change)
    if isinstance(change, UnitSet | Selection):
        return _ablated(base, change)
    if isinstance(change, nn.Module):
        return _tuned(base, change)
    if not isinstance(change, str | os.PathLike):
        raise TypeError(
            f"change is a {type(change).__name__}, must be a plan, a UnitSet, a model, a folder or "
            "a Selection"
        )
    name = os.fspath(change)
    if is_update(name):
        placed = placed_update(base, read_update(name))
        return ((each.name, each.parameter.detach(), each.written()) for each in placed)
    return _tuned(base, load_weights(name))


def _trained(plan: UpdatePlan) -> Weights:
    names = {name for name, *_ in plan.trained_slices()}
    # Copies, since those of a parameter that trains whole are the model's own.
    tuned = {n: v.detach().clone() for n, v in plan.original_named_parameters() if n in names}
    with plan.disabled():
        for name, before in plan.original_named_parameters():
            if name in names:
                yield name, before.detach(), tuned[name]


def _ablated(base: nn.Module, what: UnitSet | Selection) -> Weights:
    if isinstance(what, Selection):
        units, beside = output_parts(what, base)
        names = dict.fromkeys(beside)
    else:
        units, names = what, {}
    modules = check_units(base, units)
    names |= dict.fromkeys(modules[name].output.param for name in units if len(units[name]))
    # Copies, as the model's own are zero inside the block.
    before = {name: base.get_parameter(name).detach().clone() for name in names}
    with ablate(base, what):
        for name, weight in before.items():
            yield name, weight, base.get_parameter(name).detach()


def _tuned(base: nn.Module, model: nn.Module) -> Weights:
    tuned = check_whole(model)
    plan = plan_of(tuned)
    if plan is None:
        check_not_ablated(tuned, "to be exported; pass the units as the change instead")
        check_plain(tuned, "to be compared with its base")
    # Under a plan the names of what is split are others.
    every = tuned.named_parameters() if plan is None else plan.original_named_parameters()
    own = dict(base.named_parameters())
    for name, after in every:
        before = own.pop(name, None)
        if before is None or (before.shape, before.dtype) != (after.shape, after.dtype):
            had = "nothing" if before is None else f"{before.dtype} {list(before.shape)}"
            raise ValueError(
                f"parameter {name!r} is {after.dtype} {list(after.shape)} in the tuned model and "
                f"{had} in base: they must be of one architecture, dtype and vocabulary"
            )
        yield name, before.detach(), after.detach().to(before.device)
    if own:
        raise ValueError(f"base has {next(iter(own))!r}, which the tuned model lacks")
