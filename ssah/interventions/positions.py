"""Positions: which tokens of a forward pass a change of hidden states is for.

Two prompts of 2 and 4 tokens, padded on the left (.), and the step that generates the next token.
The pass over the prompts has an empty cache, and each step after it has a cache of what was before:

    at            prompts           the step
    "all"         x x x x           x            also padding, which no token attends to
                  x x x x           x
    "last"        . . . x           .            the last token of each prompt
                  . . . x           .
    "generated"   . . . .           x            what the model says
                  . . . .           x
    3             . . . .           .            from the row's own fourth token on: padding does
                  . . . x           x            not count, and the first row has but three
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssah.models import check_bare

# A number or int64 [rows]: from this position of the row on, counted from 0 without padding.
At = Literal["all", "last", "generated"] | int | Sequence[int] | Tensor

_NAMES = ("all", "last", "generated")


def check_at(at: At) -> None:
    """Refuse what names no positions.

    Args:
        at: one of the names, or positions: a number, or integers ``[rows]``.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(at, str):
        good = at in _NAMES
    else:
        numbers = torch.as_tensor(at)
        whole = not numbers.is_floating_point() and numbers.dtype != torch.bool
        good = whole and numbers.dim() <= 1 and bool((numbers >= 0).all())
    if not good:
        raise ValueError(
            f"at is {at!r}; it must be 'all', 'last' (token of the prompt), 'generated', or a "
            "position to begin at: a number, or one a row, 0 or more"
        )


class Passes:
    """What the forward pass under way is over: how many rows, which tokens, after what."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder: nn.Module = check_bare(model).get_decoder()
        self._signature = inspect.signature(type(self.decoder).forward)
        self._given: dict[str, Any] = {}
        self._past = 0
        self._masks: dict[int, Tensor | None] = {}

    def hook(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder, with its keyword arguments."""
        self._given = self._signature.bind_partial(decoder, *args, **kwargs).arguments
        self._given |= self._given.pop("kwargs", {})
        # Now, and not as a layer asks: the layer has put its own tokens into the cache by then.
        # Older releases of transformers call it past_key_values.
        cache = self._given.get("cache", self._given.get("past_key_values"))
        self._past = 0 if cache is None else int(cache.get_seq_length())
        self._masks = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the batch, and tokens of each that this pass computes."""
        ids = self._given.get("input_ids")
        rows, tokens = (self._given["inputs_embeds"] if ids is None else ids).shape[:2]
        return rows, tokens

    def chosen(self, at: At) -> Tensor | None:
        """Bool ``[rows, tokens]``, True where the pass has the positions ``at``; None: all of them.

        Raises:
            ValueError: the pass does not tell: its mask is not ``[rows, tokens]``, it recomputes
                (gradient checkpointing), or it keeps no cache.
        """
        if isinstance(at, str) and at == "all":
            return None
        # By identity: it lives as long as the change that has it, and is asked for in every layer.
        if id(at) not in self._masks:
            self._masks[id(at)] = self._mask(at)
        return self._masks[id(at)]

    def _mask(self, at: At) -> Tensor | None:
        decoder: Any = self.decoder
        if decoder.training and getattr(decoder, "is_gradient_checkpointing", False):
            raise ValueError(
                f"at is {at!r} in a model that recomputes its layers: gradient checkpointing runs "
                "them again when another pass may be under way. It must be 'all', or "
                "model.gradient_checkpointing_disable() comes first"
            )
        (rows, tokens), past = self.shape, self._past
        none = torch.zeros(rows, tokens, dtype=torch.bool)
        if isinstance(at, str) and at == "generated":
            if self._given.get("use_cache") is False:
                raise ValueError(
                    "at is 'generated' in a pass without a cache, which does not tell what was "
                    "generated: use_cache must be True, or at the position where it begins"
                )
            return None if past else none
        if isinstance(at, str) and past:  # a step: the prompt and its last token lie before it
            return none
        attended = self._attended(rows, past + tokens)
        own = attended.cumsum(1) - 1  # [rows, past + tokens]: a token's number in its row
        if isinstance(at, str):
            return attended & (own == own[:, -1:])
        first = torch.as_tensor(at, device=own.device).reshape(-1, 1)  # [1 or rows, 1]
        if len(first) not in (1, rows):
            raise ValueError(f"at has {len(first)} positions, the batch {rows} rows; must be equal")
        return (attended & (own >= first))[:, past:]

    def _attended(self, rows: int, length: int) -> Tensor:
        """Bool ``[rows, length]``: False at padding."""
        mask = self._given.get("attention_mask")
        if mask is None:
            return torch.ones(rows, length, dtype=torch.bool)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != (rows, length):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {shape} in the decoder, must be [{rows}, {length}] to tell "
                "positions (a static cache and vision models have it otherwise): use at='all'"
            )
        return mask.bool()
