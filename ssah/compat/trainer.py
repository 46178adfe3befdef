"""transformers' Trainer, and what of it has had other names or is private.

Importing it imports peft, which imports bitsandbytes. On a CPU with AVX512-BF16, bitsandbytes then
warns that it has no fast kernel for 4-bit weights. Nothing that is trained here has 4-bit weights,
so this one note is left out. A process that loads 4-bit weights and does not train still shows it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ssah.compat.notes import Without
from ssah.compat.transformers import LIBRARY

_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
_NOTE = Without(("gemm_4bit_forward",))
_LOGGER.addFilter(_NOTE)
try:
    # ``as`` with the same name: handed on, as no other room imports these from transformers.
    from transformers import PrinterCallback as PrinterCallback
    from transformers import Trainer, TrainingArguments
    from transformers import TrainerCallback as TrainerCallback
    from transformers import set_seed as set_seed
    from transformers.integrations import (
        get_available_reporting_integrations as get_available_reporting_integrations,
    )
    from transformers.trainer_utils import SchedulerType as SchedulerType
except ImportError as error:
    raise LIBRARY.lacks("Trainer that fits", "to train", str(error)) from error
finally:
    _LOGGER.removeFilter(_NOTE)


# What a run cannot be resumed without to the same bits; the weights may be in several files.
_PARTS = ("scheduler.pt", "trainer_state.json")
_WHOLE, _SHARDED = ("optimizer.pt",), ("optimizer.bin", "pytorch_model_fsdp.bin")


class SealingTrainer(Trainer):
    """A Trainer that hands each checkpoint on once all of it is written.

    Args:
        seal: called on the first rank with the folder of the checkpoint and the names of files that
            it must have.
        agreeing: gives a block at whose end all ranks wait, and end alike.
        **options: of ``Trainer``.
    """

    def __init__(
        self,
        seal: Callable[[Path, tuple[str, ...]], None],
        agreeing: Callable[[], AbstractContextManager[None]],
        model: Any,
        args: Any,
        **options: Any,
    ) -> None:
        super().__init__(model, args, **options)
        self._seal, self._agreeing = seal, agreeing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        n = self.args.world_size
        states = [f"rng_state_{rank}.pth" for rank in range(n)] if n > 1 else ["rng_state.pth"]
        with self._agreeing():  # every rank writes a part
            self._write_checkpoint(folder, model, trial)
        with self._agreeing():
            if self.args.should_save:
                own = _SHARDED if self.is_fsdp_enabled else _WHOLE
                self._seal(folder, (*own, *_PARTS, *states))

    def _write_checkpoint(self, folder: Path, model: Any, trial: Any) -> None:
        output = folder.parent
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            # Of a full disk torch says "enforce fail", safetensors its own kind of error.
            written = [path for path in folder.glob("*") if path.is_file()]
            path = max(written, key=lambda file: file.stat().st_mtime_ns, default=folder)
            named = isinstance(error, OSError) and error.filename
            about = str(error) if named else f"{str(path)!r}: {str(error).splitlines()[0]}"
            raise OSError(
                f"the checkpoint of step {self.state.global_step} cannot be written ({about}); "
                f"{shutil.disk_usage(output).free:,} bytes are free there: with more of them the "
                "same command goes on from the checkpoint before"
            ) from error


def keeps_whole_checkpoints(trainer: Trainer) -> bool:
    """Whether a trainer with FSDP writes each part of a checkpoint into one file."""
    plugin = trainer.accelerator.state.fsdp_plugin
    return "FULL_STATE_DICT" in str(plugin.state_dict_type)


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
    raise LIBRARY.lacks(f"TrainingArguments.{missing[0]}", "to train")
