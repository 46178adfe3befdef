"""What of a training model changed since somebody asked last: what to send to a rollout engine.

In reinforcement learning a second copy of the model generates, and is brought up to date after
every few steps. Under a plan nothing but its slices can have changed, and in bfloat16 a small step
moves few of their elements. Example: of a weight ``[3, 4]`` the columns 1 and 3 train, and a step
moved two elements. Sent are their positions in the whole weight, row by row, and their values:

    0 . 2 .
    4 . 6 *        index  7, 9
    8 * 10 .       values the two new elements
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssah.models import check_plain
from ssah.training.optimising import check_unplanned
from ssah.training.plan import UpdatePlan

# A type of as many bytes: two values are the same where their bits are, -0 and NaN included.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """Elements of one parameter.

    Attributes:
        name: of the parameter in the model without a plan.
        index: int64 ``[n]``, positions in the parameter as one row of numbers; ascending.
        values: ``[n]``, what is there now.
    """

    name: str
    index: Tensor
    values: Tensor


class WeightChanges:
    """The changes of a plan's model, taken step by step.

    Example::

        changes = WeightChanges(plan)  # the second model has the same weights now
        ...                            # train for some steps
        apply_changes(engine_model, changes.take())

    It keeps one copy of what trains.

    Args:
        plan: a plan in force, of a model in one memory.

    Raises:
        ValueError: the model is sharded.
        RuntimeError: the plan is closed.
    """

    def __init__(self, plan: UpdatePlan) -> None:
        if plan._installed.sharded:
            raise ValueError(
                "model is sharded, or about to be, must be in one memory for what "
                "changed to be taken: send the whole state_dict of torch.distributed.checkpoint"
            )
        self._plan = plan
        self._check_open()
        self._last = [parameter.detach().clone() for _, parameter, *_ in plan.trained_slices()]

    def take(self) -> Iterator[ChangedWeight]:
        """What changed since the last call, or since this object was made; at most once each.

        Each part counts as taken when the next one is asked for: read the iterator to its end.

        Raises:
            RuntimeError: the plan is closed; the model was cast or moved since.
        """
        self._check_open()
        for i, (name, parameter, entries, _) in enumerate(self._plan.trained_slices()):
            now, last = parameter.detach(), self._last[i]
            if (now.dtype, now.device) != (last.dtype, last.device):
                raise RuntimeError(
                    f"{name!r} was {last.dtype} on {last.device} and is {now.dtype} on "
                    f"{now.device}: send the whole model once, and make a new WeightChanges"
                )
            differ = _bits(now) != _bits(last)
            flat = differ.flatten().nonzero()[:, 0]  # [n]
            if len(flat):
                values = now.flatten()[flat]
                yield self._changed(name, now.shape, entries, flat, values)
                # After the yield: who stops early gets the rest with the next call.
                last.view(-1)[flat] = values

    def _check_open(self) -> None:
        if self._plan.closed:
            raise RuntimeError("the plan is closed, so that nothing of it changes: make a new one")

    def _changed(
        self, name: str, shape: torch.Size, entries: Tensor, flat: Tensor, values: Tensor
    ) -> ChangedWeight:
        """Positions ``flat`` of a slice ``shape`` as those of the parameter that it belongs to."""
        owner, _, leaf = name.rpartition(".")
        module = self._plan.masked.get(owner)
        split = None if module is None else module.split_tensors.get(leaf)
        if split is None:
            return ChangedWeight(name, flat, values)
        width = shape[1:].numel()  # a slice is unit-major: [trained, ...]
        row, rest = flat // width, flat % width
        inner = [dim for dim in range(len(split.shape)) if dim not in split.dims]
        place = torch.zeros_like(flat)
        for dims, position in ((split.dims, entries.to(flat.device)[row]), (inner, rest)):
            sizes = [split.shape[dim] for dim in dims]
            for dim, own in zip(dims, torch.unravel_index(position, sizes), strict=True):
                place += own * split.shape[dim + 1 :].numel()
        # A packed slice has its entries in the order of the plan.
        order = place.argsort()
        return ChangedWeight(name, place[order], values[order])


def apply_changes(model: nn.Module, changes: Iterable[ChangedWeight]) -> None:
    """Bring a second model up to date, bit for bit, with what :meth:`WeightChanges.take` gave.

    Args:
        model: has the weights that the first one had when they were taken last; changed in place.
        changes: of the first model, on any device.

    Raises:
        ValueError: the model has a plan, packed weights, no such parameter, another dtype of it,
            or fewer elements. Nothing is changed then.
    """
    check_unplanned(model)
    check_plain(model, "to be brought up to date")
    own = dict(model.named_parameters())
    # An iterator is read to its end first, so that nothing is changed if a later part is refused.
    changes = list(changes)
    for each in changes:
        there = own.get(each.name)
        if there is None or there.dtype != each.values.dtype:
            had = "no such parameter" if there is None else f"{there.dtype}"
            raise ValueError(
                f"{each.name!r} changed as {each.values.dtype}, and the model has {had}: both "
                "models must be the same one, in one dtype"
            )
        if len(each.index) and int(each.index.max()) >= there.numel():
            raise ValueError(
                f"{each.name!r} changed at position {int(each.index.max())}, and the model has "
                f"{there.numel()} elements: both models must be the same one"
            )
    for each in changes:
        weight = own[each.name].detach()
        place = torch.unravel_index(each.index.to(weight.device), weight.shape)
        weight[place] = each.values.to(weight.device)


def _bits(values: Tensor) -> Tensor:
    return values.view(_BITS[values.element_size()])
