"""Training a part of a model and keeping the rest frozen: `freeze` and `train_only`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ssah.moved import renamed
from ssah.selections import Selection
from ssah.training.plan import UpdatePlan
from ssah.units import UnitSet


def freeze(
    model: PreTrainedModel,
    units: UnitSet | Selection | None = None,
    *,
    keep: Collection[str] = (),
    rows: Mapping[str, Sequence[int] | Tensor] | None = None,
    unfreeze: bool = False,
) -> UpdatePlan:
    """Train everything except what ``units`` own, which stays bit for bit what it is.

    A unit owns a column of B, a row of every A and A's bias there. With shared key/value heads a
    row of V trains only if every column of O that it feeds trains. Every other parameter that
    required a gradient before trains; the plan's :meth:`~UpdatePlan.close` puts
    ``requires_grad`` back.

    What is frozen does not move: that alone keeps no model safe. By our own measurement it matters
    how much is frozen, and not which units (docs/training/index.md).

    Args:
        model: a transformers model of a known family; changed in place until the plan is closed.
        units: what to keep, for instance ``groups["scu"]``, or a selection of heads, layers,
            parameters, rows or single weights (`ssah.select`); None where ``keep`` or ``rows``
            says.
        keep: further parameters that stay whole: names in ``model.named_parameters()``, or
            patterns of them such as ``"*norm*"``.
        rows: rows of embeddings and heads that stay, the rest of which trains: name of the
            parameter -> numbers of its rows, a list or a tensor ``[n]``. Of tied weights either
            name is meant for both.
        unfreeze: parameters that required no gradient before train too.

    Raises:
        TypeError, ValueError: units of another model, an unknown name, pattern or row, a quantised
            or already planned model, or nothing left to train.
        FloatingPointError: a weight of a unit is NaN or infinite.

    Source: Li & Kim, arXiv 2410.10862 (freezing safety-critical components).
    """
    return UpdatePlan(
        model,
        _units(units, "keep", keep, rows),
        keep=True,
        kept_parameters=keep,
        rows=rows,
        unfreeze=unfreeze,
    )


@renamed(also="extra_parameters")
def train_only(
    model: PreTrainedModel,
    units: UnitSet | Selection | None = None,
    extra_parameters: Collection[str] = (),
    *,
    rows: Mapping[str, Sequence[int] | Tensor] | None = None,
) -> UpdatePlan:
    """Train what ``units`` own and nothing else, whatever ``requires_grad`` was before.

    With shared key/value heads a row of V trains only if every column of O that it feeds trains.

    Args:
        model: a transformers model of a known family; changed in place until the plan is closed.
        units: what to train, for instance ``groups["ru"]``, or a selection (`ssah.select`); None
            where ``extra_parameters`` or ``rows`` says.
        extra_parameters: further parameters that train whole: names in
            ``model.named_parameters()``, or patterns of them.
        rows: rows of embeddings and heads that train: name of the parameter -> numbers of its
            rows, a list or a tensor ``[n]``. Of tied weights either name is meant for both.

    Raises:
        TypeError, ValueError: units of another model, a quantised or already planned model, an
            unknown name, pattern or row, or nothing to train.
        FloatingPointError: a weight of a unit is NaN or infinite.

    Source: Li & Kim, arXiv 2410.10862 (redundant units as an alignment budget).
    """
    units = _units(units, "extra_parameters", extra_parameters, rows)
    return UpdatePlan(model, units, keep=False, extra_parameters=extra_parameters, rows=rows)


def _units(
    units: UnitSet | Selection | None, argument: str, names: object, rows: object
) -> UnitSet | Selection:
    """``units``, or none where something else says what is meant."""
    if units is not None:
        return units
    if not names and not rows:
        raise TypeError(
            f"units is None; it must be a UnitSet, e.g. groups['scu'], or {argument}= or rows= "
            "must say what is meant"
        )
    return UnitSet({}, {})
