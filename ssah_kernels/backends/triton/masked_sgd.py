"""Triton ``masked_sgd_``: one SGD step of the trained elements of a list of tensors.

    g += weight_decay w;  b = g at step 1, else momentum b + (1 - dampening) g
    p = w - lr (g + momentum b if nesterov, else b)

params and, compact, grads and buffers: matrices [rows, cols]; scalars float64 []. Arguments,
accumulation and bytes per element: ``masked_update.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .launch import Launch, run
from .masked_list import Update, launches


def plan(
    update: Update,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> list[Launch]:
    hyper = (momentum, 1 - dampening, weight_decay)
    return launches("sgd", hyper, update, nesterov=nesterov, maximize=maximize)


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    seed: Tensor | None = None,
    compensations: Sequence[Tensor] | None = None,
    signed: Sequence[Tensor] | None = None,
    squared: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    states = () if momentum_buffers is None else (momentum_buffers,)
    scalars = (lr, step, grad_scale, clip_coef, seed)
    rest = (compensations, signed, squared)
    scales = [] if momentum_scales is None else [momentum_scales]
    update = Update(params, grads, states, indices, dims, *scalars, *rest, scales, found_inf)
    run(plan(update, momentum, dampening, weight_decay, nesterov, maximize), params[0].device)
