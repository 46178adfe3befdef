"""The CPU kernels against the reference on drawn calls: shapes, strides, offsets, masks, types,
memory that is read twice, and values at the ends of what the types hold.

Every draw has a number of its own. A failure prints it, and how to draw the same call again.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import update_samples
from cases import ACTIVATIONS, CASES, DTYPES, OpCase, check_sample, check_skipped
from cpu_compare import on
from samples import Sample, copied, flat, normal
from torch import Tensor

from ssah_kernels.bit_masks import block_offsets, pack_bits, unpack_bits

DRAWS = 50  # of an operator and kind in one test
SAMPLE = 1  # tests of DRAWS in the default run; all of them are exhaustive
ALL = 25
UPDATES = ("masked_adamw_", "masked_sgd_")
BITS = "bit_masked_adamw_"
SPECIAL = (math.inf, -math.inf, math.nan, -0.0, 0.0)
# How large values are whose squares and products float32 holds; sums of squares are of float64.
SIZES = (1.0, 1e-40, 1e-25, 1e20, 1e37)
NARROW = (1.0, 1e-7, 3e3)  # float16 holds neither
MODEST = (1.0, 1e-10, 1e10)


class Draw:
    """Everything of one call, from one generator."""

    def __init__(self, seed: int, extreme: bool = False) -> None:
        self.random = random.Random(seed)
        self.g = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        self.extreme = extreme

    def size(self, most: int = 70) -> int:
        """0 and 1 as often as sizes around the widths of registers, and larger ones."""
        return self.random.choice([0, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, most])

    def large(self, *sizes: float) -> float:
        """How large the values of a tensor are."""
        if not self.extreme:
            return 1.0
        return self.random.choice(NARROW if self.dtype == torch.float16 else sizes)

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """Normal ones; among extreme ones, here and there infinite, NaN and zeros of both signs."""
        x = (normal(shape, torch.float64, self.g) * size).to(dtype)
        if self.extreme and self.random.random() < 0.5:
            for value in self.random.sample(SPECIAL, 2):
                x[torch.rand(shape, generator=self.g) < 0.01] = value
        return x

    def values(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, size: float = 1.0
    ) -> Tensor:
        """Contiguous, with offset and gaps, with dimensions in another order, or expanded."""
        dtype = dtype or self.dtype
        layout = self.random.choice(["contiguous", "gaps", "order", "expanded"])
        if layout == "gaps":
            steps = [self.random.choice([1, 1, 2, 3]) for _ in shape]
            first = [self.random.randrange(4) for _ in shape]
            whole = [f + max(n, 1) * s for n, f, s in zip(shape, first, steps, strict=True)]
            cut = (
                slice(f, f + n * s, s) if n else slice(0, 0)
                for n, f, s in zip(shape, first, steps, strict=True)
            )
            return self.numbers(tuple(whole), dtype, size)[tuple(cut)]
        if layout == "order":
            order = [*range(len(shape))]
            self.random.shuffle(order)
            x = self.numbers(tuple(shape[d] for d in order), dtype, size)
            return x.permute([order.index(d) for d in range(len(shape))])
        if layout == "expanded" and len(shape) > 1:
            return self.numbers((1, *shape[1:]), dtype, size).expand(shape)
        return self.numbers(shape, dtype, size)

    def spread(self, x: Tensor) -> Tensor:
        """``x`` in another layout."""
        order = self.random.sample(range(x.dim()), x.dim())
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """Of any bytes, as a mask that was viewed as bool has them."""
        share = self.random.choice([0.0, 0.5, 1.0])
        flags = (torch.rand(shape, generator=self.g) < share).to(torch.uint8)
        if self.random.random() < 0.5:
            flags *= torch.randint(1, 256, shape, generator=self.g, dtype=torch.uint8)
        if shape and self.random.random() < 0.5:
            return flags.view(torch.bool).flip(0).transpose(0, -1).contiguous().transpose(0, -1)
        return flags.view(torch.bool)

    def moments(self) -> tuple[tuple[int, ...], tuple[Tensor, ...], Tensor | None]:
        """A shape [..., channels], a state of it and a mask of its rows."""
        lead = tuple(self.size(300 if d == 0 else 3) for d in range(self.random.randrange(4)))
        channels = self.size(1100 if math.prod(lead) < 60 else 65)
        state = [normal((channels,), torch.float64, self.g) for _ in range(2)]
        count = torch.tensor(float(self.random.choice([0, 7])), dtype=torch.float64)
        state = [s * (count > 0) for s in state]
        mask = None
        if self.random.random() < 0.6:
            mask = self.mask(lead)
        return (*lead, channels), (count, state[0], state[1].abs()), mask

    def arms(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [arms, C], some of them 0, and arms of the first dimensions of ``gate``."""
        n = self.random.choice([1, 2, 5])
        own = self.random.choice([self.dtype, torch.float32])
        factors = self.spread(normal((n, gate.shape[-1]), torch.float64, self.g).to(own))
        factors = factors.masked_fill(torch.rand(factors.shape, generator=self.g) < 0.3, 0)
        lead = gate.shape[: self.random.randrange(gate.dim())]
        return factors, self.spread(torch.randint(n, lead, generator=self.g))

    def parameter(self) -> tuple[Tensor, int]:
        """Of no to four dimensions, and the first or the last of them, counted from either end."""
        n = self.random.choice([0, 1, 2, 2, 2, 2, 3, 4])
        shape = (self.size(9 if n > 2 else 70), self.size(1100 if n == 2 else 70))[:n]
        shape = (*shape, *(self.random.randrange(4) for _ in range(n - 2)))
        param = self.values(shape)
        if any(s == 0 and k > 1 for s, k in zip(param.stride(), shape, strict=True)):
            param = param.clone()  # an element must lie in one place
        return param, self.random.choice([0, -1, max(n - 1, 0), -max(n, 1)])

    def lists(self) -> dict[str, list[Any]]:
        """Parameters in every layout, and what is compact with them."""
        names = ("params", "grads", "first", "second", "indices", "dims", "compensations", "signed")
        lists: dict[str, list[Any]] = {name: [] for name in (*names, "squared")}
        state = torch.float64 if self.dtype == torch.float64 else torch.float32
        if state == torch.float32 and self.random.random() < 0.5:
            state = torch.bfloat16
        size = self.large(1.0, 1e-20, 1e-30, 1e15)
        wide = self.dtype.itemsize == 2 and self.random.random() < 0.3
        of_grads = torch.float32 if wide else self.dtype
        for _ in range(self.random.randrange(1, 4)):
            param, dim = self.parameter()
            index, compact = None, [*param.shape]
            if param.dim() and self.random.random() < 0.6:
                chosen = torch.rand(param.shape[dim], generator=self.g) < self.random.random()
                index = chosen.nonzero().flatten()
                compact[dim] = len(index)
            trained = param if index is None else param.index_select(dim, index)
            # Of the parameter's shape a gradient is read at the index; where all trains, all of it.
            whole = self.random.random() < 0.4
            shape = list(param.shape) if whole else compact
            if lists["grads"] and list(lists["grads"][-1].shape) == shape:
                grad = lists["grads"][-1]  # what is only read may be given twice
            else:
                grad = self.values(tuple(shape), of_grads, size=size)
            # An infinite state stays infinite or becomes NaN, by the order of a sum.
            first, second = (normal(tuple(compact), torch.float64, self.g) * size for _ in "mv")
            lists["params"].append(param)
            lists["grads"].append(grad)
            lists["first"].append(first.to(state))
            lists["second"].append(second.square().to(state))
            lists["indices"].append(index)
            lists["dims"].append(dim)
            lists["compensations"].append(update_samples.compensation(trained, self.g))
            units = (compact[dim],) if compact else (1,)
            lists["signed"].append(normal(units, torch.float64, self.g))
            lists["squared"].append(normal(units, torch.float64, self.g).abs())
        return lists

    def scalar(self, *values: float | None) -> Tensor | None:
        value = self.random.choice(values)
        return None if value is None else torch.tensor(value, dtype=torch.float64)

    def update(self, op: str) -> Sample:
        lists = self.lists()
        narrow = self.dtype in (torch.bfloat16, torch.float16)
        compensations = lists["compensations"] if narrow and self.random.random() < 0.3 else None
        sums = [lists["signed"], lists["squared"]] if self.random.random() < 0.5 else [None, None]
        seed = self.random.choice([None, torch.tensor(self.random.randrange(-(2**63), 2**63))])
        scalars = [
            self.scalar(1e-3, 0.1), self.scalar(1, 2, 1000), self.scalar(None, 8),
            self.scalar(None, 0.3), seed,
        ]  # fmt: skip
        options: dict[str, Any] = {"weight_decay": self.random.choice([0.0, 0.1])}
        options["maximize"] = self.random.random() < 0.3
        states = [lists["first"], lists["second"]]
        if op == "masked_sgd_":
            options["momentum"] = self.random.choice([0.0, 0.9])
            options["nesterov"] = options["momentum"] > 0 and self.random.random() < 0.5
            states = [lists["first"] if options["momentum"] else None]
        args = (lists["params"], lists["grads"], *states, lists["indices"], lists["dims"])
        without_scales = [None] * len(states)
        found_inf = self.scalar(None, 0, 0, 0, 1)
        args = (*args, *scalars, compensations, *sums, *without_scales, found_inf)
        return Sample("drawn", args, options)

    def bits(self) -> Sample:
        """Single elements of contiguous parameters, from none to all, over several blocks."""
        lists: list[list[Tensor]] = [[] for _ in range(6)]
        state = torch.float64 if self.dtype == torch.float64 else torch.float32
        if state == torch.float32 and self.random.random() < 0.5:
            state = torch.bfloat16
        size = self.large(1.0, 1e-20, 1e-30, 1e15)
        for _ in range(self.random.randrange(1, 4)):
            n = self.random.randrange(3)
            shape = tuple(self.size(1100 if d else 5) for d in range(n))
            share = self.random.choice([0.0, 0.01, 0.3, 0.9, 1.0])
            mask = torch.rand(shape, generator=self.g) < share
            packed, k = pack_bits(mask), int(mask.sum())
            first, second = (normal((k,), torch.float64, self.g) * size for _ in "mv")
            states = (first.to(state), second.square().to(state))
            own = (self.numbers(shape, self.dtype), self.values(shape, size=size), *states, packed)
            for each, tensor in zip(lists, (*own, block_offsets(packed)), strict=True):
                each.append(tensor)
        options: dict[str, Any] = {"weight_decay": self.random.choice([0.0, 0.1])}
        options["maximize"] = self.random.random() < 0.3
        seed = self.random.choice([None, torch.tensor(self.random.randrange(-(2**63), 2**63))])
        scalars = [
            self.scalar(1e-3, 0.1), self.scalar(1, 2, 1000), self.scalar(None, 8),
            self.scalar(None, 0.3), seed,
        ]  # fmt: skip
        return Sample("drawn", (*lists, *scalars), options)

    def call(self, op: str) -> Sample:
        if op == BITS:
            return self.bits()
        if op in UPDATES:
            return self.update(op)
        if op == "masked_grad_norm":
            lists = self.lists()
            args = (lists["params"], lists["indices"], lists["dims"], self.scalar(None, 8))
            return Sample("drawn", args)
        if op == "column_sq_norms":
            weight = self.values((self.size(300), self.size(1100)), size=self.large(*SIZES))
            return Sample("drawn", (weight,))
        shape, state, mask = self.moments()
        if op == "channel_moments_":
            return Sample("drawn", (self.values(shape, size=self.large(*SIZES)), *state, mask))
        act = self.random.choice(ACTIVATIONS)
        if op == "gated_moments_backward":
            gate = self.values(shape, size=self.large(1.0, 1e-10, 1e15))
            # Without infinities: 0 * inf is NaN or left out, by which factors are multiplied first.
            others = [normal(shape, torch.float64, self.g) * self.large(*MODEST) for _ in "ab"]
            others = [self.spread(other.to(self.dtype)) for other in others]
            return Sample("drawn", (others[0], gate, others[1]), {"act": act})
        first = self.values(shape, size=self.large(*MODEST))
        if op in ("gated_moments", "gated_product"):  # as above: act(gate) may be 0
            second = self.spread(
                (normal(shape, torch.float64, self.g) * self.large(*MODEST)).to(self.dtype)
            )
        else:
            second = self.values(shape, size=self.large(*MODEST))
        if self.random.random() < 0.1 and not self.extreme:
            second = first
        if op == "taylor_moments_":
            return Sample("drawn", (first, second, *state[1:], mask))
        if op == "gated_product":
            return Sample("drawn", (first, second, *self.arms(first)), {"act": act})
        return Sample("drawn", (first, second, *state, mask), {"act": act})


def moments_without_a_value(case: OpCase) -> OpCase:
    """``case``, where a mean of infinities and NaN is any that is not finite."""
    base = case.adjusted
    assert base is not None

    def adjusted(sample: Sample, expected: list[Tensor], actual: list[Tensor]) -> list[Tensor]:
        expected = base(sample, expected, actual)
        lost = ~(expected[-1].isfinite() & expected[-2].isfinite())
        finite = actual[-1].isfinite() & actual[-2].isfinite()
        assert not (lost & finite).any(), "finite moments of values that are not"
        pairs = zip(actual[-2:], expected[-2:], strict=True)
        return [*expected[:-2], *(torch.where(lost, a, e) for a, e in pairs)]

    return replace(case, adjusted=adjusted)


def largest(*lists: list[Tensor] | Tensor | None) -> float:
    """The largest finite magnitude in all of them."""
    every = [t.double() for each in lists for t in flat(each)]
    return max((float(t[t.isfinite()].abs().max()) for t in every if t.isfinite().any()), default=0)


def scales(case: OpCase, sample: Sample, results: list[Tensor]) -> list[float]:
    """How large the terms are of which each result is the sum."""
    if case.op == "taylor_moments_":
        x, grad, signed, squared = sample.args[:4]
        product, n = largest(x) * largest(grad), x.numel()
        return [n * product + largest(signed), n * product**2 + largest(squared)]
    if case.op not in (*UPDATES, BITS):
        return [0.0] * len(results)
    p, g = (largest(each) for each in sample.args[:2])
    p = max(p, largest(results[: len(sample.args[0])]))  # before and after
    n = max((t.numel() for t in sample.args[1]), default=0)
    of_states = [p + g + largest(sample.args[i]) for i in case.outputs[1 : case.rounded]]
    if case.op == BITS:
        every = zip(case.outputs, [p, *of_states], strict=True)
        return [scale for i, scale in every for _ in flat(sample.args[i])]
    outputs = case.outputs[: case.rounded + 3]  # without scales
    of_sums = [
        n * (p * g) ** power + largest(sample.args[i]) for power, i in enumerate(outputs[-2:], 1)
    ]
    return [
        scale
        for i, scale in zip(outputs, [p, *of_states, p, *of_sums], strict=True)
        for _ in flat(sample.args[i])
    ]


def up_to_rounding(case: OpCase) -> OpCase:
    """``case``, compared with what the terms of each sum are, which may cancel.

    A tensor of one element has no larger neighbour whose size tells what a rounding is; and next to
    zero a type of 16 bits has a coarser grid than its relative precision says.
    """

    def adjusted(sample: Sample, expected: list[Tensor], actual: list[Tensor]) -> list[Tensor]:
        if case.adjusted is not None:
            expected = case.adjusted(sample, expected, actual)
        narrow = flat(sample.args[0])[0].dtype != torch.float64
        rounding = 16 * torch.finfo(torch.float32 if narrow else torch.float64).eps
        close = []
        for a, e, scale in zip(actual, expected, scales(case, sample, expected), strict=True):
            if not e.is_floating_point():  # a half of a weight, which `case` has compared
                close.append(e)
                continue
            kind = torch.finfo(e.dtype)
            own = kind.eps * e.double().abs() + kind.eps * kind.smallest_normal
            near = (a.double() - e.double()).abs() <= rounding * scale + own
            close.append(torch.where(near, a, e))
        rounded = case.n_rounded(sample) if case.op in (*UPDATES, BITS) else 0
        for a, e in zip(actual[:rounded], expected[:rounded], strict=True):
            # Float32 and float64 fall on two sides of a cut once in 2000 values of float16.
            if sample.args[case.seed or 0] is not None and e.element_size() == 2:
                unequal = int(((a != e) & ~(a.isnan() & e.isnan())).sum())
                assert unequal <= 4 + e.numel() // 250, f"{unequal} of {e.numel()} bits"
        return close

    return replace(case, adjusted=adjusted, seed=None)


def check_frozen(op: str, function: Any, sample: Sample) -> None:
    """Assert that no bit of a parameter's storage changes but those of what trains."""
    args = [copied(a) for a in sample.args]
    function(*args, **sample.kwargs)
    at = 3 if op == "masked_sgd_" else 4  # masks, or indices
    indices, dims = sample.args[at : at + 2]
    for i, (before, after) in enumerate(zip(sample.args[0], args[0], strict=True)):
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[before.element_size()]
        whole = [torch.empty(0, dtype=bits).set_(t.untyped_storage()) for t in (before, after)]
        trains = torch.zeros(len(whole[0]), dtype=torch.bool)
        inner = trains.as_strided(before.shape, before.stride(), before.storage_offset())
        if op == BITS:
            inner.copy_(unpack_bits(indices[i], before.shape))
        elif indices[i] is None:
            inner.fill_(True)
        else:
            inner.index_fill_(dims[i], indices[i], True)
        assert torch.equal(whole[0][~trains], whole[1][~trains]), f"params[{i}]: frozen bits moved"


def check(op: str, number: int, extreme: bool) -> None:
    sample = Draw(number, extreme).call(op)
    case = CASES[op]
    if extreme and op in ("channel_moments_", "gated_moments"):
        case = moments_without_a_value(case)
    case = up_to_rounding(case)
    try:
        if op in UPDATES and sample.args[-1] is not None and sample.args[-1] != 0:
            check_skipped(case, on("cpu", op), sample)
            return
        check_sample(case, on("cpu", op), on("reference", op), sample)
        if op in (*UPDATES, BITS):
            check_frozen(op, on("cpu", op), sample)
    except Exception as error:
        again = f"check({op!r}, {number}, extreme={extreme})"
        raise AssertionError(f"{error}\n\nTo repeat it: test_drawn_ops.{again}") from error


@pytest.mark.parametrize(
    "block",
    [pytest.param(n, marks=[] if n < SAMPLE else pytest.mark.exhaustive) for n in range(ALL)],
)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("op", CASES)
def test_drawn_calls(op: str, extreme: bool, block: int) -> None:
    for number in range(block * DRAWS, (block + 1) * DRAWS):
        check(op, number, extreme)
