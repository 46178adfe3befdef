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

from ... import bit_masks
from .device import wide
from .launch import WARPS, Launch, run
from .masked_list import TYPES, bits, cdiv, device_table, is_far
from .masked_rounding import noise, noise_keys, rounded
from .masked_rules import adamw, adamw_head, adamw_scalars
from .masked_table import HEAD, find_row, pointer, scalar_or_one

STEPS = 8  # blocks of a program, which computes what they share once
FIELDS = 9  # first program, parameter, gradient, two states, mask, offsets, elements, number


@triton.jit
def bits_of_block(mask_ptr, left, BLOCK: tl.constexpr):
    """(bits, how many are set before each) [BLOCK] of a block; the tensor has ``left`` elements.

    Byte 0b00000110 for example. Its bits, four places apart, are 0x00000110. Times 0x11111111 that
    is 0x22222210: place i has the number of bits up to bit i, and the last one that of all.
    """
    byte = tl.arange(0, BLOCK // 8)
    # Beyond the last element a byte has zeros, so that nothing there trains.
    x = tl.load(mask_ptr + byte, mask=byte * 8 < left, other=0).to(tl.uint32)
    x = (x | (x << 12)) & 0x000F000F
    x = (x | (x << 6)) & 0x03030303
    x = (x | (x << 3)) & 0x11111111
    up_to = x * tl.full((), 0x11111111, tl.uint32)
    of_byte = (up_to >> 28).to(tl.int32)
    before_byte = tl.cumsum(of_byte, 0) - of_byte  # [BLOCK / 8]
    place = 4 * tl.arange(0, 8)[None, :].to(tl.uint32)
    bit = (x[:, None] >> place) & 1
    before = before_byte[:, None] + (((up_to << 4)[:, None] >> place) & 15).to(tl.int32)
    return tl.reshape(bit, (BLOCK,)), tl.reshape(before, (BLOCK,))  # of [BLOCK / 8, 8]


@triton.jit(do_not_specialize=["n_tensors"])
def bit_masked_adamw_kernel(
    table_ptr, lr_ptr, step_ptr, grad_scale_ptr, clip_coef_ptr, seed_ptr, n_tensors,
    MAXIMIZE: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    FAR: tl.constexpr, FIELDS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    X: tl.constexpr = tl.float64 if tl.float64 == P else tl.float32
    NOISE: tl.constexpr = seed_ptr is not None
    row_ptr = find_row(table_ptr, n_tensors, HEAD, FIELDS)
    p_ptr, g_ptr = pointer(row_ptr, 1, P, 1), pointer(row_ptr, 2, P, 1)
    s0_ptr, s1_ptr = pointer(row_ptr, 3, S, 1), pointer(row_ptr, 4, S, 1)
    mask_ptr, offsets_ptr = pointer(row_ptr, 5, tl.uint8, 1), pointer(row_ptr, 6, tl.int64, 1)
    n = tl.load(row_ptr + 7)
    first = (tl.program_id(0) - tl.load(row_ptr)) * STEPS  # block, within this tensor
    step = tl.load(step_ptr)
    scale = scalar_or_one(clip_coef_ptr) / scalar_or_one(grad_scale_ptr)
    scale = -scale if MAXIMIZE else scale
    # Before the first block, since no load moves past a store.
    scalars = adamw_scalars(table_ptr, tl.load(lr_ptr), step, scale, X)
    key_0, key_1 = noise_keys(seed_ptr, step, row_ptr + 8)
    within = tl.arange(0, BLOCK)
    for block in range(first, tl.minimum(first + STEPS, tl.cdiv(n, BLOCK))):
        start, element = tl.load(offsets_ptr + block), block * BLOCK
        bit, state = bits_of_block(mask_ptr + element // 8, n - element, BLOCK)  # [1024]
        trains = bit == 1
        at_p, at_0, at_1 = p_ptr + element + within, s0_ptr + start + state, s1_ptr + start + state
        p = wide(tl.load(at_p, mask=trains, other=0)).to(X)
        g = wide(tl.load(g_ptr + element + within, mask=trains, other=0)).to(X)
        m = wide(tl.load(at_0, mask=trains, other=0)).to(X)
        v = wide(tl.load(at_1, mask=trains, other=0)).to(X)
        p, m, v = adamw(p, g, m, v, scalars)
        random = noise(start, state, key_0, key_1, FAR) if NOISE else state
        tl.store(at_p, rounded(p, random, 0, NOISE, P), mask=trains)
        tl.store(at_0, rounded(m, random, 1, NOISE, S), mask=trains)
        tl.store(at_1, rounded(v, random, 2, NOISE, S), mask=trains)


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
            programs += cdiv(bit_masks.n_blocks(n), STEPS)
    if not programs:
        return []
    head = adamw_head(beta1, beta2, eps, weight_decay)
    table = device_table([*map(bits, head), *rows], params[0].device)
    args = (table, lr, step, grad_scale, clip_coef, seed, len(rows) // FIELDS)
    options = {
        "MAXIMIZE": maximize,
        "P": TYPES[params[0].dtype],
        "S": TYPES[exp_avgs[0].dtype],
        "FAR": any(is_far(x.numel()) for x in exp_avgs),
        "FIELDS": FIELDS,
        "STEPS": STEPS,
        "BLOCK": bit_masks.BLOCK,
        "num_warps": WARPS,
    }
    return [Launch(bit_masked_adamw_kernel, (programs,), args, options)]


def bit_masked_adamw_(params: Sequence[Tensor], *args: object, **options: float) -> None:
    run(plan(params, *args, **options), params[0].device)  # type: ignore[arg-type]
