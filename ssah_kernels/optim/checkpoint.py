"""Saving and resuming a masked optimiser: compact state, whole DTensors, and what must agree.

State is compact, so that a checkpoint is too: of a weight [1000, 64] of which 200 rows train, each
moment is [200, 64]. Two selections may have one size, so that the indices are compared as well: a
moment of row 3 must not become that of row 4.

A sharded parameter's state is saved as a DTensor of the parameter's whole shape, zero where nothing
trains. Any number of ranks can then read what any other number has written, because only whole
shapes mean the same to both. Scales of state in 8 bits have a row for each row of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..dynamic_map import scales_shape
from ..sharded import compact, expand, is_sharded, join, local, parts
from .calls import scales_of


class Masked(Protocol):
    """What is read of an optimiser here, so that this file need not import it.

    Of its entries: number, state, parameter [units, other], index [trained] or None, and dim.
    """

    param_groups: list[dict[str, Any]]
    state: Any
    state_names: tuple[str, ...]

    def entries(self) -> Iterator[tuple[int, dict[str, Any], Tensor, Tensor | None, Any]]: ...


Entries = tuple[list[Tensor | None], list[Any]]  # indices and dims of one group


def entries_of(optimizer: Masked) -> list[Entries]:
    """What every group trains."""
    return [(group["indices"], group["dims"]) for group in optimizer.param_groups]


def numbers(state_dict: dict[str, Any]) -> Iterator[int]:
    """The numbers that ``state_dict`` gives to parameters, in the order of the optimiser."""
    return (n for group in state_dict["param_groups"] for n in group["params"])


def trained_shape(p: Tensor, index: Tensor | None, dim: Any) -> list[int]:
    """The shape of what trains of ``p`` [units, other]: [trained, other]; of experts [all]."""
    shape = list(p.shape)
    if index is not None and not isinstance(dim, int) and shape[0] == 1:  # one expert: not cut
        shape[dim[1]] = len(index)
        return shape[1:]
    if index is not None and not isinstance(dim, int):
        # One expert behind the other: entries [trained], each of the size of the third dimension.
        return [len(index) * p.numel() // math.prod(shape[d] for d in dim)]
    if index is not None and isinstance(dim, int):
        shape[dim] = len(index)
    return shape


def _placed(
    optimizer: Masked, name: str, p: Tensor, index: Tensor | None, dim: Any
) -> tuple[Tensor | None, Any, tuple[int, ...] | None]:
    """Index, dimension and shape by which state ``name`` of a sharded parameter is expanded."""
    if name not in map(scales_of, optimizer.state_names):
        return index, dim, None
    rows, *blocks = scales_shape(trained_shape(p, index, dim), dim)
    by_row = dim % p.dim() == 0
    return index if by_row else None, 0, (p.shape[0] if by_row else rows, *blocks)


def expand_state_(optimizer: Masked, state_dict: dict[str, Any]) -> None:
    """In ``state_dict``, put DTensors of whole shape in place of sharded parameters' state."""
    of_parameters = zip(optimizer.entries(), numbers(state_dict), strict=True)
    for (_, _, p, index, dim), n in of_parameters:
        if is_sharded(p) and n in state_dict["state"]:
            state_dict["state"][n] = {
                name: value
                if name == "step"
                else expand(p, value, *_placed(optimizer, name, p, index, dim))
                for name, value in state_dict["state"][n].items()
            }


def part_steps_(state_dict: dict[str, Any]) -> None:
    """In ``state_dict``, give every parameter a count of its own.

    Those of a call are shared, and torch.distributed.checkpoint loads into what it finds.
    """
    for n, state in state_dict["state"].items():
        if "step" in state:
            state_dict["state"][n] = {**state, "step": state["step"].clone()}


def _other_half(p: Tensor, rest: Tensor) -> Tensor:
    """Int16 [...] of Kahan's ``rest`` [...] of bfloat16 ``p``: the nearest float32 weight's.

    Earlier releases kept the two as a sum: 1 and 0.001 are the float32 weight 1.001.
    """
    weight, upper = (
        x.contiguous().view(torch.int32).long() for x in (p.float() + rest.float(), p.float())
    )
    # Half a unit up does not fit, by one: the weight is a float32 neighbour then.
    return (weight - upper).clamp(-(1 << 15), (1 << 15) - 1).short()


def restore_state_(optimizer: Masked, state_dict: dict[str, Any]) -> None:
    """Give the optimiser the state of ``state_dict``, in the dtype that it was saved in.

    Raises:
        ValueError: state is of other shapes than what trains here.
    """
    of_parameters = zip(optimizer.entries(), numbers(state_dict), strict=True)
    for (_, _, p, index, dim), n in of_parameters:
        shape = trained_shape(p, index, dim)
        shapes = dict.fromkeys(optimizer.state_names, shape)
        if isinstance(dim, int):
            scales = list(scales_shape(shape, dim))
            shapes |= dict.fromkeys(map(scales_of, optimizer.state_names), scales)
        saved = state_dict["state"].get(n, {})
        if saved and "step" not in saved:
            # torch's SGD counts no steps. It keeps a buffer from the first one on, if at all.
            saved = {**saved, "step": 1}
        for name, value in saved.items():
            if value is None:  # the buffer of an SGD without momentum
                optimizer.state[p].pop(name, None)
                continue
            if is_sharded(p) and name != "step":
                value = compact(p, value, *_placed(optimizer, name, p, index, dim))
            elif name == "step":
                # torch counts in float32, which is exact up to 2^24 steps alone.
                value = torch.as_tensor(value).to(torch.float64)
            elif name in shapes and list(value.shape) != shapes[name]:
                raise ValueError(
                    f"{name} of parameter {n} has shape {list(value.shape)} in the checkpoint; "
                    f"it must be {shapes[name]}: was it saved with another selection of units?"
                )
            if name == "compensation" and value.dtype == torch.bfloat16:
                own = join([part.entries(local(p.detach())) for part in parts(p, index, dim)])
                value = _other_half(own, value.to(p.device))
            # Steps are counted on the host, where reading them waits for no GPU.
            device = "cpu" if name == "step" else p.device
            optimizer.state[p][name] = value.detach().to(device, copy=True)


# Options of torch's optimisers that change the update, and their values for ours. Others of them
# (foreach, fused, capturable, differentiable) say how it is computed.
_SAME_UPDATE = {"amsgrad": False, "decoupled_weight_decay": True}


def check_same_update(optimizer: Masked, state_dict: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint is of an optimiser that computes something else."""
    for number, group in enumerate(state_dict["param_groups"]):
        for name, own in _SAME_UPDATE.items():
            if name in group and group[name] != own:
                raise ValueError(
                    f"{name} is {group[name]!r} in group {number} of the checkpoint; it must be "
                    f"{own!r}, as {type(optimizer).__name__} computes nothing else: start a new "
                    "optimiser"
                )
    known = {"step", "compensation", "importance_signed", "importance_squared"}
    for state in state_dict["state"].values():
        strange = state.keys() - known - set(optimizer.state_names)
        strange -= set(map(scales_of, optimizer.state_names))
        if strange:
            raise ValueError(
                f"the checkpoint has state that {type(optimizer).__name__} does not know "
                f"({', '.join(sorted(strange))}): another kind of optimiser wrote it; start a new "
                "one"
            )


def check_same_entries(current: list[Entries], groups: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError unless a checkpoint's ``groups`` train what ``current`` has."""
    saved = [(group.get("indices"), group.get("dims")) for group in groups]
    if len(current) != len(saved):
        return  # torch says that the number of groups differs
    for number, ((indices, dims), (saved_indices, saved_dims)) in enumerate(
        zip(current, saved, strict=True)
    ):
        if saved_indices is None or saved_dims is None or len(saved_indices) != len(indices):
            continue  # torch says that the number of parameters differs
        for i, (index, its) in enumerate(zip(indices, saved_indices, strict=True)):
            same = index is its or (
                index is not None and its is not None and torch.equal(index.cpu(), its.cpu())
            )
            if not same or dims[i] != saved_dims[i]:
                raise ValueError(
                    f"parameter {i} of group {number} trains other entries than in the "
                    "checkpoint; resume with the same units, or start a new optimiser"
                )
