"""Models that accelerate has changed: weights that are elsewhere until their module runs.

An offloaded weight lies on the meta device; the hook on its module fetches it before each forward
and lets it go afterwards. accelerate puts the hook in place of the module's forward:

    module.forward       fetches the weights, calls module._old_forward, lets them go
    module._old_forward  what the class computes

So whoever replaces what a module computes must replace ``_old_forward`` where there is a hook, or
the weights would not be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ssah.compat.accelerate import OWN_FORWARD, hook_of, offloading_hook, unconverted_forward


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes: where its weights are, or where they are fetched to.

    Raises:
        ValueError: the weights are on the meta device and nothing fetches them.
    """
    # A weight may be a tensor and no parameter.
    weight: Any = next(module.parameters(), None)
    weight = module.weight if weight is None else weight
    if not weight.is_meta:
        device: torch.device = weight.device
        return device
    hook = offloading_hook(module)
    if hook is None:
        raise ValueError(
            f"model has a {type(module).__name__} whose weight is on the meta device, without a "
            "hook of accelerate that loads it; it must have its weights"
        )
    return torch.device(hook.execution_device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of ``module`` itself are elsewhere until it runs."""
    own = module.parameters(recurse=False)
    return offloading_hook(module) is not None and any(weight.is_meta for weight in own)


@contextmanager
def at_hand(*modules: nn.Module) -> Iterator[None]:
    """Offloaded weights of ``modules`` are fetched once for the block, however often they run."""
    with ExitStack() as stack:
        for part in [part for module in modules for part in module.modules()]:
            if offloading_hook(part) is not None:
                hook = hook_of(part)
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
                # Without the hook, which would fetch them again at each call.
                stack.enter_context(swapped(part, "forward", getattr(part, OWN_FORWARD)))
        yield


def runs_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` computes what its class says: nobody but accelerate has replaced it."""
    if "forward" not in vars(module):
        return True
    # Under a hook of accelerate the forward that counts is the one that it calls.
    own = module.forward if hook_of(module) is None else getattr(module, OWN_FORWARD)
    return getattr(own, "__func__", None) is type(module).forward


@contextmanager
def unconverted(model: nn.Module) -> Iterator[None]:
    """``model`` runs in its own dtype inside the block: without accelerate's autocast."""
    forward = unconverted_forward(model)
    if forward is None:
        yield
        return
    with swapped(model, "forward", forward):
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` computes ``forward`` inside the block; accelerate's hook still runs around it."""
    with swapped(module, "forward" if hook_of(module) is None else OWN_FORWARD, forward):
        yield


@contextmanager
def swapped(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """``module`` has ``value`` as its attribute ``name`` inside the block."""
    before = vars(module).get(name)  # not the class's: what was not on the module is removed again
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
