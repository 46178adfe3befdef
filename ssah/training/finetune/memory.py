"""What a fine-tuning run takes: parameters and memory, without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssah.models import config_size
from ssah.training.finetune.run import count_parameters, optimizer_options
from ssah.training.finetune.settings import Settings
from ssah.training.optimising import PlanAdamW
from ssah.training.plan import UpdatePlan
from ssah.units import layers_path

__all__ = ["Memory", "preview"]

_PROBE = 32  # tokens: activations are measured at 1, 2 and 3 times this length, and extrapolated


@dataclass(frozen=True)
class Memory:
    """Estimated memory of a training step, bytes. Allocator and driver come on top of it.

    Attributes:
        weights: parameters and buffers, with what the plan holds beside them.
        gradients: of what trains.
        optimizer_state: both moments of what trains.
        activations: what the forward pass of one batch keeps, and gradients of its logits.
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it together. An upper bound: activations go while gradients come."""
        return self.weights + self.gradients + self.optimizer_state + self.activations


def preview(plan: UpdatePlan, settings: Settings, length: int) -> dict[str, Any]:
    """What training under ``plan`` takes, without training: plain data.

    Activations are those of the largest batch possible, ``batch_size`` rows of ``length`` tokens.
    They are measured in three short forward passes and extrapolated, which is exact as long as
    what a layer keeps is a quadratic function of the length.

    Args:
        plan: an active plan.
        settings: batch size, autocast and checkpointing matter.
        length: tokens of the longest row.

    Returns:
        ``parameters`` (``trained`` and ``all``, counts; ``share`` in [0, 1]) and ``memory``
        (bytes: the fields of `Memory` and ``peak``).

    Raises:
        ValueError: the weights are float16.
    """
    optimizer = PlanAdamW(plan.param_groups(), **optimizer_options(plan, settings))
    trained = list(plan.parameters())
    memory = Memory(
        weights=sum(_storages(_held(plan)).values()),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer_state=optimizer.state_bytes(),
        activations=_activations(plan, settings, length),
    )
    return {
        "parameters": count_parameters(plan),
        "memory": {**asdict(memory), "peak": memory.peak},
    }


def _held(plan: UpdatePlan) -> Iterator[Tensor]:
    yield from plan.model.parameters()
    yield from plan.model.buffers()
    for module in plan.masked.values():
        for tensor in module.split_tensors.values():
            yield tensor.storage
            places = (*tensor.parts, tensor.order, tensor.places)
            yield from (each for each in places if isinstance(each, Tensor))


def _storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    """Address -> bytes of what the tensors are stored in, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _activations(plan: UpdatePlan, settings: Settings, length: int) -> int:
    step = max(1, min(_PROBE, length // 3))
    probes = [_saved(plan, settings, n * step) for n in (1, 2, 3)]
    layers, head = (
        _extrapolated(values, length / step, settings.batch_size / 2)
        for values in zip(*probes, strict=True)
    )
    tokens = settings.batch_size * length
    # The backward pass of the loss makes two gradients of the logits' size, in float32.
    head += 2 * tokens * config_size(plan.model, "vocab_size") * torch.float32.itemsize
    if not settings.gradient_checkpointing:
        return round(layers + head)
    # Kept: the input of each layer. Computed again: one layer at a time, after the head is done.
    n_layers = config_size(plan.model, "num_hidden_layers")
    inputs = tokens * config_size(plan.model, "hidden_size") * plan.model.dtype.itemsize * n_layers
    return round(inputs + max(layers / n_layers, head))


def _extrapolated(values: tuple[int, ...], at: float, times: float) -> float:
    """Of f with f(1), f(2), f(3) given, quadratic: f(0) + times * (f(at) - f(0)).

    f(0) is what does not depend on the length (rotary tables, say), and is kept once for any
    number of rows. Example: 5, 9, 15 is f(x) = x^2 + x + 3, so that f(4) = 23.
    """
    first, second, third = values
    slope, bend = second - first, third - 2 * second + first

    def f(x: float) -> float:
        return first + slope * (x - 1) + bend * (x - 1) * (x - 2) / 2

    return f(0) + times * (f(at) - f(0))


def _saved(plan: UpdatePlan, settings: Settings, length: int) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, in the layers and after them.

    The batch has two rows, the second of them padded, as batches of training are.
    """
    model = plan.model
    device = next(model.parameters()).device
    own = _storages(_held(plan))
    kept: tuple[dict[int, int], dict[int, int]] = ({}, {})
    here = [kept[0]]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept[0]:
            here[0][storage.data_ptr()] = storage.nbytes()
        return tensor

    def leave(*_: Any) -> None:
        here[0] = kept[1]

    ids = torch.zeros((2, length), dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    mask[1, max(1, length - 1) :] = 0
    training = model.training
    # Not on B: among the channels of what a plan has split there is no place for a hook.
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    hook = layers[-1].register_forward_hook(leave)
    try:
        model.train()
        with (
            torch.enable_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            # Bound to a name: what it keeps must stay in memory, so that addresses differ.
            output = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        del output
    finally:
        hook.remove()
        model.train(training)
    return sum(kept[0].values()), sum(kept[1].values())
