"""One OpCase per operator: what every backend is checked with, and the one tolerance table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import moment_samples
import range_samples
import torch
import update_samples
from moment_samples import ACTIVATIONS, moments_state
from samples import Sample, copied, flat
from torch import Tensor

from ssah_kernels.reference.channel_moments import channel_moments_ as reference_moments_

__all__ = ["ACTIVATIONS", "CASES", "DTYPES", "OpCase", "Sample", "check_backend", "compare"]
__all__ += ["check_bits", "check_skipped", "copied", "flat", "moments_state", "results"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# (rtol, atol relative to the largest magnitude of the expected tensor). Sums in float64 over
# low-precision input are as exact as float32 ones: only a result in the input's own dtype is loose.
TOLERANCE = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (8e-3, 1e-4),
    torch.float16: (1e-3, 1e-4),
}


def tolerance(result: torch.dtype, inputs: torch.dtype) -> tuple[float, float]:
    """State in float64 is compared as finely as the arithmetic on ``inputs`` allows."""
    if result == torch.float64 and inputs != torch.float64:
        return TOLERANCE[torch.float32]
    return TOLERANCE[result]


def compare(actual: Tensor, expected: Tensor, inputs: torch.dtype) -> None:
    """Assert that a result equals the reference's; ``inputs`` is the dtype of the case's input."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel() == 0:
        return
    if expected.dtype == torch.int16:
        assert torch.equal(actual, expected)
        return
    if expected.dtype == torch.uint8:
        check_codes(actual, expected)
        return
    rtol, atol = tolerance(expected.dtype, inputs)
    finite = expected[expected.isfinite()].double()
    scale = finite.abs().max().item() if finite.numel() else 0.0
    # What arithmetic in float32 leaves below its normal numbers, a few of them, is as good as 0.
    lost = 0.0 if expected.dtype == torch.float64 else 4 * torch.finfo(torch.float32).tiny
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol * scale + lost, equal_nan=True
    )


def check_codes(actual: Tensor, expected: Tensor) -> None:
    """Assert that state in 8 bits has the reference's codes.

    The arithmetic is float32 here and float64 there, so that one value in a thousand may lie so
    near the bound of two codes that they fall on different sides of it: codes of neighbours then.
    """
    # Code 255 is the neighbour of 0 in the map with signs.
    apart = (actual.int() - expected.int()).abs()
    apart = apart.minimum(256 - apart)
    assert int(apart.max()) <= 1, "codes that are no neighbours"
    unequal = int(apart.sum())
    assert unequal <= expected.numel() // 1000, f"{unequal} of {expected.numel()} codes"


def check_bits(actual: Tensor, expected: Tensor) -> None:
    """Assert that values of 16 bits, rounded once with specified noise, are the reference's.

    The arithmetic is float32 here and float64 there: at most one value in a thousand may lie so
    near a cut that the two fall on different sides of it.
    """
    if expected.element_size() == 2:
        differs = actual.view(torch.int16) != expected.view(torch.int16)
        unequal = int((differs & ~(actual.isnan() & expected.isnan())).sum())
        assert unequal <= max(1, expected.numel() // 1000), f"{unequal} of {expected.numel()} bits"


@dataclass(frozen=True)
class OpCase:
    """How one operator is checked.

    samples(dtype) yields calls, far(dtype) those that leave the first tile, segment and chunk of
    every kernel, extreme(dtype) those at the ends of the types, and extreme_of_float32(dtype) those
    for backends whose sums of squares are of float32. ``outputs`` names the positional arguments
    that the operator mutates (they are compared too). ``state_of_output`` gives the state that a
    returned tensor implies: an element that float32 and float64 round to different neighbours must
    not fail the moments that are taken over it. For the same reason ``adjusted`` gives the expected
    results that an actual one implies. ``rounded`` of the mutated lists, the first ones, hold
    values that are rounded once; where the argument at ``seed`` is given, their bits are compared.
    """

    op: str
    samples: Callable[[torch.dtype], Iterator[Sample]]
    far: Callable[[torch.dtype], Iterator[Sample]]
    extreme: Callable[[torch.dtype], Iterator[Sample]]
    extreme_of_float32: Callable[[torch.dtype], Iterator[Sample]]
    outputs: tuple[int, ...] = ()
    rounded: int = 0
    seed: int | None = None
    state_of_output: Callable[[Sample, Tensor], list[Tensor]] | None = None
    adjusted: Callable[[Sample, list[Tensor], list[Tensor]], list[Tensor]] | None = None

    def n_rounded(self, sample: Sample) -> int:
        """How many of the results, the first ones, hold values that are rounded once."""
        return sum(len(flat(sample.args[i])) for i in self.outputs[: self.rounded])


def _moments_of_gated(sample: Sample, output: Tensor) -> list[Tensor]:
    count, mean, m2 = (state.clone() for state in sample.args[2:5])
    reference_moments_(output, count, mean, m2, sample.args[5])
    return [count, mean, m2]


def _adjusted_m2(sample: Sample, expected: list[Tensor], actual: list[Tensor]) -> list[Tensor]:
    """Rows that are all alike have an M2 of 0, but for what rounding the mean leaves of them."""
    count, mean, m2 = expected[-3:]
    double = flat(sample.args[0])[0].dtype == torch.float64
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    lost = count * (4 * eps * mean).square()
    return [*expected[:-1], torch.where((actual[-1] - m2).abs() <= lost, actual[-1], m2)]


def _adjusted_compensation(
    sample: Sample, expected: list[Tensor], actual: list[Tensor]
) -> list[Tensor]:
    """What an update leaves to its compensations, as far as float32 can say.

    A parameter that was rounded to the other neighbour leaves that much more or less; and the sum
    of the two is computed in float32, where a few roundings of the parameter's size are lost, and
    rounded once more: below the normal numbers of its type to one side or the other.
    """
    sgd = isinstance(sample.args[5], Tensor)
    case = CASES["masked_sgd_" if sgd else "masked_adamw_"]
    indices, dims, compensations = (sample.args[i] for i in ((3, 4, 10) if sgd else (4, 5, 11)))
    if compensations is None:
        return expected
    first = case.n_rounded(sample)
    for i, (index, dim) in enumerate(zip(indices, dims, strict=True)):
        pair = [
            p[i] if index is None else p[i].index_select(dim, index) for p in (expected, actual)
        ]
        if compensations[i].dtype == torch.int16:
            halves = (expected[first + i], actual[first + i])
            exact, mine = (
                update_samples.whole_weight(p, rest) for p, rest in zip(pair, halves, strict=True)
            )
            # A rounding is to the terms of a sum, which are of the size of the largest weights.
            most = torch.where(mine.isfinite(), mine.abs(), 0).flatten().sort().values[-1:].sum()
            lost = 4 * torch.finfo(torch.float32).eps * (1 + most)
            near = ((mine - exact).abs() <= lost) | (mine.isnan() & exact.isnan())
            near |= mine == exact  # infinite ones
            expected[first + i] = torch.where(near, halves[1], halves[0])
            continue
        moved = pair[0].double() - pair[1].double()
        rest, mine = expected[first + i].double() + moved, actual[first + i].double()
        narrow = torch.finfo(expected[first + i].dtype)
        lost = 4 * torch.finfo(torch.float32).eps * pair[1].double().abs()
        lost += narrow.smallest_normal * narrow.eps
        rest = torch.where((mine - rest).abs() <= lost, mine, rest)
        expected[first + i] = rest.to(expected[first + i].dtype)
    return expected


def no_samples(_: torch.dtype) -> Iterator[Sample]:
    return iter(())


def _of_activations(op: str, name: str, **options: Any) -> OpCase:
    samples = getattr(moment_samples, name)
    far = partial(samples, shapes=moment_samples.far)
    extreme = narrow = getattr(range_samples, name, no_samples)
    if "sizes" in inspect.signature(extreme).parameters:
        narrow = partial(extreme, sizes=range_samples.SIZES_OF_FLOAT32)
    return OpCase(op, samples, far, extreme, narrow, **options)


def _of_lists(op: str, **options: Any) -> OpCase:
    name = op.removesuffix("_")
    samples, extreme = getattr(update_samples, name), getattr(range_samples, name)
    far = partial(samples, shapes=update_samples.FAR_UPDATED)
    return OpCase(op, samples, far, extreme, extreme, **options)


CASES: dict[str, OpCase] = {
    case.op: case
    for case in (
        _of_activations(
            "channel_moments_", "channel_moments", outputs=(1, 2, 3), adjusted=_adjusted_m2
        ),
        _of_activations(
            "gated_moments",
            "gated_moments",
            outputs=(2, 3, 4),
            state_of_output=_moments_of_gated,
            adjusted=_adjusted_m2,
        ),
        _of_activations("gated_moments_backward", "gated_moments_backward"),
        _of_activations("gated_product", "gated_product"),
        _of_activations("taylor_moments_", "taylor_moments", outputs=(2, 3)),
        _of_activations("column_sq_norms", "column_sq_norms"),
        _of_lists(
            "masked_adamw_",
            outputs=(0, 2, 3, 11, 12, 13, 14, 15),
            rounded=3,
            seed=10,
            adjusted=_adjusted_compensation,
        ),
        _of_lists(
            "masked_sgd_",
            outputs=(0, 2, 10, 11, 12, 13),
            rounded=2,
            seed=9,
            adjusted=_adjusted_compensation,
        ),
        _of_lists("bit_masked_adamw_", outputs=(0, 2, 3), rounded=3, seed=10),
        _of_lists("masked_grad_norm"),
    )
}


def results(case: OpCase, function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Everything that a call writes: what it returns, then the arguments that it mutates."""
    args = [copied(a) if i in case.outputs else a for i, a in enumerate(sample.args)]
    returned = function(*args, **sample.kwargs)
    given = [i for i in case.outputs if i < len(args)]  # the last ones may be left out
    return [*flat(returned), *(tensor for i in given for tensor in flat(args[i]))]


def check_sample(
    case: OpCase, function: Callable[..., Any], reference: Callable[..., Any], sample: Sample
) -> None:
    """Compare everything that ``function`` writes with what ``reference`` writes."""
    expected = results(case, reference, sample)
    actual = results(case, function, sample)
    if case.state_of_output is not None:
        expected[1:] = case.state_of_output(sample, actual[0])
    if case.adjusted is not None:
        expected = case.adjusted(sample, expected, actual)
    assert len(actual) == len(expected)
    inputs = flat(sample.args[0])[0].dtype
    noisy = case.seed is not None and sample.args[case.seed] is not None
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        try:
            compare(a, e, inputs)
            if noisy and i < case.n_rounded(sample):
                check_bits(a, e)
        except AssertionError as error:
            raise AssertionError(
                f"{case.op} {sample.name} {inputs} result {i} {tuple(a.shape)}: {error}"
            ) from None


def check_skipped(case: OpCase, function: Callable[..., Any], sample: Sample) -> None:
    """Assert that an update writes nothing where an infinite gradient was found.

    Memory is compared, all of it: of what is not a number too.
    """
    args = [copied(a) for a in sample.args[:-1]]
    args[1] = [torch.full_like(g, torch.inf) for g in args[1]]
    before = copied(args)
    for value in (1.0, 0.5, torch.nan):
        function(*args, torch.tensor(value), **sample.kwargs)
    for i in case.outputs:
        for a, b in zip(flat(args[i]), flat(before[i]), strict=True):
            # uint8 [bytes] of all of the storage
            memory = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in (a, b)]
            assert torch.equal(*memory), f"{case.op} {sample.name}: argument {i} was written"


def check_backend(
    case: OpCase,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    which: str = "samples",
) -> int:
    """Compare ``function`` with ``reference`` on the samples that ``which`` of an OpCase's names,
    of every dtype; the number compared."""
    compared = 0
    for dtype in dtypes:
        for sample in getattr(case, which)(dtype):
            check_sample(case, function, reference, sample)
            compared += 1
    return compared
