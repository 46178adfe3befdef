"""A linear function of whose weight only some rows or columns train.

Let the storage S be ``[entries, other]`` (`ssah.training.splitting.split_tensor`). With x
``[tokens, in]``, y ``[tokens, out]`` and its gradient g ``[tokens, out]``, and T the storage rows
that train:

    A (rows of the weight train)       y = x S^T + b     dS[T] = g[:, T]^T x    [trained, in]
    B (columns of the weight train)    y = x S + b       dS[T] = x[:, T]^T g    [trained, out]
    both                               dx = g times the weight, as in any linear layer

In a packed storage the order of the entries is another one. Between A and B of an FFN the channels
are in this order too. A head's channels must stay where they are. There A's output is put back into
the model's order, and B's input is brought into that of the storage: x is much smaller than S.

    A   y = (x S^T)[:, places] + b        B   y = x[:, order] S + b

So no weight gradient is made for what is frozen, and B needs only the trained channels of x for it.
Example: of 8,192 channels 20 % train. Dense training keeps 8,192 numbers a token for B's weight
gradient, this one 1,638, and multiplies a fifth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssah.training.splitting.split_tensor import Part, width

# At most this share of B's input is copied for the backward pass; beyond, all of it is kept: the
# next layer may hold it anyway, and a copy of most of it would cost more than it saves.
_COPIED_SHARE = 0.5
_HALVES = (torch.bfloat16, torch.float16)
_BEFORE = 8  # arguments of `MaskedLinearFunction` before the trained slices


def _columns(matrix: Tensor, part: Part) -> Tensor:
    """Some columns of ``[tokens, n]``: a view of a stretch, or gathered. ``[tokens, trained]``."""
    if isinstance(part, Tensor):
        return matrix.index_select(1, part)
    return matrix[:, part[0] : part[1]]


def _channels(part: Part, order: Tensor | None) -> Part:
    """The channels that belong to a part of the storage, whose order is ``order`` ``[entries]``."""
    return part if order is None or isinstance(part, Tensor) else order[part[0] : part[1]]


def _in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """``x`` ``[..., n]`` with its channels in another order, int64 ``[n]``; None: as it is."""
    return x if order is None else x.index_select(-1, order)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., k] @ matrix [k, n] + bias [n]``."""
    if x.device.type != "cpu" or x.dtype not in _HALVES:
        return F.linear(x, matrix.t(), bias)
    # Of this layout torch makes single products where the processor has no arithmetic of these
    # types: 64 tokens through [2816, 1024] took 0.8 seconds, and its transpose takes 0.02.
    across = x.reshape(-1, x.shape[-1]).t().contiguous()  # [k, tokens]
    if bias is None:
        y = matrix.t() @ across  # [n, tokens]
    else:
        y = torch.addmm(bias[:, None], matrix.t(), across)
    # Not a view, which autograd would let nobody write to in place; models do.
    result = y.new_empty(*x.shape[:-1], len(y))
    result.view(-1, len(y)).copy_(y.t())
    return result


class MaskedLinearFunction(torch.autograd.Function):
    """y = x W^T + b, with gradients for x and the trained rows (A) or columns (B) of W and b.

    A bias that trains whole gets its own. The slices are arguments, though ``storage`` and ``bias``
    have their values already, so that autograd has somewhere to put their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., in]
        storage: Tensor,  # unit-major: of A [entries, in], of B [entries, out]
        bias: Tensor | None,  # [out]
        is_output: bool,  # whether this is B
        weight_parts: tuple[Part, ...],
        bias_parts: tuple[Part, ...],
        order: Tensor | None,  # int64 [entries] of a storage in another order than the channels
        places: Tensor | None,  # its inverse
        *trained: Tensor,  # the slices, of the weight and then of the bias: [trained, ...] each
    ) -> Tensor:
        ctx.shape, ctx.x_dtype, ctx.dtype = x.shape, x.dtype, storage.dtype
        ctx.is_output, ctx.weight_parts, ctx.bias_parts = is_output, weight_parts, bias_parts
        ctx.order, ctx.places = order, places
        weight, b = storage, bias
        # Autocast knows nn.Linear, not this function: cast as it would.
        if torch.is_autocast_enabled(x.device.type) and storage.dtype != torch.float64:
            ctx.dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(ctx.dtype), storage.to(ctx.dtype)
            b = None if bias is None else bias.to(ctx.dtype)
        if is_output:
            y = _product(_in_order(x, order), weight, b)  # [..., out]
        elif places is None:
            y = F.linear(x, weight, b)
        else:
            y = _in_order(F.linear(x, weight), places)
            y = y if b is None else y.add_(b)  # the bias is in the model's order
        kept: list[Tensor] = []
        if any(ctx.needs_input_grad[_BEFORE : _BEFORE + len(weight_parts)]):
            matrix = x.reshape(-1, x.shape[-1])  # [tokens, in]
            share = sum(width(part) for part in weight_parts) / len(storage)
            # A multiplies all of x by the trained columns of g; B the trained columns of x by g.
            ctx.copied = is_output and share <= _COPIED_SHARE
            if ctx.copied:
                kept = [_columns(matrix, _channels(p, order)).clone() for p in weight_parts]
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
        result: list[Tensor | None] = [None] * _BEFORE
        if needs[0]:
            weight = storage.to(ctx.dtype)
            # [tokens, in]
            if ctx.is_output:
                grad_x = _in_order(grad @ weight.t(), ctx.places)
            else:
                grad_x = _product(_in_order(grad, ctx.order), weight)
            result[0] = grad_x.view(ctx.shape).to(ctx.x_dtype)
        if bias is not None and needs[2]:  # a bias that trains whole is no slice
            result[2] = grad.sum(0).to(bias.dtype)
        for i, part in enumerate(ctx.weight_parts):
            value = None
            if needs[_BEFORE + i]:
                channels = _channels(part, ctx.order)
                if not ctx.is_output:
                    value = _columns(grad, channels).t() @ kept[0]  # [trained, in]
                else:
                    x = kept[i] if ctx.copied else _columns(kept[0], channels)  # [tokens, trained]
                    value = x.t() @ grad  # [trained, out]
                value = value.to(trained[i].dtype)
            result.append(value)
        for i, part in enumerate(ctx.bias_parts, start=len(ctx.weight_parts)):
            needed = needs[_BEFORE + i]
            result.append(_columns(grad, part).sum(0).to(trained[i].dtype) if needed else None)
        return tuple(result)
