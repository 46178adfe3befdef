"""Triton's operators: against the reference in the interpreter, and compiled for three GPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssah_kernels import backends
from ssah_kernels.backends import triton as package
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
    from triton_launches import launches, variants

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
        pytest.param(torch.float32, marks=pytest.mark.exhaustive),
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
@pytest.mark.parametrize(
    "label",
    [
        "`channel_moments_`",
        "`channel_moments_`, a mask",
        "`gated_moments` (silu)",
        "`gated_moments` (silu), a mask",
        "`gated_moments_backward` (silu)",
        "`masked_adamw_`, state as the parameters",
        "`masked_adamw_`, float32 state",
    ],
)
def test_instructions_per_element(label: str) -> None:
    """In bfloat16 for sm_90: few enough for the memory to be what a kernel waits for."""
    from triton_costs import ROWS, compiled, instructions

    (row,) = (row for row in ROWS if row.label == label)
    kernel = compiled(row, torch.bfloat16, 90)
    assert row.most is not None
    assert instructions(row, kernel) <= row.most
    # What is in float64 is the same for all elements, and computed before the first of them.
    assert (kernel.cost.doubles, kernel.cost.calls, kernel.spill_bytes) == (0, 0, 0)


@needs_triton
@of_this_triton
@pytest.mark.exhaustive
def test_page_has_the_table() -> None:
    from triton_costs import ROWS, line

    page = (TESTS.parent / "docs" / "gpu.md").read_text().splitlines()
    assert [row for row in map(line, ROWS) if row not in page] == []


# One whose sizes are arguments, and one that has them in a table.
SMALL = ("column_sq_norms", "masked_sgd_")


@needs_triton
@of_this_triton
@pytest.mark.parametrize(
    "op",
    [
        # Every operator is compiled in bfloat16 by `test_compiled`.
        pytest.param(op, marks=[] if op in SMALL else pytest.mark.exhaustive)
        for op in KERNELS
    ],
)
def test_compiles_for_small_shapes(op: str) -> None:
    """Sizes and strides of 1 become constants when a kernel is compiled."""
    from triton_compile import compile_launch
    from triton_launches import launches, variants

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
