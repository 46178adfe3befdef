"""Specification of ``masked_sgd_``: one SGD step, with momentum, of the trained elements alone.

Shapes are those of ``masked_adamw``, with one state. With t = step (already incremented by the
caller), and g, w, round as in ``masked_update``:

    g <- g + weight_decay w                                       (unless weight_decay is 0)
    b <- g if t = 1, else momentum b + (1 - dampening) g          (if momentum_buffers is given)
    w <- w - lr (g + momentum b  if nesterov,  else b)            (g without momentum_buffers)

as ``torch.optim.SGD`` does. w is computed from b before that is rounded. With scales, b is stored
in 8 bits: see ``dynamic_map``.

Example, of step 2 with w = 1, g = 0.5, b = 0.5, lr = 0.1 and momentum = 0.9. b becomes 0.45 + 0.5 =
0.95 and w 1 - 0.095 = 0.905; with nesterov w becomes 1 - 0.1 (0.5 + 0.855) = 0.8645.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masked_update import (
    Rounder,
    State,
    add_importance_,
    entry,
    gradient,
    selected,
    skips,
    trained_gradient,
    trained_weight,
)


def masked_sgd_(
    params: Sequence[Tensor],  # [units, other] each, or of any shape
    grads: Sequence[Tensor],  # compact: [trained, other]; or as params
    momentum_buffers: Sequence[Tensor] | None,  # compact
    indices: Sequence[Tensor | None],  # [trained]
    dims: Sequence[int],
    lr: Tensor,  # [], as step, grad_scale, clip_coef and seed
    step: Tensor,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    seed: Tensor | None = None,
    compensations: Sequence[Tensor] | None = None,
    signed: Sequence[Tensor] | None = None,  # [trained], as squared
    squared: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,  # [rows, blocks]
    found_inf: Tensor | None = None,  # []
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    if skips(found_inf):
        return
    rate, first = lr.double(), step.double() == 1
    for i, (param, grad, index, dim) in enumerate(zip(params, grads, indices, dims, strict=True)):
        p = selected(param, index, dim)
        grad = trained_gradient(grad, param, index, dim)
        if signed is not None and squared is not None:
            add_importance_(p, grad, grad_scale, dim, signed[i], squared[i])
        compensation = entry(compensations, i)
        w = trained_weight(param, index, dim, compensation)
        g = gradient(grad, grad_scale, clip_coef, maximize)
        if weight_decay != 0:  # an infinite weight times 0 is NaN
            g = g + weight_decay * w
        rounded = Rounder(grad, step, seed, i)
        if momentum_buffers is not None:
            buffer = State(momentum_buffers[i], entry(momentum_scales, i), 1, dim)
            # What a buffer held before its first step does not count, even if it is NaN.
            b = torch.where(first, g, momentum * buffer.read() + (1 - dampening) * g)
            buffer.write_(b, rounded)
            g = g + momentum * b if nesterov else b
        rounded.write_param_(param, index, dim, w - rate * g, compensation)
