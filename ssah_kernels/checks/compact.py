"""What is compact: has an entry for each trained element of a parameter.

Compact means the parameter's shape with the index's length in place of the size along its dim: of
[4096, 11008] with 2,202 columns trained, gradient and state are [4096, 2202], the sums of
importance are [2202], and the scales of state in 8 bits are [4096, 9].

A gradient may be of the parameter's own shape instead, [4096, 11008], and is read at the index. No
argument says which it is: an index of all 11,008 columns is the only one for which the shapes are
the same, and it selects everything, so that both readings are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .matrices import as_matrix, can_be_matrix
from .tensors import dense

# The dtype of what compensates a parameter of 16 bits, see reference/masked_update.py.
COMPENSATIONS = {torch.bfloat16: torch.int16, torch.float16: torch.float16}
HALVES = (torch.bfloat16, torch.float16)


class Compact(NamedTuple):
    """A list of tensors that have an entry for each trained element, and what they must be."""

    name: str
    tensors: Sequence[Tensor]
    dtypes: tuple[torch.dtype, ...]
    stored: bool  # read and written where it lies, so that it must be contiguous
    ready: list[Tensor]


def compact_shape(name: str, i: int, x: Tensor, index: Tensor | None, dim: int) -> tuple[int, ...]:
    """The shape that ``index`` along ``dim`` selects from ``x``, the ``i``-th of the list."""
    shape = x.shape
    n = len(shape) or 1  # a parameter without dimensions has one unit
    # A dimension in the middle makes no matrix of units, see matrices.py.
    if not -n <= dim < n or (n > 2 and dim % n not in (0, n - 1)):
        raise ValueError(
            f"dims has {dim} for {name}[{i}] of {len(shape)} dimensions; it must be the first or "
            "last"
        )
    if index is None:
        return shape
    if index.layout is not torch.strided:
        dense(f"indices[{i}]", index)
    if index.dtype is not torch.int64 or index.dim() != 1 or not shape:
        raise ValueError(
            f"indices[{i}] is {index.dtype} with {index.dim()} dimensions for {name}[{i}] of "
            f"{len(shape)}; it must be int64 with 1, strictly increasing"
        )
    if index.device != x.device:
        raise ValueError(f"indices[{i}] is on {index.device}; it must be on {x.device}")
    if not index.is_contiguous():
        raise ValueError(
            f"indices[{i}] has stride {index.stride(0)}; it must be contiguous: call contiguous()"
        )
    dim %= n
    return (*shape[:dim], index.shape[0], *shape[dim + 1 :])


def read_at(grad: Tensor, param: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """A gradient of the shape of ``param`` [...] as a kernel takes it: the matrix of all of it.

    Of a parameter that is no matrix the trained elements are copied, so that its gradient's are.
    """
    if index is None or (can_be_matrix(param, dim) and can_be_matrix(grad, dim)):
        return as_matrix(grad, dim)
    return as_matrix(grad.index_select(dim, index), dim)  # [trained, other]


def refuse(compact: Compact, i: int, shape: tuple[int, ...], device: torch.device) -> None:
    name, x = f"{compact.name}[{i}]", compact.tensors[i]
    dense(name, x)
    if x.dtype not in compact.dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in compact.dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; with its parameter it must be {allowed}")
    if x.shape != shape:
        must = f"{tuple(shape)}, what is trained"
        if not compact.stored:
            must += ", or that of its parameter"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {must}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}")
    raise ValueError(f"{name} must be contiguous")  # nothing else was wrong


def _one_of(dtypes: tuple[torch.dtype, ...], tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """Of ``dtypes`` that of the first tensor, which all others must have; else all of them."""
    return (tensors[0].dtype,) if tensors and tensors[0].dtype in dtypes else dtypes


def compact_lists(
    first: Tensor,
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    compensations: Sequence[Tensor] | None,
    in_codes: bool,
) -> list[Compact]:
    """What is compact with parameters like ``first``."""
    # Autograd gives gradients any strides; state is this package's own, and contiguous.
    dtypes: tuple[torch.dtype, ...] = (first.dtype,)
    if first.dtype in HALVES:
        dtypes = (first.dtype, torch.float32)
    lists = [Compact("grads", grads, _one_of(dtypes, grads), False, [])]
    dtypes = (torch.float32, torch.bfloat16)
    if in_codes:
        dtypes = (torch.uint8,)
    elif first.dtype == torch.float64:
        dtypes = (torch.float64,)
    for name, state in states.items():
        # All state of a call has one dtype, which its very first tensor decides.
        dtypes = _one_of(dtypes, state)
        lists.append(Compact(name, state, dtypes, True, []))
    if compensations is not None:
        # Of wider parameters, rounding loses too little to be worth their memory.
        if first.dtype not in COMPENSATIONS:
            raise TypeError(
                f"compensations are given for {first.dtype} parameters; they must be bfloat16 or "
                "float16"
            )
        dtypes = (COMPENSATIONS[first.dtype],)
        lists.append(Compact("compensations", compensations, dtypes, True, []))
    return lists
