"""Derivatives. A schema that mutates cannot carry a formula, so a differentiable operator has a
functional companion, composed here of the kernels, and the public function calls that one when a
gradient is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssah_kernels.reference.channel_moments import merge_moments_


def new_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero state (count [], mean [C], m2 [C]) in float64 for ``x`` [..., C]."""
    mean = x.new_zeros(x.shape[-1], dtype=torch.float64)
    return x.new_zeros((), dtype=torch.float64), mean, torch.zeros_like(mean)


def gated_moments_functional(
    gate: Tensor, up: Tensor, token_mask: Tensor | None = None, *, act: str = "silu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = new_moments(gate)
    return torch.ops.ssah.gated_moments(gate, up, *state, token_mask, act=act), *state


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.act = keyword_only_inputs["act"]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_gate, grad_up = torch.ops.ssah.gated_moments_backward(
        grad, *ctx.saved_tensors, act=ctx.act
    )
    return grad_gate, grad_up, None


def register(lib: torch.library.Library) -> None:
    """Register every derivative on ``lib``."""
    torch.library.register_autograd(
        "ssah::gated_moments_functional", _backward, setup_context=_setup_context, lib=lib
    )


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
    """``torch.ops.ssah.gated_moments`` with a gradient through the output."""
    output, *batch = torch.ops.ssah.gated_moments_functional(gate, up, token_mask, act=act)
    merge_moments_(count, mean, m2, *batch)
    return output
