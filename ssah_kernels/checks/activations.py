"""Arguments of the operators that read activations [..., C] or weights [out, C].

A mask has the leading shape [...], count has [], and all other state [C].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssah_kernels.checks.tensors import (
    floating,
    last_contiguous,
    like,
    mask_of,
    rows,
    shown,
    state_of,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {shown(act)}; it must be one of {', '.join(ACTIVATIONS)}")


def _moments(x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None) -> None:
    """Raise unless the state, and the mask, are those of moments of ``x`` [..., C]."""
    channels = (x.shape[-1],)  # [C]
    state_of("count", count, (), x.device)
    state_of("mean", mean, channels, x.device)
    state_of("m2", m2, channels, x.device)
    mask_of(token_mask, x)


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> tuple[Any, ...]:
    floating("x", x)
    rows("x", x)
    _moments(x, count, mean, m2, token_mask)
    return last_contiguous(x), count, mean, m2, token_mask


def gated_moments(
    gate: Tensor,
    up: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    token_mask: Tensor | None = None,
    *,
    act: str = "silu",
) -> tuple[Any, ...]:
    floating("gate", gate)
    like("up", up, "gate", gate)
    rows("gate", gate)
    rows("up", up)
    _act(act)
    _moments(gate, count, mean, m2, token_mask)
    return last_contiguous(gate), last_contiguous(up), count, mean, m2, token_mask


def gated_moments_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, act: str = "silu"
) -> tuple[Any, ...]:
    floating("gate", gate)
    like("up", up, "gate", gate)
    rows("gate", gate)
    rows("up", up)
    like("grad", grad, "gate", gate)
    _act(act)
    return last_contiguous(grad), last_contiguous(gate), last_contiguous(up)


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> tuple[Any, ...]:
    floating("x", x)
    rows("x", x)
    like("grad", grad, "x", x)
    channels = (x.shape[-1],)  # [C]
    state_of("signed", signed, channels, x.device)
    state_of("squared", squared, channels, x.device)
    mask_of(token_mask, x)
    return last_contiguous(x), last_contiguous(grad), signed, squared, token_mask


def column_sq_norms(weight: Tensor) -> tuple[Any, ...]:
    floating("weight", weight, 2)
    rows("weight", weight)
    # Leading dimensions are not merged: columns of several matrices are several results.
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions; it must have 2")
    return (last_contiguous(weight),)
