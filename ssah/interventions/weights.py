"""Changes of weights: units or other entries that are zeroed, scaled or replaced for a while.

Unit j puts out h_j B[:, j]. So to change what it puts out is to change column j of B:

    Zero      B[:, j] = 0                    a unit of column (3, -1) puts out nothing
    Scale     B[:, j] = factor * B[:, j]     with factor 2, its column is (6, -2)
    Replace   B[:, j] = other[:, j]          what another checkpoint has there

A packed weight cannot hold every column. One that is computed anew as the model runs, or that is
fetched then, would lose it. There a hook multiplies channel j of what enters B, which is the same
function: h_j (factor B[:, j]) = (factor h_j) B[:, j].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssah.interventions.columns import MaskedEntries, Part, checked_modules, columns_of
from ssah.models import is_offloaded, nonfinite, scheme_of
from ssah.selections import Selection, output_parts
from ssah.settings import check_number
from ssah.units import BitMask, DepthTwoModule, UnitSet, check_parameters, is_computed

# What is changed: units, the entries of a selection, or whole parameters by their names.
Changed = UnitSet | Selection | str | Sequence[str]


@dataclass(frozen=True, eq=False)
class Zero:
    """The columns of B of these units, or other entries, are zero.

    Args:
        selection: a `UnitSet`, a `Selection`, or names in ``model.named_parameters()``.
    """

    selection: Changed


@dataclass(frozen=True, eq=False)
class Scale:
    """The columns of B of these units, or other entries, are multiplied by a number.

    Args:
        selection: a `UnitSet`, a `Selection`, or names in ``model.named_parameters()``.
        factor: the number; 0 makes zeros, 1 changes nothing, -1 turns the sign.

    Raises:
        ValueError: ``factor`` is NaN or infinite.
    """

    selection: Changed
    factor: float

    def __post_init__(self) -> None:
        check_number("factor", self.factor)


@dataclass(frozen=True, eq=False)
class Replace:
    """The columns of B of these units, or other entries, are those of other weights.

    Args:
        selection: a `UnitSet`, a `Selection`, or names in ``model.named_parameters()``.
        values: parameter's name -> the whole other parameter, of the shape that the model's own
            has (``[out, units]`` for a Linear B): for instance ``other.state_dict()``.
    """

    selection: Changed
    values: Mapping[str, Tensor]


WeightChange = Zero | Scale | Replace


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels of what enters a B whose weight cannot be written.

    Attributes:
        down: B.
        index: int64 ``[n]``, which channels.
        factor: what they are multiplied by.
    """

    down: nn.Module
    index: Tensor
    factor: float

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of B, which is given ``[..., units]``."""
        x: Tensor = args[0]
        index = self.index.to(x.device)
        if self.factor == 0:  # by filling: 0 times infinity would be NaN
            return (x.index_fill(-1, index, 0), *args[1:])
        chosen = x.index_select(-1, index) * self.factor  # [..., n]
        return (x.index_copy(-1, index, chosen), *args[1:])


@dataclass(frozen=True, eq=False)
class Writing:
    """What one change writes.

    Attributes:
        parts: weights, each with what sets it to its new values.
        channels: of what enters those B that cannot be written.
    """

    parts: list[tuple[Part, Callable[[], None]]]
    channels: list[Channels]


def plan_weights(model: nn.Module, change: WeightChange) -> Writing:
    """What ``change`` writes; nothing is written yet.

    Raises:
        TypeError: the selection is neither units nor names.
        ValueError: it does not fit the model, a weight cannot be written, or ``values`` lacks a
            parameter or has another shape there.
        FloatingPointError: ``values`` are NaN or infinite.
    """
    selection = change.selection
    if isinstance(selection, UnitSet):
        return plan_units(model, selection, change)
    if isinstance(selection, Selection):
        return _plan_entries(model, selection.of(model), change)
    # A string is a sequence too, of names of one letter each.
    names = [selection] if isinstance(selection, str) else selection
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"selection is {type(selection).__name__}; it must be a UnitSet, for instance "
            "groups['scu'], a Selection (ssah.select), or names of parameters, as in "
            "model.named_parameters()"
        )
    # With both names of a tied parameter: either may be given.
    known = dict(model.named_parameters(remove_duplicate=False))
    once: dict[int, str] = {}
    for name in names:
        if name not in known:
            raise ValueError(
                f"selection has {name!r}, which is no parameter of the model "
                f"{type(model).__name__}; it must be a name in model.named_parameters()"
            )
        once.setdefault(id(known[name]), name)  # tied ones would be scaled twice
    whole = BitMask.of(torch.ones([], dtype=torch.bool))
    return _plan_masks(model, dict.fromkeys(once.values(), whole), change)


def plan_ablation(model: nn.Module, what: UnitSet | Selection) -> list[Writing]:
    """What ablating units or a selection writes; nothing is written yet. Errors as `plan_weights`.

    Of a selection what its units and heads put out is zero: their columns of B and of O. What feeds
    these is left as it is, and every other entry is zero.
    """
    if not isinstance(what, Selection):
        return [plan_units(model, what, Zero(what))]
    units, beside = output_parts(what, model)
    return [plan_units(model, units, Zero(units)), _plan_entries(model, beside, Zero(beside))]


def _plan_entries(model: nn.Module, selection: Selection, change: WeightChange) -> Writing:
    """As `plan_weights`, of all entries of a selection."""
    return _plan_masks(model, {name: selection[name] for name in selection}, change)


def _plan_masks(model: nn.Module, masks: Mapping[str, BitMask], change: WeightChange) -> Writing:
    """The same of masks by parameter, which broadcast over it."""
    parts = []
    for name, mask in masks.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        weight: Tensor = getattr(owner, name.rpartition(".")[2])
        if weight.is_meta or not weight.is_floating_point() or scheme_of(owner) is not None:
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device}, or packed; it must be a plain "
                "floating-point weight in memory (dequantize the model, and load it whole)"
            )
        part = MaskedEntries(name, owner, mask)
        parts.append((part, _setter(part, change)))
    return Writing([*parts], [])


def plan_units(model: nn.Module, units: UnitSet, change: WeightChange) -> Writing:
    """As `plan_weights`, of units alone; errors as of it."""
    modules = checked_modules(model, units)
    experts = {module.output.param for module in modules.values() if module.routed is not None}
    check_parameters(model, experts, "to be changed")  # no hook sees what enters an expert's B
    plain, channels = {}, []
    for name, module in modules.items():
        if len(units[name]) == 0:
            continue
        if not _must_be_hooked(model, module):
            plain[name] = module
        elif isinstance(change, Replace):
            raise ValueError(
                f"{module.output.param} is packed, computed as the model runs, or not in memory; "
                "it must be a plain weight in memory to be replaced (Zero and Scale work)"
            )
        else:
            factor = change.factor if isinstance(change, Scale) else 0.0
            channels.append(Channels(module.down, units[name], factor))
    columns = columns_of(units, plain).values()
    return Writing([(part, _setter(part, change)) for part in columns], channels)


def _must_be_hooked(model: nn.Module, module: DepthTwoModule) -> bool:
    """Whether B's weight cannot hold a change."""
    if scheme_of(module.down) is not None:
        return True
    # What enters an expert's B no hook sees: `check_parameters` has refused a computed one.
    return module.routed is None and (
        is_computed(model, module.output.param) or is_offloaded(module.down)
    )


def _setter(part: Part, change: WeightChange) -> Callable[[], None]:
    """What sets ``part`` to its new values, which are checked here."""
    if isinstance(change, Replace):
        values = _values(part, change.values)
        return lambda: part.write(values)
    if isinstance(change, Scale):
        # Read again as it is written: an earlier change of the same block may have come before.
        return lambda: part.write(part.read() * change.factor)
    return part.zero


def _values(part: Part, values: Mapping[str, Tensor]) -> Tensor:
    """What ``part`` is replaced by: ``[...]`` as `Part.read` gives it."""
    if part.param not in values:
        raise ValueError(
            f"values lacks {part.param}; it must have every parameter that is replaced, as "
            "other.state_dict() has"
        )
    given = values[part.param].detach()
    own = getattr(part.owner, part.param.rpartition(".")[2])
    if given.shape != own.shape or not given.is_floating_point():
        raise ValueError(
            f"values of {part.param} is {given.dtype} {list(given.shape)}; it must be the whole "
            f"parameter in floating point, {list(own.shape)}"
        )
    # What is not taken may be anything: the columns of other units, the weights of other experts.
    new = part.taken_from(given)
    if nonfinite([(part.param, new)]) is not None:
        raise FloatingPointError(
            f"values of {part.param} are NaN or infinite where the model takes them; they must be "
            "finite"
        )
    return new
