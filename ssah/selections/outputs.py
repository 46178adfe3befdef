"""What of a selection puts something out: the columns of B and O that are chosen.

Unit j puts out h_j B[:, j], so that without column j it puts out nothing, whatever its rows of A
are. A head is as many units of one attention module. So of a selection of heads only the columns of
O need to be taken out. Its rows of Q, K and V then put nothing out, or serve another head.
"""

from __future__ import annotations

from torch import nn

from ssah.selections.granularities import granularity
from ssah.selections.selection import Selection
from ssah.units import UnitSet, family_of, find_heads


def output_parts(selection: Selection, model: nn.Module) -> tuple[UnitSet, Selection]:
    """The units whose columns of B are chosen, and what is chosen beside them and their inputs.

    Example: of heads it is their channels, and nothing. Of a layer it is all its units, and its
    norms, the biases of O and down, and whatever else it has.

    Args:
        selection: of such a model.
        model: a transformers model of a known family.

    Returns:
        The units; and the selection without their columns of B and without what feeds them: rows of
        gate, up and V, and the rows of Q and K of heads that are out as a whole.
    """
    selection = selection.of(model)
    units, outline = selection.units, selection.outline
    # By "any": a row of V or K that another head reads too goes on serving that head.
    own = granularity(model, selection.shapes, "units", "any")
    rest = selection - Selection.made(own.entries(units), outline)
    attention = family_of(model).attention
    if attention is not None and attention.has_heads:
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
