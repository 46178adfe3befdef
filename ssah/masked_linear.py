"""Projections of which only some rows or columns train.

A projection's tensor (weight or bias) is kept *unit-major*: units run along dimension 0, so that
what trains is whole rows of storage. Two layouts:

* packed: the rows are permuted once so that those that train lie side by side. The trained slices
  are parameters that alias the storage which the forward pass multiplies with.
* gathered: the order stays; the trained rows are one compact parameter of their own, which is
  written into the storage before every use.

The weight gradient is computed for the trained rows or columns alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

__all__ = ["MaskedConv1D", "MaskedLinear", "MaskedProjection", "Slot", "runs"]

# A stretch (start, stop) of storage rows, or the int64 rows that were gathered.
Part = tuple[int, int] | Tensor

# At most this share of B's input is copied for the backward pass; beyond, all of it is kept.
_COPIED_SHARE = 0.5


def runs(positions: Tensor) -> list[tuple[int, int]]:
    """The stretches (start, stop) of consecutive integers in ``positions``, in their order."""
    found: list[tuple[int, int]] = []
    if len(positions) == 0:
        return found
    breaks = (positions.diff() != 1).nonzero()[:, 0] + 1
    for piece in positions.tensor_split(breaks.cpu()):
        found.append((int(piece[0]), int(piece[-1]) + 1))
    return found


@dataclass(eq=False)
class Slot:
    """One tensor of a projection while only part of it trains.

    Attributes:
        original: the parameter that this replaces; it holds no data meanwhile.
        transposed: whether the original has units along dimension 1.
        storage: unit-major ``[entries, ...]``, what the forward pass uses.
        order: int64 ``[entries]``, the original entry that each storage row holds; None where
            the order is the original one.
        parts: the storage rows that train, one element per parameter in ``names``.
        names: the trained parameters' names in their module.
    """

    original: nn.Parameter
    transposed: bool
    storage: Tensor
    order: Tensor | None
    parts: tuple[Part, ...]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, name: str, original: nn.Parameter, dim: int, order: Tensor | None, trains: Tensor
    ) -> Slot:
        """Take over ``original``, of which the entries ``trains`` (bool) along ``dim`` train.

        Args:
            name: of the tensor in its module, ``"weight"`` or ``"bias"``.
            original: emptied; :meth:`restore` fills it again.
            dim: dimension that runs over entries.
            order: pack the entries in this order, or None to gather.
            trains: bool ``[entries]``.
        """
        device = original.device
        values = original.detach()
        values = values.t() if dim == 1 else values
        parts: tuple[Part, ...]
        if order is None:
            storage = values.clone(memory_format=torch.contiguous_format)
            parts = (trains.nonzero()[:, 0].to(device),)
        else:
            storage = values.index_select(0, order.to(device))
            parts = tuple(runs(trains[order].nonzero()[:, 0]))
            order = order.to(device)
        suffixes = ("",) if len(parts) == 1 else tuple(f"_{i}" for i in range(len(parts)))
        names = tuple(f"{name}_trained{suffix}" for suffix in suffixes)
        original.grad = None
        original.data = original.data.new_empty(0)
        return cls(original, dim == 1, storage.contiguous(), order, parts, names)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """New parameters over the trained rows: views where packed, a copy where gathered."""
        for name, part in zip(self.names, self.parts, strict=True):
            rows = _rows(self.storage, part)
            yield name, nn.Parameter(rows)

    def trained_index(self) -> Tensor:
        """int64 on the CPU: the original entries that train, parameter by parameter."""
        rows = [torch.arange(*p) if isinstance(p, tuple) else p.cpu() for p in self.parts]
        index = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        return index if self.order is None else self.order.cpu()[index]

    def frozen_rows(self) -> Iterator[Tensor]:
        """The frozen entries in ascending original order, as pieces of unit-major rows."""
        frozen = torch.ones(len(self.storage), dtype=torch.bool)
        frozen[self.trained_index()] = False
        entries = frozen.nonzero()[:, 0]
        if self.order is None:
            yield self.storage.index_select(0, entries.to(self.storage.device))
            return
        for start, stop in runs(torch.argsort(self.order.cpu())[entries]):
            yield self.storage[start:stop]

    def read(self) -> Tensor:
        """A copy in the original order and orientation."""
        rows = self.storage
        rows = rows.clone() if self.order is None else rows.index_select(0, self.order.argsort())
        return rows.t().contiguous() if self.transposed else rows

    @torch.no_grad()
    def write(self, values: Tensor, owner: nn.Module) -> None:
        """Take over values in the original order and orientation."""
        rows = values.t() if self.transposed else values
        self.storage.copy_(rows if self.order is None else rows[self.order])
        for name, part in zip(self.names, self.parts, strict=True):
            parameter = owner._parameters[name]
            if not self._aliases(parameter, part):
                parameter.copy_(_rows(self.storage, part))  # type: ignore[union-attr]

    def _aliases(self, parameter: Any, part: Part) -> bool:
        if isinstance(part, Tensor):
            return False
        return parameter.data_ptr() == self.storage[part[0]].data_ptr()

    def sync(self, owner: nn.Module) -> None:
        """Bring trained parameters that do not alias the storage into it."""
        compiling = torch.compiler.is_compiling()
        for name, part in zip(self.names, self.parts, strict=True):
            parameter = owner._parameters[name]
            assert parameter is not None
            # Through .data: the version of the storage must not change when another forward pass
            # writes the same values again. The parameter, saved beside it, has a version too.
            if isinstance(part, Tensor):
                self.storage.data.index_copy_(0, part, parameter.data.to(self.storage.dtype))
            elif not compiling and not self._aliases(parameter, part):
                self.storage.data[part[0] : part[1]].copy_(parameter.data)

    def convert(self, function: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        """Move or cast the storage as :meth:`torch.nn.Module._apply` does, and alias it again."""
        self.storage = function(self.storage)
        device = self.storage.device
        self.order = None if self.order is None else self.order.to(device)
        self.parts = tuple(p.to(device) if isinstance(p, Tensor) else p for p in self.parts)
        self.alias(owner._parameters)

    def alias(self, parameters: dict[str, nn.Parameter | None]) -> None:
        """Make the trained parameters of a packed layout views of the storage."""
        for name, part in zip(self.names, self.parts, strict=True):
            parameter = parameters[name]
            assert parameter is not None
            if isinstance(part, tuple):
                parameter.data = self.storage[part[0] : part[1]]

    def restore(self) -> nn.Parameter:
        """The original parameter with the present values."""
        self.original.data = self.read()
        return self.original


def _rows(storage: Tensor, part: Part) -> Tensor:
    if isinstance(part, Tensor):
        return storage.index_select(0, part)
    return storage[part[0] : part[1]]


def _columns(matrix: Tensor, part: Part) -> Tensor:
    """Some columns of ``[tokens, n]``: a view of a stretch, or gathered."""
    if isinstance(part, Tensor):
        return matrix.index_select(1, part)
    return matrix[:, part[0] : part[1]]


def _width(part: Part) -> int:
    return len(part) if isinstance(part, Tensor) else part[1] - part[0]


class _MaskedLinear(torch.autograd.Function):
    """y = x W^T + b, with gradients for x and the trained rows (A) or columns (B) of W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        storage: Tensor,
        bias: Tensor | None,
        is_output: bool,
        weight_parts: tuple[Part, ...],
        bias_parts: tuple[Part, ...],
        *trained: Tensor,
    ) -> Tensor:
        ctx.shape, ctx.x_dtype, ctx.dtype = x.shape, x.dtype, storage.dtype
        ctx.is_output, ctx.weight_parts, ctx.bias_parts = is_output, weight_parts, bias_parts
        weight, b = storage, bias
        if torch.is_autocast_enabled(x.device.type) and storage.dtype != torch.float64:
            ctx.dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(ctx.dtype), storage.to(ctx.dtype)
            b = None if bias is None else bias.to(ctx.dtype)
        y = F.linear(x, weight.t() if is_output else weight, b)
        kept: list[Tensor] = []
        first = 6
        if any(ctx.needs_input_grad[first : first + len(weight_parts)]):
            matrix = x.reshape(-1, x.shape[-1])
            share = sum(_width(part) for part in weight_parts) / len(storage)
            ctx.copied = is_output and share <= _COPIED_SHARE
            if ctx.copied:
                kept = [_columns(matrix, part).clone() for part in weight_parts]
            else:
                kept = [matrix]
        # Saved though not needed: a change of them before the backward pass must be noticed.
        ctx.save_for_backward(storage, bias, *trained, *kept)
        ctx.n_trained = len(trained)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        storage, bias, *saved = ctx.saved_tensors
        trained, kept = saved[: ctx.n_trained], saved[ctx.n_trained :]
        needs = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])  # [tokens, out]
        result: list[Tensor | None] = [None] * 6
        if needs[0]:
            weight = storage.to(ctx.dtype)
            grad_x = grad @ (weight.t() if ctx.is_output else weight)
            result[0] = grad_x.view(ctx.shape).to(ctx.x_dtype)
        if bias is not None and needs[2]:
            result[2] = grad.sum(0).to(bias.dtype)
        for i, part in enumerate(ctx.weight_parts):
            value = None
            if needs[6 + i]:
                if not ctx.is_output:
                    value = _columns(grad, part).t() @ kept[0]
                else:
                    x = kept[i] if ctx.copied else _columns(kept[0], part)
                    value = x.t() @ grad
                value = value.to(trained[i].dtype)
            result.append(value)
        for i, part in enumerate(ctx.bias_parts, start=len(ctx.weight_parts)):
            value = _columns(grad, part).sum(0).to(trained[i].dtype) if needs[6 + i] else None
            result.append(value)
        return tuple(result)


class _Unreadable:
    """A weight that is split up: reading it would give a copy, writing it would change nothing."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if self.name in module._parameters:
            return module._parameters[self.name]
        if self.name not in module.slots:  # type: ignore[operator]
            return None
        raise RuntimeError(
            f"the {self.name} of this {owner.__name__} is split into trained and frozen units by "
            "an active plan: close it first (plan.close()), or read model.state_dict()"
        )


class MaskedProjection(nn.Module):
    """A projection while a plan is active: an ``nn.Linear`` or ``Conv1D`` whose class was changed.

    Attributes:
        slots: ``"weight"``, ``"bias"`` -> what of it is split; other tensors stay parameters.
        is_output: whether units are the columns (B) rather than the rows (A) of the weight.
        order: names of the original parameters, in their order.
    """

    slots: dict[str, Slot]
    is_output: bool
    order: tuple[str, ...]

    @staticmethod
    def install(module: nn.Module, slots: dict[str, Slot], *, is_output: bool) -> None:
        """Turn ``module`` into a masked projection, in place."""
        module.order = tuple(module._parameters)  # type: ignore[assignment]
        module.slots = slots  # type: ignore[assignment]
        module.is_output = is_output  # type: ignore[assignment]
        module.__class__ = MaskedConv1D if isinstance(module, Conv1D) else MaskedLinear
        own: dict[str, nn.Parameter | None] = {}
        for name, parameter in module._parameters.items():
            if name in slots:
                own.update(slots[name].parameters())
            else:
                own[name] = parameter
        module._parameters = own

    def uninstall(self) -> None:
        """The ordinary module again, with the original parameters and the present values."""
        self.sync()
        own = {name: p for name, p in self._parameters.items() if name in self.order}
        own.update((name, slot.restore()) for name, slot in self.slots.items())
        self._parameters = {name: own[name] for name in self.order}
        del self.slots, self.is_output, self.order
        self.__class__ = Conv1D if isinstance(self, Conv1D) else nn.Linear  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """The projection of ``x`` ``[..., in]``: ``[..., out]``."""
        self.sync()
        weight, bias = self.slots["weight"], self.slots.get("bias")
        return _MaskedLinear.apply(
            x,
            weight.storage,
            self._parameters.get("bias") if bias is None else bias.storage,
            self.is_output,
            weight.parts,
            () if bias is None else bias.parts,
            *(self._parameters[name] for slot in self.slots.values() for name in slot.names),
        )

    def sync(self) -> None:
        """Bring trained values that are held apart into what the forward pass uses."""
        for slot in self.slots.values():
            slot.sync(self)

    def extra_repr(self) -> str:
        """Shapes of what is split."""
        parts = ((name, slot) for name, slot in self.slots.items())
        return ", ".join(
            f"{name}: {sum(map(_width, slot.parts))} of {len(slot.storage)} train"
            for name, slot in parts
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _originals(self) -> dict[str, nn.Parameter | None]:
        """The parameters as the ordinary module would have them; copies where they are split."""
        self.sync()
        originals = dict(self._parameters)
        for name, slot in self.slots.items():
            originals[name] = nn.Parameter(slot.read(), requires_grad=False)
        return {name: originals[name] for name in self.order}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own, self._parameters = self._parameters, self._originals()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters = own

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        own, self._parameters = self._parameters, self._originals()
        # Assigning would part the parameters from their storage: always copy.
        metadata = {**local_metadata, "assign_to_params_buffers": False}
        try:
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        finally:
            loaded, self._parameters = self._parameters, own
            for name, slot in self.slots.items():
                slot.write(loaded[name], self)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedProjection:
        self.sync()
        super()._apply(fn, recurse)
        for slot in self.slots.values():
            slot.convert(fn, self)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedProjection:
        self.sync()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for slot in new.slots.values():
            slot.alias(new._parameters)
        return new


class MaskedLinear(MaskedProjection, nn.Linear):
    """An ``nn.Linear`` of which some units train."""

    weight = _Unreadable()
    bias = _Unreadable()


class MaskedConv1D(MaskedProjection, Conv1D):
    """A transformers ``Conv1D`` of which some units train."""

    weight = _Unreadable()
    bias = _Unreadable()
