"""Specification of ``masked_grad_norm``: Euclidean norm of the gradient of the trained elements.

    norm = sqrt(sum of g^2) / grad_scale

over i and over the elements of grads[i] that indices[i] selects along dims[i], in float64. grads
are dense here, or compact with ``indices[i]`` None.

Example. Of [[3, 4], [9, 9]] the index [0] along dimension 0 leaves (3, 4): the norm is 5, and 2.5
where the loss was multiplied by 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masked_update import selected


def masked_grad_norm(
    grads: Sequence[Tensor],  # [units, other] each, or of any shape
    indices: Sequence[Tensor | None],  # [trained]
    dims: Sequence[int],
    grad_scale: Tensor | None = None,  # []
) -> Tensor:  # float64 []
    total = grads[0].new_zeros((), dtype=torch.float64)
    for grad, index, dim in zip(grads, indices, dims, strict=True):
        total += selected(grad, index, dim).square().sum()
    norm = total.sqrt()
    return norm if grad_scale is None else norm / grad_scale.double().reshape(())
