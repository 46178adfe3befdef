"""The launches of realistic calls of Triton's operators, for the compiler: nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ssah_kernels.backends.triton import (
    bit_masked_adamw,
    channel_moments,
    column_sq_norms,
    gated_moments,
    gated_product,
    masked_adamw,
    masked_grad_norm,
    masked_sgd,
    taylor_moments,
)
from ssah_kernels.backends.triton.launch import Launch
from ssah_kernels.backends.triton.masked_list import Update
from ssah_kernels.bit_masks import n_blocks, packed_size
from ssah_kernels.checks.compact import COMPENSATIONS


def launches(
    op: str, dtype: torch.dtype, detail: str, shape: tuple[int, int] = (4096, 11008)
) -> list[Launch]:
    """The launches of one realistic call; nothing is computed, the memory is never touched."""
    if op.startswith("masked"):
        return masked_launches(op, dtype, detail, shape)
    if op == "bit_masked_adamw_":
        return bit_launches(dtype, detail, shape)
    rows, channels = shape
    x, y, z, v, w = (torch.empty(rows, channels, dtype=dtype) for _ in range(5))
    mean, m2 = (torch.empty(channels, dtype=torch.float64) for _ in range(2))
    count = torch.empty((), dtype=torch.float64)
    mask = torch.empty(rows, dtype=torch.bool) if "masked" in detail else None
    act = detail.split()[0] if detail else ""
    if op == "channel_moments_":
        return channel_moments.launches(x, count, mean, m2, mask)
    if op == "gated_moments":
        return gated_moments.launches(x, y, z, count, mean, m2, mask, act)
    if op == "gated_moments_backward":
        return gated_moments.launches_backward(x, y, z, v, w, act)
    if op == "gated_product":
        factors = torch.empty(4, channels, dtype=torch.promote_types(dtype, torch.float32))
        arm = torch.empty(rows, dtype=torch.int64)
        return gated_product.launches(x, y, z, factors, arm, act)
    if op == "taylor_moments_":
        return taylor_moments.launches(x, y, mean, m2, mask)
    return column_sq_norms.launches(x, mean)


def bit_launches(dtype: torch.dtype, detail: str, shape: tuple[int, int]) -> list[Launch]:
    """One matrix of which every second element trains."""
    whole, scalar = torch.empty(shape, dtype=dtype), torch.empty((), dtype=torch.float64)
    narrow = torch.bfloat16 if dtype == torch.bfloat16 and "wide" not in detail else torch.float32
    state = torch.empty(
        -(-whole.numel() // 2), dtype=torch.float64 if dtype == torch.float64 else narrow
    )
    bits = torch.empty(packed_size(whole.numel()), dtype=torch.uint8)
    offsets = torch.empty(n_blocks(whole.numel()) + 1, dtype=torch.int64)
    seed = torch.empty((), dtype=torch.int64) if "noise" in detail else None
    lists = ([whole], [whole], [state], [state], [bits], [offsets])
    return bit_masked_adamw.plan(*lists, *[scalar] * 4, seed)


def masked_launches(
    op: str, dtype: torch.dtype, detail: str, shape: tuple[int, int]
) -> list[Launch]:
    """One matrix, with the choices that ``detail`` names."""
    whole, scalar = torch.empty(shape, dtype=dtype), torch.empty((), dtype=torch.float64)
    dim = int("columns" in detail)
    width = min(2202 if "odd" in detail else 2208, shape[dim])
    param = whole[:, -width:] if dim else whole
    index = None if "packed" in detail else torch.empty(width, dtype=torch.int64)
    shape = (shape[0], width) if dim else (width, shape[1])
    narrow = torch.bfloat16 if dtype == torch.bfloat16 and "wide" not in detail else torch.float32
    state = torch.float64 if dtype == torch.float64 else narrow
    states, scales = 2 if op == "masked_adamw_" else 1, []
    if "codes" in detail:
        state = torch.uint8
        scales = [[torch.empty(shape[0], -(-shape[1] // 256))] for _ in range(states)]
    if op == "masked_grad_norm":
        return masked_grad_norm.launches([param], [index], [dim], scalar, scalar)
    units = [torch.empty(shape[dim], dtype=torch.float64)] if "units" in detail else None
    of_grads = torch.float32 if "float32 grads" in detail else dtype
    update = Update(
        [param],
        [torch.empty(whole.shape if "through index" in detail else shape, dtype=of_grads)],
        [[torch.empty(shape, dtype=state)] for _ in range(states)],
        [index],
        [dim],
        *[scalar] * 4,
        torch.empty((), dtype=torch.int64) if "noise" in detail else None,
        [torch.empty(shape, dtype=COMPENSATIONS[dtype])]
        if "compensated" in detail and dtype in COMPENSATIONS
        else None,
        units,
        units,
        scales,
        scalar if "skips" in detail else None,
    )
    return (masked_adamw if op == "masked_adamw_" else masked_sgd).plan(update)


def variants(op: str) -> Iterator[str]:
    """What to compile: relu is a part of relu2, and the mask does not meet the activation."""
    if op == "gated_moments":
        yield from ("silu", "silu masked", "gelu masked", "gelu_tanh masked", "relu2 masked")
    elif op in ("gated_moments_backward", "gated_product"):
        yield from ("silu", "gelu", "gelu_tanh", "relu2")
    elif op == "masked_grad_norm":
        yield from ("rows", "packed columns", "odd packed columns", "gathered columns")
    elif op == "bit_masked_adamw_":
        yield from ("noise", "noise wide", "")
    elif op == "masked_sgd_":
        yield from ("rows units noise", "packed columns compensated", "rows codes")
    elif op == "masked_adamw_":
        yield from (
            "rows noise",
            "rows units noise",
            "rows compensated wide",
            "packed columns noise wide",
        )
        yield from ("rows codes units noise", "packed odd columns codes")
        yield from ("packed columns units noise", "packed odd columns units", "gathered columns")
        yield "rows units noise through index skips float32 grads"
        yield "gathered columns units through index skips"
    else:
        yield from ("", "masked") if op != "column_sq_norms" else ("",)
