"""Argument checks, done once before any backend runs; a backend may rely on them.

Every operator has a function of its name and arguments. It raises ``TypeError`` or ``ValueError``
that names the argument, what it was and what it must be, and returns the arguments ready for a
kernel: the last dimension of each input contiguous, the tensors of an update as matrices, its
scalars as float64 on their device, everything else as it was passed. It reads no element, so that
it serves for tracing too. Shapes are those of :mod:`ssah_kernels.ops`.
"""

from .activations import (
    ACTIVATIONS,
    channel_moments_,
    column_sq_norms,
    gated_moments,
    gated_moments_backward,
    gated_product,
    taylor_moments_,
)
from .bit_masks import bit_masked_adamw_
from .tensors import FLOATS, dense, shown
from .updates import masked_adamw_, masked_grad_norm, masked_sgd_

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "bit_masked_adamw_",
    "channel_moments_",
    "column_sq_norms",
    "dense",
    "gated_moments",
    "gated_moments_backward",
    "gated_product",
    "masked_adamw_",
    "masked_grad_norm",
    "masked_sgd_",
    "shown",
    "taylor_moments_",
]
