"""peft: which modules of a model have adapters, and in which tensor each keeps what."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from ssah.compat import Library

_LIBRARY = Library("peft", ">=0.19,<0.22", "train")
_ADAPTER = "adapter_config.json"  # what peft writes beside the weights of an adapter
_PURPOSE = "to know which weights an adapter changes"


def inner_model(model: nn.Module) -> nn.Module | None:
    """The transformers model inside a ``PeftModel``; None where ``model`` is no such thing."""
    if "peft" not in sys.modules:  # what was never imported has wrapped nothing
        return None
    kind = _LIBRARY.find("peft:PeftModel", _PURPOSE)
    if not isinstance(model, kind):
        return None
    inner: nn.Module = model.get_base_model()
    return inner


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters of a ``PeftModel`` that its forward pass uses."""
    active: Any = model.active_adapters
    return (active,) if isinstance(active, str) else tuple(active)


def adapted(inner: nn.Module) -> dict[str, nn.Module]:
    """Name in the model -> module that peft has put in the place of the module of that name."""
    if "peft" not in sys.modules:
        return {}
    layer = _LIBRARY.find("peft.tuners.tuners_utils:BaseTunerLayer", _PURPOSE)
    return {name: module for name, module in inner.named_modules() if isinstance(module, layer)}


def adapters_on(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the adapters that add to what ``module`` does; None: it has no place for any."""
    if not adapted(module).get(""):
        return None
    own: Any = module
    return () if own.disable_adapters else tuple(own.active_adapters)


def experts_out_dim(layer: Any) -> int:
    """Of adapted experts' parameter, the dimension that B of the adapter runs along; A: the other.

    Which one it is depends on the release of peft, and on whether an expert is ``[in, out]``.
    """
    return 1 if layer._did_swap_in_out_features else 2


def saved_whole(inner: nn.Module) -> dict[str, nn.Module]:
    """Name in the model -> wrapper of a module that trains whole (``modules_to_save``)."""
    if "peft" not in sys.modules:
        return {}
    wrapper = _LIBRARY.find("peft.utils.other:ModulesToSaveWrapper", _PURPOSE)
    return {name: module for name, module in inner.named_modules() if isinstance(module, wrapper)}


def with_adapter(model: nn.Module, folder: str) -> nn.Module:
    """``model`` with the adapter that ``save_pretrained`` has written to ``folder``.

    Raises:
        LibraryError: peft is not installed, or another release.
    """
    kind = _LIBRARY.find("peft:PeftModel", "to load an adapter")
    adapted: nn.Module = kind.from_pretrained(model, folder)
    return adapted


def is_adapter(name: str | os.PathLike[str]) -> bool:
    """Whether ``name`` is the folder of an adapter."""
    return (Path(name) / _ADAPTER).is_file()


def merged(model: nn.Module, folder: str) -> Any:
    """``model`` with the adapter in ``folder`` added to its weights: an ordinary model again.

    Raises:
        LibraryError: as of `with_adapter`.
    """
    adapted: Any = with_adapter(model, folder)
    return adapted.merge_and_unload()
