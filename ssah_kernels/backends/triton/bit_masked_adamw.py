"""Triton ``bit_masked_adamw_``: one AdamW step of single elements, for a list of tensors.

    per element as ``masked_adamw.py``; an element whose bit is not set is neither read nor written

A program takes a block of 1,024 elements: the bits of their 128 bytes, [1024], of which a running
sum says where the state of an element lies. With bits 0 1 0 0 1 1 and a block whose offset is 7,
the states of elements 1, 4 and 5 are 7, 8 and 9.

params, grads [...] contiguous; states [trained]; masks uint8 [ceil(n / 8)]; offsets int64
[blocks + 1]; scalars float64 []. Computation: float32 (float64 for float64 parameters). Bytes per
element of which a share s trains, at random: in float32 12 and 16 s, which is 20 for s = 0.5.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ssah_kernels import bit_masks
from ssah_kernels.backends.triton.launch import WARPS, Launch, run
from ssah_kernels.backends.triton.masked_list import TYPES, bits, device_table
from ssah_kernels.backends.triton.masked_rounding import KEY_0, KEY_1, noise, noise_key, rounded
from ssah_kernels.backends.triton.masked_rules import adamw, adamw_head
from ssah_kernels.backends.triton.masked_table import HEAD, find_row, pointer, scalar_or_one

FIELDS = 9  # first program, parameter, gradient, two states, mask, offsets, elements, number


@triton.jit(do_not_specialize=["n_tensors"])
def bit_masked_adamw_kernel(
    table_ptr, lr_ptr, step_ptr, grad_scale_ptr, clip_coef_ptr, seed_ptr, n_tensors,
    MAXIMIZE: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    X: tl.constexpr = tl.float64 if tl.float64 == P else tl.float32
    NOISE: tl.constexpr = seed_ptr is not None
    row_ptr = find_row(table_ptr, n_tensors, HEAD, FIELDS)
    p_ptr, g_ptr = pointer(row_ptr, 1, P, 1), pointer(row_ptr, 2, P, 1)
    s0_ptr, s1_ptr = pointer(row_ptr, 3, S, 1), pointer(row_ptr, 4, S, 1)
    mask_ptr, offsets_ptr = pointer(row_ptr, 5, tl.uint8, 1), pointer(row_ptr, 6, tl.int64, 1)
    n = tl.load(row_ptr + 7)
    block = tl.program_id(0) - tl.load(row_ptr)  # within this tensor
    within = tl.arange(0, BLOCK)
    element = block * BLOCK + within
    byte = tl.load(mask_ptr + element // 8, mask=element < n, other=0).to(tl.int32)
    bit = (byte >> (within % 8)) & 1
    trains = bit == 1
    state = tl.load(offsets_ptr + block) + tl.cumsum(bit, 0) - bit  # [1024]

    p = tl.load(p_ptr + element, mask=trains, other=0).to(X)
    g = tl.load(g_ptr + element, mask=trains, other=0).to(X)
    m = tl.load(s0_ptr + state, mask=trains, other=0).to(X)
    v = tl.load(s1_ptr + state, mask=trains, other=0).to(X)
    lr, step = tl.load(lr_ptr), tl.load(step_ptr)
    scale = scalar_or_one(clip_coef_ptr) / scalar_or_one(grad_scale_ptr)
    g *= (-scale if MAXIMIZE else scale).to(X)
    p, m, v = adamw(p, g, m, v, table_ptr, lr, step, X)
    random = state
    if NOISE:
        seed, number = tl.load(seed_ptr), tl.load(row_ptr + 8)
        key_0 = noise_key(KEY_0, seed, step.to(tl.int64), number)
        key_1 = noise_key(KEY_1, seed, step.to(tl.int64), number)
        random = noise(state, key_0, key_1)
    tl.store(p_ptr + element, rounded(p, random, 0, NOISE, P), mask=trains)
    tl.store(s0_ptr + state, rounded(m, random, 1, NOISE, S), mask=trains)
    tl.store(s1_ptr + state, rounded(v, random, 2, NOISE, S), mask=trains)


def plan(
    params: Sequence[Tensor],  # [...] each, contiguous
    grads: Sequence[Tensor],  # [...]
    exp_avgs: Sequence[Tensor],  # [trained]
    exp_avg_sqs: Sequence[Tensor],  # [trained]
    masks: Sequence[Tensor],  # [ceil(n / 8)]
    offsets: Sequence[Tensor],  # [blocks + 1]
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> list[Launch]:
    """The launch of one call; none where nothing trains."""
    rows: list[int] = []
    programs = 0
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, masks, offsets, strict=True)
    for i, lists in enumerate(tensors):
        if lists[2].numel():  # else none of its elements trains
            n = lists[0].numel()
            rows += [programs, *(x.data_ptr() for x in lists), n, i]
            programs += bit_masks.n_blocks(n)
    if not programs:
        return []
    head = adamw_head(beta1, beta2, eps, weight_decay)
    table = device_table([*map(bits, head), *rows], params[0].device)
    args = (table, lr, step, grad_scale, clip_coef, seed, len(rows) // FIELDS)
    options = {
        "MAXIMIZE": maximize,
        "P": TYPES[params[0].dtype],
        "S": TYPES[exp_avgs[0].dtype],
        "FIELDS": FIELDS,
        "BLOCK": bit_masks.BLOCK,
        "num_warps": WARPS,
    }
    return [Launch(bit_masked_adamw_kernel, (programs,), args, options)]


def bit_masked_adamw_(params: Sequence[Tensor], *args: object, **options: float) -> None:
    run(plan(params, *args, **options), params[0].device)  # type: ignore[arg-type]
