"""Compare Triton's operators with the reference in Triton's interpreter, on the CPU.

`triton_interpret.py [--exhaustive] OP...` prints one line of JSON per operator. A process of its
own, because Triton reads TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from cases import CASES, DTYPES, check_sample
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton_masked import check_norms, check_skipped, check_update, samples
from triton_wide import EXACT, check_every_bit, check_wide
from update_samples import all_sides_of_all_bounds

from ssah_kernels import backends, dynamic_map
from ssah_kernels.backends.triton import launch, masked_grad_norm, masked_rounding
from ssah_kernels.backends.triton.masked_codes import nearest_codes
from ssah_kernels.backends.triton.masked_list import device_maps
from ssah_kernels.reference import masked_update as specification


def round_to_bfloat16(builder: InterpreterBuilder, src: TensorHandle, dtype: Any) -> TensorHandle:
    """float32 to bfloat16 to nearest even, as on a GPU; the interpreter cuts the lower half off."""
    if (src.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return builder.cast_impl(src, dtype)
    data = np.ascontiguousarray(src.data)
    rounded = torch.from_numpy(data).to(torch.bfloat16).view(torch.int16)
    return TensorHandle(rounded.numpy().view(np.uint16), dtype.scalar)


InterpreterBuilder.create_fp_trunc = round_to_bfloat16


def approximate(name: str, error: float) -> None:
    """Make a function as wrong in float32 as a GPU's may be: every second value too large, and the
    others too small, by ``error`` of it. The interpreter's own is right to the last bit."""
    exact = getattr(InterpreterBuilder, name)

    def wrong(builder: InterpreterBuilder, arg: TensorHandle) -> TensorHandle:
        result = exact(builder, arg)
        if result.dtype.scalar == tl.float32:
            signs = np.resize([1, -1], result.data.size).reshape(result.data.shape)
            result.data = (result.data * (1 + error * signs)).astype(np.float32)
        return result

    setattr(InterpreterBuilder, name, wrong)


# The largest relative errors of ex2, rsqrt and sqrt.approx in NVIDIA's description of PTX.
for function, power in (("create_exp2", -22), ("create_rsqrt", -22.9), ("create_sqrt", -23)):
    approximate(function, 2**power)


def reference(op: str) -> Callable[..., Any]:
    return backends.kernel("reference", op)


def moments_of(parts: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """count, mean and M2 after one call per part."""
    channels = parts[0].shape[-1]
    count, mean, m2 = (torch.zeros(n, dtype=torch.float64) for n in ((), channels, channels))
    for part in parts:
        torch.ops.ssah.channel_moments_(part, count, mean, m2, mask)
    return count, mean, m2


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs() / expected.abs()).max().item()


def check_long_chunks() -> None:
    """Chunks of up to 32 tiles: large means, an outlier in the first row, leading masked rows."""
    g = torch.Generator().manual_seed(0)
    rows = 1100  # one chunk of 32 tiles of 32 rows, and what is left of another
    normal = torch.randn(rows, 24, generator=g)
    outlier = normal.clone()
    outlier[0] = 1000
    for x in (1e4 + normal, outlier):
        exact = x.double()
        m2 = (exact - exact.mean(0)).square().sum(0)
        results = []
        for programs, parts in ((768, [x]), (1, [x]), (1, [x[:7], x[7:600], x[600:]])):
            launch.PROGRAMS = programs
            results.append(moments_of(parts))
            assert results[-1][0] == rows
            error = (results[-1][1] - exact.mean(0)).abs()
            assert (error <= 1e-6 * (exact.mean(0).abs() + exact.std(0))).all()
            assert relative(results[-1][2], m2) < 1e-6
        for other in results[1:]:
            assert relative(other[2], results[0][2]) < 1e-6
    mask = torch.arange(rows) >= 300
    masked = (1e4 + normal).masked_fill(~mask[:, None], float("nan"))
    count, _, m2 = moments_of([masked], mask)
    exact = masked[300:].double()
    assert count == rows - 300
    assert relative(m2, (exact - exact.mean(0)).square().sum(0)) < 1e-6
    launch.PROGRAMS = 768


def check_not_a_number() -> None:
    """An unmasked NaN reaches its own channel's moments, and no other's."""
    x = torch.ones(40, 9)
    x[3, 4] = float("nan")
    count, mean, m2 = moments_of([x])
    expected = torch.arange(9) == 4
    assert count == 40
    assert torch.equal(mean.isnan(), expected)
    assert torch.equal(m2.isnan(), expected)


def check_bytes_of_masks() -> None:
    """Every byte but 0 counts."""
    x, number = torch.randn(256, 9), torch.arange(256)
    states = [moments_of([x], m) for m in (number.to(torch.uint8).view(torch.bool), number != 0)]
    assert states[0][0] == 255
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@triton.jit
def noise_kernel(start_ptr, key_ptr, out_ptr, FAR: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    keys = tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32)
    bits = masked_rounding.noise(tl.load(start_ptr + at), 5 + at, *keys, FAR)
    tl.store(out_ptr + at, bits.to(tl.int64))


def check_noise_of_far_elements() -> None:
    """A kernel that reaches one of those needs 34 GB: the noise is asked for by itself."""
    start = torch.tensor([0, 1, 2**31 - 7, 2**32 - 9, 2**32 - 9, 2**32 + 5, 3 * 2**32 + 1, 2**40])
    keys, bits = specification.noise_keys(-(7**20), 41, 3), torch.empty_like(start)
    for far, n in ((True, 8), (False, 4)):  # the fourth is 2^32 - 1, and the fifth 2^32
        noise_kernel[(1,)](start, torch.tensor(keys), bits, FAR=far, BLOCK=n)
        low, high, _ = specification.noise(keys, (start + 5 + torch.arange(8))[:n])
        assert torch.equal(bits[:n], high << 16 | low)


@triton.jit
def codes_kernel(x_ptr, map_ptr, codes_ptr, scales_ptr, WHICH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    at = row * 256 + tl.arange(0, 256)[None, :]
    codes, scales = nearest_codes(tl.load(x_ptr + at), at >= 0, map_ptr, WHICH)
    tl.store(codes_ptr + at, codes)
    tl.store(scales_ptr + row + tl.arange(0, 1)[:, None], scales)


def check_codes_on_every_bound() -> None:
    """Halfway between two values a code is that of the smaller one."""
    for which, signed in enumerate((True, False)):
        x = all_sides_of_all_bounds(signed)
        codes, scales = torch.empty_like(x, dtype=torch.uint8), torch.empty(len(x), 1)
        codes_kernel[(len(x),)](x, device_maps(x.device), codes, scales, WHICH=which)
        expected = dynamic_map.quantize(x, signed=signed)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scales, expected[1])


def check_many_parts_of_a_norm() -> None:
    """More than the 1,024 partial sums that are added at once."""
    parts, norm = torch.arange(1300, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    masked_grad_norm.norm_kernel[(1,)](parts, norm, None, len(parts), BLOCK=1024)
    assert torch.allclose(norm, parts.sum().sqrt(), rtol=1e-12, atol=0)


# Nothing, one element, a mask over several chunks, every kind of stride; every activation.
LONG = "(2, 131)x127-mask"
SHAPES = (LONG, "(0,)x5", "(1,)x1", "row-stride", "transposed-leading", "expanded", "all-masked")
BY_DEFAULT = {torch.bfloat16: (*SHAPES, "ramp"), torch.float32: (LONG, "(2, 131)x127", "ramp")}


def compare(op: str, exhaustive: bool) -> int:
    """The number of calls that equalled the reference's."""
    compared = 0
    for dtype in DTYPES if exhaustive else BY_DEFAULT:
        for sample in CASES[op].samples(dtype):
            if not exhaustive and not sample.name.startswith(BY_DEFAULT[dtype]):
                continue
            # With two programs a chunk has several tiles.
            for programs in (768, 2) if sample.name.startswith("(2, 131)") else (768,):
                launch.PROGRAMS = programs
                check_sample(CASES[op], getattr(torch.ops.ssah, op), reference(op), sample)
                compared += 1
    launch.PROGRAMS = 768
    return compared


def compare_extremes(op: str, exhaustive: bool) -> int:
    """Calls at the ends of the types. In float64 GELU's tail has fewer digits: there is no erfc."""
    compared = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if exhaustive else 2]:
        for sample in CASES[op].extreme_of_float32(dtype):
            # Of an update, whose parameters and states meet in pairs: those of one type.
            if op.endswith("masked_adamw_") and not (
                exhaustive or sample.name.endswith(str(dtype))
            ):
                continue
            check_sample(CASES[op], getattr(torch.ops.ssah, op), reference(op), sample)
            compared += 1
    return compared


def compare_updates(op: str, exhaustive: bool) -> int:
    chosen = [sample for sample in samples(exhaustive=exhaustive) if sample.op == op]
    for sample in chosen:
        try:
            check_update(sample)
            check_skipped(sample)
        except AssertionError as error:
            raise AssertionError(f"{sample.name}: {error}") from None
    return len(chosen)


def compare_bits(op: str, exhaustive: bool) -> int:
    compared = 0
    for dtype in DTYPES if exhaustive else BY_DEFAULT:
        for sample in list(CASES[op].samples(dtype))[: None if exhaustive else 4]:
            check_sample(CASES[op], getattr(torch.ops.ssah, op), reference(op), sample)
            compared += 1
    return compared


MORE = {
    "channel_moments_": (check_long_chunks, check_not_a_number, check_bytes_of_masks),
    "masked_adamw_": (check_noise_of_far_elements, check_codes_on_every_bound),
    "masked_grad_norm": (check_many_parts_of_a_norm,),
}


def main(*ops: str, exhaustive: bool) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
    importlib.import_module("ssah_kernels.registration")
    with backends.use("triton"):
        for op in ops:
            if op == "masked_grad_norm":
                compared = check_norms()
            else:
                run = compare_updates if op.startswith("masked") else compare
                run = compare_bits if op == "bit_masked_adamw_" else run
                compared = run(op, exhaustive)
            compared += compare_extremes(op, exhaustive)
            if op in EXACT:
                compared += check_every_bit(op)
            elif op != "masked_grad_norm":
                compared += check_wide(op)
            for check in MORE.get(op, ()):
                check()
            print(json.dumps({"op": op, "compared": compared}), flush=True)


if __name__ == "__main__":
    main(*(a for a in sys.argv[1:] if a != "--exhaustive"), exhaustive="--exhaustive" in sys.argv)
