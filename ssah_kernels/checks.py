"""Argument checks, done once before any backend runs; a backend may rely on them.

Every function has its operator's name and arguments. It raises ``TypeError`` or ``ValueError``
that names the argument, what it was and what it must be, and returns the arguments ready for a
kernel: the last dimension of each input contiguous, the tensors of an update as matrices, its
scalars as float64 on their device, everything else as it was passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _floating(name: str, x: Tensor, min_dim: int = 1) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; it must be one of "
            + ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        )
    if x.dim() < min_dim:
        raise ValueError(f"{name} has {x.dim()} dimensions; it must have at least {min_dim}")


def _primal(name: str, x: Tensor) -> None:
    """Raise where a tangent would be lost without a word."""
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{name} carries a tangent of forward-mode differentiation, which no operator of ssah "
            "passes on; take the derivative in reverse mode, with torch.autograd.grad"
        )


def _like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        is_, must = getattr(x, what), getattr(other, what)
        if is_ != must:
            is_, must = (tuple(v) if what == "shape" else v for v in (is_, must))
            raise ValueError(f"{name} has {what} {is_}; it must be {must}, as {other_name}")


def _state(name: str, state: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if state.dtype != torch.float64:
        raise TypeError(f"{name} has dtype {state.dtype}; state tensors must be float64")
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}; it must be {shape}")
    if state.device != device:
        raise ValueError(f"{name} is on {state.device}; it must be on {device}, with the input")
    if not state.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"token_mask has dtype {mask.dtype}; it must be bool")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:-1])}, "
            "the leading shape of the input"
        )
    if mask.device != x.device:
        raise ValueError(f"token_mask is on {mask.device}; it must be on {x.device}")


def _act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; it must be one of {', '.join(ACTIVATIONS)}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> tuple[Any, ...]:
    _floating("x", x)
    _primal("x", x)
    channels = (x.shape[-1],)
    for name, state, shape in (
        ("count", count, ()),
        ("mean", mean, channels),
        ("m2", m2, channels),
    ):
        _state(name, state, shape, x.device)
    _mask(token_mask, x)
    return _rows(x), count, mean, m2, token_mask


def gated_moments(
    gate: Tensor,
    up: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    token_mask: Tensor | None = None,
    *,
    act: str = "silu",
) -> tuple[Any, ...]:
    _floating("gate", gate)
    _like("up", up, "gate", gate)
    _primal("gate", gate)
    _primal("up", up)
    _act(act)
    channel_moments_(gate, count, mean, m2, token_mask)
    return _rows(gate), _rows(up), count, mean, m2, token_mask


def gated_moments_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, act: str = "silu"
) -> tuple[Any, ...]:
    _floating("gate", gate)
    _like("up", up, "gate", gate)
    _primal("gate", gate)
    _primal("up", up)
    _like("grad", grad, "gate", gate)
    _act(act)
    return _rows(grad), _rows(gate), _rows(up)


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> tuple[Any, ...]:
    _floating("x", x)
    _primal("x", x)
    _like("grad", grad, "x", x)
    channels = (x.shape[-1],)
    _state("signed", signed, channels, x.device)
    _state("squared", squared, channels, x.device)
    _mask(token_mask, x)
    return _rows(x), _rows(grad), signed, squared, token_mask


def column_sq_norms(weight: Tensor) -> tuple[Any, ...]:
    _floating("weight", weight, 2)
    _primal("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions; it must have 2")
    return (_rows(weight),)


def _matrix(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """``x`` as a view [rows, columns], and which of the two ``dim`` became."""
    if x.dim() == 2:
        return x, dim % 2
    if x.dim() < 2:
        return x.reshape(1, -1), 1
    dim %= x.dim()
    if dim == 0:
        return x.view(x.shape[0], -1), 0
    return x.view(-1, x.shape[-1]), 1


def _same_length(name: str, values: Sequence[Any], must: int) -> None:
    if len(values) != must:
        raise ValueError(f"{name} has {len(values)} entries; it must have {must}, one a parameter")


def _compact_shape(
    name: str, x: Tensor, index_name: str, index: Tensor | None, dim: int
) -> tuple[int, ...]:
    """The shape that ``index`` along ``dim`` selects from ``x``."""
    shape = tuple(x.shape)
    n = max(len(shape), 1)
    if not -n <= dim < n or (n > 2 and dim % n not in (0, n - 1)):
        raise ValueError(
            f"dims has {dim} for {name} of {len(shape)} dimensions; it must be the first or last"
        )
    if index is None:
        return shape
    if index.dtype != torch.int64 or index.dim() != 1 or not shape:
        raise ValueError(
            f"{index_name} is {index.dtype} with {index.dim()} dimensions for {name} of "
            f"{len(shape)}; it must be int64 with 1, strictly increasing"
        )
    if index.device != x.device:
        raise ValueError(f"{index_name} is on {index.device}; it must be on {x.device}")
    dim %= n
    return (*shape[:dim], index.shape[0], *shape[dim + 1 :])


def _compact(
    name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; with its parameter it must be {allowed}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}, what is trained")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device}")


def _scalar(
    name: str, x: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    if x is None:
        return None
    if x.numel() != 1 or x.is_floating_point() != dtype.is_floating_point:
        kind = "a floating-point" if dtype.is_floating_point else "an int64"
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be {kind} tensor of one value"
        )
    if x.device == like.device and x.dtype == dtype:
        return x
    return x.to(like.device, dtype)


def _update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    compensations: Sequence[Tensor] | None,
    importance: dict[str, Sequence[Tensor] | None],
) -> tuple[list[Any], ...]:
    """Checks the lists of an update; params, grads, states, dims, compensations as matrices."""
    if not params:
        raise ValueError("params is empty; it must have at least one parameter")
    first = params[0]
    _floating("params[0]", first, 0)
    state_dtypes = (
        (torch.float64,) if first.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    )
    lists: dict[str, tuple[Sequence[Tensor], tuple[torch.dtype, ...]]] = {
        "grads": (grads, (first.dtype,))
    }
    for name, state in states.items():
        if state:
            state_dtypes = (state[0].dtype,) if state[0].dtype in state_dtypes else state_dtypes
        lists[name] = state, state_dtypes
    if compensations is not None:
        if first.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"compensations are given for {first.dtype} parameters; they must be bfloat16 or "
                "float16"
            )
        lists["compensations"] = compensations, (first.dtype,)
    for name, values in {"indices": indices, "dims": dims, **importance}.items():
        if values is not None:
            _same_length(name, values, len(params))
    for name, (tensors, _) in lists.items():
        _same_length(name, tensors, len(params))
    if (importance["signed"] is None) != (importance["squared"] is None):
        raise ValueError("signed and squared must be given together")

    matrices: list[list[Any]] = [[] for _ in range(len(lists) + 2)]
    for i, (param, index, dim) in enumerate(zip(params, indices, dims, strict=True)):
        if param.dtype != first.dtype or param.device != first.device:
            raise ValueError(
                f"params[{i}] is {param.dtype} on {param.device}; all of one call must be "
                f"{first.dtype} on {first.device}, as params[0]"
            )
        shape = _compact_shape(f"params[{i}]", param, f"indices[{i}]", index, dim)
        for name, (tensors, dtypes) in lists.items():
            _compact(f"{name}[{i}]", tensors[i], shape, dtypes, param)
            if name != "grads" and not tensors[i].is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous")
        for name, values in importance.items():
            if values is not None:
                _state(
                    f"{name}[{i}]", values[i], shape[dim : dim + 1 or None] or (1,), param.device
                )
        matrix, axis = _matrix(param, dim)
        for row, value in zip(
            matrices,
            (matrix, axis, *(_matrix(t[i].contiguous(), dim)[0] for t, _ in lists.values())),
            strict=True,
        ):
            row.append(value)
    return tuple(matrices)


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
    **_: float,
) -> tuple[Any, ...]:
    p, axes, g, m, v, *c = _update(
        params,
        grads,
        {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        indices,
        dims,
        compensations,
        {"signed": signed, "squared": squared},
    )
    scalars = (
        _scalar(name, x, params[0])
        for name, x in (
            ("lr", lr),
            ("step", step),
            ("grad_scale", grad_scale),
            ("clip_coef", clip_coef),
        )
    )
    seed = _scalar("seed", seed, params[0], torch.int64)
    return p, g, m, v, indices, axes, *scalars, seed, c[0] if c else None, signed, squared


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
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    **_: float,
) -> tuple[Any, ...]:
    if momentum_buffers is None and (momentum != 0 or nesterov):
        raise ValueError(
            f"momentum_buffers is None; momentum {momentum} and nesterov {nesterov} need them"
        )
    states = {} if momentum_buffers is None else {"momentum_buffers": momentum_buffers}
    p, axes, g, *rest = _update(
        params, grads, states, indices, dims, compensations, {"signed": signed, "squared": squared}
    )
    buffers = None if momentum_buffers is None else rest.pop(0)
    scalars = (
        _scalar(name, x, params[0])
        for name, x in (
            ("lr", lr),
            ("step", step),
            ("grad_scale", grad_scale),
            ("clip_coef", clip_coef),
        )
    )
    seed = _scalar("seed", seed, params[0], torch.int64)
    c = rest[0] if rest else None
    return p, g, buffers, indices, axes, *scalars, seed, c, signed, squared


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
        _floating(f"grads[{i}]", grad, 0)
        if grad.dtype != grads[0].dtype or grad.device != grads[0].device:
            raise ValueError(
                f"grads[{i}] is {grad.dtype} on {grad.device}; all of one call must be "
                f"{grads[0].dtype} on {grads[0].device}, as grads[0]"
            )
        _compact_shape(f"grads[{i}]", grad, f"indices[{i}]", index, dim)
        matrix, axis = _matrix(grad if grad.dim() < 3 else grad.contiguous(), dim)
        matrices.append(matrix)
        axes.append(axis)
    return matrices, indices, axes, _scalar("grad_scale", grad_scale, grads[0])
