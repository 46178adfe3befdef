"""Ablation: units or heads put out nothing for a while; the model is then what it was, bit for bit.

with ablate(model, groups["scu"]):
    ...                                  # their columns of B are zero
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from ssah.interventions.intervention import Intervention
from ssah.interventions.weights import plan_ablation
from ssah.models import check_idle
from ssah.selections import Selection
from ssah.units import UnitSet


def ablate(model: nn.Module, units: UnitSet | Selection) -> AbstractContextManager[nn.Module]:
    """Context manager: the units' columns of B are zero inside, and back bit for bit after.

    Of a selection, what its units and heads put out is zero: columns of B, of heads those of O.
    Their rows of gate, up, Q, K and V stay: they then put nothing out, or serve another head.
    Everything else that is selected is zero. So of a layer O and down, their biases and its norms
    are zero, and the block adds nothing to the residual stream.

    They are put back after an exception too. Only the touched columns are copied. Ablations nest
    and may overlap, as long as the last one entered is the first one left, which `with` ensures.
    Inside, what is trained or loaded into these columns is lost, and what would make the zeros
    permanent is refused: `freeze`, `train_only`, `prune` and `load_update`.

    A packed weight (:mod:`ssah.models.packed`) cannot hold every column of zeros. One that is
    computed anew as the model runs (``torch.nn.utils.prune``, ``parametrize``, ``weight_norm``), or
    that accelerate fetches then, would not keep them. None of these is touched: there a hook sets
    the units' channels to zero before they enter B, which is the same function (where B rounds its
    input by the largest channel, of the input without these).

    Args:
        model: a model that `find_modules` knows.
        units: what to ablate, for instance `groups["scu"]`, or a selection (`ssah.select`).
            Yields the model.

    Raises:
        ValueError: where units belong to another model, a weight is not in memory, or experts'
            weights are computed anew.
        FloatingPointError: as the block is entered, where a column to be zeroed is NaN or infinite.

    Source: Li & Kim, arXiv 2410.10862 (ablation of each group).
    """
    check_idle(model, "to be ablated")
    return Intervention(model, "ablate", plan_ablation(model, units))
