"""What a batch means: which positions count, what is predicted, what the model gets.

Example: a row of two texts packed together (the second begins at "D"), with one position of
padding.

    token            A     B     C     D     E     pad
    attended         1     1     1     1     1     0
    starts           1     0     0     1     0     0
    label           -100   B     C    -100   E    -100
    targets          B     C    -100   E    -100  -100

A label stands at its own token, and a target at the token before, where the model predicts it. "D"
is no target of "C": no document predicts the next one. With ``tokens="labels"`` the positions of B,
C and E count; with ``"after_first"`` the same ones here, and with ``"all"`` every attended one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution.documents import attended_positions, document_starts
from ssah.data import IGNORE_INDEX as IGNORED
from ssah.models import device_of, text_config, to_device, to_host
from ssah.units import FAMILIES

# A batch with other keys may mean positions or masks that we do not know: it is left as it is.
_PLAIN_KEYS = frozenset({"input_ids", "attention_mask", "labels"})


@dataclass(frozen=True)
class Batch:
    """One batch, ready to run.

    Attributes:
        inputs: keyword arguments of the backbone; no labels.
        input_ids: int64 ``[rows, length]``; this and all below are on the host.
        labels: int64 ``[rows, length]``, or None.
        attended: bool ``[rows, length]``, False on padding.
        starts: bool ``[rows, length]``, True on the first token of every document.
        token_mask: bool ``[rows, length]``, True where a position counts.
        padding_unseen: there is padding, and no other position attends to any of it.
    """

    inputs: dict[str, Any]
    input_ids: Tensor
    labels: Tensor | None
    attended: Tensor
    starts: Tensor
    token_mask: Tensor
    padding_unseen: bool

    @cached_property
    def targets(self) -> Tensor:
        """int64 ``[rows, length]``: the token that each position is to predict, else ``IGNORED``.

        The next position's label (its token where the batch has no labels), if both positions are
        attended and of one document: neither padding on the left nor a document before it in the
        same row adds a prediction of a first token.
        """
        following = self.input_ids if self.labels is None else self.labels
        both = self.attended[:, :-1] & self.attended[:, 1:] & ~self.starts[:, 1:]
        targets = torch.full_like(self.input_ids, IGNORED)
        targets[:, :-1] = following[:, 1:].masked_fill(~both, IGNORED)  # [rows, length - 1]
        return targets

    def up_to(self, end: int) -> Batch:
        """The first ``end`` columns: states there are the same, as no token sees a later one.

        The batch as it is where the model is given more than tensors ``[rows, length]``.
        """
        shape = self.input_ids.shape
        if any(not isinstance(v, Tensor) or v.shape != shape for v in self.inputs.values()):
            return self
        return Batch(
            {key: value[:, :end] for key, value in self.inputs.items()},
            self.input_ids[:, :end],
            None if self.labels is None else self.labels[:, :end],
            self.attended[:, :end],
            self.starts[:, :end],
            self.token_mask[:, :end],
            self.padding_unseen,
        )


class BatchReader:
    """Checks batches for a model, and says what they mean.

    Args:
        model: of transformers.
        tokens: ``"all"``, ``"after_first"`` or ``"labels"``: which positions count.
        keep_mask: whether the model gets the mask of a right-padded batch even where it may do
            without.
        device: where the batches are to be; None: where the model's embeddings are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokens: str,
        keep_mask: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.tokens = model, tokens
        self._maskless = may_drop_mask(model) and not keep_mask
        embeddings = model.get_input_embeddings()
        self.device = device_of(embeddings) if device is None else device
        # How many token ids the model has an embedding for. Some tables do not say it themselves.
        n_ids: Any = getattr(embeddings, "num_embeddings", None)
        self._n_ids = int(n_ids or len(embeddings.weight))  # type: ignore[arg-type]

    def read(self, batch: object, number: int) -> Batch:
        """One batch.

        Args:
            batch: what the loader yielded: a mapping with ``input_ids`` and optionally
                ``attention_mask``, ``labels`` and whatever else the model takes.
            number: of the batch, for messages.

        Raises:
            TypeError: the batch is not a mapping of tensors.
            ValueError: it lacks something, shapes disagree, or a token or label is out of range.
                Padding may have any id: one that has no embedding is given to the model as 0.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"loader yielded a {type(batch).__name__} as batch {number}, must yield mappings "
                "with 'input_ids' (and optionally 'attention_mask' and 'labels')"
            )
        batch = _on_host(batch)
        input_ids, labels = self._ids_and_labels(batch, number)
        mask = batch.get("attention_mask")
        if mask is None:
            attended = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            attended = attended_positions(mask, input_ids, number)
        known = self._known(input_ids)
        self._check_range("input_ids", input_ids, known | ~attended, number)
        if labels is not None:
            fine = (labels == IGNORED) | self._known(labels)
            self._check_range("labels", labels, fine | ~attended, number)
        starts = document_starts(batch, attended, number)
        counted = attended & ~starts if self.tokens == "after_first" else attended
        if self.tokens == "labels":
            assert labels is not None
            counted = attended & (labels != IGNORED)
        input_ids = input_ids.masked_fill(~known, 0)
        by_position = isinstance(mask, Tensor) and mask.dim() == 2
        return Batch(
            self._inputs(batch, input_ids, attended, by_position),
            input_ids,
            labels,
            attended,
            starts,
            counted,
            padding_unseen=by_position and not bool(attended.all()),
        )

    def _ids_and_labels(
        self, batch: Mapping[str, Any], number: int
    ) -> tuple[Tensor, Tensor | None]:
        """Both ``[rows, length]``."""
        input_ids, labels = (_ids(batch, key, number) for key in ("input_ids", "labels"))
        if input_ids is None:
            raise ValueError(
                f"batch {number} has the keys {sorted(map(str, batch))}, must have 'input_ids'"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"batch {number}: labels have shape {tuple(labels.shape)}, must have that of "
                f"input_ids, {tuple(input_ids.shape)}"
            )
        if labels is None and self.tokens == "labels":
            raise ValueError(
                f"batch {number} has no labels, must have them when the tokens counted are 'labels'"
            )
        if input_ids.numel() == 0:
            raise ValueError(
                f"batch {number}: input_ids have shape {tuple(input_ids.shape)}, must have at "
                "least one row and one position"
            )
        return input_ids, labels

    def _known(self, ids: Tensor) -> Tensor:
        """Bool ``[rows, length]``: the model has an embedding for it."""
        return (ids >= 0) & (ids < self._n_ids)

    def _check_range(self, key: str, ids: Tensor, fine: Tensor, number: int) -> None:
        """Refuse a token that the model does not know. ``ids``, ``fine`` (bool): [rows, length]."""
        if bool(fine.all()):
            return
        row, position = (~fine).nonzero()[0].tolist()
        ignored = f" (or {IGNORED}: not to be predicted)" if key == "labels" else ""
        raise ValueError(
            f"batch {number}: {key}[{row}, {position}] is {int(ids[row, position])}, must be from "
            f"0 to {self._n_ids - 1}, a token of the model{ignored}"
        )

    def _inputs(
        self, batch: Mapping[str, Any], input_ids: Tensor, attended: Tensor, by_position: bool
    ) -> dict[str, Any]:
        """What the model gets. ``input_ids``, ``attended``: ``[rows, length]``; ``by_position``:
        the mask is of that shape too."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "use_cache")}
        inputs["input_ids"] = input_ids
        # A causal model computes the same without a mask where padding stands on the right alone,
        # and its attention is faster then.
        plain = by_position and _PLAIN_KEYS.issuperset(batch)
        if self._maskless and plain and not bool((attended[:, 1:] > attended[:, :-1]).any()):
            del inputs["attention_mask"]
        # With learned absolute positions (GPT-2) a token three places to the right of padding would
        # be taken for the fourth one of its row. So positions begin at the first attended token.
        # A model that takes none has them from its mask (ALiBi).
        padded = "position_ids" not in inputs and not bool(attended[:, 0].all())
        if padded and isinstance(inputs.get("attention_mask"), Tensor) and self._takes_positions():
            first = attended.int().argmax(1, keepdim=True)  # [rows, 1]
            every = torch.arange(attended.shape[1], device=first.device)  # [length]
            inputs["position_ids"] = (every - first).clamp(min=0)  # [rows, length]
        return {
            key: to_device(value, self.device) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }

    def _takes_positions(self) -> bool:
        backbone = self.model.base_model
        assert isinstance(backbone, nn.Module)
        return "position_ids" in inspect.signature(backbone.forward).parameters


def counted_tokens(batch: object) -> str:
    """What ``tokens="auto"`` means where ``batch`` comes first: ``"labels"`` if it has them."""
    labelled = isinstance(batch, Mapping) and batch.get("labels") is not None
    return "labels" if labelled else "all"


def may_drop_mask(model: PreTrainedModel) -> bool:
    """Whether a right-padded batch may run without its attention mask."""
    config = text_config(model)
    family = FAMILIES.get(config.model_type)  # of an unknown one nothing is known
    causal = getattr(config, "is_causal", True)
    both_ways = getattr(config, "use_bidirectional_attention", False)
    return family is not None and family.maskless and causal and not both_ways


def _on_host(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch that a loader has put on a GPU is brought back at once: every look would wait."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    return {**batch, **dict(zip(tensors, to_host([*tensors.values()]), strict=True))}


def _ids(batch: Mapping[str, Any], key: str, number: int) -> Tensor | None:
    """Integers ``[rows, length]``, or None where the batch has none."""
    value = batch.get(key)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() != 2:
        what = (
            f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        raise TypeError(f"batch {number}: {key} is {what}, must be integers [rows, length]")
    if value.dtype == torch.bool:
        raise TypeError(f"batch {number}: {key} is a bool tensor, must be integers [rows, length]")
    return value if value.dtype == torch.int32 else value.to(torch.int64)
