"""Directions that matter: Gram matrices of inputs, subspaces, projections, and what they share."""

from __future__ import annotations

from ssah.deltas.subspaces.bases import Subspace, delta_subspace, output_subspace
from ssah.deltas.subspaces.columns import column_overlaps
from ssah.deltas.subspaces.gram_matrices import Gram, gram
from ssah.deltas.subspaces.gram_passes import GramPasses
from ssah.deltas.subspaces.overlaps import Share, energy, overlap, principal_angles
from ssah.lazy import submodules_of

__all__ = [
    "Gram",
    "GramPasses",
    "Share",
    "Subspace",
    "column_overlaps",
    "delta_subspace",
    "energy",
    "gram",
    "output_subspace",
    "overlap",
    "principal_angles",
]

__getattr__ = submodules_of(__name__)
