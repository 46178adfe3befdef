"""Which selections run as arms of one batch, and which need a pass of their own.

An arm takes out what units put out, by factors of their channels, so that all arms share the
weights. Heads are units of attention. A layer has norms and biases as well, and a single weight is
no channel: for these the weights change, and so the model runs alone.

    arm 0  None                  with the others
    arm 1  groups["scu"]         with the others
    arm 2  heads 3 and 7         with the others: channels of O
    arm 3  layer 5               alone, inside `ablate`
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ssah.selections import Selection, output_parts
from ssah.units import UnitSet


def arm_units(model: nn.Module, what: UnitSet | Selection) -> UnitSet | None:
    """The units whose channels are all that ``what`` takes out; None: it takes out more.

    Raises:
        ValueError: a selection of another model.
    """
    if not isinstance(what, Selection):
        return what
    units, beside = output_parts(what.of(model), model)
    return None if beside else units


def split_arms(
    model: nn.Module, selections: Sequence[UnitSet | Selection | None]
) -> tuple[list[UnitSet | None], dict[int, Selection]]:
    """What runs together, and what runs by itself.

    Returns:
        the units that each arm takes out, None where it takes out nothing or runs by itself; and
        number of an arm -> what is to be ablated while it runs by itself.

    Raises:
        ValueError: a selection of another model.
    """
    units = [None if what is None else arm_units(model, what) for what in selections]
    alone = {
        arm: what
        for arm, (what, own) in enumerate(zip(selections, units, strict=True))
        if own is None and isinstance(what, Selection)
    }
    return units, alone
