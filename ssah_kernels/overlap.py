"""Whether tensors share memory: exactly, and quickly where they lie apart, as nearly always.

The addresses of a tensor's elements are a set; a set of whole stretches is compared by its bounds,
any other by marking bytes, which is exact and costs what reading the tensor would.

Take a matrix [4, 6]. Its columns 0 to 2 and 3 to 5, as views, lie between each other's rows: their
stretches from first to last element overlap, their elements do not. Updating both in one call is
right, and what training some columns of a matrix beside others needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from operator import le

import torch
from torch import Tensor


def _span(x: Tensor) -> int:
    """Bytes from the first element of ``x`` to behind the last one."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _marked(marks: Tensor, x: Tensor, unit: int, offset: int) -> Tensor:
    """The bytes of ``x`` among ``marks``, ``unit`` of them each, from ``offset`` on: a view."""
    scale = x.element_size() // unit
    # A stride of 0 (expanded tensors) is one place, however often it is read.
    sizes = [n if s else 1 for n, s in zip(x.shape, x.stride(), strict=True)]
    strides = [s * scale for s in x.stride()]
    return marks.as_strided([*sizes, scale], [*strides, 1], offset // unit)


def within(x: Tensor) -> bool:
    """Whether two elements of ``x`` [...] lie in one place."""
    if x.is_contiguous() or x.numel() == 0:
        return False
    used = sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1)
    if used and used[0][0] == 0:  # an expanded dimension
        return True
    reach = 1
    for stride, size in used:
        if stride < reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # each dimension steps over all of the smaller ones
    # What is left is rare: as_strided views such as windows that overlap. Counting is exact.
    unit = x.element_size()
    marks = torch.zeros(_span(x) // unit, dtype=torch.bool)
    _marked(marks, x, unit, 0).fill_(True)
    return int(marks.sum()) < x.numel()


def _is_one_stretch(x: Tensor, span: int) -> bool:
    return span == x.numel() * x.element_size() and not within(x)


def _other_columns(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices with one distance between rows lie in different columns of it."""
    if a.dim() != 2 or b.dim() != 2 or a.element_size() != b.element_size():
        return False
    # The larger stride is the distance between rows, of transposed views too.
    (wide_a, step_a, n_a), (wide_b, step_b, n_b) = (
        (s[0], s[1], n[1]) if s[0] >= s[1] else (s[1], s[0], n[0])
        for s, n in ((a.stride(), a.shape), (b.stride(), b.shape))
    )
    if wide_a != wide_b or wide_a == 0 or (b.data_ptr() - a.data_ptr()) % a.element_size():
        return False
    # The column of ``a``'s first row at which ``b`` begins; ``b`` may begin in a later row.
    begin = (b.data_ptr() - a.data_ptr()) // a.element_size() % wide_a
    return (n_a - 1) * step_a < begin and begin + (n_b - 1) * step_b < wide_a


def between(a: Tensor, b: Tensor) -> bool:
    """Whether an element of ``a`` [...] and one of ``b`` [...] share a byte."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    start_a, start_b = a.data_ptr(), b.data_ptr()
    span_a, span_b = _span(a), _span(b)
    if start_a + span_a <= start_b or start_b + span_b <= start_a:
        return False
    if start_a == start_b or (_is_one_stretch(a, span_a) and _is_one_stretch(b, span_b)):
        return True
    if _other_columns(a, b):
        return False
    # Marks of the largest size that both tensors' elements are whole multiples of.
    start = min(start_a, start_b)
    unit = math.gcd(a.element_size(), b.element_size(), abs(start_a - start_b))
    size = max(start_a + span_a, start_b + span_b) - start
    marks = torch.zeros(size // unit, dtype=torch.bool)
    _marked(marks, a, unit, start_a - start).fill_(True)
    return bool(_marked(marks, b, unit, start_b - start).any())


def stretches(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Where the memory of ``tensors``, each [...], begins and ends, in order of address.

    Those that overlap, such as columns of one matrix, are one stretch: [0, 8), [4, 12) and [20, 24)
    begin at 0 and 20, and end at 12 and 24.
    """
    begins: list[int] = []
    ends: list[int] = []
    for start, end in sorted((x.data_ptr(), x.data_ptr() + _span(x)) for x in tensors):
        if ends and start < ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            begins.append(start)
            ends.append(end)
    return begins, ends


def first(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[int, int] | None:
    """Positions among ``[*written, *read]`` of a written tensor and one that shares memory with it.

    A written one that lies on itself is returned twice. None: there is none.
    """
    starts, ends = [], []
    for i, x in enumerate(written):
        start = x.data_ptr()
        starts.append(start)
        if x.is_contiguous():
            ends.append(start + x.nbytes)
        elif within(x):
            return i, i
        else:
            ends.append(start + _span(x))
    for x in read:
        start = x.data_ptr()
        starts.append(start)
        ends.append(start + (x.nbytes if x.is_contiguous() else _span(x)))
    # Stretches lie apart if and only if each has ended where the next one begins.
    if all(map(le, sorted(ends), islice(sorted(starts), 1, None))):
        return None
    # Some overlap: sweep by address, comparing each with those that have not ended before it.
    tensors = [*written, *read]
    reached: list[int] = []
    for i in sorted(range(len(tensors)), key=starts.__getitem__):
        reached = [j for j in reached if ends[j] > starts[i]]
        for j in reached:
            # Two that are only read may lie in one place.
            if min(i, j) < len(written) and between(tensors[i], tensors[j]):
                return min(i, j), max(i, j)
        reached.append(i)
    return None
