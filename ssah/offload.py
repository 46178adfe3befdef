"""Models that accelerate has dispatched: weights that are elsewhere until their module runs.

An offloaded weight lies on the meta device; the hook on its module fetches it before each forward
and lets it go afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ssah.compat.accelerate import OWN_FORWARD, hook_of, offloading_hook

__all__ = ["at_hand", "device_of", "replaced_forward", "runs_own_forward"]


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes: where its weights are, or where they are fetched to.

    Raises:
        ValueError: the weights are on the meta device and nothing fetches them.
    """
    weight = next(module.parameters(), None)
    if weight is None:  # a weight that is a tensor and no parameter
        weight = module.weight
    if not weight.is_meta:
        return weight.device
    hook = offloading_hook(module)
    if hook is None:
        raise ValueError(
            f"model has a {type(module).__name__} whose weight is on the meta device, without a "
            "hook of accelerate that loads it; it must have its weights"
        )
    return torch.device(hook.execution_device)


@contextmanager
def at_hand(*modules: nn.Module) -> Iterator[None]:
    """Offloaded weights of ``modules`` are fetched once for the block, however often they run."""
    with ExitStack() as stack:
        for part in [part for module in modules for part in module.modules()]:
            if offloading_hook(part) is not None:
                hook = hook_of(part)
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
                stack.enter_context(_set(part, "forward", getattr(part, OWN_FORWARD)))
        yield


def runs_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` computes what its class says: nobody but accelerate has replaced it."""
    if hook_of(module) is not None:
        own = getattr(module, OWN_FORWARD)
        return getattr(own, "__func__", None) is type(module).forward
    return "forward" not in vars(module)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` computes ``forward`` inside the block; accelerate's hook still runs around it."""
    with _set(module, "forward" if hook_of(module) is None else OWN_FORWARD, forward):
        yield


@contextmanager
def _set(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
