"""Positions of tokens where padding stands on the left.

With learned absolute positions (GPT-2) a token three places to the right of padding would be taken
for the fourth one of its row. So the positions are given: padding then never counts, on either
side. Models with relative positions compute the same with and without.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssah.attribution.batches import Batch

__all__ = ["with_positions"]


def with_positions(model: nn.Module, batch: Batch) -> Batch:
    """``batch`` with ``position_ids`` that start at each row's first attended token.

    It is returned as it is where no row begins with padding, where it has positions already, and
    where the model takes none (its positions follow from the mask: ALiBi).

    Args:
        model: a transformers model.
        batch: what it is to run on.
    """
    mask = batch.inputs.get("attention_mask")
    padded = ~batch.attended[:, 0]  # [rows]
    if "position_ids" in batch.inputs or not bool(padded.any()):
        return batch
    if not isinstance(mask, Tensor) or not _takes_positions(model):
        return batch
    length = batch.attended.shape[1]
    first = batch.attended.int().argmax(1, keepdim=True)  # [rows, 1]
    positions = (torch.arange(length, device=first.device) - first).clamp(min=0)
    device = batch.inputs["input_ids"].device
    return replace(batch, inputs={**batch.inputs, "position_ids": positions.to(device)})


def _takes_positions(model: nn.Module) -> bool:
    backbone = model.base_model
    assert isinstance(backbone, nn.Module)
    return "position_ids" in inspect.signature(backbone.forward).parameters
