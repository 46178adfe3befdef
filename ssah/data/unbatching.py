"""Rows out of batches: what was padded to be scored together, as rows that a trainer may shuffle.

A batch of two rows, of which the second one is padded on the right:

    input_ids  5 6 7    attention_mask  1 1 1    labels  -100 6    7
               8 9 0                    1 1 0            -100 9 -100

    rows       [5, 6, 7] with [-100, 6, 7], and [8, 9] with [-100, 9]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ssah.data.encoding import Encoded


def encoded_rows(batches: Iterable[Mapping[str, Any]]) -> list[Encoded]:
    """The rows of all batches in their order, without padding on either side.

    Args:
        batches: as `make_loader` gives them: ``input_ids``, ``labels`` and, where rows are padded,
            ``attention_mask``, ``[rows, length]`` each.

    Raises:
        ValueError: a batch has no labels, or there is no row.
    """
    rows: list[Encoded] = []
    for batch in batches:
        ids = batch["input_ids"]
        if batch.get("labels") is None:
            raise ValueError(
                f"batches have {', '.join(batch)}; they must have labels to be trained on, as "
                "those of ssah.data.make_loader have"
            )
        attended = batch.get("attention_mask", torch.ones_like(ids)).bool()  # [rows, length]
        rows += [
            {"input_ids": own[kept].tolist(), "labels": labels[kept].tolist()}
            for own, labels, kept in zip(ids, batch["labels"], attended, strict=True)
        ]
    if not rows:
        raise ValueError("batches have no row; there must be at least one to train on")
    return rows
