"""Projections of which only some rows or columns train.

The weight gradient is computed for the trained rows or columns alone; how they are stored is in
:mod:`ssah.training.split_tensor`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pickle import PicklingError
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ssah.training.split_tensor import Part, Slot, width

__all__ = ["MaskedConv1D", "MaskedLinear", "MaskedProjection", "SplitWeightError"]

# At most this share of B's input is copied for the backward pass; beyond, all of it is kept.
_COPIED_SHARE = 0.5


def _columns(matrix: Tensor, part: Part) -> Tensor:
    """Some columns of ``[tokens, n]``: a view of a stretch, or gathered."""
    if isinstance(part, Tensor):
        return matrix.index_select(1, part)
    return matrix[:, part[0] : part[1]]


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
            share = sum(width(part) for part in weight_parts) / len(storage)
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


class SplitWeightError(AttributeError, RuntimeError):
    """The tensor is split up: reading it would give a copy, writing it would change nothing.

    An AttributeError, so that ``hasattr(module, "weight")`` is an answer and not an error.
    """


def pickling_error() -> PicklingError:
    """The error of pickling what belongs to a plan: a slice would no longer alias its weight."""
    return PicklingError(
        "the model is under a plan, and cannot be pickled (torch.save of a whole model): save its "
        "weights (model.save_pretrained, model.state_dict()) or what was trained "
        "(plan.save_pretrained), or close the plan first (plan.close())"
    )


def _in_order(register: Callable[..., Any]) -> Callable[..., Any]:
    """``register``, a method of ``nn.Module``; refused among channels that the plan has moved."""

    @functools.wraps(register)
    def checked(self: MaskedProjection, *args: Any, **options: Any) -> Any:
        self.check_order()
        return register(self, *args, **options)

    return checked


class MaskedProjection(nn.Module):
    """A projection while a plan is active: an ``nn.Linear`` or ``Conv1D`` whose class was changed.

    Attributes:
        slots: ``"weight"``, ``"bias"`` -> what of it is split; other tensors stay parameters.
        is_output: whether units are the columns (B) rather than the rows (A) of the weight.
        order: names of the original parameters, in their order.
        plain: the class that the module had.
    """

    is_split = True  # rooms below this one know a split projection by it
    slots: dict[str, Slot]
    is_output: bool
    order: tuple[str, ...]
    plain: type[nn.Module]

    @staticmethod
    def install(
        module: nn.Module,
        slots: dict[str, Slot],
        masked: type[MaskedProjection],
        *,
        is_output: bool,
    ) -> None:
        """Turn ``module`` into a masked projection of class ``masked``, in place."""
        module.order = tuple(module._parameters)  # type: ignore[assignment]
        module.slots = slots  # type: ignore[assignment]
        module.is_output = is_output  # type: ignore[assignment]
        module.plain = type(module)  # type: ignore[assignment]
        module.__class__ = masked
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
        plain = self.plain
        del self.slots, self.is_output, self.order, self.plain
        self.__class__ = plain  # type: ignore[assignment]

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

    def __getattr__(self, name: str) -> Any:
        slots = vars(self).get("slots")
        if slots is not None and name in slots:
            raise SplitWeightError(
                f"the {name} of this {type(self).__name__} is split into trained and frozen units "
                "by an active plan: close it first (plan.close()), or read model.state_dict()"
            )
        return super().__getattr__(name)

    @property
    def packed(self) -> bool:
        """Whether its channels lie in the order of the plan, not in that of the model."""
        return any(slot.order is not None for slot in self.slots.values())

    def check_order(self) -> None:
        """Raise RuntimeError where a hook among the channels would take one for another."""
        if self.packed:
            raise RuntimeError(
                f"a hook hangs on this {type(self).__name__} or on the activation beside it, whose "
                "channels a plan has put into another order: register it before the plan is made, "
                "so that they stay where they are, or after plan.close()"
            )

    register_forward_pre_hook = _in_order(nn.Module.register_forward_pre_hook)
    register_forward_hook = _in_order(nn.Module.register_forward_hook)
    register_full_backward_pre_hook = _in_order(nn.Module.register_full_backward_pre_hook)
    register_full_backward_hook = _in_order(nn.Module.register_full_backward_hook)

    def _replicate_for_data_parallel(self) -> MaskedProjection:
        raise RuntimeError(
            "the model is under a plan, whose trained slices torch.nn.DataParallel cannot copy: "
            "let one GPU be visible (CUDA_VISIBLE_DEVICES=0), or run one process a GPU (torchrun)"
        )

    def sync(self) -> None:
        """Bring trained values that are held apart into what the forward pass uses."""
        for slot in self.slots.values():
            slot.sync(self)

    def extra_repr(self) -> str:
        """Shapes of what is split."""
        parts = ((name, slot) for name, slot in self.slots.items())
        return ", ".join(
            f"{name}: {sum(map(width, slot.parts))} of {len(slot.storage)} train"
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

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise pickling_error()

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


class MaskedConv1D(MaskedProjection, Conv1D):
    """A transformers ``Conv1D`` of which some units train."""
