"""Runs in memory that stop after some batches, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import build, collate, rows
from torch import Tensor

from ssah.attribution import attribute

Batches = list[dict[str, Tensor]]
PART = "rank-0000-of-0001"


def batches(n: int = 3) -> Batches:
    return [collate(rows((11, 4, 9), seed=seed)) for seed in range(n)]


def killed_after(n: int, data: Batches) -> Iterator[dict[str, Tensor]]:
    """The first ``n`` batches, then an error, which leaves what a kill leaves between batches."""
    yield from data[:n]
    raise InterruptedError


def interrupt(n: int, state: Path) -> None:
    """Leave a state of ``n`` batches of the tiny model."""
    loader = killed_after(n, batches())
    with pytest.raises(InterruptedError):
        attribute(build("llama"), loader, resume_dir=state, save_every_seconds=0)
