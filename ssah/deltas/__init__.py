"""What training changed: go a part of the way, put a selection back, merge, measure."""

from __future__ import annotations

from ssah.deltas.arithmetic import delta_of
from ssah.deltas.lora_adapters import to_lora
from ssah.deltas.low_ranks import low_rank
from ssah.deltas.magnitudes import Draw
from ssah.deltas.matching import Deltas
from ssah.deltas.measuring import DeltaSizes, GroupSize, Size, measure
from ssah.deltas.merging import interpolate, keep, merge
from ssah.deltas.owners import in_tensors
from ssah.deltas.results import RECORD, Maker, Out, finished, put_weights
from ssah.deltas.rewinding import Rewound, rewind
from ssah.deltas.weights import WeightsOf
from ssah.lazy import submodules_of

__all__ = [
    "DeltaSizes",
    "GroupSize",
    "Size",
    "interpolate",
    "keep",
    "low_rank",
    "measure",
    "merge",
    "rewind",
    "to_lora",
]

__getattr__ = submodules_of(__name__)
