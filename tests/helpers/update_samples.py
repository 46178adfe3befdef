"""Calls of the operators that take lists of parameters or of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from samples import Sample, generator, normal
from torch import Tensor

from ssah_kernels.bit_masks import block_offsets, pack_bits
from ssah_kernels.checks.matrices import as_matrix
from ssah_kernels.dynamic_map import dynamic_map, quantize, scales_shape

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


Shapes = tuple[tuple[tuple[int, ...], int, float, str], ...]

# More than the 128 rows and the columns of a block of the CUDA kernels, than the 256 units of a
# block that adds importance, than the 1024 columns of a stripe and the 1024 elements that are
# gathered at once on the CPU, and than the 65,536 elements of a block there.
FAR_UPDATED = (
    ((300, 40), 1, 0.7, "dense"),
    ((300, 264), 0, 0.6, "dense"),
    ((140, 1100), 1, 1.0, "dense"),
    ((3, 1300), 1, 0.9, "dense"),
    ((66_000,), 0, 1.0, "dense"),
    ((1, 2100), 0, 1.0, "slice"),
)


def _parameter(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, g: torch.Generator
) -> Tensor:
    if layout == "transposed":
        return normal(shape[::-1], dtype, g).t()
    if layout == "slice":
        return normal((shape[0], shape[1] + 7), dtype, g)[:, 3 : 3 + shape[1]]
    return normal(shape, dtype, g)


def all_sides_of_all_bounds(signed: bool) -> Tensor:
    """[rows, 256] of which each block has a 1: every bound of two values and its neighbours."""
    bounds = dynamic_map(signed=signed).bounds
    y = torch.cat(
        [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-1.0))]
    )
    y = y[(y >= 0) & (y <= 1)]
    y = torch.cat([y, -y]) if signed else y
    y = torch.cat([y, torch.zeros(-len(y) % 255)]).view(-1, 255)
    return torch.cat([torch.ones(len(y), 1), y], 1)


def compensation(trained: Tensor, g: torch.Generator) -> Tensor:
    """What 16 bits of ``trained`` [...] could not hold: of bfloat16 a half that a float32 has."""
    if trained.dtype == torch.bfloat16:
        half = torch.randint(-(1 << 15), 1 << 15, trained.shape, generator=g)
        # Less than nothing below 0 and more than nothing above infinity would be the bits of a NaN,
        # which no update leaves.
        half = torch.where(trained == 0, half & 0x7FFF, half)
        half = torch.where(trained.isinf(), -(half & 0x7FFF), half)
        return half.where(~trained.isnan(), 0).to(torch.int16).contiguous()
    return (trained * 2**-10).contiguous()


def whole_weight(p: Tensor, rest: Tensor) -> Tensor:
    """The weight of which ``p`` [...] and its compensation are the parts, in float64."""
    if rest.dtype != torch.int16:
        return p.double() + rest.double()
    # In 64 bits, where the sum of the two halves has no carry to make.
    word = (p.flatten().view(torch.int16).long() % 2**16 * 2**16 + rest.flatten()) % 2**32
    signed = torch.where(word < 2**31, word, word - 2**32).int()
    return signed.view(torch.float32).double().view(p.shape)


def _selection(size: int, share: float, g: torch.Generator) -> Tensor | None:
    if share == 1:
        return None
    return torch.randperm(size, generator=g)[: max(1, int(share * size))].sort().values


def update_lists(
    dtype: torch.dtype,
    state: torch.dtype,
    g: torch.Generator,
    *,
    compensated: bool,
    shapes: Shapes = UPDATED,
    whole_grads: bool = False,
    wide_grads: bool = False,
) -> dict[str, list[Any]]:
    """The lists of one masked update: parameters, and everything compact with them.

    Every second gradient is of its parameter's shape instead, and lies as that does, with
    ``whole_grads``; they are float32 with ``wide_grads``.
    """
    lists: dict[str, list[Any]] = {
        name: []
        for name in ("params", "grads", "first", "second", "indices", "dims", "compensations")
    }
    lists |= {"signed": [], "squared": [], "first_scales": [], "second_scales": []}
    of_grads = torch.float32 if wide_grads else dtype
    for i, (shape, dim, share, layout) in enumerate(shapes):
        index = _selection(shape[dim], share, g) if shape else None
        compact = list(shape)
        if index is not None:
            compact[dim] = len(index)
        size = tuple(compact)
        units = compact[dim] if compact else 1
        parameter = _parameter(shape, layout, dtype, g)
        trained = parameter if index is None else parameter.index_select(dim, index)
        lists["params"].append(parameter)
        whole = whole_grads and i % 2 == 0
        lists["grads"].append(
            _parameter(shape if whole else size, layout if whole else "dense", of_grads, g)
        )
        wide = torch.float32 if state == torch.uint8 else state
        first = normal(size, wide, g)
        second = normal(size, torch.float64, g).square().to(wide) + 0.01
        for name, x in (("first", first), ("second", second)):
            scales = None
            if state == torch.uint8:
                codes, scales = quantize(as_matrix(x * x, dim), signed=name == "first")
                x, scales = codes.view(size), scales.view(scales_shape(size, dim))
            lists[name].append(x)
            lists[f"{name}_scales"].append(scales)
        lists["indices"].append(index)
        lists["dims"].append(dim)
        lists["compensations"].append(compensation(trained, g) if compensated else None)
        lists["signed"].append(torch.randn(units, generator=g, dtype=torch.float64))
        lists["squared"].append(torch.rand(units, generator=g, dtype=torch.float64))
    return lists


EIGHT_BIT = (12, 13, 14, 16)  # with state in 8 bits; all options in four calls
NUMBERS = (*range(12), *EIGHT_BIT)
FAR_NUMBERS = (1, 2, 4)  # all options in three calls
WHOLE_GRADS = (2, 3, 5, 8, 13, 16)
WIDE_GRADS = (2, 4, 5, 13, 16)  # of parameters of 16 bits


def _update_samples(
    dtype: torch.dtype, tag: str, shapes: Shapes
) -> Iterator[tuple[str, dict[str, list[Any]], tuple[Any, ...], int]]:
    """Name, lists, the arguments from grad_scale to squared, and a number that varies options."""
    states = (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.bfloat16)
    for number in NUMBERS if shapes is UPDATED else (*FAR_NUMBERS, *EIGHT_BIT[:2]):
        state = torch.uint8 if number in EIGHT_BIT else states[number % len(states)]
        compensated = dtype == torch.bfloat16 and number % 3 == 2
        g = generator(tag, number)
        lists = update_lists(
            dtype,
            state,
            g,
            compensated=compensated,
            shapes=shapes,
            whole_grads=number in WHOLE_GRADS,
            wide_grads=number in WIDE_GRADS and dtype.itemsize == 2,
        )
        scale = torch.tensor(4.0) if number % 2 else None
        clip = torch.tensor(0.3, dtype=torch.float64) if number % 4 == 1 else None
        seed = torch.tensor(-(7**20) * number) if number % 3 else None
        sums = (lists["signed"], lists["squared"]) if number % 5 < 3 else (None, None)
        compensations = lists["compensations"] if compensated else None
        name = f"131-{number}-{str(state).removeprefix('torch.')}"
        yield name, lists, (scale, clip, seed, compensations, *sums), number


def _found_inf(number: int) -> Tensor | None:
    """None was; what a call does where one was is another test."""
    return torch.tensor(0.0) if number % 3 == 1 else None


def _rate_and_step(number: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(0.01), torch.tensor(float(1 + number % 4 * 40), dtype=torch.float64)


def masked_adamw(dtype: torch.dtype, shapes: Shapes = UPDATED) -> Iterator[Sample]:
    for name, lists, rest, number in _update_samples(dtype, "adamw", shapes):
        names = ("params", "grads", "first", "second", "indices", "dims")
        options = {"weight_decay": 0.1 * (number % 2), "maximize": number % 6 == 5, "beta2": 0.99}
        scales = [lists[f"{n}_scales"] if number in EIGHT_BIT else None for n in names[2:4]]
        args = (*(lists[n] for n in names), *_rate_and_step(number), *rest, *scales)
        args = (*args, _found_inf(number))
        yield Sample(name, args, options)


def masked_sgd(dtype: torch.dtype, shapes: Shapes = UPDATED) -> Iterator[Sample]:
    for name, lists, rest, number in _update_samples(dtype, "sgd", shapes):
        momentum = 0.9 * (number % 4 != 3)
        names = ("params", "grads", "first", "indices", "dims")
        options = {"momentum": momentum, "weight_decay": 0.1 * (number % 2)}
        options |= {"maximize": number % 6 == 5, "nesterov": number % 4 == 2}
        options |= {"dampening": 0.2 * (number % 4 == 1)}
        args = [lists[n] for n in names]
        args[2] = args[2] if momentum else None
        scales = lists["first_scales"] if momentum and number in EIGHT_BIT else None
        args = [*args, *_rate_and_step(number), *rest, scales, _found_inf(number)]
        yield Sample(name, tuple(args), options)


def bit_masked_adamw(dtype: torch.dtype, shapes: Shapes = UPDATED) -> Iterator[Sample]:
    """Shapes and shares are those of the other updates; what is contiguous alone is taken."""
    states = (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.bfloat16)
    for number in range(12) if shapes is UPDATED else FAR_NUMBERS:
        g, state = generator("bits", number), states[number % len(states)]
        lists: list[list[Tensor]] = [[] for _ in range(6)]
        for shape, _, share, _ in shapes:
            mask = torch.rand(shape, generator=g) < share * (number + 1) / 12
            bits, n = pack_bits(mask), int(mask.sum())
            first = normal((n,), state, g)
            second = normal((n,), torch.float64, g).square().to(state) + 0.01
            own = (normal(shape, dtype, g), normal(shape, dtype, g), first, second, bits)
            for each, tensor in zip(lists, (*own, block_offsets(bits)), strict=True):
                each.append(tensor)
        scale = torch.tensor(4.0) if number % 2 else None
        clip = torch.tensor(0.3, dtype=torch.float64) if number % 4 == 1 else None
        seed = torch.tensor(-(7**20) * number) if number % 3 else None
        options = {"weight_decay": 0.1 * (number % 2), "maximize": number % 6 == 5, "beta2": 0.99}
        args = (*lists, *_rate_and_step(number), scale, clip, seed)
        yield Sample(f"131-{number}-{str(state).removeprefix('torch.')}", args, options)


def masked_grad_norm(dtype: torch.dtype, shapes: Shapes = UPDATED) -> Iterator[Sample]:
    for number in range(12) if shapes is UPDATED else FAR_NUMBERS:
        g = generator("norm", number)
        lists = update_lists(dtype, torch.float32, g, compensated=False, shapes=shapes)
        gradients = [p * 10.0 ** (number - 6) for p in lists["params"]]
        scale = torch.tensor(8.0) if number % 2 else None
        yield Sample(f"131-{number}", (gradients, lists["indices"], lists["dims"], scale))
    if shapes is not UPDATED:  # more than the 256 partial sums that are added at once
        column = normal((257 * 128, 1), dtype, generator("norm"))
        yield Sample("many blocks", ([column], [None], [0], None))
