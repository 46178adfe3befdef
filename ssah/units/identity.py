"""Whose result is it? What identifies the units of a model, and one configuration of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ssah.models import config_size, text_config
from ssah.units.find import find_modules

# Settings that change neither the units nor what the model computes: not part of what a run
# that goes on must have kept.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "sep_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def _stable(value: Any) -> Any:
    """``value`` as JSON writes it in every run: without settings of the day, dtypes as text."""
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items() if str(key) not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def config_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the model's configuration, without what does not shape the model.

    A run that was interrupted goes on only with the same. Left out: the name, the dtype, the
    attention implementation, special token ids, library versions.
    """
    text = json.dumps(_stable(model.config.to_dict()), sort_keys=True)  # type: ignore[union-attr, operator]
    return hashlib.sha256(text.encode()).hexdigest()


def units_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of what makes the units of a model: what a result belongs to.

    That is the type of its text model, the hidden size, and of each depth-2 module the name, the
    kind and the number of units. A fine-tuned, quantised, converted or resized copy has the same
    units, under every release of transformers.

    Raises:
        TypeError, ValueError: `find_modules` does not know the model.
    """
    found = find_modules(model)
    # Not the configuration itself: a newer transformers adds fields, a resized vocabulary changes
    # one, and the units stay what they are.
    parts = [[name, module.kind, module.n_units] for name, module in found.items()]
    text = json.dumps([text_config(model).model_type, config_size(model, "hidden_size"), parts])
    return hashlib.sha256(text.encode()).hexdigest()


def model_name(model: nn.Module) -> str:
    """Hub id or path that the model was loaded from, or its class name."""
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def check_same_model(
    model: nn.Module, expected_hash: str | None, *, expected_name: str, what: str
) -> None:
    """Refuse a result that was made on a model with other units.

    Args:
        model: the model that the result is to be used with.
        expected_hash: :func:`units_hash` stored with the result; of an older file, None: then the
            caller compares names and sizes of modules.
        expected_name: :func:`model_name` stored with the result.
        what: what the result is, for the message, e.g. ``"attribution"``.

    Raises:
        ValueError: the units differ.
    """
    if expected_hash is not None and (actual := units_hash(model)) != expected_hash:
        raise ValueError(
            f"{what} was made on {expected_name!r} (units {expected_hash[:12]}), but the model "
            f"given is {model_name(model)!r} (units {actual[:12]}): its architecture, its hidden "
            "size or its depth-2 modules differ, so that its units are others"
        )
