"""Specification of ``column_sq_norms``: squared Euclidean norm of every column, in float64.

norms_j = sum_i weight_ij^2, with weight [out_features, in_features] and norms [in_features].
"""

from __future__ import annotations

from torch import Tensor


def column_sq_norms(weight: Tensor) -> Tensor:
    return weight.double().square().sum(0)
