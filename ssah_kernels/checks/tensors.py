"""What one tensor must be, of any shape [...] unless its function says more.

Each function raises, with the argument's name, or returns nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 2**28  # the CPU kernels list where rows begin: 2 GiB
_SHOWN = 60


def shown(value: object) -> str:
    """``value`` as an error shows it: a long one is cut."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def dense(name: str, x: Tensor) -> None:
    """Raise unless ``x`` has its elements in memory, one by one."""
    if x.layout is not torch.strided:
        raise TypeError(
            f"{name} has layout {x.layout}; it must be torch.strided: convert it with to_dense()"
        )


def floating(name: str, x: Tensor, min_dim: int = 1) -> None:
    dense(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; it must be one of "
            + ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        )
    if x.dim() < min_dim:
        raise ValueError(f"{name} has {x.dim()} dimensions; it must have at least {min_dim}")


def rows(name: str, x: Tensor) -> None:
    """Raise where ``x`` [..., C] is read and has no end, as an expanded tensor may."""
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{name} carries a tangent of forward-mode differentiation, which no operator of ssah "
            "passes on; take the derivative in reverse mode, with torch.autograd.grad"
        )
    n = x.numel()
    if not isinstance(n, int) or n <= MOST_ROWS:  # what is traced may have any size
        return
    # Only a tensor of very many elements can have very many rows of at least one channel.
    n = math.prod(x.shape[:-1])
    if n > MOST_ROWS:
        raise ValueError(
            f"{name} has {n} rows; it must have at most 2^28 = {MOST_ROWS}: call the operator on "
            "parts of it, whose sums add up"
        )


def like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    dense(name, x)
    for what in ("shape", "dtype", "device"):
        is_, must = getattr(x, what), getattr(other, what)
        if is_ != must:
            is_, must = (tuple(v) if what == "shape" else v for v in (is_, must))
            raise ValueError(f"{name} has {what} {is_}; it must be {must}, as {other_name}")


def state_of(
    name: str,
    state: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Raise unless ``state`` is of this dtype and shape, and contiguous."""
    dense(name, state)
    if state.dtype != dtype:
        must = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name} has dtype {state.dtype}; state tensors must be {must}")
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}; it must be {shape}")
    if state.device != device:
        raise ValueError(f"{name} is on {state.device}; it must be on {device}, with the input")
    # Refused, not copied: a kernel would write to the copy.
    if not state.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def mask_of(mask: Tensor | None, x: Tensor) -> None:
    """Raise unless ``mask`` says of every row of ``x`` whether it counts."""
    if mask is None:
        return
    dense("token_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"token_mask has dtype {mask.dtype}; it must be bool")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:-1])}, "
            "the leading shape of the input"
        )
    if mask.device != x.device:
        raise ValueError(f"token_mask is on {mask.device}; it must be on {x.device}")


def last_contiguous(x: Tensor) -> Tensor:
    # Only read, so that a copy serves. Kernels load 16 bytes of neighbouring channels at a time.
    return x if x.stride(-1) == 1 else x.contiguous()
