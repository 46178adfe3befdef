"""The units that a command line names: groups, or shares of them."""

from __future__ import annotations

from collections.abc import Sequence

from ssah.groups import GROUPS, UnitGroups, share_of
from ssah.units import UnitSet


def select_units(selection: Sequence[str], groups: UnitGroups) -> UnitSet:
    """The units that a selection names: the union of its parts.

    Args:
        selection: group names such as ``"scu"``, or a group and a fraction of *all* units such as
            ``"cu:0.06"``: those of its units that are most like it (`UnitGroups.top` by
            ``"group"``; of CU, the highest for safety).
        groups: where they are taken from.

    Raises:
        ValueError: a part is neither, the group has fewer units, or nothing is selected.
    """
    units = UnitSet({}, groups.sizes)
    for part in selection:
        name, colon, text = part.partition(":")
        if name not in GROUPS:
            raise ValueError(
                f"the selection has {part!r}; it must be one of {', '.join(GROUPS)}, or a group "
                "and a fraction of all units such as cu:0.06"
            )
        own = groups[name]
        if colon:
            share = share_of(f"the selection has {part!r}", text)
            own = groups.top(name, share, by="group")
        units = units | own
    if not len(units):
        raise ValueError(f"the selection {' '.join(selection)!r} has no units in these groups")
    return units
