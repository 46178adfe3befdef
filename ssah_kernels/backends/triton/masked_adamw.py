"""Triton ``masked_adamw_``: one AdamW step of the trained elements of a list of tensors.

    w = p (1 - lr weight_decay);  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

params and, compact, grads and states: matrices [rows, cols]; scalars float64 []. Arguments,
accumulation and bytes per element: ``masked_update.py``. The scalars of a step are read on the
device: nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .launch import Launch, run
from .masked_list import Update, launches
from .masked_rules import adamw_head


def plan(
    update: Update,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> list[Launch]:
    hyper = adamw_head(beta1, beta2, eps, weight_decay)
    return launches("adamw", hyper, update, nesterov=False, maximize=maximize)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
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
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> None:
    states, scalars = (exp_avgs, exp_avg_sqs), (lr, step, grad_scale, clip_coef, seed)
    rest = (compensations, signed, squared)
    scales = [s for s in (exp_avg_scales, exp_avg_sq_scales) if s is not None]
    update = Update(params, grads, states, indices, dims, *scalars, *rest, scales, found_inf)
    run(plan(update, beta1, beta2, eps, weight_decay, maximize), params[0].device)
