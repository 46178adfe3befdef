"""What ``ssah bench`` measures, in full and with ``--quick``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BATCH_SIZE = 8  # rows of the batches that are scored


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    rows: int  # of the operators' inputs [rows, columns]
    columns: int
    dtypes: tuple[torch.dtype, ...]
    rounds: int  # in which every call of an operator has its turn
    layers: int  # of the Llama that is scored
    hidden: int  # its width
    length: int  # tokens a row of a batch
    scoring_rounds: int
    cache_bytes: int = 64 << 20  # what a cache may hold; inputs rotate through twice that


FULL = Settings(
    rows=4096,
    columns=4096,
    dtypes=(torch.bfloat16, torch.float32),
    rounds=11,
    layers=8,
    hidden=1024,
    length=256,
    scoring_rounds=7,
)
QUICK = Settings(
    rows=1024,
    columns=4096,
    dtypes=(torch.bfloat16,),
    rounds=5,
    layers=4,
    hidden=512,
    length=64,
    scoring_rounds=3,
)
