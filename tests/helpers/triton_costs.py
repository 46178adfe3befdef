"""What the operators cost as Triton compiles them: ``python tests/helpers/triton_costs.py``.

Prints the table of docs/gpu.md. An element that moves 2 bytes of [4096, 11008] takes 30 us of an
H100 at 90 % of its 3.35 TB/s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton_compile import Compiled, compile_launch
from triton_launches import launches

SHAPE = 4096, 11008
BYTES_PER_SECOND = 0.9 * 3.35e12
ARCHS = (80, 90, 100)


class Row(NamedTuple):
    """A row of the table. ``extra`` bytes come from a cache, by accesses as wide as the others."""

    label: str
    op: str
    detail: str
    bytes_bf16: float
    bytes_fp32: float
    most: float | None = None  # instructions per element, in bfloat16
    extra: float = 0
    elements: int | None = None  # of a turn of the main loop, where no access is wide


ROWS = (
    Row("`channel_moments_`", "channel_moments_", "", 2, 4, 8.4),
    Row("`channel_moments_`, a mask", "channel_moments_", "masked", 2, 4, 8.4),
    Row("`gated_moments` (silu)", "gated_moments", "silu", 6, 12, 24),
    Row("`gated_moments` (silu), a mask", "gated_moments", "silu masked", 6, 12, 24),
    Row("`gated_moments_backward` (silu)", "gated_moments_backward", "silu", 10, 20, 28.8),
    Row("`gated_product` (silu)", "gated_product", "silu", 6, 12, extra=4),
    Row("`taylor_moments_`", "taylor_moments_", "", 4, 8),
    Row("`column_sq_norms`", "column_sq_norms", "", 2, 4),
    Row("`masked_grad_norm`", "masked_grad_norm", "rows", 2, 4),
    Row("`masked_adamw_`, state as the parameters", "masked_adamw_", "rows noise", 14, 28, 48),
    Row("`masked_adamw_`, float32 state", "masked_adamw_", "rows noise wide", 22, 28, 48),
    Row("`masked_sgd_`, momentum as the parameters", "masked_sgd_", "rows noise", 10, 20),
    Row(
        "`bit_masked_adamw_`, half of the elements",
        "bit_masked_adamw_",
        "noise",
        10.1,
        20.1,
        elements=8,
    ),
)


def compiled(row: Row, dtype: torch.dtype, arch: int) -> Compiled:
    """The first stage of the row's operator."""
    return compile_launch(launches(row.op, dtype, row.detail, SHAPE)[0], arch)


def instructions(row: Row, kernel: Compiled) -> float:
    """Instructions per element of the main loop of ``kernel``, the row's in bfloat16."""
    return kernel.cost.per_element(row.bytes_bf16 + row.extra, row.elements)


def line(row: Row) -> str:
    """The row in Markdown."""
    in_bf16 = {arch: compiled(row, torch.bfloat16, arch) for arch in ARCHS}
    in_fp32 = [compiled(row, torch.float32, arch) for arch in ARCHS]
    times = [
        f"{SHAPE[0] * SHAPE[1] * each / BYTES_PER_SECOND * 1e6:.0f} us"
        for each in (row.bytes_bf16, row.bytes_fp32)
    ]
    cells = [
        row.label,
        f"{row.bytes_bf16:g}",
        times[0],
        f"{row.bytes_fp32:g}",
        times[1],
        f"{instructions(row, in_bf16[90]):.1f}",
        ", ".join(str(kernel.registers) for kernel in in_bf16.values()),
        ", ".join(str(kernel.registers) for kernel in in_fp32),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for each in ROWS:
        print(line(each), flush=True)
