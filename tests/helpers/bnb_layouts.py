"""The layout that bitsandbytes gives to 4-bit weights on a CPU with AVX512-BF16, on any CPU.

A module there is ``"avx512_bf16"`` until it runs and lays its weight out anew, then it ``"has
run"``. bitsandbytes does it all by itself; where its kernel for the new layout cannot run,
:func:`gemv_4bit` stands in for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NEW = ("avx512_bf16", "has run")

_library = torch.library.Library("ssah_tests", "DEF")
_library.define("gemv_4bit(Tensor x, Tensor w, Tensor absmax, Tensor code) -> Tensor")


def unpacked(w: Tensor) -> Tensor:
    """The codes ``[out, in]`` of a weight ``[out, in / 2]`` in the new layout.

    32 rows lie together, for each pair of columns 32 bytes: the pairs of the first 16 rows in the
    low four bits, those of the others in the high ones.
    """
    rows, half = w.shape
    byte = w.view(rows // 32, half, 32)
    code = torch.stack([byte & 15, byte >> 4], dim=2)  # [rows / 32, in / 2, 2, 32]
    code = code.view(rows // 32, half, 2, 16, 2).permute(0, 2, 3, 1, 4)
    return code.reshape(rows, 2 * half).int()


def _gemv_4bit(x: Tensor, w: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """As bitsandbytes' ``tinygemm_kernel_nn``: input, values and scales in bfloat16, sums of a
    block in float32, then its scale, and an output in bfloat16."""
    values = code.bfloat16().float()[unpacked(w)]  # [out, in]
    blocks = len(absmax)
    x_blocks = x.bfloat16().float().unflatten(-1, (blocks, -1))  # [..., blocks, block]
    sums = torch.einsum("...bk,obk->...bo", x_blocks, values.unflatten(-1, (blocks, -1)))
    return (sums * absmax.float()).sum(-2).bfloat16().to(x.dtype)


_library.impl("gemv_4bit", _gemv_4bit, "CPU")


def gemv_4bit(A: Tensor, B: Tensor, *, out: None, state: Any) -> Tensor:
    """bitsandbytes' function of that name; like its own, an operator without a backward."""
    product: Tensor = torch.ops.ssah_tests.gemv_4bit(A, B, state.absmax, state.code)
    return product


@contextmanager
def kernel() -> Iterator[None]:
    """The new layout can be computed with inside the block."""
    from bitsandbytes import functional

    with pytest.MonkeyPatch.context() as patch:
        if not functional.has_avx512bf16():
            patch.setattr(functional, "gemv_4bit", gemv_4bit)
        yield


@contextmanager
def processor(*, lays_out: bool) -> Iterator[None]:
    """Modules made inside the block lay their weights out anew when they run, or never."""
    from bitsandbytes.nn import modules

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "has_avx512bf16", lambda: lays_out)
        yield


def projections(model: nn.Module) -> list[Any]:
    """The 4-bit modules."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def run_once(model: nn.Module) -> None:
    """Every 4-bit module runs, and lays its weight out."""
    with torch.no_grad():
        for module in projections(model):
            module(torch.zeros(1, module.in_features, dtype=module.compute_dtype))
            assert module.weight.quant_state.packing_format_for_cpu


def computed(module: Any) -> Tensor:
    """The weight that a module which has run computes with, float32 ``[out, in]``: exact."""
    state = module.weight.quant_state
    values = state.code.bfloat16().float()[unpacked(module.weight.data)]
    scales = state.absmax.float().t()[..., None]  # [out, blocks, 1]
    return (values.unflatten(-1, (scales.shape[1], -1)) * scales).flatten(1)


def differentiable(model: nn.Module) -> nn.Module:
    """A copy of a model that has run, whose weights are in the canonical layout and stay in it."""
    from bitsandbytes import functional

    twin = copy.deepcopy(model)
    for module in projections(twin):
        state = module.weight.quant_state
        scales, state.original_nested = state.absmax.t().reshape(-1).float(), False
        data, state = functional._convert_weight_packed_for_cpu_inverse(module.weight.data, state)
        state.absmax = scales
        module.weight.data, module.weight.quant_state = data, state
        module.support_avx512bf16_for_cpu = False
    return twin
