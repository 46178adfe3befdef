"""Masks of single entries against sets of their positions."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from ssah.units import BitMask
from ssah_kernels.bit_masks import pack_bits, unpack_bits


def _positions(mask: Tensor) -> set[int]:
    """The row-major positions that are True."""
    return {i for i, value in enumerate(mask.flatten().tolist()) if value}


def test_the_worked_example_is_two_bytes() -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[0, 3, 9]] = True
    assert pack_bits(mask).tolist() == [9, 2]


@given(st.integers(0, 70), st.integers(0, 2**32))
def test_bits_are_those_of_the_integer_that_they_spell(n: int, seed: int) -> None:
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    number = sum(1 << i for i in _positions(mask))
    assert bytes(pack_bits(mask).tolist()) == number.to_bytes(-(-n // 8), "little")
    assert torch.equal(unpack_bits(pack_bits(mask), (n,)), mask)


@given(st.lists(st.booleans(), min_size=15, max_size=15), st.integers(0, 2**15 - 1))
def test_operations_are_those_of_sets(first: list[bool], second: int) -> None:
    left = torch.tensor(first).view(3, 5)
    right = torch.tensor([bool(second >> i & 1) for i in range(15)]).view(3, 5)
    a, b, everything = _positions(left), _positions(right), set(range(15))
    of_left, of_right = BitMask.of(left), BitMask.of(right)
    cases: list[tuple[BitMask, set[int]]] = [
        (of_left | of_right, a | b),
        (of_left & of_right, a & b),
        (of_left - of_right, a - b),
        (~of_left, everything - a),
    ]
    for result, expected in cases:
        assert _positions(result.to_mask()) == expected
        assert result.count == len(expected)
        # Equal sets have equal bytes: nothing stands after the last entry.
        assert result == BitMask.of(result.to_mask())
    assert _positions(BitMask.random(of_left, seed=second).to_mask()) <= everything
    assert BitMask.random(of_left, seed=second).count == len(a)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: pack_bits(torch.zeros(3)), "mask is torch.float32"),
        (lambda: unpack_bits(torch.zeros(3), (24,)), "bits is torch.float32"),
        (lambda: unpack_bits(torch.zeros(3, dtype=torch.uint8), (4, 5, 2)), r"must have \[5\]"),
        (
            lambda: BitMask.of(torch.ones(2, 3) > 0) & BitMask.of(torch.ones(3, 2) > 0),
            "must be of the same parameter",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        wrong()
