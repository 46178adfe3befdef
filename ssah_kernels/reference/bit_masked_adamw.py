"""Specification of ``bit_masked_adamw_``: one AdamW step of single elements, chosen by bits.

The chosen elements of a parameter and its gradient, in row-major order, are compact tensors
[trained], as the states are. The step is that of ``masked_adamw_`` on these, its rounding and its
noise included: see there, with an example of the numbers.

    param       1.0  2.0  3.0  4.0        bits 0b1001, of elements 0 and 3
    compact     1.0            4.0        updated to 0.9 and 3.9
    param       0.9  2.0  3.0  3.9
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..bit_masks import unpack_bits
from .masked_adamw import masked_adamw_


def bit_masked_adamw_(
    params: Sequence[Tensor],  # [...] each
    grads: Sequence[Tensor],  # [...]
    exp_avgs: Sequence[Tensor],  # [trained]
    exp_avg_sqs: Sequence[Tensor],  # [trained]
    masks: Sequence[Tensor],  # [ceil(n / 8)]
    offsets: Sequence[Tensor],  # [blocks + 1]; nothing that the masks do not say
    lr: Tensor,  # []
    step: Tensor,  # []
    grad_scale: Tensor | None = None,  # []
    clip_coef: Tensor | None = None,  # []
    seed: Tensor | None = None,  # []
    **options: Any,
) -> None:
    chosen = [unpack_bits(bits, p.shape) for bits, p in zip(masks, params, strict=True)]
    values = [p[mask] for p, mask in zip(params, chosen, strict=True)]  # [trained], copies
    own = [g[mask] for g, mask in zip(grads, chosen, strict=True)]
    none, dims = [None] * len(values), [0] * len(values)
    scalars = (lr, step, grad_scale, clip_coef, seed)
    masked_adamw_(values, own, exp_avgs, exp_avg_sqs, none, dims, *scalars, **options)
    for param, mask, value in zip(params, chosen, values, strict=True):
        param[mask] = value
