"""The operators as typed functions. Each equals ``torch.ops.ssah.<name>``."""

from __future__ import annotations

import torch
from torch import Tensor

from ssah_kernels import autograd
from ssah_kernels.autograd import new_moments

__all__ = [
    "channel_moments_",
    "column_sq_norms",
    "gated_moments",
    "new_moments",
    "taylor_moments_",
]


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> None:
    """Merge the rows of ``x`` into running moments of every channel, in one pass over ``x``.

    Args:
        x: ``[..., C]`` float64, float32, bfloat16 or float16; any strides. Read once.
        count: float64 ``[]``, tokens seen so far. Updated in place.
        mean: float64 ``[C]``, mean over those tokens. Updated in place.
        m2: float64 ``[C]``, sum of squared deviations from the mean; the unbiased variance is
            ``m2 / (count - 1)``. Updated in place.
        token_mask: bool ``[...]``; only rows that are True count. A masked row never
            contributes, even if it is NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.

    Source: Chan, Golub and LeVeque (1979), merge of (n, mean, M2); SSAH (arXiv 2410.10862) eq. 1.
    """
    torch.ops.ssah.channel_moments_(x, count, mean, m2, token_mask)


def gated_moments(
    gate: Tensor,
    up: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    token_mask: Tensor | None = None,
    *,
    act: str = "silu",
) -> Tensor:
    """act(gate) * up of a gated FFN, and its running moments, in one pass.

    Args:
        gate, up: ``[..., C]`` of one dtype and shape; any strides. Each is read once.
        count, mean, m2, token_mask: as in ``channel_moments_``; over the output as rounded to its
            dtype.
        act: ``"silu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"relu2"`` (squared).

    Returns:
        act(gate) * up, ``[..., C]`` contiguous, in gate's dtype: computed in float32 (float64 for
        float64 input) and rounded once. Differentiable with respect to gate and up.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return autograd.gated_moments(gate, up, count, mean, m2, token_mask, act=act)
    return torch.ops.ssah.gated_moments(gate, up, count, mean, m2, token_mask, act=act)


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> None:
    """Add sum(x * grad) and sum((x * grad)^2) over tokens to every channel's accumulators.

    Args:
        x, grad: ``[..., C]`` of one dtype and shape: an activation and dL/dx. Each is read once.
        signed, squared: float64 ``[C]``. Updated in place.
        token_mask: as in ``channel_moments_``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.

    Source: first-order Taylor importance, Molchanov et al. (arXiv 1906.10771).
    """
    torch.ops.ssah.taylor_moments_(x, grad, signed, squared, token_mask)


def column_sq_norms(weight: Tensor) -> Tensor:
    """Squared Euclidean norm of every column of ``weight`` [out_features, in_features].

    Returns:
        float64 ``[in_features]``.

    Raises:
        TypeError, ValueError: weight is not a floating-point matrix.
    """
    return torch.ops.ssah.column_sq_norms(weight)
