"""Training some units and keeping the others frozen: `freeze` and `train_only`."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from ssah.moved import renamed
from ssah.training.plan import UpdatePlan
from ssah.units import UnitSet

__all__ = ["freeze", "train_only"]


def freeze(model: PreTrainedModel, units: UnitSet) -> UpdatePlan:
    """Train everything except what ``units`` own, which stays bit for bit what it is.

    A unit owns a column of B, a row of every A and A's bias there. With shared key/value heads a
    row of V trains only if every column of O that it feeds trains. Every other parameter of the
    model trains, whatever its ``requires_grad`` was; the plan's :meth:`~UpdatePlan.close` puts
    that back.

    Args:
        model: a transformers model of a known family; changed in place until the plan is closed.
        units: what to keep, for instance ``groups["scu"]``.

    Raises:
        TypeError, ValueError: units of another model, a quantised or already planned model, or
            nothing left to train.
        FloatingPointError: a weight of a unit is NaN or infinite.

    Source: Li & Kim, arXiv 2410.10862 (freezing safety-critical components).
    """
    return UpdatePlan(model, units, keep=True)


@renamed(also="extra_parameters")
def train_only(
    model: PreTrainedModel, units: UnitSet, extra_parameters: Collection[str] = ()
) -> UpdatePlan:
    """Train what ``units`` own and nothing else.

    With shared key/value heads a row of V trains only if every column of O that it feeds trains.

    Args:
        model: a transformers model of a known family; changed in place until the plan is closed.
        units: what to train, for instance ``groups["ru"]``.
        extra_parameters: names in ``model.named_parameters()`` of parameters that train whole.

    Raises:
        TypeError, ValueError: units of another model, a quantised or already planned model, an
            unknown name in ``extra_parameters``, or nothing to train.
        FloatingPointError: a weight of a unit is NaN or infinite.

    Source: Li & Kim, arXiv 2410.10862 (redundant units as an alignment budget).
    """
    return UpdatePlan(model, units, keep=False, extra_parameters=extra_parameters)
