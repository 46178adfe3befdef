"""Which positions of a batch hold tokens, and where its documents begin: of masks and positions.

Example: two texts packed in one row, the second at "D", and one position of padding on the right.

    token           A  B  C  D  E  pad
    position_ids    0  1  2  0  1  0         they start again at "D"
    attended        1  1  1  1  1  0
    starts          1  0  0  1  0  0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def attended_positions(mask: object, input_ids: Tensor, number: int) -> Tensor:
    """Bool ``[rows, length]`` of a 2-d mask, or of a 4-d one by whether a position sees itself.

    Raises:
        ValueError: ``mask`` is neither; ``number`` is that of the batch, for the message.
    """
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


def document_starts(batch: Mapping[str, Any], attended: Tensor, number: int) -> Tensor:
    """Bool ``[rows, length]``: where a document begins.

    At the first attended position, and in a packed row where ``position_ids`` start again or a
    4-d mask hides the position before.

    Raises:
        ValueError: ``position_ids`` are of another shape; ``number`` is that of the batch.
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
