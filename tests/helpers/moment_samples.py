"""Calls of the operators that read activations or weights [..., channels]."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from samples import Sample, generator, normal
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

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


# More rows than any chunk, more channels than any tile; and so many rows that a warp of the CUDA
# kernels has more than one segment (32 rows) of a chunk: one wave is at most 528 blocks of 8 warps.
FAR_SHAPES = (((300,), 1100), ((1056 * 256 + 100,), 8))


def every_second(lead: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Every second byte of memory; the bytes between say the opposite."""
    mask = torch.rand(lead, generator=g) < 0.6
    return torch.stack([mask, ~mask], -1)[..., 0]


def moments_state(channels: int, g: torch.Generator, fresh: bool) -> tuple[Tensor, ...]:
    if fresh:
        zeros = torch.zeros(channels, dtype=torch.float64)
        return torch.zeros((), dtype=torch.float64), zeros, zeros.clone()
    mean = torch.randn(channels, generator=g, dtype=torch.float64)
    return torch.tensor(7.0, dtype=torch.float64), mean, mean.square() + 1


Inputs = Iterator[tuple[str, list[Tensor], Tensor | None, torch.Generator]]


def _of_shape(dtype: torch.dtype, n: int, tag: str, lead: tuple[int, ...], channels: int) -> Inputs:
    """``n`` inputs of one shape, without a mask and with one; masked rows are NaN."""
    g = generator(tag, lead, channels)
    xs = [normal((*lead, channels), dtype, g) for _ in range(n)]
    yield f"{lead}x{channels}", xs, None, g
    mask = every_second(lead, g)
    poisoned = [x.masked_fill(~mask.unsqueeze(-1), float("nan")) for x in xs]
    yield f"{lead}x{channels}-mask", poisoned, mask, g


def near(dtype: torch.dtype, n: int, tag: str) -> Inputs:
    """``n`` same-shaped inputs over the shapes, masks and strides that every backend must take."""
    for shape in SHAPES:
        yield from _of_shape(dtype, n, tag, *shape)
    g = generator(tag, "strided")
    wide = [normal((4, 6, 90), dtype, g) for _ in range(n)]
    yield "row-stride", [w[..., 11:61] for w in wide], every_second((4, 6), g), g
    yield "transposed-leading", [w.transpose(0, 1)[::2] for w in wide], None, g
    yield "last-dim-strided", [w[..., ::3] for w in wide], None, g
    yield "expanded", [w[:, :1].expand(4, 6, 90) for w in wide], every_second((4, 6), g), g
    yield "all-masked", wide, torch.zeros(4, 6, dtype=torch.bool), g


def far(dtype: torch.dtype, n: int, tag: str) -> Inputs:
    """``n`` inputs that leave the first tile, the first segment and the first chunk."""
    for shape in FAR_SHAPES:
        yield from _of_shape(dtype, n, tag, *shape)


Shapes = Callable[[torch.dtype, int, str], Inputs]


def channel_moments(dtype: torch.dtype, shapes: Shapes = near) -> Iterator[Sample]:
    for i, (name, (x,), mask, g) in enumerate(shapes(dtype, 1, "channel")):
        yield Sample(name, (x, *moments_state(x.shape[-1], g, i % 2 == 0), mask))


def gated_moments(dtype: torch.dtype, shapes: Shapes = near) -> Iterator[Sample]:
    for i, (name, (gate, up), mask, g) in enumerate(shapes(dtype, 2, "gated")):
        state = moments_state(gate.shape[-1], g, i % 2 == 0)
        yield Sample(name, (gate, up, *state, mask), {"act": ACTIVATIONS[i % len(ACTIVATIONS)]})
    g, ramp = generator("acts"), torch.linspace(-30, 30, 601, dtype=torch.float64).to(dtype)
    for act in ACTIVATIONS if shapes is near else ():
        gate = torch.stack([ramp, ramp / 10])
        state = moments_state(601, g, True)
        yield Sample(f"ramp-{act}", (gate, torch.ones_like(gate), *state, None), {"act": act})


def gated_moments_backward(dtype: torch.dtype, shapes: Shapes = near) -> Iterator[Sample]:
    for i, (name, xs, mask, _) in enumerate(shapes(dtype, 3, "backward")):
        if mask is None:
            yield Sample(name, tuple(xs), {"act": ACTIVATIONS[i % len(ACTIVATIONS)]})
    ramp = torch.linspace(-30, 30, 601, dtype=torch.float64).to(dtype)
    for act in ACTIVATIONS if shapes is near else ():
        ones = torch.ones_like(ramp)
        yield Sample(f"ramp-{act}", (ones, ramp, ones), {"act": act})


def arms(gate: Tensor, wide: bool, prefix: bool, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors of three arms, some of them 0, and arms of ``gate`` [..., C] or of its first rows."""
    own = gate.dtype if not wide else torch.promote_types(gate.dtype, torch.float32)
    factors = normal((3, 2 * gate.shape[-1]), own, g)[:, ::2]
    lead = gate.shape[: 1 if prefix else -1]
    arm = torch.randint(3, (*lead, 2), generator=g)[..., 0]
    return factors.masked_fill(torch.rand(factors.shape, generator=g) < 0.2, 0), arm


def gated_product(dtype: torch.dtype, shapes: Shapes = near) -> Iterator[Sample]:
    for i, (name, (gate, up), _, g) in enumerate(shapes(dtype, 2, "product")):
        if not name.endswith("-mask"):  # of which rows are NaN
            args = arms(gate, wide=i % 4 < 2, prefix=i % 3 == 0, g=g)
            act = ACTIVATIONS[i // 2 % len(ACTIVATIONS)]
            yield Sample(name, (gate, up, *args), {"act": act})
    ramp = torch.linspace(-30, 30, 601, dtype=torch.float64).to(dtype)
    factors = torch.stack([torch.full_like(ramp, 0.3), torch.ones_like(ramp)])
    for act in ACTIVATIONS if shapes is near else ():
        gate = torch.stack([ramp, ramp / 10, ramp])
        args = (gate, torch.ones_like(gate), factors, torch.tensor([1, 0, 0]))
        yield Sample(f"ramp-{act}", args, {"act": act})


def taylor_moments(dtype: torch.dtype, shapes: Shapes = near) -> Iterator[Sample]:
    for name, (x, grad), mask, g in shapes(dtype, 2, "taylor"):
        _, signed, squared = moments_state(x.shape[-1], g, False)
        yield Sample(name, (x, grad, signed, squared, mask))


def column_sq_norms(dtype: torch.dtype, shapes: Shapes = near) -> Iterator[Sample]:
    for name, (x,), mask, _ in shapes(dtype, 1, "norms"):
        if mask is None:
            yield Sample(name, (x.flatten(0, -2) if x.dim() > 2 else x,))
