"""transformers: how it lays experts out, looks for packed rows, and reads a checkpoint's weights.

Its GGUF files are in :mod:`ssah.compat.gguf`, its Trainer in :mod:`ssah.compat.trainer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ssah.compat import Library, LibraryError

LIBRARY = Library("transformers", ">=5.20,<5.25")

# What `use_experts_implementation` says of a class of experts.
_EXPERT_FLAGS = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "is_concatenated",
    "has_post_expert_norm",
    "_apply_gate",
)


def has_expert_layout(module: nn.Module) -> bool:
    """Whether the class of ``module`` says how it lays the weights of its experts out.

    Raises:
        LibraryError: it says a part of it: by another release of transformers.
    """
    missing = [flag for flag in _EXPERT_FLAGS if not hasattr(module, flag)]
    # None of them: no class of experts. A part of them: they have been renamed.
    if missing and len(missing) < len(_EXPERT_FLAGS):
        raise LIBRARY.lacks(
            f"{type(module).__name__}.{missing[0]}", "to read the layout of experts"
        )
    return not missing


def dispatches(module: nn.Module) -> bool:
    """Whether the forward of experts is the one that transformers' decorator has put around them.

    A subclass with a forward of its own inherits the layout, and may compute anything.
    """
    return hasattr(type(module).forward, "__wrapped__")


def is_expert_parallel(module: Any) -> bool:
    """Whether experts are one rank's, so that a token may have chosen some that are elsewhere."""
    return bool(getattr(module, "_is_expert_parallel", False))  # not in every release


def expert_gate(module: Any) -> Callable[[Tensor], Tensor]:
    """What experts compute between A and B: ``[tokens, width of A]`` to ``[tokens, units]``."""
    gate: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
    return gate


def has_usual_gate(module: Any) -> bool:
    """Whether the gate of experts is known to be act(gate) * up, gate first.

    False where transformers no longer has its function for it: :func:`expert_gate` serves any gate,
    with one more pass over what A puts out.
    """
    if not (module.has_gate and module.is_concatenated):
        return False
    try:
        usual = LIBRARY.find(
            "transformers.integrations.moe:_default_apply_gate", "to tell the usual gate of experts"
        )
    except LibraryError:
        return False
    # A class with a gate of its own (a clamp, a shift) has another function under this name.
    return getattr(module._apply_gate, "__func__", None) is usual


def attention_implementation(model: Any) -> str:
    """``"sdpa"``, ``"eager"`` and the like: what computes the attention of ``model``."""
    return str(_own(model.config, "_attn_implementation", "to tell which attention runs"))


_UNPACKED: ContextVar[bool] = ContextVar("unpacked", default=False)


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Layers for which ``model.gradient_checkpointing_enable()`` was called.

    In training mode they keep their inputs alone, and compute the rest again in the backward pass.
    """
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]


@contextmanager
def unpacked_rows() -> Iterator[None]:
    """In the block no row that a model is given holds several documents.

    transformers looks for them in the positions of every batch without a mask, which it makes
    itself, and waits for the GPU to say that there are none. Other threads go on looking.

    Raises:
        LibraryError: transformers looks in another way.
    """
    _look_unless_unpacked()
    before = _UNPACKED.set(True)
    try:
        yield
    finally:
        _UNPACKED.reset(before)


@cache
def _look_unless_unpacked() -> None:
    """Put a function that knows of :func:`unpacked_rows` in place of transformers' own, for good.

    It cannot be there for a block alone: another thread may be in a block of its own.
    """
    name = "find_packed_sequence_indices"
    look = LIBRARY.find(f"transformers.masking_utils:{name}", "to run a batch without waiting")

    @wraps(look)
    def unless_unpacked(position_ids: Tensor) -> Tensor | None:
        # What is traced is traced as ever: a compiler cannot read the variable.
        looks = torch.compiler.is_compiling() or not _UNPACKED.get()
        found: Tensor | None = look(position_ids) if looks else None
        return found

    setattr(import_module("transformers.masking_utils"), name, unless_unpacked)


class WeightReader:
    """Names, types and conversions of the weights in a checkpoint, as ``from_pretrained`` has them.

    Args:
        model: on the meta device.
        dtype: of its weights.
        device: where they are put.

    Raises:
        LibraryError: transformers reads weights in another way.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        loading = "core_model_loading"
        self._model = model
        self._rename = _for_weights(f"{loading}:rename_source_key")
        self._read = _for_weights(f"{loading}:convert_and_load_state_dict_in_model")
        mapping = _for_weights("conversion_mapping:get_model_conversion_mapping")(model) or []
        kinds = (
            _for_weights(f"{loading}:{kind}") for kind in ("WeightRenaming", "WeightConverter")
        )
        self._kinds = [[each for each in mapping if isinstance(each, kind)] for kind in kinds]
        self._options = _for_weights("modeling_utils:LoadStateDictConfig")(
            dtype=dtype,
            dtype_plan=_own(model, "_get_dtype_plan", _READING)(dtype),
            weight_mapping=mapping,
            device_map={"": device},
        )

    def target(self, key: str, names: Any) -> str:
        """Name in the model of what the checkpoint calls ``key``; of its first part if several."""
        target, _ = self._rename(key, *self._kinds, self._model.base_model_prefix, names)
        # A rule may rename what the model calls as the checkpoint does: then the key is right.
        return key if target not in names and key in names else target

    def put(self, tensors: dict[str, Tensor]) -> list[tuple[str, Any, Any]]:
        """Convert tensors of the checkpoint, ``[...]`` as it has them, and put them into the model.

        Returns:
            Name, shape and expected shape of each that does not fit.
        """
        info, _ = self._read(model=self._model, state_dict=tensors, load_config=self._options)
        return list(info.mismatched_keys)


def in_checkpoint_layout(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors ``[...]`` by their names in ``model``, as a checkpoint has them: what saving does.

    Example: ``mlp.experts.gate_up_proj`` of Mixtral is two matrices an expert there, w1 and w3.
    """
    revert = _for_weights("core_model_loading:revert_weight_conversion")
    found: dict[str, Tensor] = revert(model, tensors)
    return found


def tied_weights(model: Any) -> dict[str, str]:
    """Name of a weight that is another one -> the name of that one."""
    return dict(_own(model, "all_tied_weights_keys", _READING))


def tie_weights(model: Any, missing: set[str]) -> None:
    """Tie the weights of ``model`` of which those called ``missing`` were in no file."""
    options = {"missing_keys": missing, "recompute_mapping": False}
    if not options.keys() <= inspect.signature(model.tie_weights).parameters.keys():
        raise LIBRARY.lacks(f"{type(model).__name__}.tie_weights({', '.join(options)})", _READING)
    model.tie_weights(**options)


_READING = "to read the weights of a checkpoint layer by layer"


def _for_weights(place: str) -> Any:
    return LIBRARY.find(f"transformers.{place}", _READING)


def _own(thing: Any, name: str, purpose: str) -> Any:
    """The attribute ``name`` that transformers gives to ``thing``."""
    try:
        return getattr(thing, name)
    except AttributeError as error:
        raise LIBRARY.lacks(f"{type(thing).__name__}.{name}", purpose) from error
