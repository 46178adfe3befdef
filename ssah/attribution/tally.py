"""What the batches of a loader held, all together: how many, of what, and which data that was.

Rows are hashed one by one and the hashes added up, so that a result is of the same data however
that was batched, ordered and padded. Example: the rows "ab" and "c" in one batch, or "c" and "ab"
in two, have the same fingerprint. Their `BatchHash` differs: an interrupted run may go on only with
the very batches that it has begun with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ssah.attribution.batches import IGNORED, Batch
from ssah.distributed import Ranks


@dataclass
class Tally:
    """Counts over batches, and a hash of the attended tokens and labels of all rows.

    Attributes:
        fingerprint: of the data, if the loader knows it; else the hash of the rows, after `join`.
        n_batches: how many there were.
        counted: positions that count.
        n_targets: tokens to predict.
    """

    fingerprint: str | None
    n_batches: int = 0
    counted: int = 0
    n_targets: int = 0
    _rows: int = 0

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        self.n_batches += 1
        self.counted += int(batch.token_mask.sum())
        self.n_targets += int((batch.targets != IGNORED).sum())
        if self.fingerprint is not None:
            return
        attended = batch.attended.cpu()  # [rows, length]
        columns = [batch.input_ids.cpu()]
        if batch.labels is not None:
            columns.append(batch.labels.cpu())
        for row in range(len(attended)):
            digest = hashlib.sha256()
            for column in columns:
                kept = column[row][attended[row]].to(torch.int64)  # [tokens]
                digest.update(kept.numpy().tobytes())
            # A sum, unlike an exclusive or, does not lose a row that is there twice.
            self._rows = (self._rows + int.from_bytes(digest.digest(), "big")) % 2**256

    def join(self, ranks: Ranks) -> None:
        """Make this the tally of all ranks together."""
        told = ranks.tell([self.n_batches, self.counted, self.n_targets, f"{self._rows:x}"])
        self.n_batches, self.counted, self.n_targets = (
            sum(each[i] for each in told) for i in range(3)
        )
        self._rows = sum(int(each[3], 16) for each in told) % 2**256
        self.fingerprint = str(self.fingerprint or f"{self._rows:064x}")

    def check(self, *, metric: str, tokens: str) -> None:
        """Raise ValueError unless the loader gave what ``metric`` needs.

        Args:
            metric, tokens: as `attribute` takes them, ``tokens`` resolved.
        """
        if self.n_batches == 0:
            raise ValueError(
                "loader yielded no batch, must yield at least one (a generator runs only once)"
            )
        if self.counted == 0:
            raise ValueError(
                f"loader has no position that counts with tokens={tokens!r}: every position is "
                "padding" + (" or has the label -100" if tokens == "labels" else "")
            )
        if self.counted == 1 and metric == "variance":
            raise ValueError("loader has a single token that counts, must have two for a variance")


class BatchHash:
    """A hash of batches in their order, of everything that they hold: the same one, the same bits.

    What `BatchReader` has refused does not belong here.
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
