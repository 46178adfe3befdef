"""Arguments of the operators over lists of parameters.

Thousands of tensors pass here in every step: names are made where something is wrong, not before.

Compact means the parameter's shape with the index's length in place of the size along its dim: of
[4096, 11008] with 2,202 columns trained, gradient and state are [4096, 2202], the sums of
importance are [2202], and the scales of state in 8 bits are [4096, 9].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssah_kernels.checks.matrices import as_matrix, axis_of, can_be_matrix
from ssah_kernels.checks.tensors import dense, floating, state_of
from ssah_kernels.dynamic_map import scales_shape

# The dtype of what compensates a parameter of 16 bits, see reference/masked_update.py.
COMPENSATIONS = {torch.bfloat16: torch.int16, torch.float16: torch.float16}


class _Compact(NamedTuple):
    """A list of tensors that have an entry for each trained element, and what they must be."""

    name: str
    tensors: Sequence[Tensor]
    dtypes: tuple[torch.dtype, ...]
    stored: bool  # read and written where it lies, so that it must be contiguous
    ready: list[Tensor]


def _same_length(name: str, values: Sequence[Any], must: int) -> None:
    if len(values) != must:
        raise ValueError(f"{name} has {len(values)} entries; it must have {must}, one a parameter")


def _compact_shape(name: str, i: int, x: Tensor, index: Tensor | None, dim: int) -> tuple[int, ...]:
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


def _refuse(compact: _Compact, i: int, shape: tuple[int, ...], device: torch.device) -> None:
    name, x = f"{compact.name}[{i}]", compact.tensors[i]
    dense(name, x)
    if x.dtype not in compact.dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in compact.dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; with its parameter it must be {allowed}")
    if x.shape != shape:
        must = tuple(shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {must}, what is trained")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}")
    raise ValueError(f"{name} must be contiguous")  # nothing else was wrong


def _scalar(
    name: str, x: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    if x is None:
        return None
    dense(name, x)
    fits = x.is_floating_point() if dtype.is_floating_point else x.dtype == dtype
    if x.numel() != 1 or not fits:
        kind = "a floating-point" if dtype.is_floating_point else "an int64"
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be {kind} tensor of one value"
        )
    # The usual case is tested first: to() costs a microsecond even where it does nothing.
    if x.device == like.device and x.dtype == dtype:
        return x
    return x.to(like.device, dtype)


def _lists(
    first: Tensor,
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    compensations: Sequence[Tensor] | None,
    in_codes: bool,
) -> list[_Compact]:
    """What is compact with parameters like ``first``."""
    # Autograd gives gradients any strides; state is this package's own, and contiguous.
    lists = [_Compact("grads", grads, (first.dtype,), False, [])]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    if in_codes:
        dtypes = (torch.uint8,)
    elif first.dtype == torch.float64:
        dtypes = (torch.float64,)
    for name, state in states.items():
        if state:
            # All state of a call has one dtype, which its first tensor decides.
            dtypes = (state[0].dtype,) if state[0].dtype in dtypes else dtypes
        lists.append(_Compact(name, state, dtypes, True, []))
    if compensations is not None:
        # Of wider parameters, rounding loses too little to be worth their memory.
        if first.dtype not in COMPENSATIONS:
            raise TypeError(
                f"compensations are given for {first.dtype} parameters; they must be bfloat16 or "
                "float16"
            )
        dtypes = (COMPENSATIONS[first.dtype],)
        lists.append(_Compact("compensations", compensations, dtypes, True, []))
    return lists


def _update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    compensations: Sequence[Tensor] | None,
    importance: dict[str, Sequence[Tensor] | None],
    scales: dict[str, Sequence[Tensor] | None],
) -> tuple[list[Any], ...]:
    """Checks the lists of an update; params, grads, states, dims, compensations as matrices.

    A parameter whose strides allow no matrix stays as it is.
    """
    if not params:
        raise ValueError("params is empty; it must have at least one parameter")
    first = params[0]
    floating("params[0]", first, 0)
    dtype, device, strided = first.dtype, first.device, torch.strided
    per_block = [(name, each) for name, each in scales.items() if each is not None]
    if 0 < len(per_block) < len(scales):
        raise ValueError(f"{' and '.join(scales)} must be given together")
    lists = _lists(first, grads, states, compensations, in_codes=bool(per_block))
    named = {"indices": indices, "dims": dims, **importance, **{x.name: x.tensors for x in lists}}
    named |= scales
    for name, values in named.items():
        if values is not None:
            _same_length(name, values, len(params))
    if (importance["signed"] is None) != (importance["squared"] is None):  # one pass makes both
        raise ValueError("signed and squared must be given together")

    per_unit = [(name, sums) for name, sums in importance.items() if sums is not None]
    matrices: list[Tensor] = []
    axes: list[int] = []
    for i, (param, index, dim) in enumerate(zip(params, indices, dims, strict=True)):
        if param.dtype is not dtype or param.device != device or param.layout is not strided:
            dense(f"params[{i}]", param)
            raise ValueError(
                f"params[{i}] is {param.dtype} on {param.device}; all of one call must be "
                f"{dtype} on {device}, as params[0]"
            )
        shape = _compact_shape("params", i, param, index, dim)
        is_matrix = len(shape) == 2  # nearly always: no call of as_matrix then
        for compact in lists:
            x = compact.tensors[i]
            other = x.layout is not strided or x.dtype not in compact.dtypes or x.shape != shape
            if other or x.device != device:
                _refuse(compact, i, shape, device)
            if not x.is_contiguous():
                if compact.stored:
                    _refuse(compact, i, shape, device)
                x = x.contiguous()  # a gradient is only read
            compact.ready.append(x if is_matrix else as_matrix(x, dim))
        for name, sums in per_unit:
            # dim may be -1, whose slice would end at 0.
            units = tuple(shape[dim : dim + 1 or None]) or (1,)
            state_of(f"{name}[{i}]", sums[i], units, device)
        for name, each in per_block:
            blocks = scales_shape(shape, dim)
            state_of(f"{name}[{i}]", each[i], blocks, device, torch.float32)
        if is_matrix:
            matrices.append(param)
        else:
            matrices.append(as_matrix(param, dim) if can_be_matrix(param, dim) else param)
        axes.append(dim % 2 if is_matrix else axis_of(param, dim))
    return matrices, axes, *(compact.ready for compact in lists)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    seed: Tensor | None = None,
    compensations: Sequence[Tensor] | None = None,
    signed: Sequence[Tensor] | None = None,
    squared: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    **_: float,
) -> tuple[Any, ...]:
    scales = {"exp_avg_scales": exp_avg_scales, "exp_avg_sq_scales": exp_avg_sq_scales}
    p, axes, g, m, v, *c = _update(
        params,
        grads,
        {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        indices,
        dims,
        compensations,
        {"signed": signed, "squared": squared},
        scales,
    )
    scalars = _scalars(params[0], lr, step, grad_scale, clip_coef, seed)
    rest = (c[0] if c else None, signed, squared, *scales.values())
    return p, g, m, v, indices, axes, *scalars, *rest


def _scalars(like: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
    *floats, seed = values
    names = ("lr", "step", "grad_scale", "clip_coef")
    ready = (_scalar(name, x, like) for name, x in zip(names, floats, strict=True))
    return *ready, _scalar("seed", seed, like, torch.int64)


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    seed: Tensor | None = None,
    compensations: Sequence[Tensor] | None = None,
    signed: Sequence[Tensor] | None = None,
    squared: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    **_: float,
) -> tuple[Any, ...]:
    # With momentum 0 a caller may leave the buffers out, which saves their memory.
    if momentum_buffers is None and (momentum != 0 or nesterov):
        raise ValueError(
            f"momentum_buffers is None; momentum {momentum} and nesterov {nesterov} need them"
        )
    if momentum_buffers is None and momentum_scales is not None:
        raise ValueError("momentum_scales are given without momentum_buffers, which they are of")
    states = {} if momentum_buffers is None else {"momentum_buffers": momentum_buffers}
    p, axes, g, *rest = _update(
        params,
        grads,
        states,
        indices,
        dims,
        compensations,
        {"signed": signed, "squared": squared},
        {"momentum_scales": momentum_scales},
    )
    buffers = None if momentum_buffers is None else rest.pop(0)
    scalars = _scalars(params[0], lr, step, grad_scale, clip_coef, seed)
    c = rest[0] if rest else None
    return p, g, buffers, indices, axes, *scalars, c, signed, squared, momentum_scales


def masked_grad_norm(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None = None,
) -> tuple[Any, ...]:
    if not grads:
        raise ValueError("grads is empty; it must have at least one gradient")
    _same_length("indices", indices, len(grads))
    _same_length("dims", dims, len(grads))
    matrices, axes = [], []
    for i, (grad, index, dim) in enumerate(zip(grads, indices, dims, strict=True)):
        floating(f"grads[{i}]", grad, 0)
        if grad.dtype != grads[0].dtype or grad.device != grads[0].device:
            raise ValueError(
                f"grads[{i}] is {grad.dtype} on {grad.device}; all of one call must be "
                f"{grads[0].dtype} on {grads[0].device}, as grads[0]"
            )
        _compact_shape("grads", i, grad, index, dim)
        # Gradients are dense here: they are read through the index, and never written.
        matrices.append(as_matrix(grad if can_be_matrix(grad, dim) else grad.contiguous(), dim))
        axes.append(axis_of(grad, dim))
    return matrices, indices, axes, _scalar("grad_scale", grad_scale, grads[0])
