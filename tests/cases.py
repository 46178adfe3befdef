"""One OpCase per operator: what every backend is checked with, and the one tolerance table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssah_kernels.autograd import new_moments
from ssah_kernels.reference.channel_moments import channel_moments_ as reference_moments_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

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
    rtol, atol = tolerance(expected.dtype, inputs)
    finite = expected[expected.isfinite()].double()
    scale = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol * scale, equal_nan=True
    )


def copied(value: Any, device: str | None = None) -> Any:
    """A copy of an argument: of a tensor with its strides and all of its storage, or of a list."""
    if isinstance(value, list):
        return [copied(v, device) for v in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().clone().to(device=device or value.device)
    copy = torch.empty(0, dtype=value.dtype, device=device or value.device)
    return copy.set_(storage, value.storage_offset(), value.shape, value.stride())


def flat(value: Any) -> list[Tensor]:
    """The tensors of an argument: one, or those of a list."""
    return [] if value is None else [value] if isinstance(value, Tensor) else [*value]


@dataclass(frozen=True)
class Sample:
    """One call: positional tensors (or lists, or None), keyword arguments, a name for the test."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> Sample:
        return Sample(self.name, tuple(copied(a, device) for a in self.args), dict(self.kwargs))


@dataclass(frozen=True)
class OpCase:
    """How one operator is checked.

    samples(dtype) yields calls; ``outputs`` names the positional arguments that the operator
    mutates (they are compared too); ``dtypes`` are the input types it takes. ``state_of_output``
    gives the state that a returned tensor implies: an element that float32 and float64 round to
    different neighbours must not fail the moments that are taken over it. For the same reason
    ``adjusted`` gives the expected results that an actual one implies.
    """

    op: str
    samples: Callable[[torch.dtype], Iterator[Sample]]
    outputs: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES
    state_of_output: Callable[[Sample, Tensor], list[Tensor]] | None = None
    adjusted: Callable[[Sample, list[Tensor], list[Tensor]], list[Tensor]] | None = None


# Leading shape and channels: empty, one, around the vector widths, a prime, one realistic.
SHAPES = (
    ((0,), 5),
    ((3,), 0),
    ((1,), 1),
    ((2, 3), 7),
    ((5,), 15),
    ((9,), 16),
    ((8,), 17),
    ((2, 2, 4), 33),
    ((65,), 64),
    ((2, 131), 127),
    ((300,), 97),
)


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(repr(key))))


def _normal(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * 1.5 + 0.3).to(dtype)


def _mask(lead: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.rand(lead, generator=g) < 0.6


def moments_state(channels: int, g: torch.Generator, fresh: bool) -> tuple[Tensor, ...]:
    if fresh:
        zeros = torch.zeros(channels, dtype=torch.float64)
        return torch.zeros((), dtype=torch.float64), zeros, zeros.clone()
    mean = torch.randn(channels, generator=g, dtype=torch.float64)
    return torch.tensor(7.0, dtype=torch.float64), mean, mean.square() + 1


def _inputs(
    dtype: torch.dtype, n: int, tag: str
) -> Iterator[tuple[str, list[Tensor], Tensor | None, torch.Generator]]:
    """``n`` same-shaped inputs over the shapes, masks and strides that every backend must take."""
    for lead, channels in SHAPES:
        g = _generator(tag, lead, channels)
        xs = [_normal((*lead, channels), dtype, g) for _ in range(n)]
        yield f"{lead}x{channels}", xs, None, g
        mask = _mask(lead, g)
        poisoned = [x.masked_fill(~mask.unsqueeze(-1), float("nan")) for x in xs]
        yield f"{lead}x{channels}-mask", poisoned, mask, g
    g = _generator(tag, "strided")
    wide = [_normal((4, 6, 90), dtype, g) for _ in range(n)]
    yield "row-stride", [w[..., 11:61] for w in wide], _mask((4, 6), g), g
    yield "transposed-leading", [w.transpose(0, 1)[::2] for w in wide], None, g
    yield "last-dim-strided", [w[..., ::3] for w in wide], None, g
    yield "expanded", [w[:, :1].expand(4, 6, 90) for w in wide], _mask((4, 6), g), g
    yield "all-masked", wide, torch.zeros(4, 6, dtype=torch.bool), g


def _channel_moments(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, (x,), mask, g) in enumerate(_inputs(dtype, 1, "channel")):
        yield Sample(name, (x, *moments_state(x.shape[-1], g, i % 2 == 0), mask))


def _gated_moments(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, (gate, up), mask, g) in enumerate(_inputs(dtype, 2, "gated")):
        state = moments_state(gate.shape[-1], g, i % 2 == 0)
        yield Sample(name, (gate, up, *state, mask), {"act": ACTIVATIONS[i % len(ACTIVATIONS)]})
    g = _generator("acts")
    ramp = torch.linspace(-30, 30, 601, dtype=torch.float64).to(dtype)
    for act in ACTIVATIONS:
        gate = torch.stack([ramp, ramp / 10])
        state = moments_state(601, g, True)
        yield Sample(f"ramp-{act}", (gate, torch.ones_like(gate), *state, None), {"act": act})


def _gated_moments_functional(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, (gate, up), mask, _) in enumerate(_inputs(dtype, 2, "functional")):
        yield Sample(name, (gate, up, mask), {"act": ACTIVATIONS[i % len(ACTIVATIONS)]})


def _gated_moments_backward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, xs, mask, _) in enumerate(_inputs(dtype, 3, "backward")):
        if mask is None:
            yield Sample(name, tuple(xs), {"act": ACTIVATIONS[i % len(ACTIVATIONS)]})
    ramp = torch.linspace(-30, 30, 601, dtype=torch.float64).to(dtype)
    for act in ACTIVATIONS:
        ones = torch.ones_like(ramp)
        yield Sample(f"ramp-{act}", (ones, ramp, ones), {"act": act})


def _taylor_moments(dtype: torch.dtype) -> Iterator[Sample]:
    for name, (x, grad), mask, g in _inputs(dtype, 2, "taylor"):
        _, signed, squared = moments_state(x.shape[-1], g, False)
        yield Sample(name, (x, grad, signed, squared, mask))


def _column_sq_norms(dtype: torch.dtype) -> Iterator[Sample]:
    for name, (x,), mask, _ in _inputs(dtype, 1, "norms"):
        if mask is None:
            yield Sample(name, (x.flatten(0, -2) if x.dim() > 2 else x,))


def _moments_of_gated(sample: Sample, output: Tensor) -> list[Tensor]:
    count, mean, m2 = (state.clone() for state in sample.args[2:5])
    reference_moments_(output, count, mean, m2, sample.args[5])
    return [count, mean, m2]


def _moments_of_functional(sample: Sample, output: Tensor) -> list[Tensor]:
    state = new_moments(output)
    reference_moments_(output, *state, sample.args[2])
    return [*state]


# Parameters of one call: shape, dim that runs over units, share of it that is selected (1: no
# index), and how the parameter lies in memory.
UPDATED = (
    ((5,), 0, 0.6, "dense"),
    ((33, 40), 0, 1.0, "dense"),
    ((33, 40), 0, 0.5, "dense"),
    ((40, 131), 1, 0.7, "dense"),
    ((17, 31), 0, 0.5, "slice"),
    ((31, 17), 1, 0.5, "transposed"),
    ((3, 1), 1, 1.0, "dense"),
    ((2, 1100), 0, 1.0, "dense"),
    ((67, 530), 1, 1.0, "slice"),
    ((0, 4), 0, 1.0, "dense"),
    ((6, 4, 3), 2, 0.5, "dense"),
    ((6, 4, 3), 0, 0.5, "dense"),
    ((), 0, 1.0, "dense"),
)


def _parameter(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, g: torch.Generator
) -> Tensor:
    if layout == "transposed":
        return _normal(shape[::-1], dtype, g).t()
    if layout == "slice":
        return _normal((shape[0], shape[1] + 7), dtype, g)[:, 3 : 3 + shape[1]]
    return _normal(shape, dtype, g)


def _selection(size: int, share: float, g: torch.Generator) -> Tensor | None:
    if share == 1:
        return None
    return torch.randperm(size, generator=g)[: max(1, int(share * size))].sort().values


def update_lists(
    dtype: torch.dtype, state: torch.dtype, g: torch.Generator, *, kahan: bool
) -> dict[str, list[Any]]:
    """The lists of one masked update: parameters, and everything compact with them."""
    lists: dict[str, list[Any]] = {
        name: []
        for name in ("params", "grads", "first", "second", "indices", "dims", "compensations")
    }
    lists |= {"signed": [], "squared": []}
    for shape, dim, share, layout in UPDATED:
        index = _selection(shape[dim], share, g) if shape else None
        compact = list(shape)
        if index is not None:
            compact[dim] = len(index)
        size = tuple(compact)
        units = compact[dim] if compact else 1
        parameter = _parameter(shape, layout, dtype, g)
        trained = parameter if index is None else parameter.index_select(dim, index)
        lists["params"].append(parameter)
        lists["grads"].append(_normal(size, dtype, g))
        lists["first"].append(_normal(size, state, g))
        lists["second"].append(_normal(size, torch.float64, g).square().to(state) + 0.01)
        lists["indices"].append(index)
        lists["dims"].append(dim)
        lists["compensations"].append((trained * 2**-10).contiguous() if kahan else None)
        lists["signed"].append(torch.randn(units, generator=g, dtype=torch.float64))
        lists["squared"].append(torch.rand(units, generator=g, dtype=torch.float64))
    return lists


def _update_samples(
    dtype: torch.dtype, tag: str
) -> Iterator[tuple[str, dict[str, list[Any]], tuple[Any, ...], int]]:
    """Name, lists, the arguments from grad_scale on, and a number that varies the options."""
    states = (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.bfloat16)
    for number in range(12):
        state = states[number % len(states)]
        kahan = dtype == torch.bfloat16 and number % 3 == 2
        g = _generator(tag, number)
        lists = update_lists(dtype, state, g, kahan=kahan)
        scale = torch.tensor(4.0) if number % 2 else None
        clip = torch.tensor(0.3, dtype=torch.float64) if number % 4 == 1 else None
        seed = torch.tensor(-(7**20) * number) if number % 3 else None
        sums = (lists["signed"], lists["squared"]) if number % 5 < 3 else (None, None)
        compensations = lists["compensations"] if kahan else None
        name = f"131-{number}-{str(state).removeprefix('torch.')}"
        yield name, lists, (scale, clip, seed, compensations, *sums), number


def _rate_and_step(number: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(0.01), torch.tensor(float(1 + number % 4 * 40), dtype=torch.float64)


def _masked_adamw(dtype: torch.dtype) -> Iterator[Sample]:
    for name, lists, rest, number in _update_samples(dtype, "adamw"):
        names = ("params", "grads", "first", "second", "indices", "dims")
        options = {"weight_decay": 0.1 * (number % 2), "maximize": number % 6 == 5, "beta2": 0.99}
        args = (*(lists[n] for n in names), *_rate_and_step(number), *rest)
        yield Sample(name, args, options)


def _masked_sgd(dtype: torch.dtype) -> Iterator[Sample]:
    for name, lists, rest, number in _update_samples(dtype, "sgd"):
        momentum = 0.9 * (number % 4 != 3)
        names = ("params", "grads", "first", "indices", "dims")
        options = {"momentum": momentum, "weight_decay": 0.1 * (number % 2)}
        options |= {"maximize": number % 6 == 5, "nesterov": number % 4 == 2, "dampening": 0.0}
        args = [lists[n] for n in names]
        args[2] = args[2] if momentum else None
        yield Sample(name, (*args, *_rate_and_step(number), *rest), options)


def _adjusted_compensation(
    sample: Sample, expected: list[Tensor], actual: list[Tensor]
) -> list[Tensor]:
    """What a parameter that was rounded to the other neighbour leaves to its compensation."""
    sgd = isinstance(sample.args[5], Tensor)
    case, n = CASES["masked_sgd_" if sgd else "masked_adamw_"], len(sample.args[0])
    indices, dims, compensations = (sample.args[i] for i in ((3, 4, 10) if sgd else (4, 5, 11)))
    if compensations is None:
        return expected
    first = n * sum(sample.args[i] is not None for i in case.outputs[: 2 if sgd else 3])
    for i in range(n):
        index, dim = indices[i], dims[i]
        pair = [
            p[i] if index is None else p[i].index_select(dim, index) for p in (expected, actual)
        ]
        moved = pair[0].double() - pair[1].double()
        expected[first + i] = (expected[first + i].double() + moved).to(expected[first + i].dtype)
    return expected


def _masked_grad_norm(dtype: torch.dtype) -> Iterator[Sample]:
    for number in range(12):
        lists = update_lists(dtype, torch.float32, _generator("norm", number), kahan=False)
        gradients = [p * 10.0 ** (number - 6) for p in lists["params"]]
        scale = torch.tensor(8.0) if number % 2 else None
        yield Sample(f"131-{number}", (gradients, lists["indices"], lists["dims"], scale))


CASES: dict[str, OpCase] = {
    case.op: case
    for case in (
        OpCase("channel_moments_", _channel_moments, outputs=(1, 2, 3)),
        OpCase(
            "gated_moments",
            _gated_moments,
            outputs=(2, 3, 4),
            state_of_output=_moments_of_gated,
        ),
        OpCase(
            "gated_moments_functional",
            _gated_moments_functional,
            state_of_output=_moments_of_functional,
        ),
        OpCase("gated_moments_backward", _gated_moments_backward),
        OpCase("taylor_moments_", _taylor_moments, outputs=(2, 3)),
        OpCase("column_sq_norms", _column_sq_norms),
        OpCase(
            "masked_adamw_",
            _masked_adamw,
            outputs=(0, 2, 3, 11, 12, 13),
            adjusted=_adjusted_compensation,
        ),
        OpCase(
            "masked_sgd_", _masked_sgd, outputs=(0, 2, 10, 11, 12), adjusted=_adjusted_compensation
        ),
        OpCase("masked_grad_norm", _masked_grad_norm),
    )
}


def results(case: OpCase, function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Everything that a call writes: what it returns, then the arguments that it mutates."""
    args = [copied(a) if i in case.outputs else a for i, a in enumerate(sample.args)]
    returned = function(*args, **sample.kwargs)
    return [*flat(returned), *(tensor for i in case.outputs for tensor in flat(args[i]))]


def check_backend(case: OpCase, function: Callable[..., Any], reference: Callable[..., Any]) -> int:
    """Compare ``function`` with ``reference`` on every sample and dtype; the number compared."""
    compared = 0
    for dtype in case.dtypes:
        for sample in case.samples(dtype):
            expected = results(case, reference, sample)
            actual = results(case, function, sample)
            if case.state_of_output is not None:
                expected[1:] = case.state_of_output(sample, actual[0])
            if case.adjusted is not None:
                expected = case.adjusted(sample, expected, actual)
            assert len(actual) == len(expected)
            for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                try:
                    compare(a, e, dtype)
                except AssertionError as error:
                    raise AssertionError(
                        f"{case.op} {sample.name} {dtype} result {i}: {error}"
                    ) from None
            compared += 1
    return compared
