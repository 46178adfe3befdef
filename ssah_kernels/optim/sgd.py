"""SGD over ``masked_sgd_``.

    g <- g + weight_decay w
    b <- g in the first step, then momentum b + (1 - dampening) g
    w <- w - lr (b, or g + momentum b if nesterov)

With lr 0.1, momentum 0.9 and g = 1 twice, b is 1 and then 1.9, and w goes down by 0.1 and by 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .base import MaskedOptimizer
from .calls import Call, Scalars


class MaskedSGD(MaskedOptimizer):
    """SGD with momentum in the same form: see ``MaskedAdamW`` for what the options mean.

    Args:
        lr: a float, or a tensor ``[]`` or ``[1]``.
        momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``.

    Raises:
        ValueError: an option is out of range, or a parameter has nothing to train.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
            "max_norm": max_norm,
            "track_importance": track_importance,
        }
        super().__init__(params, defaults)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        # torch.optim.SGD keeps no buffer either where there is no momentum.
        return self.state_names if group["momentum"] else ()

    def _update(self, group: dict[str, Any], call: Call, scalars: Scalars) -> None:
        ops.masked_sgd_(
            call.params,
            call.grads,
            call.state("momentum_buffer"),
            call.indices,
            call.dims,
            *scalars,
            call.state("compensation"),
            call.state("importance_signed"),
            call.state("importance_squared"),
            call.state("momentum_buffer_scales"),
            self._of_scaler("found_inf"),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
