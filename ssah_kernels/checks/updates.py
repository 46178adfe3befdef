"""Arguments of the operators over lists of parameters.

Thousands of tensors pass here in every step: names are made where something is wrong, not before.

What is compact, such as a gradient, is described in ``compact.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dynamic_map import scales_shape
from .compact import compact_lists, compact_shape, read_at, refuse
from .matrices import as_matrix, axis_of, can_be_matrix
from .tensors import dense, floating, state_of


def same_length(name: str, values: Sequence[Any], must: int) -> None:
    """Raise ValueError unless a list has an entry for each of ``must`` parameters."""
    if len(values) != must:
        raise ValueError(f"{name} has {len(values)} entries; it must have {must}, one a parameter")


def _all_or_none(lists: dict[str, Sequence[Tensor] | None]) -> list[tuple[str, Sequence[Tensor]]]:
    """Those that are given, by name: one pass makes all of them, or none."""
    given = [(name, each) for name, each in lists.items() if each is not None]
    if 0 < len(given) < len(lists):
        raise ValueError(f"{' and '.join(lists)} must be given together")
    return given


def scalar_like(
    name: str, x: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    """A number of a call, [] or [1], as kernels take it: of ``dtype``, beside ``like`` [...]."""
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
    if x.device.type == "cpu" and like.device != x.device and type(x) is Tensor:
        # By value, with the kernel that fills it in: a copy from the host would be awaited. What is
        # traced, a tensor of another type, has no value.
        return torch.full((), x.item(), dtype=dtype, device=like.device)
    return x.to(like.device, dtype)


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
    per_block, per_unit = _all_or_none(scales), _all_or_none(importance)
    lists = compact_lists(first, grads, states, compensations, in_codes=bool(per_block))
    named = {"indices": indices, "dims": dims, **importance, **{x.name: x.tensors for x in lists}}
    named |= scales
    for name, values in named.items():
        if values is not None:
            same_length(name, values, len(params))

    matrices: list[Tensor] = []
    axes: list[int] = []
    for i, (param, index, dim) in enumerate(zip(params, indices, dims, strict=True)):
        if param.dtype is not dtype or param.device != device or param.layout is not strided:
            dense(f"params[{i}]", param)
            raise ValueError(
                f"params[{i}] is {param.dtype} on {param.device}; all of one call must be "
                f"{dtype} on {device}, as params[0]"
            )
        shape = compact_shape("params", i, param, index, dim)
        is_matrix = len(shape) == 2  # nearly always: no call of as_matrix then
        for compact in lists:
            x = compact.tensors[i]
            fits = x.shape == shape or (not compact.stored and x.shape == param.shape)
            other = x.layout is not strided or x.dtype not in compact.dtypes or not fits
            if other or x.device != device:
                refuse(compact, i, shape, device)
            if x.shape != shape:
                compact.ready.append(read_at(x, param, index, dim))
                continue
            if not x.is_contiguous():
                if compact.stored:
                    refuse(compact, i, shape, device)
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
    found_inf: Tensor | None = None,
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
    scalars = scalars_of(params[0], lr, step, grad_scale, clip_coef, seed)
    skips = scalar_like("found_inf", found_inf, params[0])
    rest = (c[0] if c else None, signed, squared, *scales.values(), skips)
    return p, g, m, v, indices, axes, *scalars, *rest


def scalars_of(like: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
    """lr, step, grad_scale, clip_coef and seed, [] each, as kernels take them beside ``like``."""
    *floats, seed = values
    names = ("lr", "step", "grad_scale", "clip_coef")
    ready = (scalar_like(name, x, like) for name, x in zip(names, floats, strict=True))
    return *ready, scalar_like("seed", seed, like, torch.int64)


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
    found_inf: Tensor | None = None,
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
    scalars = scalars_of(params[0], lr, step, grad_scale, clip_coef, seed)
    c = rest[0] if rest else None
    skips = scalar_like("found_inf", found_inf, params[0])
    return p, g, buffers, indices, axes, *scalars, c, signed, squared, momentum_scales, skips


def masked_grad_norm(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None = None,
) -> tuple[Any, ...]:
    if not grads:
        raise ValueError("grads is empty; it must have at least one gradient")
    same_length("indices", indices, len(grads))
    same_length("dims", dims, len(grads))
    matrices, axes = [], []
    for i, (grad, index, dim) in enumerate(zip(grads, indices, dims, strict=True)):
        floating(f"grads[{i}]", grad, 0)
        if grad.dtype != grads[0].dtype or grad.device != grads[0].device:
            raise ValueError(
                f"grads[{i}] is {grad.dtype} on {grad.device}; all of one call must be "
                f"{grads[0].dtype} on {grads[0].device}, as grads[0]"
            )
        compact_shape("grads", i, grad, index, dim)
        # Gradients are dense here: they are read through the index, and never written.
        matrices.append(as_matrix(grad if can_be_matrix(grad, dim) else grad.contiguous(), dim))
        axes.append(axis_of(grad, dim))
    return matrices, indices, axes, scalar_like("grad_scale", grad_scale, grads[0])
