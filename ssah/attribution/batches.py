"""What a batch means: which positions count, what is predicted, what the model gets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ssah.data import IGNORE_INDEX as IGNORED

__all__ = [
    "IGNORED",
    "Batch",
    "Fingerprint",
    "Trail",
    "counted_tokens",
    "n_embeddings",
    "read_batch",
]

# A batch with other keys may mean positions or masks that we do not know: it is left as it is.
_PLAIN_KEYS = frozenset({"input_ids", "attention_mask", "labels"})


@dataclass(frozen=True)
class Batch:
    """One batch, ready to run.

    Attributes:
        inputs: keyword arguments of the backbone; no labels.
        input_ids: int64 ``[rows, length]``.
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

    def targets(self) -> Tensor:
        """int64 ``[rows, length]``: the token that each position is to predict, else ``IGNORED``.

        The next position's label (its token where the batch has no labels), if both positions are
        attended and of one document: neither padding on the left nor a document before it in the
        same row adds a prediction of a first token.
        """
        following = self.input_ids if self.labels is None else self.labels
        both = self.attended[:, :-1] & self.attended[:, 1:] & ~self.starts[:, 1:]
        targets = torch.full_like(self.input_ids, IGNORED)
        targets[:, :-1] = following[:, 1:].masked_fill(~both, IGNORED)
        return targets


def counted_tokens(batch: object) -> str:
    """What ``tokens="auto"`` means where ``batch`` comes first: ``"labels"`` if it has them."""
    labelled = isinstance(batch, Mapping) and batch.get("labels") is not None
    return "labels" if labelled else "all"


def n_embeddings(model: nn.Module) -> int:
    """How many token ids ``model`` has an embedding for."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return int(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])


def read_batch(
    batch: object,
    number: int,
    *,
    tokens: str,
    maskless: bool,
    device: torch.device,
    vocab_size: int,
) -> Batch:
    """Check one batch and say what it means.

    Args:
        batch: what the loader yielded: a mapping with ``input_ids`` and optionally
            ``attention_mask``, ``labels`` and whatever else the model takes.
        number: of the batch, for messages.
        tokens: ``"all"``, ``"after_first"`` or ``"labels"``, which positions count.
        maskless: whether the model may be run without the mask of a right-padded batch.
        device: where the model's embeddings are.
        vocab_size: of the model, see :func:`n_embeddings`.

    Raises:
        TypeError: the batch is not a mapping of tensors.
        ValueError: it lacks something, shapes disagree, or a token or label is out of range.
            Padding may have any id: one that has no embedding is given to the model as 0.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"loader yielded a {type(batch).__name__} as batch {number}, must yield mappings with "
            "'input_ids' (and optionally 'attention_mask' and 'labels')"
        )
    input_ids = _ids(batch, "input_ids", number)
    if input_ids is None:
        raise ValueError(
            f"batch {number} has the keys {sorted(map(str, batch))}, must have 'input_ids'"
        )
    labels = _ids(batch, "labels", number)
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"batch {number}: labels have shape {tuple(labels.shape)}, must have that of "
            f"input_ids, {tuple(input_ids.shape)}"
        )
    if labels is None and tokens == "labels":
        raise ValueError(
            f"batch {number} has no labels, must have them when the tokens counted are 'labels'"
        )
    if input_ids.numel() == 0:
        raise ValueError(
            f"batch {number}: input_ids have shape {tuple(input_ids.shape)}, must have at least "
            "one row and one position"
        )
    mask = batch.get("attention_mask")
    if mask is None:
        attended = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        attended = _attended(mask, input_ids, number)
    known = (input_ids >= 0) & (input_ids < vocab_size)
    _check_range("input_ids", input_ids, known | ~attended, number, vocab_size)
    if labels is not None:
        fine = (labels == IGNORED) | (labels >= 0) & (labels < vocab_size)
        _check_range("labels", labels, fine | ~attended, number, vocab_size)
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "use_cache")}
    inputs["input_ids"] = input_ids = input_ids.masked_fill(~known, 0)
    by_position = isinstance(mask, Tensor) and mask.dim() == 2
    plain = by_position and _PLAIN_KEYS.issuperset(batch)
    if maskless and plain and not bool((attended[:, 1:] > attended[:, :-1]).any()):
        del inputs["attention_mask"]
    starts = _starts(batch, attended, number)
    counted = attended & ~starts if tokens == "after_first" else attended
    if tokens == "labels":
        assert labels is not None
        counted = attended & (labels != IGNORED)
    moved = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }
    padding_unseen = by_position and not bool(attended.all())
    return Batch(moved, input_ids, labels, attended, starts, counted, padding_unseen)


def _ids(batch: Mapping[str, Any], key: str, number: int) -> Tensor | None:
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


def _check_range(key: str, ids: Tensor, fine: Tensor, number: int, vocab_size: int) -> None:
    """Refuse a token that the model does not know. ``ids``, ``fine`` (bool): [rows, length]."""
    if bool(fine.all()):
        return
    row, position = (~fine).nonzero()[0].tolist()
    ignored = f" (or {IGNORED}: not to be predicted)" if key == "labels" else ""
    raise ValueError(
        f"batch {number}: {key}[{row}, {position}] is {int(ids[row, position])}, must be from 0 to "
        f"{vocab_size - 1}, a token of the model{ignored}"
    )


def _attended(mask: object, input_ids: Tensor, number: int) -> Tensor:
    """Bool ``[rows, length]`` of a 2-d mask, or of a 4-d one by whether a position sees itself."""
    rows, length = input_ids.shape
    if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
        mask = mask.to(input_ids.device)
        fine = (mask == 0) | (mask == 1)
        if not bool(fine.all()):
            row, position = (~fine).nonzero()[0].tolist()
            raise ValueError(
                f"batch {number}: attention_mask[{row}, {position}] is "
                f"{mask[row, position].item()}, must be 0 (padding) or 1. A mask that is added to "
                "scores, or that numbers documents, must be of shape "
                f"[{rows}, heads, {length}, {length}]"
            )
        return mask != 0
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == (length, length):
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(rows, length).to(input_ids.device)
        return own if own.dtype == torch.bool else own == 0
    what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"batch {number}: attention_mask is {what}, must be [{rows}, {length}] or "
        f"[{rows}, heads, {length}, {length}], so that padding can be told from tokens"
    )


def _starts(batch: Mapping[str, Any], attended: Tensor, number: int) -> Tensor:
    """Bool ``[rows, length]``: where a document begins.

    At the first attended position, and in a packed row where ``position_ids`` start again or a
    4-d mask hides the position before.
    """
    starts = attended.clone()
    starts[:, 1:] &= ~attended[:, :-1]
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        if positions.shape[0] not in (1, len(attended)) or positions.shape[1] != attended.shape[1]:
            raise ValueError(
                f"batch {number}: position_ids have shape {tuple(positions.shape)}, must have that "
                f"of input_ids, {tuple(attended.shape)}"
            )
        again = (positions[:, 1:] <= positions[:, :-1]).to(attended.device)  # [rows or 1, length-1]
        starts[:, 1:] |= again & attended[:, 1:]
    if isinstance(mask, Tensor) and mask.dim() == 4:
        before = mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1).to(attended.device)
        seen = before if before.dtype == torch.bool else before == 0  # [rows or 1, length - 1]
        starts[:, 1:] |= ~seen & attended[:, 1:]
    return starts


class Fingerprint:
    """A hash of the attended tokens and labels of all rows; batching, order and padding do not
    change it."""

    def __init__(self) -> None:
        self._sum = 0

    def update(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        attended = batch.attended.cpu()
        columns = [batch.input_ids.cpu()]
        if batch.labels is not None:
            columns.append(batch.labels.cpu())
        for row in range(len(attended)):
            digest = hashlib.sha256()
            for column in columns:
                kept = column[row][attended[row]].to(torch.int64)
                digest.update(kept.numpy().tobytes())
            self._sum = (self._sum + int.from_bytes(digest.digest(), "big")) % 2**256

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return f"{self._sum:064x}"

    @staticmethod
    def total(parts: Iterable[str]) -> str:
        """That of all rows together, from the hexadecimal digits of each part of them."""
        return f"{sum(int(part, 16) for part in parts) % 2**256:064x}"


class Trail:
    """A hash of batches in their order, of everything that they hold: the same one, the same bits.

    What `read_batch` has refused does not belong here.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, batch: Mapping[str, Any]) -> None:
        """Add what a loader yielded."""
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in batch.items() if key not in tensors}
        # Copies: safetensors refuses tensors that share memory, and strides.
        copies = {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        self._digest.update(safetensors.torch.save(copies))
        self._digest.update(repr(sorted(plain.items())).encode())

    def hexdigest(self) -> str:
        """64 hexadecimal digits, of all batches so far."""
        return self._digest.hexdigest()
