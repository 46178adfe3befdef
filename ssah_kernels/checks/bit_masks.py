"""Arguments of the update of single elements, which bit masks choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..bit_masks import n_blocks, packed_size
from .tensors import dense, floating, like
from .updates import same_length, scalars_of


def _piece(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise unless ``x`` is of this shape and one of these dtypes, and contiguous."""
    dense(name, x)
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {allowed}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous: call contiguous()")


def bit_masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    offsets: Sequence[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    seed: Tensor | None = None,
    **_: float,
) -> tuple[Any, ...]:
    if not params:
        raise ValueError("params is empty; it must have at least one parameter")
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, values in {"grads": grads, **states, "masks": masks, "offsets": offsets}.items():
        same_length(name, values, len(params))
    first = params[0]
    floating("params[0]", first, 0)
    dtype, device = first.dtype, first.device
    wide = dtype == torch.float64
    dtypes = (torch.float64,) if wide else (torch.float32, torch.bfloat16)
    if exp_avgs[0].dtype in dtypes:
        dtypes = (exp_avgs[0].dtype,)  # all state of a call has one dtype
    ready = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        # Elements are counted in row-major order: that of the memory, if there are no gaps.
        _piece(f"params[{i}]", param, tuple(param.shape), (dtype,), device)
        like(f"grads[{i}]", grad, f"params[{i}]", param)
        ready.append(grad.contiguous())  # a gradient is only read
        n = param.numel()
        _piece(f"masks[{i}]", masks[i], (packed_size(n),), (torch.uint8,), device)
        _piece(f"offsets[{i}]", offsets[i], (n_blocks(n) + 1,), (torch.int64,), device)
        # How many elements train stands in the offsets, whose values are not read here.
        trained = (exp_avgs[i].numel(),)
        for name, state in states.items():
            _piece(f"{name}[{i}]", state[i], trained, dtypes, device)
    ready_scalars = scalars_of(first, lr, step, grad_scale, clip_coef, seed)
    return params, ready, exp_avgs, exp_avg_sqs, masks, offsets, *ready_scalars
