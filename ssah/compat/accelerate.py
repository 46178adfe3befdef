"""accelerate: what it hangs on modules, and whether it will shard a model.

Hooks fetch a module's weights before it runs and let them go afterwards. Mixed precision puts
autocast around a model's forward, and leaves it there after training.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ssah.compat import Library

OWN_FORWARD = "_old_forward"  # under which a hooked module keeps the forward of its class
_HOOK = "_hf_hook"
_UNCONVERTED = "_original_forward"
_PREPARED = "_is_accelerate_prepared"
_LIBRARY = Library("accelerate", ">=1.10,<1.16", "train")
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


def forget_prepared(model: nn.Module) -> None:
    """Let accelerate prepare ``model`` once more.

    It marks a model that it has prepared for an evaluation. On several ranks a training afterwards
    finds the mark, and does not wrap the model: each rank trains by itself, and nothing says so.
    """
    own = vars(model)
    own.pop(_PREPARED, None)
    before = own.pop(_UNCONVERTED, None)
    if before is not None:  # else autocast would be put around autocast
        own["forward"] = before
        if getattr(before, "__func__", None) is type(model).forward:
            del own["forward"]


def sharder(args: Any = None) -> str | None:
    """What shards a model as accelerate prepares it; None: nothing does.

    Args:
        args: the ``TrainingArguments`` of the trainer that will do so; None: the ``Accelerator``
            that was made is asked.

    Returns:
        ``"FSDP2"``, ``"FSDP1"`` or ``"DeepSpeed"``.
    """
    if args is None:
        return _sharder_of_accelerator()
    if getattr(args, "deepspeed_plugin", None) is not None:
        return "DeepSpeed"
    state = getattr(args, "distributed_state", None)
    # On CPUs accelerate passes its own FSDP settings over, and takes DistributedDataParallel.
    if state is None or state.distributed_type.value in ("NO", "MULTI_CPU"):
        return None
    plugin = getattr(args, "fsdp_plugin_args", None)
    if plugin is not None:
        return f"FSDP{plugin['fsdp_version']}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # of `accelerate launch`
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return None


def _sharder_of_accelerator() -> str | None:
    if "accelerate" not in sys.modules:
        return None
    purpose = "to know whether a model is to be sharded"
    if not _LIBRARY.find("accelerate.state:is_initialized", purpose)():
        return None
    state = _LIBRARY.find("accelerate.state:AcceleratorState", purpose)()
    kind = state.distributed_type.value
    if kind == "FSDP":
        return f"FSDP{state.fsdp_plugin.fsdp_version}"
    return "DeepSpeed" if kind == "DEEPSPEED" else None


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
