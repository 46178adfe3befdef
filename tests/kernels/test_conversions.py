"""Between float32 and 16 bits: every instruction set rounds as torch converts.

A masked SGD step shows what a kernel reads and writes. Its first step sets the momentum to the
gradient; with a learning rate of one, a parameter of -0 becomes minus the momentum, in which no
bit, not even that of a zero's sign, is lost.
"""

from __future__ import annotations

import pytest
import torch
from instruction_sets import BUILT, python_with
from torch import Tensor

from ssah_kernels import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALVES = [BF16, F16]
# Elements of a row: all in whole registers, or a register's rest in every row.
WIDTHS = [1 << 16, 61]


def every_half(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of a 16-bit type."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def around_the_ties(dtype: torch.dtype) -> Tensor:
    """float32 values at, just below and just above every value of ``dtype`` and every tie between
    two, of both signs; and float32 patterns all over: subnormals, infinities, NaNs."""
    upper = torch.arange(1 << 16).reshape(-1, 1) << 16
    patterns = upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    anywhere = torch.where(patterns < 1 << 31, patterns, patterns - (1 << 32)).int().flatten()
    positive = every_half(dtype)
    positive = positive[(positive >= 0) & positive.isfinite()].double().unique()
    past_the_last = 2 * positive[-1:] - positive[-2:-1]  # from half way to it on: infinity
    ties = (positive + torch.cat([positive[1:], past_the_last])) / 2
    edges = torch.cat([positive, ties]).float()
    assert torch.equal(edges.double(), torch.cat([positive, ties]))
    near = edges.view(torch.int32).reshape(-1, 1) + torch.tensor([-1, 0, 1], dtype=torch.int32)
    near = near.flatten().view(F32)
    return torch.cat([near, -near, anywhere.view(F32)])


def rows(values: Tensor, width: int) -> Tensor:
    """Rows of ``width``, the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % width)).reshape(-1, width)


def slice_of(values: Tensor, filled_with: float) -> Tensor:
    """A matrix as large, whose rows lie apart."""
    n, width = values.shape
    return torch.full((n, width + 3), filled_with, dtype=values.dtype)[:, :width]


def step(param: Tensor, grad: Tensor, momentum: Tensor, number: int) -> None:
    """A step of SGD with learning rate 1 and momentum 1."""
    rate, count = torch.ones(()), torch.tensor(float(number))
    ops.masked_sgd_([param], [grad], [momentum], [None], [0], rate, count, momentum=1.0)


def assert_same(actual: Tensor, expected: Tensor, payload: Tensor) -> None:
    """Bit for bit; a NaN is quiet and has the upper bits of ``payload``, its source."""
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    bits = torch.int32 if actual.dtype == F32 else torch.int16
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(bits), expected[~nan].view(bits))
    if actual.dtype != F32:
        cut, mask, quiet = (16, 0x7F, 0x40) if actual.dtype == BF16 else (13, 0x3FF, 0x200)
        wanted = payload[nan].view(torch.int32) >> cut & mask | quiet
        assert torch.equal(actual[nan].view(bits).int() & mask, wanted)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_reading_every_value(dtype: torch.dtype, width: int) -> None:
    grad = rows(every_half(dtype), width)
    momentum = torch.empty(grad.shape)
    step(slice_of(grad, -0.0), grad, momentum, 1)
    assert_same(momentum, grad.float(), momentum)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_writing_around_every_tie(dtype: torch.dtype, width: int) -> None:
    momentum = rows(around_the_ties(dtype), width)
    expected = (-momentum).to(dtype)
    minus_zero = torch.full(momentum.shape, -0.0, dtype=dtype)
    param = slice_of(minus_zero, -0.0)
    step(param, minus_zero, momentum.clone(), 2)
    assert_same(param, expected, momentum)


@pytest.mark.parametrize("width", WIDTHS)
def test_writing_the_state_around_every_tie(width: int) -> None:
    grad = rows(around_the_ties(BF16), width)
    momentum = torch.empty(grad.shape, dtype=BF16)
    step(slice_of(grad, -0.0), grad, momentum, 1)
    assert_same(momentum, grad.to(BF16), grad)


def test_bfloat16_two_registers_at_a_time() -> None:
    """Where parameters and state are bfloat16. A difference of two is a tie every few elements."""
    torch.manual_seed(0)
    grad = every_half(BF16).repeat(4)
    param = every_half(BF16)[torch.randperm(1 << 16)].repeat(4)
    close = torch.arange(len(param)) % 4 > 0  # of about the gradient's size
    scaled = grad.float() * (1 + torch.randint(1, 300, grad.shape) / 64)
    param[close] = scaled.to(BF16)[close]
    expected = (param.float() - grad.float()).to(BF16)
    momentum = torch.empty_like(grad)
    step(param, grad, momentum, 1)
    assert_same(momentum, grad, grad.float())
    assert torch.equal(param.isnan(), expected.isnan())
    assert torch.equal(param.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_what_a_moments_kernel_writes(dtype: torch.dtype, width: int) -> None:
    """relu(gate) * up: a product of two 16-bit values, which float32 holds to the last bit."""
    torch.manual_seed(0)
    up = every_half(dtype).repeat(3)
    gate = torch.tensor([0.0, 1, 1.5, 2**-9 + 2**-3, 3 * 2**-14, 2**14]).to(dtype)
    gate = gate[torch.randint(len(gate), up.shape)]
    up, gate = rows(up, width), rows(gate, width)
    output = ops.gated_moments(gate, up, *ops.new_moments(up), act="relu")
    expected = (gate.float() * up.float()).to(dtype)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("isa", BUILT)
def test_every_other_instruction_set(isa: str) -> None:
    output = python_with(
        isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not instruction_set"
    )
    assert " passed" in output
