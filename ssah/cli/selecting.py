"""What commands name by text: groups of units, or heads, layers and whatever else is selected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ssah.choices import Shared
    from ssah.selections import Selection
    from ssah.units import UnitSet


def check_selected(texts: Sequence[str], groups: Path | None, option: str) -> UnitSet | None:
    """Refuse, before a model is loaded, what no model can have.

    Args:
        texts: as `ssah.selections.selectors` has them.
        groups: the folder that groups are in, or None.
        option: what they were given as, ``"freeze"``.

    Returns:
        the units, where groups alone are named; else None: then a model must say.

    Raises:
        ValueError: a text of another form; groups are named and not given, or given and not named.
        FileNotFoundError: the folder has no groups.
    """
    from ssah.groups import UnitGroups
    from ssah.selections import check_named, names_groups

    named = names_groups(texts)
    if named and groups is None:
        raise ValueError(
            f"--groups is not given; --{option} {' '.join(texts)} must have what `ssah classify` "
            "saved"
        )
    if groups is not None and not named:
        raise ValueError(f"--groups is given, and --{option} names none of scu, ucu, ru, cu")
    return check_named(texts, None if groups is None else UnitGroups.load(groups))


def selected_in(
    model: nn.Module, texts: Sequence[str], groups: Path | None, shared: Shared
) -> UnitSet | Selection:
    """What texts name in ``model``: units where they name groups alone.

    Arguments as of `check_selected`, and ``shared`` as of `ssah.select`.

    Raises:
        ValueError: the model lacks something, or groups are of another model.
    """
    from ssah.groups import UnitGroups
    from ssah.selections import named

    found = None if groups is None else UnitGroups.load(groups, model)
    return named(model, texts, found, shared=shared)


def described(chosen: UnitSet | Selection) -> str:
    """The same for people."""
    found = counted(chosen)
    n, share = found.values()
    return f"{n:,} {next(iter(found))} ({share:.1%})"


def counted(chosen: UnitSet | Selection) -> dict[str, int | float]:
    """How much it is, for JSON: units and their share, or weights and theirs."""
    from ssah.units import UnitSet

    if isinstance(chosen, UnitSet):
        return {"units": len(chosen), "share": chosen.fraction}
    return {"weights": len(chosen), "weight_share": chosen.fraction}
