"""Logits of the positions that are wanted, and what rows begin with alike is run once.

Three rows that begin with the system message b, and predict their responses at the positions x:

    b b b b p p x x x        b is run once:    b b b b
    b b b b p x x . .        the rest of all:          p p x x x
    b b b b p p p x .                                  p x x . .
                                                       p p p x .
    the vocabulary projection is computed for the 6 positions x, of 15 in the columns that have one

SmolLM2's chat template begins with 24 tokens of system message. On the 40 rows of
`builtin:utility_eval` the layers then compute 2,912 positions in the place of 3,848, padding
included, and the vocabulary projection 1,874 in the place of 2,408.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssah.evaluation.generating import SHARED, cache_of, is_plain
from ssah.interventions import changes_some_positions, rows_have_arms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logits_at(model: PreTrainedModel, inputs: Mapping[str, Any], where: Tensor) -> Tensor:
    """Logits of the positions ``where``, in one pass over whole rows.

    Args:
        model: a causal language model of transformers.
        inputs: keyword arguments of its forward pass, such as ``input_ids`` ``[rows, length]``. No
            cache is kept unless they say so.
        where: bool ``[rows, length]``.

    Returns:
        ``[n, vocabulary]``, row after row.
    """
    with _picked(model.get_output_embeddings(), where) as done:
        logits: Tensor = model(**{"use_cache": False, **inputs}).logits
    # An architecture that projects in another way gives all logits: [rows, length, vocabulary].
    return logits[0] if done else logits[where.to(logits.device)]


def summed_log_prob(logits: Tensor, targets: Tensor) -> float:
    """Log-probability in nats of the tokens ``targets``, int64 ``[n]``.

    ``logits`` is ``[n, vocabulary]``, of one row: those of a whole batch would take their memory
    again in float32.
    """
    loss = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return -float(loss.double().sum())


class Predictions:
    """Logits of batch after batch by a model that stays as it is.

    Args:
        model: a causal language model of transformers, with the interventions that are under way.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._begin: list[int] = []  # tokens whose keys and values are kept
        self._past: dict[str, Any] = {}  # of one row
        self._plain = True  # as far as we know: whether its cache may be gone on from

    def __call__(self, inputs: Mapping[str, Any], where: Tensor) -> Tensor:
        """As :func:`logits_at`, but what all rows begin with is run once.

        Gradients are not kept. Under arms all rows are to be of one arm, ``run.assign(number)``.
        """
        with torch.no_grad():
            shared = self._shared(inputs, where)
            if not shared:
                return logits_at(self._model, inputs, where)
            ids = inputs["input_ids"]  # [rows, length]
            past = copy.deepcopy(self._past)  # a pass adds to its cache
            for cache in past.values():
                cache.reorder_cache(torch.zeros(len(ids), dtype=torch.int64, device=ids.device))
            rest = {**inputs, "input_ids": ids[:, shared:], "use_cache": True, **past}
            return logits_at(self._model, rest, where[:, shared:])

    def _shared(self, inputs: Mapping[str, Any], where: Tensor) -> int:
        """Tokens that all rows begin with, whose cache is there; 0: the rows are run whole."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        # Other inputs may say something of positions; a single row has nothing to share.
        known = inputs.keys() <= {"input_ids", "attention_mask"}
        if not known or len(ids) < 2 or (mask is not None and mask.dim() != 2) or not self._plain:
            return 0
        # One row would stand for several, and a part of a row for all of it.
        if changes_some_positions(self._model) or rows_have_arms(self._model):
            return 0
        alike = (ids == ids[:1]).all(0) & ~where.to(ids.device).any(0)  # [length]
        if mask is not None:
            alike &= mask.bool().all(0)
        shared = int(alike.long().cumprod(0).sum())
        begin = ids[0, :shared].tolist()
        if self._past and begin[: len(self._begin)] == self._begin:
            return len(self._begin)
        if shared < SHARED:
            return 0
        output = self._model(input_ids=ids[:1, :shared], use_cache=True)
        self._begin, self._past = begin, cache_of(output)
        self._plain = is_plain(self._past)
        return shared if self._plain else 0


@contextmanager
def _picked(head: nn.Module | None, where: Tensor) -> Iterator[list[bool]]:
    """Inside, the vocabulary projection is given the positions ``where`` as one row.

    Yields a list that is no longer empty once it was. The vocabulary is by far the widest matrix of
    a model, and ``logits_to_keep`` leaves out columns that no row needs, but no single position.
    """
    done: list[bool] = []

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]  # [rows, length, hidden]
        if hidden.shape[:-1] != where.shape:
            return None
        done.append(True)
        return (hidden[where.to(hidden.device)][None], *args[1:])  # [1, n, hidden]

    if head is None:
        yield done
        return
    hook = head.register_forward_pre_hook(pick)
    try:
        yield done
    finally:
        hook.remove()
