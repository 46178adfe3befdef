"""Calls at the ends of what the types hold: huge, tiny, infinite and not-a-number values.

One call has values of one size, so that a comparison relative to the largest means something.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from moment_samples import ACTIVATIONS, moments_state
from samples import Sample, generator, normal
from torch import Tensor

from ssah_kernels.bit_masks import block_offsets, pack_bits

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Of values whose squares float32 does not hold, or hardly; float16 has neither.
SIZES = (1e25, 1e-20, 1e-25, 1.0)
# Of values whose squares it holds, which is what is promised where sums are of float32 (on GPUs).
SIZES_OF_FLOAT32 = (1e17, 1e-17, 1.0)
# At which an activation is constant, linear, or between; of GELU also far in its tail.
GATES = (-1e38, -1e30, -1e20, -200.0, -3.0, 200.0, 1e20, 1e38, float("inf"), -float("inf"))
NAN = float("nan")


def sized(shape: tuple[int, ...], dtype: torch.dtype, size: float, g: torch.Generator) -> Tensor:
    return (normal(shape, F64, g) * size).to(dtype)


def _held(dtype: torch.dtype, sizes: tuple[float, ...]) -> tuple[float, ...]:
    return (1.0,) if dtype == F16 else sizes


def channel_moments(dtype: torch.dtype, sizes: tuple[float, ...] = SIZES) -> Iterator[Sample]:
    """Rows of more than a chunk, of which one channel is 0 and one constant; and a single row."""
    for size in _held(dtype, sizes):
        for rows in (1, 300):
            g = generator("range", rows)
            x = sized((rows, 21), dtype, size, g)
            x[:, 3], x[:, 5] = 0, size
            yield Sample(f"{size} x {rows}", (x, *moments_state(21, g, fresh=True), None))


def taylor_moments(dtype: torch.dtype, sizes: tuple[float, ...] = SIZES) -> Iterator[Sample]:
    for size in _held(dtype, sizes):
        # Products are of float32 everywhere: not 1e-50 itself, and on GPUs its square neither.
        for other in {1.0, max(size, 1e-10)} if sizes is SIZES else {1.0}:
            g = generator("range", size)
            x, grad = sized((300, 21), dtype, size, g), sized((300, 21), dtype, other, g)
            x[:, 3] = 0
            sums = torch.zeros(2, 21, dtype=F64)
            yield Sample(f"{size} {other}", (x, grad, *sums, None))


def column_sq_norms(dtype: torch.dtype, sizes: tuple[float, ...] = SIZES) -> Iterator[Sample]:
    for size in _held(dtype, sizes):
        weight = sized((300, 21), dtype, size, generator("range", size))
        weight[:, 3] = 0
        yield Sample(f"{size}", (weight,))


def masked_grad_norm(dtype: torch.dtype) -> Iterator[Sample]:
    for size in _held(dtype, SIZES):
        grads = [sized((40, 33), dtype, size, generator("range", size)) for _ in range(2)]
        yield Sample(f"{size}", (grads, [None, torch.tensor([1, 7])], [0, 1], None))


def _gates(act: str) -> tuple[float, ...]:
    return (*GATES, NAN, -5.0) if act == "gelu" else (*GATES, NAN)


def gated_moments(dtype: torch.dtype, sizes: tuple[float, ...] = SIZES) -> Iterator[Sample]:
    """Nothing counts, since a mean of infinities has no one value; and products of every size."""
    for act in ACTIVATIONS:
        for value in _gates(act):
            gate = torch.full((2, 17), value).to(dtype)
            up, mask = torch.full_like(gate, 0.5), torch.zeros(2, dtype=torch.bool)
            state = moments_state(17, generator("range"), fresh=True)
            yield Sample(f"{act} {value}", (gate, up, *state, mask), {"act": act})
    for size in _held(dtype, sizes):
        g = generator("range", size)
        up = sized((300, 21), dtype, size, g)
        state = moments_state(21, g, fresh=True)
        yield Sample(f"up {size}", (normal((300, 21), dtype, g), up, *state, None), {"act": "silu"})


def gated_moments_backward(dtype: torch.dtype) -> Iterator[Sample]:
    for act in ACTIVATIONS:
        for value in _gates(act):
            gate = torch.full((2, 17), value).to(dtype)
            half = torch.full_like(gate, 0.5)
            yield Sample(f"{act} {value}", (half, gate, half), {"act": act})


def gated_product(dtype: torch.dtype) -> Iterator[Sample]:
    """At the ends; a factor of 0 for what is not finite; and products of every size."""
    for act in ACTIVATIONS:
        for value in _gates(act):
            gate = torch.full((2, 17), value).to(dtype)
            factors = torch.full((2, 17), -0.5)
            factors[1] = 2.0 if gate.isfinite().all() else 0.0
            args = (gate, torch.full_like(gate, 0.5), factors, torch.tensor([1, 0]))
            yield Sample(f"{act} {value}", args, {"act": act})
    for size in _held(dtype, SIZES):
        g = generator("range", size)
        gate, up = normal((300, 21), dtype, g), sized((300, 21), dtype, size, g)
        args = (gate, up, torch.tensor([[0.0], [0.3]]).repeat(1, 21), torch.arange(300) % 2)
        yield Sample(f"up {size}", args, {"act": "silu"})


def _update(
    dtype: torch.dtype, state: torch.dtype, size: float, special: float | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients and two states; some parameters are ``special``."""
    g = generator("range", size)
    params = normal((5, 70), dtype, g)
    if special is not None:
        params[1::2, 1::2] = special
        params[2::2, 1::2] = -special
    grads = sized((5, 70), dtype, size, g)
    return [params], [grads], *([sized((5, 70), state, 0.0, g)] for _ in "mv")


def _states(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (F64,) if dtype == F64 else (F32, BF16)


# As a tensor of float32, so that its payload has the bits of an NVIDIA GPU's own NaN.
PAYLOAD = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)


def _updates(
    dtype: torch.dtype, state: torch.dtype
) -> Iterator[tuple[str, tuple[list[Tensor], ...], tuple[Tensor | None, ...]]]:
    """Name, lists, and lr, step, grad_scale, clip_coef, seed."""
    rate, step = torch.tensor(0.01, dtype=F64), torch.tensor(1.0, dtype=F64)
    seed = torch.tensor(77)
    exploded, clip = (1e3, 1.25e-4) if dtype == F16 else (1e21, 1.25e-22)
    for noise in (None, seed):
        lists = _update(dtype, state, exploded, None)
        yield "exploded", lists, (rate, step, None, torch.tensor(clip, dtype=F64), noise)
        yield "scaled", lists, (rate, step, torch.tensor(1 / clip, dtype=F64), None, noise)
        lists = _update(dtype, state, 1.0, float("inf"))
        yield "infinite", lists, (rate, step, None, None, noise)
        lists = _update(dtype, state, 1.0, None)
        yield "clipped by NaN", lists, (rate, step, None, PAYLOAD, noise)
        yield "scaled by NaN", lists, (rate, step, PAYLOAD, None, noise)
        yield "rate of NaN", lists, (PAYLOAD, step, None, None, noise)


def masked_adamw(dtype: torch.dtype) -> Iterator[Sample]:
    for state in _states(dtype):
        for name, (p, g, m, v), scalars in _updates(dtype, state):
            for decay in (0.0, 0.1):
                args = (p, g, m, v, [None], [0], *scalars, None, None, None)
                yield Sample(f"{name} {decay} {state}", args, {"weight_decay": decay})
        p, g, m, v = _update(dtype, state, 1e-6, None)
        m[0].fill_(300)  # of which nothing stays
        step = torch.tensor(3.0)
        args = (p, g, m, v, [None], [0], torch.tensor(0.01), step, *[None] * 6)
        yield Sample(f"beta1 of 0 {state}", args, {"beta1": 0.0})


def bit_masked_adamw(dtype: torch.dtype) -> Iterator[Sample]:
    """The calls of the other update, on every second element."""
    for sample in masked_adamw(dtype):
        (p,), (g,), (m,), (v,), _, _, *scalars = sample.args[:11]
        mask = (torch.arange(p.numel()) % 2 == 0).view(p.shape)
        bits = pack_bits(mask)
        args = ([p], [g], [m[mask]], [v[mask]], [bits], [block_offsets(bits)], *scalars)
        yield Sample(sample.name, args, sample.kwargs)


def masked_sgd(dtype: torch.dtype) -> Iterator[Sample]:
    for state in _states(dtype):
        for name, (p, g, m, _), scalars in _updates(dtype, state):
            for momentum in (0.0, 0.9):
                buffers = [b.clone() for b in m] if momentum else None
                args = (p, g, buffers, [None], [0], *scalars, None, None, None)
                yield Sample(f"{name} {momentum} {state}", args, {"momentum": momentum})
