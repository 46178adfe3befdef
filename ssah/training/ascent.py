"""Ascent with a bound: a model unlearns answers, and stops where they have become unlikely enough.

With L_e the loss of answer e, nats per token, the objective that is minimised is

    - mean over e of min(L_e, bound)

An answer at the bound pulls no more. Without one the loss has no end: the steepest way up is to
ruin the model. Example: losses of 1 and 5 with a bound of 4 have the objective -(1 + 4) / 2 = -2.5,
and the second answer has no gradient. Where all are at the bound it is -4, its floor.
"""

from __future__ import annotations

from torch import Tensor


def bounded_ascent(log_probs: Tensor, tokens: Tensor, bound: float) -> Tensor:
    """The objective of a batch of answers, in nats per token: ``[]``, at least ``-bound``.

    Args:
        log_probs: of the answers, summed over their tokens: ``[rows]``, nats.
        tokens: how many tokens each has: ``[rows]``.
        bound: nats per token, above 0.

    Raises:
        ValueError: ``bound`` is not above 0, or an answer has no token.
    """
    if not bound > 0:
        raise ValueError(f"bound is {bound}; it must be above 0, nats per token")
    if not len(tokens) or not bool((tokens > 0).all()):
        raise ValueError("an answer has no token, must have at least one to be unlearnt")
    return -(-log_probs / tokens).clamp(max=bound).mean()
