"""Triton ``gated_moments``: h = act(gate) * up, and the moments of h, in one pass.

    h = round(act(gate) * up)    (N, mu, M2) <- merged with the moments of the unmasked rows of h

gate, up [..., C] -> h [..., C] contiguous; mask [...], count [] and mean, M2 [C] in float64.
Accumulation: as in channel_moments.py; act(gate) * up in float32 (float64 for float64 input),
rounded once; the moments see the rounded values.
Bytes per element: 2 itemsize read, 1 written (6 for bf16), plus 32 / chunk rows in the L2 cache.

The derivative reads 3 itemsize and writes 2 (10 bytes for bf16):
dgate = grad * up * act'(gate), dup = grad * act(gate).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment"
# (Tuples grow as a loop is unrolled, and so change their type.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation, activation_and_slope
from .device import as_count, counted, place, wide, zeros_like_wide
from .launch import Launch, count_rows_, row_slices, run, tiling
from .moments import add_tile, merge_launch, store_moments

DEPTH = 4  # rows per warp and tile; with two inputs, 128 bytes in flight per thread
DEPTH_BACKWARD = 4


@triton.jit(do_not_specialize=["n_rows", "tiles", "first_chunk"])
def gated_moments_kernel(
    gate_ptr, up_ptr, out_ptr, mask_ptr, count_ptr, partial_ptr, counts_ptr,
    n_rows, channels, gate_stride, up_stride, out_stride, mask_stride, tiles, first_chunk,
    ACT: tl.constexpr, HAS_MASK: tl.constexpr,
    DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, cols, first, own = place(n_rows, channels, tiles, DEPTH, WARPS, BLOCK)
    n = zeros_like_wide(gate_ptr, (WARPS, 1))
    hi = zeros_like_wide(gate_ptr, (WARPS, BLOCK))
    lo = zeros_like_wide(gate_ptr, (WARPS, BLOCK))
    m2 = zeros_like_wide(gate_ptr, (WARPS, BLOCK))
    gate_ptr += first * gate_stride + cols  # [WARPS, BLOCK]: each warp's next row
    up_ptr += first * up_stride + cols
    out_ptr += first * out_stride + cols
    if HAS_MASK:
        mask_ptr += first * mask_stride  # [WARPS, 1]
    for tile in range(0, tiles):
        gates, ups = (), ()  # of DEPTH rows of each warp: [WARPS, BLOCK]
        for i in tl.static_range(DEPTH):
            inside = (tile * DEPTH + i < own) & (cols < channels)
            gates += (tl.load(gate_ptr, mask=inside, other=0),)
            ups += (tl.load(up_ptr, mask=inside, other=0),)
            gate_ptr += tl.cast(gate_stride, tl.int64) * WARPS
            up_ptr += tl.cast(up_stride, tl.int64) * WARPS
        hs, counts = (), ()
        for i in tl.static_range(DEPTH):
            h = (activation(wide(gates[i]), ACT) * wide(ups[i])).to(gates[i].dtype)
            exists = tile * DEPTH + i < own
            tl.store(out_ptr, h, mask=exists & (cols < channels))
            out_ptr += tl.cast(out_stride, tl.int64) * WARPS
            valid = counted(exists, mask_ptr, HAS_MASK)
            if HAS_MASK:
                mask_ptr += tl.cast(mask_stride, tl.int64) * WARPS
            # A masked row is computed and stored like any other, so that it is read here, unlike
            # in channel_moments, and must be set to 0 before it is summed. One that does not exist
            # is 0: so is every activation of 0.
            hs += (tl.where(valid, wide(h), 0) if HAS_MASK else wide(h),)
            counts += (as_count(valid, n.dtype),)
        n, hi, lo, m2 = add_tile(hs, counts, n, hi, lo, m2)
    total = store_moments(n, hi, lo, m2, first_chunk + chunk, cols, channels, partial_ptr, BLOCK)
    # Of the programs that share a chunk of rows, one leaves how many count; entry 0 is the state's
    # count, which the merge would else read and write at once.
    if tl.program_id(0) % tl.cdiv(channels, BLOCK) == 0:
        tl.store(counts_ptr + 1 + first_chunk + chunk, total)
        tl.store(counts_ptr, tl.load(count_ptr))


@triton.jit(do_not_specialize=["n_rows"])
def gated_moments_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n_rows, channels,
    grad_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    ACT: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, cols, first, own = place(n_rows, channels, 1, DEPTH, WARPS, BLOCK)
    grads, gates, ups = (), (), ()
    # All that is read before all that is written: no load moves past a store.
    for i in tl.static_range(DEPTH):
        inside = (i < own) & (cols < channels)
        row = first + i * WARPS
        grads += (tl.load(grad_ptr + row * grad_stride + cols, mask=inside, other=0),)
        gates += (tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0),)
        ups += (tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0),)
    for i in tl.static_range(DEPTH):
        inside = (i < own) & (cols < channels)
        row = first + i * WARPS
        grad = wide(grads[i])
        value, slope = activation_and_slope(wide(gates[i]), ACT)
        dgate = (grad * wide(ups[i]) * slope).to(dgate_ptr.dtype.element_ty)
        dup = (grad * value).to(dup_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * dgate_stride + cols, dgate, mask=inside)
        tl.store(dup_ptr + row * dup_stride + cols, dup, mask=inside)


def launches(
    gate: Tensor, up: Tensor, out: Tensor, count: Tensor, mean: Tensor, m2: Tensor,
    token_mask: Tensor | None, act: str,
) -> list[Launch]:  # fmt: skip
    slices = row_slices([gate, up, out], token_mask)  # views [rows, C], and [rows] of the mask
    rows, channels = slices[0][0].shape
    tile = tiling(rows, channels, gate.element_size(), DEPTH)
    partial = mean.new_empty(len(slices) * tile.chunks, 2, channels)
    counts = mean.new_empty(1 + partial.shape[0])
    options = {"ACT": act, "HAS_MASK": token_mask is not None, **tile.constants}
    stage1 = []
    for i, views in enumerate(slices):
        pointers = views if len(views) == 4 else (*views, None)  # no mask
        strides = [0 if v is None else v.stride(0) for v in pointers]
        args = (*pointers, count, partial, counts, rows, channels, *strides)
        more = (tile.tiles, i * tile.chunks)
        stage1.append(Launch(gated_moments_kernel, tile.grid, (*args, *more), options))
    return [*stage1, merge_launch(partial, counts, count, mean, m2)]


def launches_backward(
    grad: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, act: str
) -> list[Launch]:
    slices = row_slices([grad, gate, up, dgate, dup], None)
    rows, channels = slices[0][0].shape
    # Nothing is summed over rows: programs of one tile each leave no partial results.
    tile = tiling(rows, channels, gate.element_size(), DEPTH_BACKWARD, max_tiles=1)
    options = {"ACT": act, **tile.constants}
    return [
        Launch(
            gated_moments_backward_kernel,
            tile.grid,
            (*views, rows, channels, *(v.stride(0) for v in views)),
            options,
        )
        for views in slices
    ]


def gated_moments(
    gate: Tensor,
    up: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    token_mask: Tensor | None = None,
    *,
    act: str = "silu",
) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        count_rows_(gate, token_mask, count)
    else:
        run(launches(gate, up, out, count, mean, m2, token_mask, act), gate.device)
    return out


def gated_moments_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, act: str = "silu"
) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in "gu")
    if gate.numel():
        run(launches_backward(grad, gate, up, dgate, dup, act), gate.device)
    return dgate, dup
