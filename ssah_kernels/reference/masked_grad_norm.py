"""Specification of ``masked_grad_norm``: Euclidean norm of the gradient of the trained elements.

norm = sqrt(sum over i and over the elements of grads[i] that indices[i] selects along dims[i] of
g^2) / grad_scale, in float64. grads are dense here, or compact with ``indices[i]`` None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssah_kernels.reference.masked_update import selected


def masked_grad_norm(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None = None,
) -> Tensor:
    total = grads[0].new_zeros((), dtype=torch.float64)
    for grad, index, dim in zip(grads, indices, dims, strict=True):
        total += selected(grad, index, dim).square().sum()
    norm = total.sqrt()
    return norm if grad_scale is None else norm / grad_scale.double().reshape(())
