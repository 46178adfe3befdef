"""Argument checks, done once before any backend runs; a backend may rely on them.

Every function has its operator's name and arguments. It raises ``TypeError`` or ``ValueError``
that names the argument, what it was and what it must be, and returns the arguments ready for a
kernel: the last dimension of each input contiguous, everything else as it was passed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _floating(name: str, x: Tensor, min_dim: int = 1) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; it must be one of "
            + ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        )
    if x.dim() < min_dim:
        raise ValueError(f"{name} has {x.dim()} dimensions; it must have at least {min_dim}")


def _like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        is_, must = getattr(x, what), getattr(other, what)
        if is_ != must:
            is_, must = (tuple(v) if what == "shape" else v for v in (is_, must))
            raise ValueError(f"{name} has {what} {is_}; it must be {must}, as {other_name}")


def _state(name: str, state: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if state.dtype != torch.float64:
        raise TypeError(f"{name} has dtype {state.dtype}; state tensors must be float64")
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}; it must be {shape}")
    if state.device != device:
        raise ValueError(f"{name} is on {state.device}; it must be on {device}, with the input")
    if not state.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"token_mask has dtype {mask.dtype}; it must be bool")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:-1])}, "
            "the leading shape of the input"
        )
    if mask.device != x.device:
        raise ValueError(f"token_mask is on {mask.device}; it must be on {x.device}")


def _act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; it must be one of {', '.join(ACTIVATIONS)}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> tuple[Any, ...]:
    _floating("x", x)
    channels = (x.shape[-1],)
    for name, state, shape in (
        ("count", count, ()),
        ("mean", mean, channels),
        ("m2", m2, channels),
    ):
        _state(name, state, shape, x.device)
    _mask(token_mask, x)
    return _rows(x), count, mean, m2, token_mask


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
    _floating("gate", gate)
    _like("up", up, "gate", gate)
    _act(act)
    channel_moments_(gate, count, mean, m2, token_mask)
    return _rows(gate), _rows(up), count, mean, m2, token_mask


def gated_moments_functional(
    gate: Tensor, up: Tensor, token_mask: Tensor | None = None, *, act: str = "silu"
) -> tuple[Any, ...]:
    _floating("gate", gate)
    _like("up", up, "gate", gate)
    _act(act)
    _mask(token_mask, gate)
    return gate, up, token_mask


def gated_moments_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, act: str = "silu"
) -> tuple[Any, ...]:
    _floating("gate", gate)
    _like("up", up, "gate", gate)
    _like("grad", grad, "gate", gate)
    _act(act)
    return _rows(grad), _rows(gate), _rows(up)


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> tuple[Any, ...]:
    _floating("x", x)
    _like("grad", grad, "x", x)
    channels = (x.shape[-1],)
    _state("signed", signed, channels, x.device)
    _state("squared", squared, channels, x.device)
    _mask(token_mask, x)
    return _rows(x), _rows(grad), signed, squared, token_mask


def column_sq_norms(weight: Tensor) -> tuple[Any, ...]:
    _floating("weight", weight, 2)
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions; it must have 2")
    return (_rows(weight),)
