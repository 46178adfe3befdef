"""AdamW over ``masked_adamw_``.

    w <- w (1 - lr weight_decay)
    m <- beta1 m + (1 - beta1) g                 v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

(Loshchilov and Hutter, arXiv 1711.05101.) In the first step m and v, divided by 1 - beta^t, are
g and g^2: with lr 0.1, no decay and g = 0.3 a weight goes down by 0.1, whatever the size of g.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .base import MaskedOptimizer
from .calls import Call, Scalars


class MaskedAdamW(MaskedOptimizer):
    """AdamW whose parameters are compact slices, or dense ones of which some entries train.

    Computes what ``torch.optim.AdamW`` computes for the trained elements; the others stay bit for
    bit what they were, weight decay and stale momentum included.

    Args:
        params: parameters ``[units, other]``, or of any shape, or parameter groups. A group may
            carry ``indices``: per parameter an int64 tensor ``[trained]``, strictly increasing, of
            the entries that train along ``dims`` (default 0), or None for all. State is compact;
            gradients are read where they are. Those of bfloat16 and float16 parameters may be
            float32 (``p.grad_dtype``).
        lr: a float, or a tensor ``[]`` or ``[1]``.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        state_dtype: of both moments: float32, bfloat16, None (float32; float64 for float64
            parameters), or ``"8bit"``: codes of the dynamic map, with a scale for each 256 elements
            of a row (:mod:`ssah_kernels.dynamic_map`). Parameters of one dimension, and rows of
            fewer than 64 elements, keep float32.
        rounding: how bfloat16 parameters without a master copy are stored: ``"nearest"``;
            ``"stochastic"``, which is unbiased; ``"remainder"``, which keeps the other 16 bits of a
            float32 weight beside them: the step is, bit for bit, that of float32 weights. bfloat16
            state is rounded stochastically by the last two. float16 parameters take ``"nearest"``
            or ``"remainder"``, Kahan's compensation there; nothing of it touches float32.
        seed: of the rounding noise, with the step: a resumed run repeats the uninterrupted one.
        max_norm: clip the norm of all gradients together to this, inside the update.
        track_importance: accumulate every unit's sum of p * g and (p * g)^2, see ``importance``.

    ``torch.amp.GradScaler`` steps with it as with torch's fused optimisers: gradients are unscaled
    inside the update, and a step that overflowed changes nothing and does not count.

    Raises:
        ValueError: an option is out of range, or a parameter has nothing to train.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | Literal["8bit"] | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        max_norm: float | None = None,
        track_importance: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
            "max_norm": max_norm,
            "track_importance": track_importance,
        }
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], call: Call, scalars: Scalars) -> None:
        ops.masked_adamw_(
            call.params,
            call.grads,
            [state["exp_avg"] for state in call.states],
            [state["exp_avg_sq"] for state in call.states],
            call.indices,
            call.dims,
            *scalars,
            call.state("compensation"),
            call.state("importance_signed"),
            call.state("importance_squared"),
            call.state("exp_avg_scales"),
            call.state("exp_avg_sq_scales"),
            self._of_scaler("found_inf"),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
