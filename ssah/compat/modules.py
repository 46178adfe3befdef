"""torch: what hangs on a module, how its weight is made, and what wraps a model.

All of it is private to torch, or to the library whose class is named.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# Class of a wrapper, qualified; subclasses count -> what to do with it. {inner} is the place of the
# transformers model in it.
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": (
        "torch.compile made it: pass the uncompiled model (model._orig_mod), or compile in place "
        "with model.compile()"
    ),
    "torch.nn.parallel.data_parallel.DataParallel": (
        "pass model.module; several GPUs need a process each (torchrun)"
    ),
    "torch.nn.parallel.distributed.DistributedDataParallel": (
        "pass model.module, and make a plan before the model is wrapped"
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "FSDP1 is not supported: shard the model with torch.distributed.fsdp.fully_shard"
    ),
    "deepspeed.runtime.engine.DeepSpeedEngine": (
        "pass model.module; weights that ZeRO stage 3 has partitioned must be gathered first"
    ),
    "peft.peft_model.PeftModel": (
        "merge the adapters (model = model.merge_and_unload()), or take them off (model.unload())"
    ),
}
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called as ``module`` runs, forward or backward, or as every one does."""
    # torch keeps hooks in dictionaries of these names, and those of all modules in globals.
    own = any(getattr(module, name) for name in _HOOKS)
    return own or any(getattr(torch_module, f"_global{name}") for name in _HOOKS)


def has_pre_hooks(module: nn.Module) -> bool:
    """Whether something may change what ``module`` is given."""
    return bool(module._forward_pre_hooks)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside the block none of the hooks on ``module`` is called."""
    kept = {name: getattr(module, name) for name in _HOOKS}
    vars(module).update({name: OrderedDict() for name in _HOOKS})
    try:
        yield
    finally:
        vars(module).update(kept)


def how_computed(module: nn.Module, leaf: str) -> tuple[str, str] | None:
    """Who computes the tensor ``leaf`` of ``module`` anew as it runs, and how to end that.

    None where it is a parameter, or is missing for good.
    """
    # A computed one is an attribute in the place of the parameter.
    if leaf in module._parameters or getattr(module, leaf, None) is None:
        return None
    if leaf in getattr(module, "parametrizations", {}):
        return (
            "torch.nn.utils.parametrize",
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {leaf!r})",
        )
    for hook in module._forward_pre_hooks.values():
        for kind in type(hook).__mro__:
            place, name = kind.__module__, kind.__name__
            if (place, name) == ("torch.nn.utils.prune", "BasePruningMethod"):
                return place, f"torch.nn.utils.prune.remove(module, {leaf!r})"
            if (place, name) in (
                ("torch.nn.utils.weight_norm", "WeightNorm"),
                ("torch.nn.utils.spectral_norm", "SpectralNorm"),
            ):
                function = place.rpartition(".")[2]
                return place, f"torch.nn.utils.remove_{function}(module, {leaf!r})"
    return f"something that keeps it as a {type(getattr(module, leaf)).__name__}", (
        f"make it a parameter: module.{leaf} = torch.nn.Parameter(...)"
    )


def wrapper_of(model: nn.Module, inner: type[nn.Module]) -> str | None:
    """What to do about a module that wraps an ``inner`` one; None where it holds none."""
    found = ((name, part) for name, part in model.named_modules() if isinstance(part, inner))
    place, part = next(found, (None, None))
    if place is None:
        return None
    known = next((_WRAPPERS[name] for name in _qualified(model) if name in _WRAPPERS), None)
    return (
        f"model is a {type(model).__name__}, which wraps a {type(part).__name__}: "
        f"{known or f'pass model.{place}'}"
    )


def is_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 manages parts of ``model``; those of ``fully_shard`` are marked alike."""
    from ssah_kernels.sharded import is_sharded

    parts = list(model.modules())
    if any(_FSDP1 in _qualified(part) for part in parts):
        return True
    # Of a model that was taken out of its wrapper only the mark tells.
    marked = any(getattr(part, "_is_fsdp_managed_module", False) for part in parts)
    return marked and not any(is_sharded(parameter) for parameter in model.parameters())


def is_transformed() -> bool:
    """Whether ``torch.func`` transforms what runs now: ``grad``, ``vmap``, ``jvp`` and so on."""
    # The compiler traces through a transform, and has no such state of its own to be asked for.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def takes_over(model: nn.Module) -> bool:
    """Whether FSDP, of either kind, manages the parameters of ``model``."""
    from torch.distributed.fsdp import FSDPModule

    return is_fsdp1(model) or any(isinstance(part, FSDPModule) for part in model.modules())


def active_ddp() -> Any:
    """The ``DistributedDataParallel`` whose forward pass runs now, or None."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()


def partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO stage 3 holds a part of ``parameter`` ``[...]`` in each process."""
    return hasattr(parameter, "ds_id")


def _qualified(thing: Any) -> list[str]:
    """The qualified names of the classes of ``thing``, its own first."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(thing).__mro__]
