"""transformers' Trainer, and what of it has had other names or is private.

Importing it imports peft, which imports bitsandbytes. On a CPU with AVX512-BF16, bitsandbytes then
warns that it has no fast kernel for 4-bit weights. Nothing that is trained here has 4-bit weights,
so this one note is left out. A process that loads 4-bit weights and does not train still shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from ssah.compat import lacking
from ssah.compat.transformers import WORKS, gone

__all__ = [
    "PrinterCallback",
    "SchedulerType",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "get_available_reporting_integrations",
    "set_seed",
    "training_arguments",
]


@contextmanager
def _without_the_note_on_4_bit_weights() -> Iterator[None]:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def keep(record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


try:
    with _without_the_note_on_4_bit_weights():
        from transformers import (
            PrinterCallback,
            Trainer,
            TrainerCallback,
            TrainingArguments,
            set_seed,
        )
        from transformers.integrations import get_available_reporting_integrations
        from transformers.trainer_utils import SchedulerType
except ImportError as error:
    raise lacking("transformers", "Trainer that fits", "to train", WORKS, str(error)) from error


def training_arguments(
    *,
    in_order: bool = False,
    gradient_checkpointing: bool = False,
    **options: Any,
) -> TrainingArguments:
    """``TrainingArguments`` for one device.

    Args:
        in_order: rows are taken in their order.
        gradient_checkpointing: activations are computed again in the backward pass.
        options: the rest, as transformers calls them.

    Raises:
        LibraryError: this release of transformers does not know one of them.
    """
    known = {field.name for field in fields(TrainingArguments)}
    if gradient_checkpointing:
        new = "activation_checkpointing"  # as recent releases name it
        options[new if new in known else "gradient_checkpointing"] = True
    if in_order:
        options["train_sampling_strategy"] = "sequential"
    missing = sorted(options.keys() - known)
    if not missing:
        args = TrainingArguments(**options)
        n_gpu = args.n_gpu  # now the devices are known
        if hasattr(args, "_n_gpu"):
            # On several GPUs Trainer would take DataParallel, which copies what a plan shares.
            args._n_gpu = min(n_gpu, 1)
            return args
        missing = ["_n_gpu"]
    raise gone(f"TrainingArguments.{missing[0]}", "to train")
