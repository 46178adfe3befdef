"""Arguments of the operators that read activations [..., C] or weights [out, C].

A mask has the leading shape [...], count has [], and all other state [C].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tensors import (
    dense,
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


def _factors(factors: Tensor, gate: Tensor) -> None:
    """Raise unless ``factors`` [arms, C] has one factor for each arm and channel of ``gate``."""
    dense("factors", factors)
    if factors.dtype not in (gate.dtype, torch.float32):
        own = str(gate.dtype).removeprefix("torch.")
        raise TypeError(f"factors has dtype {factors.dtype}; it must be float32, or {own} as gate")
    if factors.dim() != 2 or factors.shape[1] != gate.shape[-1]:
        raise ValueError(
            f"factors has shape {tuple(factors.shape)}; it must be (arms, {gate.shape[-1]}), a "
            "factor for each arm and channel of gate"
        )
    rows("factors", factors)


def _arm(arm: Tensor, gate: Tensor) -> None:
    """Raise unless ``arm`` gives one to every leading index of ``gate`` [..., C], or to some."""
    dense("arm", arm)
    if arm.dtype != torch.int64:
        raise TypeError(f"arm has dtype {arm.dtype}; it must be int64")
    lead = gate.shape[:-1]
    if arm.shape != lead[: arm.dim()]:
        raise ValueError(
            f"arm has shape {tuple(arm.shape)}; it must be {tuple(lead)}, the leading shape of "
            "gate, or the first dimensions of it"
        )


def gated_product(
    gate: Tensor, up: Tensor, factors: Tensor, arm: Tensor, *, act: str = "silu"
) -> tuple[Any, ...]:
    floating("gate", gate)
    like("up", up, "gate", gate)
    rows("gate", gate)
    rows("up", up)
    _act(act)
    _factors(factors, gate)
    _arm(arm, gate)
    for name, other in (("factors", factors), ("arm", arm)):
        if other.device != gate.device:
            raise ValueError(f"{name} is on {other.device}; it must be on {gate.device}, as gate")
    # Both are small beside gate, so that a kernel need not know every form of them.
    wide = factors.to(torch.promote_types(gate.dtype, torch.float32))  # [arms, C]
    lead = gate.shape[:-1]
    every = arm.view((*arm.shape, *[1] * (len(lead) - arm.dim()))).expand(lead)  # [...]
    return (
        last_contiguous(gate),
        last_contiguous(up),
        last_contiguous(wide),
        every.contiguous(),
    )


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
