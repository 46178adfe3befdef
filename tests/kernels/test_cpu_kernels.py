"""The CPU kernels of each instruction set against the float64 reference."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, check_bits
from cpu_compare import compare, on
from instruction_sets import BUILT, python_with

import ssah_kernels
from ssah_kernels import ops
from ssah_kernels.reference.masked_update import noise, noise_keys, round_stochastically
from ssah_kernels.schema import KERNELS

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads share the channels out: one alone meets more of them than a tile has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op", CASES)
def test_equals_reference(op: str) -> None:
    assert compare(op) > 0


@pytest.mark.parametrize(
    "dtype",
    [
        # Of each type that is computed in, one; how the others are read and written is seen above.
        pytest.param(dtype, marks=[] if dtype in DTYPES[:3:2] else pytest.mark.exhaustive)
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize("op", CASES)
def test_equals_reference_beyond_the_first_tile(op: str, dtype: torch.dtype) -> None:
    assert compare(op, "far", dtypes=(dtype,)) > 0


@pytest.mark.parametrize("op", KERNELS)
def test_equals_reference_at_the_ends_of_the_range(op: str) -> None:
    assert compare(op, "extreme") > 0


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("isa", BUILT)
def test_every_instruction_set_equals_reference(isa: str, which: str) -> None:
    output = python_with(isa, str(HELPERS / "cpu_compare.py"), which)
    assert int(output.splitlines()[0]) > 0


def test_unknown_capability_is_named() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from ssah_kernels.backends import cpu; cpu.facts()"],
        env={**os.environ, "SSAH_CPU_CAPABILITY": "avx9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "SSAH_CPU_CAPABILITY is 'avx9'" in run.stderr


# ------------------------------------------------------------------------------ bytes of a mask


@pytest.mark.parametrize("op", ["channel_moments_", "gated_moments", "taylor_moments_"])
def test_every_byte_but_zero_in_a_mask_is_true(op: str) -> None:
    """Masks made of bytes, by ``uint8.view(torch.bool)``, hold more than zeros and ones."""
    number = torch.arange(256)
    x, y = torch.randn(2, 256, 24)
    results = []
    for mask in (number.to(torch.uint8).view(torch.bool), number != 0):
        signed, squared = torch.zeros(2, 24, dtype=torch.float64)
        state = ops.new_moments(x)
        if op == "channel_moments_":
            ops.channel_moments_(x, *state, mask)
        elif op == "taylor_moments_":
            ops.taylor_moments_(x, y, signed, squared, mask)
        else:
            state = (*state, ops.gated_moments(x, y, *state, mask))
        results.append([*state, signed, squared])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert op == "taylor_moments_" or results[0][0] == 255


# ------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("step", [float("inf"), float("nan"), 1e300, -1e300])
def test_a_step_that_is_no_number_is_refused_with_a_seed(step: float, backend: str) -> None:
    """The noise depends on the step as a whole number; there is none."""
    p, g, m, v = torch.ones(4, 3)
    args = ([p], [g], [m], [v], [None], [0], torch.tensor(0.1), torch.tensor(step).double())
    with pytest.raises((RuntimeError, OverflowError, ValueError), match=r"step|float|integer"):
        on(backend, "masked_adamw_")(*args, seed=torch.tensor(1))
    assert torch.equal(p, torch.ones(3))


@pytest.fixture(scope="module")
def far_update(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """AdamW of elements that lie far into a tensor: tests/helpers/far_update.cpp."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("far") / "far_update.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi", f"-I{ROOT / 'csrc' / 'cpu'}"]
    subprocess.run(["g++", *flags, HELPERS / "far_update.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library)).far_update


@pytest.mark.xdist_group("far_update")
@pytest.mark.parametrize("before", [0, 16, 29, 32])
def test_noise_of_elements_beyond_32_bits(before: int, far_update: Any) -> None:
    """A run of elements that crosses 2^32 after ``before`` of them."""
    n, first = 3000, 2**32 - before
    gen = torch.Generator().manual_seed(before)
    p, g, m = (torch.randn(n, generator=gen).bfloat16() for _ in range(3))
    v = torch.rand(n, generator=gen).bfloat16()
    seed, step, number = 99, 1, 3
    keys = noise_keys(seed, step, number)
    element = torch.arange(n) + first
    lr, beta1, beta2, eps = 0.01, 0.9, 0.99, 1e-8
    exact = [t.double()[None] for t in (p, g, m, v)]
    with ssah_kernels.use("reference"):
        lists = [[t] for t in exact]
        ops.masked_adamw_(
            *lists, [None], [0], torch.tensor(lr).double(), torch.tensor(1.0),
            betas=(beta1, beta2), eps=eps, weight_decay=0.0,
        )  # fmt: skip
    rounded = [
        round_stochastically(t[0], bits)
        for t, bits in zip((exact[0], *exact[2:]), noise(keys, element), strict=True)
    ]
    far_update(
        *(ctypes.c_void_p(t.data_ptr()) for t in (p, g, m, v)),
        ctypes.c_long(first),
        ctypes.c_long(n),
        *(ctypes.c_uint(key) for key in keys),
        *(ctypes.c_double(x) for x in (lr, beta1, beta2, eps)),
    )
    for actual, expected in zip((p, m, v), rounded, strict=True):
        check_bits(actual, expected)
