"""The importance of trained units, from sums that the optimiser takes inside its updates.

The optimiser keeps for every row of a trained slice the sums over steps of p * g and of (p * g)^2,
p the weight before the update and g its gradient. p * g is, to first order, by how much the loss
would rise if the weight were kept and not removed; a unit's importance is the sum over all that it
owns: its rows of A and its column of B. Example: unit 3 with sums 0.5 in gate, -0.1 in up and 0.2
in down has 0.6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssah.training.entries import TrainedSlice
from ssah.units import DepthTwoModule


@dataclass(frozen=True, eq=False)
class UnitImportance:
    """Importance of the trained units from the gradients of their own weights.

    Attributes:
        signed: B's name -> float64 ``[n_units]``, the sum over steps and over the unit's weights
            of p * g (before the update, gradients before clipping); 0 where nothing trains.
        squared: likewise of (p * g)^2.
    """

    signed: dict[str, Tensor]
    squared: dict[str, Tensor]


def unit_importance(
    tracked: Mapping[Tensor, tuple[Tensor, Tensor]],
    slices: Iterable[TrainedSlice],
    modules: Mapping[str, DepthTwoModule],
) -> UnitImportance:
    """Collect what an optimiser accumulated, unit by unit.

    Args:
        tracked: parameter -> both sums of each of its rows, ``[len(slice.index)]``.
        slices: what trains.
        modules: the model's depth-2 modules by B's name.

    Raises:
        RuntimeError: the experts of a layer train whole.
    """
    owned_by = {name: (*module.inputs, module.output) for name, module in modules.items()}
    experts = {s.param for owned in owned_by.values() for s in owned if s.expert is not None}
    sums: dict[str, Tensor] = {}  # parameter -> [2, entries]
    for each in slices:
        if each.parameter not in tracked:
            continue
        if each.name in experts and not each.split:
            raise RuntimeError(
                f"{each.name!r} trains whole, as one parameter of three dimensions: the importance "
                "of its units is not known"
            )
        own = sums.setdefault(
            each.name, torch.zeros(2, len(each.entries.trains), dtype=torch.float64)
        )
        own[:, each.index] = torch.stack([row.cpu().double() for row in tracked[each.parameter]])
    totals: dict[str, Tensor] = {}  # B's name -> [2, units]
    for name, owned in owned_by.items():
        totals[name] = torch.zeros(2, modules[name].n_units, dtype=torch.float64)
        for part in owned:
            if part.param in sums:
                totals[name] += sums[part.param][:, part.entries]
    signed, squared = ({name: both[i] for name, both in totals.items()} for i in range(2))
    return UnitImportance(signed, squared)
