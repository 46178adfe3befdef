"""Fitting tensors that weights are made of, while the model itself stays as it is.

A mask over a change, or a patch that is added to a weight, is fitted like this: in every step the
weights are made of it, the model runs with them in the place of its own, and AdamW moves it.
Example: a model with the weight 3 and a patch p, 0 at first, runs with 3 + p. The gradient that
arrives at 3 + p is that of p, and 3 is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ssah.attribution import IGNORED, Batch

Item = TypeVar("Item")


def log_probs_under(
    model: nn.Module, weights: Mapping[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Log-probability and number of the response tokens of each row, under other weights.

    Args:
        model: a causal language model of transformers; inside `ssah.models.as_it_was`.
        weights: name of a parameter -> what it is to be, ``[...]``; the others are the model's.
        batch: with labels.

    Returns:
        ``[rows]`` in nats, differentiable in ``weights``; and int64 ``[rows]``.
    """
    kwargs = {**batch.inputs, "use_cache": False}
    logits = functional_call(model, dict(weights), args=(), kwargs=kwargs).logits
    targets = batch.targets.to(logits.device)  # [rows, length]
    # In float32 at least, as losses of transformers are; [rows, vocabulary, length] for the loss.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).mT
    nll = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")  # [rows, length]
    return -nll.sum(1), (targets != IGNORED).sum(1)


def fit(
    parameters: Sequence[Tensor],
    loss: Callable[[Item], Tensor],
    batches: Sequence[Item],
    *,
    lr: float,
    steps: int,
    floor: float | None = None,
) -> list[float]:
    """Minimise a loss by AdamW without decay; the learning rate falls to 0 along a cosine.

    Args:
        parameters: leaves that require gradients, ``[...]`` each; they change in place.
        loss: gives the loss of a batch, ``[]``.
        batches: one a step, in turn, again and again.
        lr: of the first step.
        steps: the most of them.
        floor: the least that the loss can be. A batch that is there takes no step, which momentum
            would still make; and where all are there in turn, it ends.

    Returns:
        The loss of each batch that was looked at, before its step.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: a loss is NaN or infinite.
    """
    if not batches:
        raise ValueError("batches is empty; it must have at least one")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    at_floor = looked = taken = 0
    while taken < steps and at_floor < len(batches):
        value = loss(batches[looked % len(batches)])
        looked += 1
        losses.append(float(value.detach()))
        if not bool(value.isfinite()):
            raise FloatingPointError(
                f"the loss is NaN or infinite after {taken} steps; a lower lr may help"
            )
        # Rounding may leave a mean of bounds a little above the bound.
        if floor is not None and losses[-1] <= floor + 1e-6 * abs(floor):
            at_floor += 1
            continue
        at_floor = 0
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        taken += 1
    return losses
