"""Output shapes and dtypes of each operator, for tracing. Checks run here as well as on real data,
so that a wrong shape is an error at compile time.

Shapes are those of :mod:`ssah_kernels.ops`: activations [..., C], state [C], weights [out, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> None:
    checks.channel_moments_(x, count, mean, m2, token_mask)


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
    checks.gated_moments(gate, up, count, mean, m2, token_mask, act=act)
    return _contiguous_like(gate)  # [..., C]


def gated_moments_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, act: str = "silu"
) -> tuple[Tensor, Tensor]:
    checks.gated_moments_backward(grad, gate, up, act=act)
    return _contiguous_like(gate), _contiguous_like(up)


def gated_product(
    gate: Tensor, up: Tensor, factors: Tensor, arm: Tensor, *, act: str = "silu"
) -> Tensor:
    checks.gated_product(gate, up, factors, arm, act=act)
    return _contiguous_like(gate)  # [..., C]


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> None:
    checks.taylor_moments_(x, grad, signed, squared, token_mask)


def column_sq_norms(weight: Tensor) -> Tensor:
    checks.column_sq_norms(weight)
    return weight.new_empty(weight.shape[1], dtype=torch.float64)


def masked_adamw_(*args: Any, **kwargs: Any) -> None:
    checks.masked_adamw_(*args, **kwargs)


def bit_masked_adamw_(*args: Any, **kwargs: Any) -> None:
    checks.bit_masked_adamw_(*args, **kwargs)


def masked_sgd_(*args: Any, **kwargs: Any) -> None:
    checks.masked_sgd_(*args, **kwargs)


def masked_grad_norm(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None = None,
) -> Tensor:
    checks.masked_grad_norm(grads, indices, dims, grad_scale)
    return grads[0].new_empty((), dtype=torch.float64)
