"""What of a selection puts something out: the columns of B and O that are chosen.

Unit j puts out h_j B[:, j], so that without column j it puts out nothing, whatever its rows of A
are. A head is as many units of one attention module. So of a selection of heads only the columns of
O need to be taken out; its rows of Q, K and V feed nothing else that is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor, nn

from ssah.selections.granularities import along, granularity
from ssah.selections.selection import Selection
from ssah.units import DepthTwoModule, UnitSet, find_heads, find_modules

_AT_HAND = 8  # parameters whose masks are kept unpacked


def output_units(selection: Selection, modules: Mapping[str, DepthTwoModule]) -> UnitSet:
    """The units whose columns of B are chosen whole, over all ``modules``, those of the model."""
    mask = lru_cache(_AT_HAND)(selection.mask)
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        own = module.output
        if own.param in selection:
            size = selection.shapes[own.param][own.dim + (own.expert is not None)]
            found[name] = along(mask(own.param), own, size)[own.index].nonzero()[:, 0]
    return UnitSet(found, {name: module.n_units for name, module in modules.items()})


def output_parts(selection: Selection, model: nn.Module) -> tuple[UnitSet, Selection]:
    """The units whose columns of B are chosen, and what is chosen beside them and their inputs.

    Example: of heads it is their channels, and nothing. Of a layer it is all its units, and its
    norms, the biases of O and down, and whatever else it has.

    Args:
        selection: of ``model``.
        model: a transformers model of a known family.

    Returns:
        the units; and the selection without their columns of B and without what only feeds such
        units: rows of gate, up and V, and the rows of Q and K of heads that are out as a whole.
    """
    modules = find_modules(model)
    units = output_units(selection, modules)
    outline = selection.outline
    # By "any": a row of K that a head reads that is left goes on feeding that head.
    own = granularity(model, selection.shapes, "units", "any")
    rest = selection - Selection.made(own.entries(units), outline)
    if any(len(units[name]) for name, module in modules.items() if module.kind == "attention"):
        rest = rest - _of_heads(selection, model, units)
    return units, rest


def _of_heads(selection: Selection, model: nn.Module, units: UnitSet) -> Selection:
    """What the heads have whose channels are all among ``units``."""
    every = find_heads(model).values()
    out = {
        heads.name: units.mask(heads.name).view(heads.n_heads, -1).all(1).nonzero()[:, 0]
        for heads in every
    }
    own = granularity(model, selection.shapes, "heads", "any")
    return Selection.made(own.entries(UnitSet(out, own.sizes)), selection.outline)
