"""What an operator may write to, checked before anything is written.

It refuses what torch's own operators in place refuse: an inference tensor outside inference mode,
and a tensor that takes a gradient where gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssah_kernels.schema import arguments

Split: TypeAlias = tuple[list[Tensor], list[Tensor]]


def reader(op: str) -> Callable[[Sequence[Any]], Split]:
    """A function from the arguments of ``op`` to the tensors that it writes and those it reads."""
    kinds = [(i, kind) for i, (kind, _) in enumerate(arguments(op)) if "Tensor" in kind]
    written = [(i, "[]" in kind) for i, kind in kinds if "!" in kind]
    read = [(i, "[]" in kind) for i, kind in kinds if "!" not in kind]

    def tensors(args: Sequence[Any], which: list[tuple[int, bool]]) -> list[Tensor]:
        found: list[Tensor] = []
        for i, is_list in which:
            value = args[i] if i < len(args) else None
            if value is None:
                continue
            if is_list:
                found += value
            else:
                found.append(value)
        return found

    return lambda args: (tensors(args, written), tensors(args, read))


def name_of(op: str, args: Sequence[Any], tensor: Tensor) -> str:
    """``params[3]``: which argument of the call ``tensor`` is."""
    for (_, name), value in zip(arguments(op), args, strict=False):
        if value is tensor:
            return name
        if isinstance(value, (list, tuple)):
            for i, each in enumerate(value):
                if each is tensor:
                    return f"{name}[{i}]"
    raise AssertionError("the tensor is none of the arguments")


def check(op: str, args: Sequence[Any], written: Sequence[Tensor]) -> None:
    """Raise RuntimeError, with its name, where an argument must not be written to."""
    if torch.is_grad_enabled():
        for tensor in written:
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{name_of(op, args, tensor)} requires grad and would be changed in place, "
                    "which autograd cannot follow; call this inside torch.no_grad(), as "
                    "optimisers do"
                )
    if not torch.is_inference_mode_enabled():
        for tensor in written:
            if tensor.is_inference():
                raise RuntimeError(
                    f"{name_of(op, args, tensor)} was made in torch.inference_mode() and would be "
                    "changed outside it; make it outside, or clone it"
                )
