"""Positions: at which tokens of a row hidden states are looked at.

A row of 3 tokens of prompt (P) and 2 of response (R), padded on the left (.):

    token         .  .  P  P  P  R  R
    -2                     x
    "last"                    x              which predicts the first token of the response; also -1
    "first"                      x           the first token of the response
    "response"                   x  x        the mean of these two

Example: states (1, 0) and (3, 2) of the two R have the mean (2, 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ssah.attribution import IGNORED, Batch

# A number below 0 counts from the end of the prompt.
Position: TypeAlias = Literal["last", "first", "response"] | int

Positions: TypeAlias = Position | Iterable[Position]

_NAMES = ("last", "first", "response")


def check_positions(positions: Positions) -> tuple[Position, ...]:
    """``positions`` as they are kept.

    Raises:
        ValueError: one is neither a name nor a number below 0, or is there twice; or none is.
    """
    alone = isinstance(positions, str | int)
    given: tuple[Any, ...] = (positions,) if alone else tuple(positions)  # type: ignore[arg-type]
    for each in given:
        whole = isinstance(each, int) and not isinstance(each, bool)
        if not (each < 0 if whole else each in _NAMES):
            raise ValueError(
                f"positions has {each!r}; it must have 'last' (token of the prompt), 'first' (of "
                "the response), 'response' (its mean), or numbers below 0, from the end of the "
                "prompt"
            )
    if not given or len({-1 if each == "last" else each for each in given}) < len(given):
        raise ValueError(f"positions is {list(given)}; it must have different ones, at least one")
    return given


@dataclass(frozen=True, eq=False)
class StatePositions:
    """Where the states of one batch are.

    Attributes:
        mask: bool ``[rows, positions, length]``: the tokens whose mean is taken.
    """

    mask: Tensor

    @classmethod
    def of(cls, batch: Batch, positions: Sequence[Position], number: int) -> StatePositions:
        """The positions of ``batch``.

        Without labels a row is a prompt, and has no response.

        Args:
            batch: what is to run.
            positions: what `check_positions` returned.
            number: of the batch, for messages.

        Raises:
            ValueError: a row has no response, or too short a prompt.
        """
        attended = batch.attended  # [rows, length]
        length = attended.shape[1]
        every = torch.arange(length, device=attended.device)  # [length]
        response = torch.zeros_like(attended)
        if batch.labels is None:
            needs = [each for each in positions if each in ("first", "response")]
            if needs:
                raise ValueError(
                    f"batch {number} has no labels, must have them where the response begins, for "
                    f"the position {needs[0]!r}"
                )
            first = torch.where(attended, every, -1).amax(1, keepdim=True) + 1  # [rows, 1]
        else:
            # A target stands at the token before the one that is to be predicted.
            response[:, 1:] = (batch.targets != IGNORED)[:, :-1]
            if not bool(response.any(1).all()):
                raise ValueError(
                    f"batch {number} has a row without a response token, must have one in each "
                    "(labels other than -100 after the prompt)"
                )
            first = response.int().argmax(1, keepdim=True)  # [rows, 1]
        masks = []
        for each in positions:
            if each == "response":
                masks.append(response)
                continue
            offset = each if isinstance(each, int) else {"first": 0, "last": -1}[each]
            mask = attended & (every == first + offset)  # [rows, length]
            if not bool(mask.any(1).all()):
                raise ValueError(
                    f"positions has {each}, but a row of batch {number} has a prompt of fewer "
                    "tokens; each must have as many"
                )
            masks.append(mask)
        return cls(torch.stack(masks, 1))

    def take(self, h: Tensor) -> Tensor:
        """The states, float64 ``[copies, rows, positions, hidden]``.

        Args:
            h: ``[copies * rows, length, hidden]``: the batch once, or once for each arm.
        """
        by_copy = h.unflatten(0, (-1, len(self.mask)))  # [copies, rows, length, hidden]
        taken = []
        for mask in self.mask.to(h.device).unbind(1):  # [rows, length]
            # Left out, not multiplied by 0: a padded position may be NaN.
            kept = by_copy.masked_fill(~mask[..., None], 0)
            taken.append(kept.sum(2, dtype=torch.float64) / mask.sum(1)[:, None])
        return torch.stack(taken, 2)
