"""Specification of ``masked_adamw_``: one AdamW step of the trained elements alone.

With t = step (already incremented by the caller), and g, w, round as in ``masked_update``:

    w <- w (1 - lr weight_decay)
    m <- beta1 m + (1 - beta1) g                 v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

as ``torch.optim.AdamW`` does. w is computed from m and v before these are rounded. With scales,
m and v are stored in 8 bits: see ``dynamic_map``.

Example, of step 1 with w = 1, g = 0.5, lr = 0.1 and weight_decay = 0.01. w decays to 0.999; m is
0.05 and v 0.00025; without their bias they are 0.5 and 0.25, so that w becomes 0.999 - 0.1 = 0.899.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def masked_adamw_(
    params: Sequence[Tensor],  # [rows, columns] each
    # compact: [trained, columns], or [rows, trained] if the dim is 1; or of the parameter's shape
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],  # compact
    exp_avg_sqs: Sequence[Tensor],  # compact
    indices: Sequence[Tensor | None],  # [trained]
    dims: Sequence[int],
    lr: Tensor,  # []
    step: Tensor,  # []
    grad_scale: Tensor | None = None,  # []
    clip_coef: Tensor | None = None,  # []
    seed: Tensor | None = None,  # []
    compensations: Sequence[Tensor] | None = None,  # compact
    signed: Sequence[Tensor] | None = None,  # [trained]
    squared: Sequence[Tensor] | None = None,  # [trained]
    exp_avg_scales: Sequence[Tensor] | None = None,  # [rows, blocks]
    exp_avg_sq_scales: Sequence[Tensor] | None = None,  # [rows, blocks]
    found_inf: Tensor | None = None,  # []
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> None:
    if skips(found_inf):
        return
    rate, t = lr.double(), step.double()
    for i, (param, grad, index, dim) in enumerate(zip(params, grads, indices, dims, strict=True)):
        p = selected(param, index, dim)
        grad = trained_gradient(grad, param, index, dim)
        if signed is not None and squared is not None:
            # Before the update: p and g of one and the same forward pass.
            add_importance_(p, grad, grad_scale, dim, signed[i], squared[i])
        compensation = entry(compensations, i)
        w = trained_weight(param, index, dim, compensation)
        g = gradient(grad, grad_scale, clip_coef, maximize)
        states = (
            State(exp_avgs[i], entry(exp_avg_scales, i), 1, dim),
            State(exp_avg_sqs[i], entry(exp_avg_sq_scales, i), 2, dim),
        )
        m, v = (state.read() for state in states)
        w = w * (1 - rate * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        w = w - rate / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t).sqrt() + eps)
        rounded = Rounder(grad, step, seed, i)
        rounded.write_param_(param, index, dim, w, compensation)
        for state, value in zip(states, (m, v), strict=True):
            state.write_(value, rounded)
