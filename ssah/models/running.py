"""A model while it is measured: in evaluation mode, in its own dtype, by one thread at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ssah.compat.accelerate import OWN_FORWARD, hook_of
from ssah.compat.modules import has_pre_hooks
from ssah.compat.transformers import checkpointed_layers
from ssah.models.finite import naming_weights
from ssah.models.offload import device_of, replaced_forward, runs_own_forward, unconverted
from ssah.models.wrappers import check_whole

# Which thread runs a model, by its backbone: models that share one share its modules.
_RUNNING: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The model is measured inside the block, and as before after it.

    Inside, it is in evaluation mode, no parameter takes a gradient, and it computes in its own
    dtype: neither the caller's autocast nor what accelerate has left on its forward counts. Any
    other forward that was put in place of the model's is used as it is. A FloatingPointError of the
    block names the weight that is NaN or infinite.

    Raises:
        TypeError: ``model`` is not a transformers model, or wraps one.
        ValueError: FSDP1 or ZeRO stage 3 holds its weights.
        RuntimeError: another thread is inside such a block with this model.
    """
    # autocast is switched off by the type of device: embeddings compute where the model does.
    device = device_of(check_whole(model).get_input_embeddings())
    with (
        _alone(model),
        naming_weights(model),
        unconverted(model),
        torch.autocast(device.type, enabled=False),
    ):
        # Of every module by itself: a caller may have a part in evaluation mode while it trains.
        modes = [(module, module.training) for module in model.modules()]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, training in modes:
                module.training = training


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside the block, gradient checkpointing that is on works in evaluation mode too.

    transformers checkpoints in training mode alone, where dropout would be at work. A layer keeps
    its input, and computes the rest again in the backward pass: the same bits in less memory.
    """
    with ExitStack() as stack:
        for layer in checkpointed_layers(model):
            own = layer.forward if hook_of(layer) is None else getattr(layer, OWN_FORWARD)
            again = partial(checkpoint, own, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(replaced_forward(layer, again))
        yield


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    key = _backbone(model)
    with _LOCK:
        check_idle(model, "to be measured")
        outermost = key not in _RUNNING  # one thread may measure inside its own measuring
        if outermost:
            _RUNNING[key] = threading.get_ident()
    try:
        yield
    finally:
        if outermost:
            with _LOCK:
                del _RUNNING[key]


def check_idle(model: nn.Module, purpose: str) -> None:
    """Refuse a model that another thread measures: modes, forwards and hooks are changed meanwhile.

    Args:
        model: the model.
        purpose: what it was to be used for, e.g. ``"to be ablated"``.

    Raises:
        RuntimeError: it is measured.
    """
    if _RUNNING.get(_backbone(model), threading.get_ident()) != threading.get_ident():
        raise RuntimeError(
            f"model {type(model).__name__} is being measured by another thread. It must be idle "
            f"{purpose}: wait for that thread, or give each thread a copy (copy.deepcopy(model))"
        )


def check_backbone(model: PreTrainedModel) -> None:
    """Refuse what would count if the model ran, but not if its backbone runs by itself.

    Raises:
        ValueError: the model has forward pre-hooks, or a forward that is not its class's.
    """
    if model.base_model is model:  # there is nothing to go around
        return
    base = f"model.{model.base_model_prefix}"
    if has_pre_hooks(model):
        raise ValueError(
            f"model {type(model).__name__} has forward pre-hooks, which attribute would go around: "
            f"it runs the backbone. Register them on {base}"
        )
    with unconverted(model):  # accelerate's autocast is no forward that somebody meant
        if not runs_own_forward(model):
            raise ValueError(
                f"model {type(model).__name__} has a forward that somebody put in place of its "
                "class's, which attribute would go around: it runs the backbone. Take it off (del "
                f"model.forward), or replace the forward of {base}"
            )


def _backbone(model: nn.Module) -> nn.Module:
    base = getattr(model, "base_model", model)
    assert isinstance(base, nn.Module)
    return base
