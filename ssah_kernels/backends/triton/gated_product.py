"""Triton ``gated_product``: h = act(gate) * up * factors[arm], an arm for each row, in one pass.

gate, up [..., C] -> h [..., C] contiguous; factors [arms, C] in the type of the arithmetic; arm
[...] int64. Of three rows under the arms 0, 1, 1 the last two are multiplied by factors[1].
Arithmetic: float32 (float64 for float64 input), rounded once.
Bytes per element: 2 itemsize read, 1 written (6 for bf16); the factors stay in the L2 cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment"
# (Tuples grow as a loop is unrolled, and so change their type.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation
from .device import place, wide
from .launch import Launch, row_slices, run, tiling

DEPTH = 2  # rows per warp and tile; with two inputs, 64 bytes in flight per thread


@triton.jit(do_not_specialize=["n_rows"])
def gated_product_kernel(
    gate_ptr, up_ptr, out_ptr, arm_ptr, factors_ptr, n_rows, channels,
    gate_stride, up_stride, out_stride, arm_stride, factors_stride,
    ACT: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, cols, first, own = place(n_rows, channels, 1, DEPTH, WARPS, BLOCK)
    gates, ups, factors = (), (), ()
    # All that is read before all that is written: no load moves past a store.
    for i in tl.static_range(DEPTH):
        inside = (i < own) & (cols < channels)
        row = first + i * WARPS
        arm = tl.load(arm_ptr + row * arm_stride, mask=i < own, other=0)  # [WARPS, 1]
        gates += (tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0),)
        ups += (tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0),)
        factors += (tl.load(factors_ptr + arm * factors_stride + cols, mask=inside, other=0),)
    for i in tl.static_range(DEPTH):
        inside = (i < own) & (cols < channels)
        row = first + i * WARPS
        h = (activation(wide(gates[i]), ACT) * wide(ups[i]) * factors[i]).to(gates[i].dtype)
        tl.store(out_ptr + row * out_stride + cols, h, mask=inside)


def launches(
    gate: Tensor, up: Tensor, out: Tensor, factors: Tensor, arm: Tensor, act: str
) -> list[Launch]:
    slices = row_slices([gate, up, out], arm)  # views [rows, C], and [rows] of arm
    rows, channels = slices[0][0].shape
    # Nothing is summed over rows: programs of one tile each leave no partial results.
    tile = tiling(rows, channels, gate.element_size(), DEPTH, max_tiles=1)
    options = {"ACT": act, **tile.constants}
    result = []
    for views in slices:
        strides = (*(v.stride(0) for v in views), factors.stride(0))
        args = (*views, factors, rows, channels, *strides)
        result.append(Launch(gated_product_kernel, tile.grid, args, options))
    return result


def gated_product(
    gate: Tensor, up: Tensor, factors: Tensor, arm: Tensor, *, act: str = "silu"
) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        run(launches(gate, up, out, factors, arm, act), gate.device)
    return out
