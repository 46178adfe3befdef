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

Where a change is to begin, and how strongly each row takes part, may be computed of the prompts
themselves. A function of two prompts that gives (2, 0), for example, begins at the third token of
the first row and at the first token of the second one. It is asked in the pass over the prompts,
and the steps after it go on with what it gave.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ssah.models import check_bare


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a pass with an empty cache is over.

    Attributes:
        model: no hidden state is changed in it while a function is asked about the prompts.
        input_ids: int64 ``[rows, tokens]``.
        attended: bool ``[rows, tokens]``, False at padding.
    """

    model: nn.Module
    input_ids: Tensor
    attended: Tensor


# Gives one number a row, [rows].
OfPrompts: TypeAlias = Callable[[Prompts], Tensor]

# A number or int64 [rows]: from this position of the row on, counted from 0 without padding.
At = Literal["all", "last", "generated"] | int | Sequence[int] | Tensor | OfPrompts

_NAMES = ("all", "last", "generated")
# Decoders about whose prompts a function is asked: its own passes are of an unchanged model.
_ASKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_at(at: At) -> None:
    """Refuse what names no positions.

    Args:
        at: one of the names, or positions: a number, integers ``[rows]``, or what computes them.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(at, str):
        good = at in _NAMES
    elif callable(at):
        good = True  # what it gives is checked as a pass asks it
    else:
        numbers = torch.as_tensor(at)
        whole = not numbers.is_floating_point() and numbers.dtype != torch.bool
        good = whole and numbers.dim() <= 1 and bool((numbers >= 0).all())
    if not good:
        raise ValueError(
            f"at is {at!r}; it must be 'all', 'last' (token of the prompt), 'generated', or a "
            "position to begin at: a number, one a row, 0 or more, or a function of the prompts"
        )


class Passes:
    """What the forward pass under way is over.

    Attributes:
        decoder: the part of the model that has the layers.
        shape: rows of the batch, and tokens of each that this pass computes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.decoder: nn.Module = check_bare(model).get_decoder()
        self.shape = (0, 0)
        self._signature = inspect.signature(type(self.decoder).forward)
        self._past = 0  # tokens in the cache
        self._keeps_cache = True
        self._attention_mask: Any = None
        self._device = torch.device("cpu")
        self._masks: dict[int, Tensor | bool] = {}
        self._ids: Tensor | None = None
        self._given: dict[int, Tensor] = {}  # by what computed it of the prompts

    @property
    def asking(self) -> bool:
        """Whether the pass under way is one of a function that is asked about the prompts."""
        return self.decoder in _ASKED

    def hook(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder, with its keyword arguments."""
        if self.asking:  # the pass that asks goes on afterwards
            return
        given = self._signature.bind_partial(decoder, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        self._ids = given.get("input_ids")
        ids = given["inputs_embeds"] if self._ids is None else self._ids  # [rows, tokens, ...]
        self.shape, self._device = (ids.shape[0], ids.shape[1]), ids.device
        # Older releases of transformers call it past_key_values.
        cache = given.get("cache", given.get("past_key_values"))
        # Now, and not as a layer asks: the layer has put its own tokens into the cache by then.
        self._past = 0 if cache is None else int(cache.get_seq_length())
        self._keeps_cache = given.get("use_cache") is not False
        self._attention_mask = given.get("attention_mask")
        self._masks = {}
        if not self._past:  # other prompts
            self._given = {}

    def of_prompts(self, function: OfPrompts) -> Tensor:
        """What ``function`` gives for the prompts, ``[rows]``; it is asked once for them.

        Raises:
            ValueError: the prompts were not seen, or are no tokens; it gives something else.
        """
        # By identity, as below.
        if id(function) not in self._given:
            self._given[id(function)] = self._ask(function)
        return self._given[id(function)]

    def _ask(self, function: OfPrompts) -> Tensor:
        self._check_not_recomputed("computed of the prompts")
        if self._past or self._ids is None:
            raise ValueError(
                f"{function!r} is to be asked about prompts, and the pass "
                + ("goes on from a cache of them" if self._past else "has inputs_embeds alone")
                + "; it must be entered before the pass over the prompts, which must have input_ids"
            )
        _ASKED.add(self.decoder)
        try:
            found = function(Prompts(self._model, self._ids, self._attended()))
        finally:
            _ASKED.discard(self.decoder)
        if tuple(found.shape) != self.shape[:1] or not bool(found.isfinite().all()):
            raise ValueError(
                f"{function!r} gives {found.dtype} {list(found.shape)} for {self.shape[0]} "
                "prompts; it must give one finite number for each"
            )
        return found

    def chosen(self, at: At) -> Tensor | bool:
        """Bool ``[rows, tokens]``, True where the pass has the positions ``at``.

        True stands for all of them, False for none.

        Raises:
            ValueError: the pass does not tell: its mask is not ``[rows, tokens]``, it recomputes
                (gradient checkpointing), or it keeps no cache.
        """
        if isinstance(at, str) and at == "all":
            return True
        # By identity: it lives as long as the change that has it, and is asked for in every layer.
        if id(at) not in self._masks:
            self._masks[id(at)] = self._mask(at)
        return self._masks[id(at)]

    def _check_not_recomputed(self, at: object) -> None:
        decoder: Any = self.decoder
        if decoder.training and getattr(decoder, "is_gradient_checkpointing", False):
            raise ValueError(
                f"at is {at!r} in a model that recomputes its layers: gradient checkpointing runs "
                "them again when another pass may be under way. It must be 'all', or "
                "model.gradient_checkpointing_disable() comes first"
            )

    def _mask(self, at: At) -> Tensor | bool:
        self._check_not_recomputed(at)
        if isinstance(at, str) and at == "generated":
            if not self._keeps_cache:
                raise ValueError(
                    "at is 'generated' in a pass without a cache, which does not tell what was "
                    "generated: use_cache must be True, or at the position where it begins"
                )
            return self._past > 0
        if isinstance(at, str) and self._past:  # a step: the last of the prompt lies before it
            return False
        attended = self._attended()
        own = attended.cumsum(1) - 1  # [rows, past + tokens]: a token's number in its row
        if isinstance(at, str):
            return attended & (own == own[:, -1:])
        given = self.of_prompts(at) if callable(at) else at
        first = torch.as_tensor(given, device=own.device).reshape(-1, 1)  # [1 or rows, 1]
        rows = self.shape[0]
        if len(first) not in (1, rows):
            raise ValueError(f"at has {len(first)} positions, the batch {rows} rows; must be equal")
        return (attended & (own >= first))[:, self._past :]

    def _attended(self) -> Tensor:
        """Bool ``[rows, past + tokens]``: False at padding."""
        mask, wanted = self._attention_mask, (self.shape[0], self._past + self.shape[1])
        if mask is None:
            return torch.ones(wanted, dtype=torch.bool, device=self._device)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != wanted:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {shape} in the decoder, must be {list(wanted)} to tell "
                "positions (a static cache and vision models have it otherwise): use at='all'"
            )
        return mask.bool()
