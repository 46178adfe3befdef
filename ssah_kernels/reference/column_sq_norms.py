"""Specification of ``column_sq_norms``: squared Euclidean norm of every column, in float64.

    norms_j = sum_i weight_ij^2

with weight [out_features, in_features] and norms [in_features]: [[1, 2], [3, 0]] gives [10, 4].
Times the variance of the activation that enters column j, it is the importance of unit j.
"""

from __future__ import annotations

from torch import Tensor


def column_sq_norms(weight: Tensor) -> Tensor:
    return weight.double().square().sum(0)  # [in_features]
