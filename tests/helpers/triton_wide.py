"""Calls of Triton's operators that leave the first tile, and updates whose every bit is specified.

Two slices of 72 rows and 270 channels, in bfloat16 and with three programs wanted: two launches, of
two chunks by two blocks of 256 channels, the last of each cut short, with several tiles a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import CASES, check_sample
from moment_samples import Inputs, every_second
from samples import copied, generator, normal
from torch import Tensor

from ssah_kernels import backends
from ssah_kernels.backends.triton import launch
from ssah_kernels.bit_masks import block_offsets, pack_bits

BF16 = torch.bfloat16
EXACT = ("masked_adamw_", "masked_sgd_", "bit_masked_adamw_")  # whose bits are compared


def sliced(dtype: torch.dtype, n: int, tag: str) -> Inputs:
    """``n`` inputs whose leading dimensions do not merge, without a mask and with one."""
    g = generator(tag, "sliced")
    xs = [normal((2, 73, 290), dtype, g)[:, 1:, 5:275] for _ in range(n)]
    yield "sliced", xs, None, g
    mask = every_second((2, 73), g)[:, 1:]  # of which neighbours are two bytes apart
    for x in xs:
        x[~mask] = float("nan")
    yield "sliced-mask", xs, mask, g


def check_wide(op: str) -> int:
    """Compare with the reference what an operator of activations makes of ``sliced``."""
    compared, programs = 0, launch.PROGRAMS
    launch.PROGRAMS = 3
    case, kernel = CASES[op], getattr(torch.ops.ssah, op)
    for sample in case.samples(BF16, shapes=sliced):  # type: ignore[call-arg]
        check_sample(case, kernel, backends.kernel("reference", op), sample)
        compared += 1
    launch.PROGRAMS = programs
    return compared


def sixteenths(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Numbers from -2 to 2 that every operation below takes without an error in float32."""
    return (torch.randint(-32, 33, shape, generator=g) / 16).to(BF16)


def targets(g: torch.Generator) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
    """Matrices of several tiles: all, some rows, gathered columns, packed columns of a slice, and
    columns that allow no vectors."""
    rows, columns = torch.arange(1, 73, 2), torch.arange(0, 1028, 2)
    params = [
        sixteenths((36, 264), g),
        sixteenths((73, 264), g),
        sixteenths((33, 1030), g),
        sixteenths((36, 640), g)[:, 8:272],
        sixteenths((34, 35), g),
    ]
    return params, [None, rows, columns, None, None], [0, 0, 1, 1, 1]


def compact(tensors: list[Tensor], indices: list[Tensor | None], dims: list[int]) -> list[Tensor]:
    """What trains of ``tensors``."""
    listed = zip(tensors, indices, dims, strict=True)
    return [x if index is None else x.index_select(dim, index) for x, index, dim in listed]


def exact_call(op: str, g: torch.Generator) -> tuple[list[Any], dict[str, float], list[int]]:
    """A call of an update in exact arithmetic, and which lists have every bit specified.

    Of SGD these are parameters and buffers; of AdamW, whose step has a root and a quotient, the
    states: betas, the root of 1 - beta2, the rate and the scale are powers of two.
    """
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (2**-6, 3, 4, 0.5)]
    scalars.append(torch.tensor(7**20))
    adamw = {"beta1": 0.5, "beta2": 0.75}
    if op == "bit_masked_adamw_":  # 20 blocks, of which a program takes eight
        masks = [torch.rand(20_000, generator=g) < 0.4]
        like = [torch.empty(int(masks[0].sum()))]
        bits = [pack_bits(mask) for mask in masks]
        where: list[Any] = [bits, [block_offsets(each) for each in bits]]
        params = [sixteenths((20_000,), g)]
        grads = [sixteenths((20_000,), g)]
    else:
        params, *where = targets(g)
        like = compact(params, *where)
        grads = [sixteenths(x.shape, g) for x in like]
    first, second = ([sixteenths(x.shape, g) for x in like] for _ in range(2))
    if op == "masked_sgd_":
        options = {"momentum": 0.5, "dampening": 0.25}
        return [params, grads, first, *where, *scalars], options, [0, 2]
    return [params, grads, first, [x.abs() for x in second], *where, *scalars], adamw, [2, 3]


def check_every_bit(op: str) -> int:
    """Stochastic rounding has the reference's bits, all of them, where the arithmetic is exact."""
    args, options, written = exact_call(op, generator("every bit", op))
    results = []
    for backend in ("triton", "reference"):
        mine = [copied(a) for a in args]
        with backends.use(backend):
            getattr(torch.ops.ssah, op)(*mine, **options)
        results.append([x for i in written for x in mine[i]])
    before = [x for i in written for x in args[i]]
    for old, actual, expected in zip(before, *results, strict=True):
        assert torch.equal(actual.view(torch.int16), expected.view(torch.int16)), op
        assert not torch.equal(actual, old)
    return len(before)
