"""What an operator may write to, checked before anything is written.

It refuses what torch's own operators in place refuse: an inference tensor outside inference mode,
a tensor that takes a gradient where gradients are recorded, and memory that is written twice or
read beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import overlap
from .schema import arguments

Split: TypeAlias = tuple[list[Tensor], list[Tensor]]


def _split(op: str) -> tuple[list[int], list[int]]:
    """Positions of the arguments that are written, and of those read elementwise beside them."""
    kinds = [kind for kind, _ in arguments(op)]
    written = [i for i, kind in enumerate(kinds) if "!" in kind]
    # lr, step and the like are read before anything is written; where they lie does not matter.
    of_lists = any("[]" in kind for kind in kinds)  # then single tensors are scalars
    beside = ("Tensor[]",) if of_lists else ("Tensor", "Tensor?")
    return written, [i for i, kind in enumerate(kinds) if kind in beside]


def reader(op: str) -> Callable[[Sequence[Any]], Split]:
    """A function from the arguments of ``op`` to the tensors that it writes and those it reads."""
    lists = ["[]" in kind for kind, _ in arguments(op)]
    written, read = ([(i, lists[i]) for i in which] for which in _split(op))

    def tensors(args: Sequence[Any], which: list[tuple[int, bool]]) -> list[Tensor]:
        found: list[Tensor] = []
        for i, is_list in which:
            if i < len(args) and args[i] is not None:
                found.extend(args[i] if is_list else (args[i],))
        return found

    return lambda args: (tensors(args, written), tensors(args, read))


def _name(op: str, args: Sequence[Any], number: int) -> str:
    """``params[3]``: the ``number``-th of the tensors that are written and then read."""
    names: list[str] = []
    for i in (i for which in _split(op) for i in which):
        value, name = (args[i] if i < len(args) else None), arguments(op)[i][1]
        if isinstance(value, Tensor):
            names.append(name)
        elif value is not None:  # a list
            names += [f"{name}[{k}]" for k in range(len(value))]
    return names[number]


def check_grad(op: str, args: Sequence[Any], written: Sequence[Tensor]) -> None:
    """Raise RuntimeError where autograd could not follow a change of ``written``, each [...]."""
    if not torch.is_grad_enabled():
        return
    for i, tensor in enumerate(written):
        if tensor.requires_grad:
            raise RuntimeError(
                f"{_name(op, args, i)} requires grad and would be changed in place, which autograd "
                "cannot follow; call this inside torch.no_grad(), as optimisers do"
            )


def check(op: str, args: Sequence[Any], written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Raise, with the names of the arguments, each [...], where they must not be written to.

    Raises:
        RuntimeError: autograd could not follow.
        ValueError: two of them, or two elements of one, lie in one place.
    """
    check_grad(op, args, written)
    # Inference tensors have no version: autograd could not tell that they were changed.
    if not torch.is_inference_mode_enabled():
        for i, tensor in enumerate(written):
            if tensor.is_inference():
                raise RuntimeError(
                    f"{_name(op, args, i)} was made in torch.inference_mode() and would be changed "
                    "outside it; make it outside, or clone it"
                )
    if not written:
        return
    pair = overlap.first(written, read)
    if pair is None:
        return
    first, second = (_name(op, args, number) for number in pair)
    if first == second:
        raise ValueError(
            f"{first} has several elements in one place, as expanded tensors do; it is written to "
            "and must have each in a place of its own: clone() it"
        )
    raise ValueError(
        f"{first} and {second} share memory; what is written must lie apart from all else in the "
        "call: clone() one of them"
    )
