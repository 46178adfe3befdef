"""Triton's operators: against the reference in the interpreter, and compiled for three GPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssah_kernels import backends
from ssah_kernels.backends import triton as package
from ssah_kernels.checks.compact import COMPENSATIONS
from ssah_kernels.schema import KERNELS

TESTS = Path(__file__).parents[1]
ARCHS = (80, 90, 100)
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
# What an older compiler makes of the same kernels is right (`test_interpreted`), and slower.
of_this_triton = pytest.mark.skipif(
    TRITON and tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 8),
    reason="the machine code of Triton before 3.8 spills and waits more (docs/gpu.md)",
)

OPS = (
    "gated_moments",
    "gated_moments_backward",
    "gated_product",
    "masked_adamw_",
    "channel_moments_",
    "taylor_moments_",
    "column_sq_norms",
    "masked_sgd_",
    "bit_masked_adamw_",
    "masked_grad_norm",
)


def python(*args: str, **env: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "helpers")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(process: subprocess.Popen[str]) -> dict[str, int | str]:
    """Per operator, how many calls equalled the reference's, or why they did not."""
    stdout, stderr = process.communicate()
    outcome: dict[str, int | str] = dict.fromkeys(OPS, stderr[-4000:])
    return outcome | {r["op"]: r["compared"] for r in map(json.loads, stdout.splitlines())}


# The interpreter takes 10 to 25 s for one of these, and its kernel has much in common with
# another's: that of the moments in the gate's backward pass, that of the rules of an update in
# AdamW, and the same rules where bits say what trains.
SLOW = ("gated_moments", "masked_sgd_", "bit_masked_adamw_")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, int | str]:
    quick = [op for op in OPS if op not in SLOW]
    return outcomes(python(str(TESTS / "helpers" / "triton_interpret.py"), *quick))


@needs_triton
@pytest.mark.xdist_group("triton")
@pytest.mark.parametrize("op", [op for op in OPS if op not in SLOW])
def test_interpreted(op: str, interpreted: dict[str, int | str]) -> None:
    assert isinstance(interpreted[op], int), interpreted[op]
    assert interpreted[op] >= 4


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("op", OPS)
def test_interpreted_on_every_shape(op: str) -> None:
    script = str(TESTS / "helpers" / "triton_interpret.py")
    outcome = outcomes(python(script, "--exhaustive", op))[op]
    assert isinstance(outcome, int), outcome
    assert outcome >= (8 if op.startswith("masked") else 4 * 13)


def test_every_kernel_is_checked() -> None:
    assert set(OPS) == set(KERNELS)


def launches(
    op: str, dtype: torch.dtype, detail: str, shape: tuple[int, int] = (4096, 11008)
) -> list:
    """The launches of one realistic call; nothing is computed, the memory is never touched."""
    from ssah_kernels.backends.triton import (
        channel_moments,
        column_sq_norms,
        gated_moments,
        gated_product,
        taylor_moments,
    )

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


def bit_launches(dtype: torch.dtype, detail: str, shape: tuple[int, int]) -> list:
    """One matrix of which every second element trains."""
    from ssah_kernels.backends.triton import bit_masked_adamw
    from ssah_kernels.bit_masks import n_blocks, packed_size

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


def masked_launches(op: str, dtype: torch.dtype, detail: str, shape: tuple[int, int]) -> list:
    """One matrix, with the choices that ``detail`` names."""
    from ssah_kernels.backends.triton import masked_adamw, masked_grad_norm, masked_sgd
    from ssah_kernels.backends.triton.masked_list import Update

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


# 16-byte loads and stores per thread that the inputs and the outputs of a tile make.
WIDE = {
    "channel_moments_kernel": (8, 0),
    "gated_moments_kernel": (4, 2),
    "gated_moments_backward_kernel": (6, 4),
    "gated_product_kernel": (6, 2),
    "taylor_moments_kernel": (8, 0),
    "column_sq_norms_kernel": (8, 0),
    "masked_grad_norm_kernel": (1, 0),
    "masked_update_kernel": (3, 2),
}


def faults(op: str, dtype: torch.dtype, arch: int) -> list[str]:
    """What is wrong with the compiled kernels of ``op``: spills, narrow access, loops that wait."""
    from triton_compile import compile_launch

    found = []
    for detail in variants(op):
        for launch in launches(op, dtype, detail):
            kernel = compile_launch(launch, arch)
            name = f"{kernel.name} {detail}:"
            if kernel.spill_bytes:
                found.append(f"{name} {kernel.spill_bytes} bytes of local memory")
            vectors = "odd" not in detail and "gathered" not in detail
            if kernel.name in WIDE and dtype != torch.float64 and vectors:
                loads, stores = WIDE[kernel.name]
                if "codes" in detail:  # which are 4 or 8 bytes of a lane
                    loads, stores = 2, 1
                if kernel.wide_loads() < loads or kernel.wide_stores() < stores:
                    found.append(f"{name} {kernel.wide_loads()}, {kernel.wide_stores()} wide")
            if kernel.name in WIDE and "_moments_kernel" in kernel.name and kernel.loop_barriers():
                found.append(f"{name} {kernel.loop_barriers()} barriers in its loop")
            to_bfloat16 = dtype == torch.bfloat16 and kernel.name == "gated_moments_kernel"
            if to_bfloat16 and "cvt.rn.bf16" not in kernel.ptx:
                found.append(f"{name} no rounding to nearest")
    return found


@needs_triton
@of_this_triton
@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=[] if arch == 90 else pytest.mark.exhaustive) for arch in ARCHS],
)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float32,
        pytest.param(torch.float64, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("op", KERNELS)
def test_compiled(op: str, dtype: torch.dtype, arch: int) -> None:
    if dtype == torch.float64 and arch != 90:
        pytest.skip("float64 is compiled for one architecture")
    assert faults(op, dtype, arch) == []


@needs_triton
@of_this_triton
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_for_small_shapes(op: str) -> None:
    """Sizes and strides of 1 become constants when a kernel is compiled."""
    from triton_compile import compile_launch

    for shape in ((1, 1), (3, 1), (1, 40), (5, 17)):
        for launch in launches(op, torch.float32, [*variants(op)][-1], shape):
            assert compile_launch(launch, 90).spill_bytes == 0


def test_importable_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import ssah_kernels, ssah_kernels.backends.triton as t\n"
        "assert not any(m.startswith('triton.') for m in sys.modules)"
    )
    process = python("-c", code)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_says_how_to_get_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in (package.missing() or "")


@needs_triton
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        backends.use("triton"),
        pytest.raises(backends.MissingBackendError, match="TRITON_INTERPRET=1"),
    ):
        torch.ops.ssah.column_sq_norms(torch.ones(2, 2))


@needs_triton
def test_cpu_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssah_kernels.backends.triton.launch import run

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="the inputs are on the CPU"):
        run([], torch.device("cpu"))


@needs_triton
def test_rows_are_merged_without_copies() -> None:
    from ssah_kernels.backends.triton.launch import row_slices

    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    assert [s.shape for s, _ in row_slices([x], mask)] == [(24, 5)]
    assert [s.shape for (s,) in row_slices([x.transpose(0, 2)], None)] == [(24, 5)]
    for view, lead in ((x[:, 1:], mask[:, 1:]), (x[..., ::2, 1:4], mask[..., ::2])):
        slices = row_slices([view], lead)
        assert torch.cat([s for s, _ in slices]).sum() == view.sum()
        assert sum(len(m) for _, m in slices) == lead.numel()
        assert all(s.data_ptr() >= x.data_ptr() for s, _ in slices)
    expanded = x[:, :1].expand(2, 3, 4, 5)
    assert torch.cat([s for (s,) in row_slices([expanded], None)]).sum() == expanded.sum()


@needs_triton
def test_chunks_depend_on_the_shape_alone() -> None:
    from ssah_kernels.backends.triton.launch import MAX_TILES, tiling

    for rows, channels in ((1, 1), (4096, 11008), (10**9, 8192), (31, 10**6)):
        tile = tiling(rows, channels, 2, 8)
        assert 1 <= tile.tiles <= MAX_TILES
        assert (tile.chunks - 1) * tile.tiles * tile.depth * 4 < rows
        assert tile.chunks * tile.tiles * tile.depth * 4 >= rows
        assert tile.grid[0] < 2**31
