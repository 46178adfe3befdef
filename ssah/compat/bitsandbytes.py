"""bitsandbytes: what its packed weights stand for, whatever layout they are in.

On a CPU with AVX512-BF16, ``Linear4bit`` lays its weight out anew when it first runs without a
gradient: the 4-bit codes in another order, the scale of each block rounded to bfloat16. From then
on the module multiplies by the codes' values rounded to bfloat16 too, and passes no gradient.

Two layouts, then. The *canonical* one is what a file holds: ``[out * in / 2, 1]`` bytes, the first
weight of a pair in the high four bits, and float32 scales ``[out * in / block]`` that may be
quantised in turn ("nested"). The other one is marked by ``packing_format_for_cpu``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ssah.compat import find

_WORKS = ">=0.50,<0.51"


def _functional(name: str) -> Any:
    return find(
        "bitsandbytes",
        f"bitsandbytes.functional:{name}",
        purpose="to read packed weights",
        works=_WORKS,
    )


def weight_8bit(module: Any) -> Tensor:
    """The weight of a ``Linear8bitLt``, float32 ``[out, in]``.

    Raises:
        ValueError: it does not hold int8 yet.
    """
    # The first forward moves the row scales from the weight to the module's state.
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if module.weight.dtype != torch.int8 or scales is None:
        raise ValueError(
            f"module is a {type(module).__name__} with a weight of {module.weight.dtype}, must "
            "hold int8 (has_fp16_weights=False, and moved to its device)"
        )
    weight: Tensor = _functional("int8_vectorwise_dequant")(module.weight.data, scales)
    return weight


def weight_4bit(module: Any) -> Tensor:
    """The weight that a ``Linear4bit`` computes with, float32 ``[out, in]``.

    Where bitsandbytes lays weights out anew it is that of the new layout, also before it has done
    so: value and scale in bfloat16, whose product is exact in float32.
    """
    if not _rounds(module):
        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32
        # As a column: bitsandbytes would transpose what comes from a row.
        column = module.weight.data.reshape(-1, 1)
        plain: Tensor = _functional("dequantize_4bit")(column, state)
        return plain
    packed, scales, values = identity_4bit(module)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).int()  # [out * in / 2, 2]
    weight = values.bfloat16().float()[codes].view(len(scales), -1) * scales.float()[:, None]
    return weight.view(module.weight.quant_state.shape)


def identity_4bit(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What tells one weight of a ``Linear4bit`` from another; the same in every layout.

    Scales are rounded, because the layout of a CPU with AVX512-BF16 has them so.

    Returns:
        The bytes of the canonical layout, uint8 ``[out * in / 2]``; the scale of each block,
        bfloat16 ``[blocks]``; the value of each code, float32 ``[16]``.
    """
    data, state = _canonical(module)
    scales = state.absmax
    if state.nested:
        scales = _functional("dequantize_blockwise")(scales, state.state2) + state.offset
    return data.view(torch.uint8).reshape(-1), scales.bfloat16(), state.code


@contextmanager
def differentiable(module: Any) -> Iterator[None]:
    """A ``Linear4bit`` passes gradients inside the block: its weight is in the canonical layout.

    The weight itself is laid out again, here and at the end: there is no second copy of it. Where
    bitsandbytes would lay it out anew as the module runs, that is done first, so that it makes no
    difference whether the module has run before.
    """
    if not _rounds(module):
        yield
        return
    lay_out = _functional("_convert_weight_packed_for_cpu")
    weight = module.weight
    if not _is_laid_out_anew(weight):
        weight.data, weight.quant_state = lay_out(weight.data, weight.quant_state)
    state, lays_out = weight.quant_state, module.support_avx512bf16_for_cpu
    weight.data, canonical = _canonical(module)
    weight.quant_state, module.support_avx512bf16_for_cpu = canonical, False
    try:
        yield
    finally:
        # Exact: scales were rounded before. The state knows what it was made of, and is kept.
        weight.data, _ = lay_out(weight.data, copy.copy(canonical))
        weight.quant_state, module.support_avx512bf16_for_cpu = state, lays_out


def _is_laid_out_anew(weight: Any) -> bool:
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def _rounds(module: Any) -> bool:
    """Whether the module computes, or will once it runs, with values and scales in bfloat16."""
    lays_out = getattr(module, "support_avx512bf16_for_cpu", False)
    return _is_laid_out_anew(module.weight) or (lays_out and module.weight.device.type == "cpu")


def _canonical(module: Any) -> tuple[Tensor, Any]:
    """The weight of a ``Linear4bit`` in the canonical layout, and the state that goes with it."""
    data, state = module.weight.data, copy.copy(module.weight.quant_state)
    if not _is_laid_out_anew(module.weight):
        return data, state
    scales = state.absmax  # [blocks of a row, out]
    # The inverse would quantise the scales again if they were nested: it is told they were not.
    state.original_nested = False
    data, state = _functional("_convert_weight_packed_for_cpu_inverse")(data, state)
    state.absmax = scales.t().reshape(-1).float()
    return data, state
