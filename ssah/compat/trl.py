"""trl: what in its trainers reads the weights of a model by name, or pairs them with another's."""

from __future__ import annotations

import sys
from typing import Any

from ssah.compat import Library

_LIBRARY = Library("trl", ">=1.0,<1.17", "train")
_PURPOSE = "to prepare a trainer for a plan"
_ASYNC = "trl.experimental.async_"


def averages(trainer: Any) -> list[Any]:
    """The callbacks of a trainer that average weights (BEMA)."""
    return _callbacks(trainer, "BEMACallback")


def reference_syncs(trainer: Any) -> list[Any]:
    """The callbacks of a trainer that bring its reference model up to date."""
    return _callbacks(trainer, "SyncRefModelCallback")


def sends_weights(trainer: Any) -> bool:
    """Whether a trainer hands its weights to vLLM; those that generate elsewhere always do."""
    elsewhere = (kind.__module__.startswith(_ASYNC) for kind in type(trainer).__mro__)
    return bool(getattr(trainer.args, "use_vllm", False)) or any(elsewhere)


def weight_sync(trainer: Any) -> tuple[Any, str] | None:
    """Where a trainer hands its weights to vLLM: the object, and the name of its method.

    None: nothing here is known to do so. `GRPOTrainer`, `RLOOTrainer` and others keep an object for
    it; `OnlineDPOTrainer` does it itself.
    """
    for owner, method in (
        (getattr(trainer, "vllm_generation", None), "sync_weights"),
        (trainer, "_move_model_to_vllm"),
    ):
        if hasattr(owner, method):
            return owner, method
    return None


def preference_trainer() -> tuple[Any, Any]:
    """TRL's trainer on pairs of answers, and the class of its arguments.

    Raises:
        LibraryError: trl is not installed, or another release.
    """
    purpose = "to train on preferences"
    return _LIBRARY.find("trl:DPOTrainer", purpose), _LIBRARY.find("trl:DPOConfig", purpose)


def _callbacks(trainer: Any, kind: str) -> list[Any]:
    if "trl" not in sys.modules:  # what was never imported has made no callback
        return []
    wanted = _LIBRARY.find(f"trl:{kind}", _PURPOSE)
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, wanted)]
