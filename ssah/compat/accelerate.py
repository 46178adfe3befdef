"""accelerate: what it hangs on modules.

Hooks fetch a module's weights before it runs and let them go afterwards. Mixed precision puts
autocast around a model's forward, and leaves it there after training.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ssah.compat import Library

OWN_FORWARD = "_old_forward"  # under which a hooked module keeps the forward of its class
_HOOK = "_hf_hook"
_UNCONVERTED = "_original_forward"
_LIBRARY = Library("accelerate", ">=1.10,<1.16")
_PURPOSE = "to know which weights are offloaded"


def hook_of(module: nn.Module) -> Any:
    """The hook that accelerate has put on ``module``, or None.

    Raises:
        LibraryError: accelerate keeps its hooks elsewhere.
    """
    own = vars(module)
    # A hook gives the module a forward of its own, wherever it may be kept.
    if "forward" in own and "accelerate" in sys.modules:
        _check()
    return own.get(_HOOK)


def offloading_hook(module: nn.Module) -> Any:
    """The hook that fetches the weights of ``module`` to its ``execution_device``, or None."""
    hook = hook_of(module)
    hooks = getattr(hook, "hooks", [hook])  # several are chained in one SequentialHook
    return next((each for each in hooks if getattr(each, "offload", False)), None)


def unconverted_forward(model: nn.Module) -> Callable[..., Any] | None:
    """The forward of ``model`` that accelerate has put autocast around; None where it has not.

    Raises:
        LibraryError: it has, and keeps that forward elsewhere.
    """
    own = vars(model)
    if "forward" not in own:
        return None
    unconverted: Callable[..., Any] | None = own.get(_UNCONVERTED)
    # What it has put there comes from this module of its own, whatever it calls the attribute.
    made_by = getattr(getattr(own["forward"], "__func__", None), "__module__", "")
    if unconverted is None and made_by == "accelerate.utils.operations":
        raise _LIBRARY.lacks(
            f"{_UNCONVERTED} on a model that it trains in mixed precision",
            "to run the model in its own dtype",
        )
    return unconverted


@functools.cache
def _check() -> None:
    """Put a hook on a module, and look for what this file reads."""
    names = ("add_hook_to_module", "AlignDevicesHook", "SequentialHook")
    add, align, sequence = (_LIBRARY.find(f"accelerate.hooks:{name}", _PURPOSE) for name in names)
    probe = add(nn.Identity(), align(execution_device="cpu"))
    wanted = {
        _HOOK: vars(probe),
        OWN_FORWARD: vars(probe),
        "offload": vars(vars(probe).get(_HOOK, probe)),
        "execution_device": vars(vars(probe).get(_HOOK, probe)),
        "hooks": vars(sequence()),
    }
    for name, there in wanted.items():
        if name not in there:
            raise _LIBRARY.lacks(f"{name} on what it hooks", _PURPOSE)
