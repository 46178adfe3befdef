"""The units of each module with the highest scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssah.units import UnitSet, lowest, share_count


def highest(scores: Mapping[str, Tensor], share: float) -> UnitSet:
    """A share of each module's units: those with the highest scores, ``[units]`` each.

    Of n units they are floor(share * n + 0.5), and of equal scores the lower index is taken.
    """
    sizes = {name: len(own) for name, own in scores.items()}
    found = {
        name: lowest(-own, torch.arange(sizes[name]), share_count(share, sizes[name]))
        for name, own in scores.items()
    }
    return UnitSet(found, sizes)
