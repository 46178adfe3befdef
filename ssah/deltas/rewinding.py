"""Put back what training changed in a selection: those weights have the bits of the base again.

    ssah.deltas.rewind("base", "tuned", groups["scu"], out="safe_again")

Example: of a down projection ``[2, 3]`` unit 1 is rewound. Column 1 is the base's, columns 0 and 2
are the tuned model's, and so it is with row 1 of gate and up. With shared key/value heads a row of
V is put back if any column of O that it feeds is, as `ssah.verify` has it: afterwards
``verify(rewound, base, units)`` holds.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ssah.deltas.matching import Deltas
from ssah.deltas.owners import in_tensors
from ssah.deltas.results import Out, finished
from ssah.deltas.weights import Weights, WeightsOf
from ssah.selections import Selection
from ssah.training import may_change
from ssah.units import BitMask, UnitSet

# Units, selections, names of parameters, or names of modules for everything in them.
Rewound: TypeAlias = "UnitSet | Selection | str | Sequence[UnitSet | Selection | str]"


def rewind(
    base: WeightsOf, tuned: WeightsOf, selection: Rewound, *, out: Out = None
) -> Path | dict[str, Tensor]:
    """The tuned model with a selection as the base has it, bit for bit.

    Args:
        base, tuned, out: as of `ssah.deltas.interpolate`. Where their dtypes differ, what is put
            back is rounded to that of ``tuned``.
        selection: a `UnitSet`; a `Selection` (`ssah.select`); the name of a parameter,
            ``"model.norm.weight"``; the name of a module, ``"model.layers.3"``, for all parameters
            in it; or several of these.

    Returns:
        ``out``; or for models in memory a state dict on the CPU, name -> ``[...]``.

    Raises:
        ValueError: a name that the model lacks, units of another model, nothing is selected, or as
            of `ssah.deltas.interpolate`.
        TypeError: the selection is no such thing; or it has units and the models are state dicts.
        FileExistsError, ModelError: as of `ssah.deltas.interpolate`.
    """
    several = not isinstance(selection, str | UnitSet | Selection)
    parts: list[UnitSet | Selection | str] = list(selection) if several else [selection]  # type: ignore[list-item]
    units = [part for part in parts if isinstance(part, UnitSet)]
    selections = [part for part in parts if isinstance(part, Selection)]
    names = [part for part in parts if isinstance(part, str)]
    if len(units) + len(selections) + len(names) < len(parts):
        kinds = {type(part).__name__ for part in parts} - {"str"}
        raise TypeError(
            f"selection has {', '.join(kinds)}; it must have UnitSets, Selections and names alone"
        )
    deltas = Deltas(base, [tuned])
    whole = _whole(deltas.tuned[0], names)
    masks = _masks(deltas.tuned[0], units, selections)
    if not whole and not masks:
        raise ValueError("selection is empty; it must have a unit, a weight or a name")
    edit = {
        "edit": "rewind",
        "names": names,
        "units": sum(map(len, units)),
        "tensors": len(whole | masks.keys()),
    }
    if selections:
        edit["weights"] = sum(map(len, selections))

    def make(name: str) -> Tensor:
        # Nothing is computed, so that a weight that is NaN can be put back too.
        before, (after,) = deltas.read(name)
        if name in whole:
            return before.to(after.dtype)
        if name not in masks:
            return after
        return torch.where(masks[name].to_mask(), before.to(after.dtype), after)

    return finished(deltas, out, edit, lambda: make)


def _whole(weights: Weights, names: Sequence[str]) -> frozenset[str]:
    """The tensors that are, or are in, what ``names`` name."""
    # Files may call a tensor otherwise, or keep it in pieces: what counts are the model's names.
    called = [(weights.param(name), name) for name in weights.names] + list(weights.tied.items())
    found: set[str] = set()
    for name in names:
        own = {each for param, each in called if f"{param}.".startswith(f"{name}.")}
        if not own:
            raise ValueError(
                f"selection has {name!r}, which is no parameter and no module of "
                f"{weights.about!r}; a parameter of it is {called[0][0]!r}"
            )
        found |= own
    return frozenset(found)


def _masks(
    weights: Weights, units: Sequence[UnitSet], selections: Sequence[Selection]
) -> dict[str, BitMask]:
    """Name of a tensor -> mask that broadcasts over it: what is selected of it."""
    # All sets at once: of a row of V that several units share, one of them is enough.
    parts: list[UnitSet | Selection] = [*selections]
    parts += [reduce(operator.or_, units)] if units else []
    chosen = [~may_change(weights.model, each) for each in parts]
    return in_tensors(weights, reduce(operator.or_, chosen)) if chosen else {}
