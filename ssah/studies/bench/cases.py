"""What ``ssah bench`` times: every operator, its inputs, and the same formula in PyTorch.

Bytes are what the formula must move. ``gated_moments`` of bfloat16 [4096, 4096] reads gate and up
and writes their product, three tensors of 32 MiB: at 100 GB/s that takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssah_kernels import ops
from ssah_kernels.bit_masks import block_offsets, pack_bits

_TRAINED = 0.2  # share of the rows that the masked operators update
_BITS = 0.5  # share of the elements that the update of single elements takes
_BETA1, _BETA2, _EPS, _DECAY = 0.9, 0.999, 1e-8, 0.01

Args = tuple[Any, ...]
Make = Callable[[int, int, torch.dtype, torch.device], Args]


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        op: its name.
        tensors: how many tensors of the first argument's size a call reads and writes.
        make: [rows, columns, dtype, device] -> arguments of both functions.
        ours: the operator.
        plain: the same in PyTorch, sums in float32.
    """

    op: str
    tensors: int
    make: Make
    ours: Callable[..., Any]
    plain: Callable[..., Any]


def _activations(n: int) -> Make:
    def make(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Args:
        shape = (rows, columns)
        return tuple(torch.randn(shape, device=device).to(dtype) for _ in range(n))

    return make


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of every channel of ``x`` [tokens, C]: moments, in PyTorch."""
    y = x.float()
    return y.sum(0), (y * y).sum(0)


def _gated_plain(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    product = F.silu(gate) * up
    return product, *sums(product)


def _gated_backward_plain(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


def _product_arguments(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Args:
    """gate, up [rows, columns], factors [4, columns] of which a fifth are 0, arm [rows]."""
    gate, up = _activations(2)(rows, columns, dtype, device)
    factors = (torch.rand(4, columns, device=device) >= 0.2).to(dtype)
    return gate, up, factors, torch.arange(rows, device=device) * 4 // max(rows, 1)


def _product_plain(gate: Tensor, up: Tensor, factors: Tensor, arm: Tensor) -> Tensor:
    return F.silu(gate) * up * factors[arm]


def _update_arguments(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Args:
    """grad and two states [trained, columns], parameter [rows, columns], index [trained], lr, step.

    A fifth of the rows train.
    """
    n = round(_TRAINED * rows)
    # At random, and sorted as an index must be.
    index = torch.randperm(rows, device=device)[:n].sort().values
    grad = torch.randn(n, columns, device=device).to(dtype)
    state = [torch.zeros_like(grad), torch.zeros_like(grad)]
    param = torch.randn(rows, columns, device=device).to(dtype)
    scalars = [torch.tensor(value, device=device) for value in (1e-5, 10.0)]
    return grad, *state, param, index, *scalars


def _adamw(g: Tensor, m: Tensor, v: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor) -> None:
    ops.masked_adamw_([p], [g], [m], [v], [i], [0], lr, t, weight_decay=_DECAY)


def _adamw_plain(
    g: Tensor, m: Tensor, v: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor
) -> None:
    grad, weight = g.float(), p.index_select(0, i).float()  # [trained, columns]
    mean = torch.lerp(m.float(), grad, 1 - _BETA1)
    square = _BETA2 * v.float() + (1 - _BETA2) * grad * grad
    # In the order of torch.optim.AdamW: decay first, then the step.
    weight = weight * (1 - lr * _DECAY)
    size = square.sqrt() / (1 - _BETA2**t).sqrt() + _EPS
    weight = weight - lr / (1 - _BETA1**t) * mean / size
    m.copy_(mean)
    v.copy_(square)
    p.index_copy_(0, i, weight.to(p.dtype))


def _bit_arguments(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Args:
    """grad [rows, columns], two states [trained], parameter, mask, bits, offsets, lr, step.

    Half of the elements train, drawn at random.
    """
    shape = (rows, columns)
    mask = torch.rand(shape, device=device) < _BITS
    bits = pack_bits(mask)
    grad, param = (torch.randn(shape, device=device).to(dtype) for _ in "gp")
    state = [grad.new_zeros(int(mask.sum())) for _ in "mv"]
    scalars = [torch.tensor(value, device=device) for value in (1e-5, 10.0)]
    return grad, *state, param, mask, bits, block_offsets(bits), *scalars


def _bit_adamw(
    g: Tensor, m: Tensor, v: Tensor, p: Tensor, _: Tensor, bits: Tensor, at: Tensor, *s: Tensor
) -> None:
    ops.bit_masked_adamw_([p], [g], [m], [v], [bits], [at], *s, weight_decay=_DECAY)


def _bit_adamw_plain(
    g: Tensor, m: Tensor, v: Tensor, p: Tensor, mask: Tensor, _: Tensor, __: Tensor, *s: Tensor
) -> None:
    own, every = p[mask], torch.arange(len(m), device=p.device)
    _adamw_plain(g[mask], m, v, own, every, *s)
    p.masked_scatter_(mask, own)


def _sgd(g: Tensor, m: Tensor, _: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor) -> None:
    ops.masked_sgd_([p], [g], [m], [i], [0], lr, t, momentum=_BETA1)


def _sgd_plain(
    g: Tensor, m: Tensor, _: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor
) -> None:
    mean = _BETA1 * m.float() + g.float()
    weight = p.index_select(0, i).float() - lr * mean  # [trained, columns]
    m.copy_(mean)
    p.index_copy_(0, i, weight.to(p.dtype))


def _moments(x: Tensor) -> None:
    ops.channel_moments_(x, *ops.new_moments(x))  # a new state is kilobytes, x is megabytes


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return ops.gated_moments(gate, up, *ops.new_moments(gate))


def _taylor(x: Tensor, grad: Tensor) -> None:
    signed = x.new_zeros(x.shape[-1], dtype=torch.float64)
    ops.taylor_moments_(x, grad, signed, torch.zeros_like(signed))


def _norm(g: Tensor) -> Tensor:
    return ops.masked_grad_norm([g], [None], [0])


CASES: dict[str, Case] = {
    case.op: case
    for case in (
        Case("channel_moments_", 1, _activations(1), _moments, sums),
        Case("gated_moments", 3, _activations(2), _gated, _gated_plain),
        Case(
            "gated_moments_backward",
            5,
            _activations(3),
            torch.ops.ssah.gated_moments_backward,
            _gated_backward_plain,
        ),
        Case("gated_product", 3, _product_arguments, ops.gated_product, _product_plain),
        Case("taylor_moments_", 2, _activations(2), _taylor, lambda x, g: sums(x * g)),
        Case(
            "column_sq_norms",
            1,
            _activations(1),
            ops.column_sq_norms,
            lambda w: w.float().square().sum(0),
        ),
        # Of the gradient's size: p, m and v are read and written, g is read.
        Case("masked_adamw_", 7, _update_arguments, _adamw, _adamw_plain),
        # Of the gradient's size, of which half trains: p is read and written, g is read; half of
        # both states is read and written.
        Case("bit_masked_adamw_", 5, _bit_arguments, _bit_adamw, _bit_adamw_plain),
        Case("masked_sgd_", 5, _update_arguments, _sgd, _sgd_plain),
        Case(
            "masked_grad_norm",
            1,
            _activations(1),
            _norm,
            lambda g: torch.linalg.vector_norm(g, dtype=torch.float32),
        ),
    )
}
