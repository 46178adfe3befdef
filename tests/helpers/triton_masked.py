"""Compare Triton's masked updates with the reference: samples for the interpreter and for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from cases import check_bits, compare
from samples import copied
from torch import Tensor
from update_samples import compensation, whole_weight

from ssah_kernels import backends
from ssah_kernels.checks.matrices import as_matrix
from ssah_kernels.dynamic_map import quantize, scales_shape

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
U8 = torch.uint8  # codes
TYPES = ((F64, F64), (F32, F32), (BF16, F32), (BF16, BF16), (F16, BF16), (F32, BF16), (BF16, U8))
RULES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("masked_adamw_", 2, {"weight_decay": 0.1}),
    ("masked_adamw_", 2, {"beta1": 0.0, "eps": 1e-3, "maximize": True}),
    ("masked_sgd_", 1, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    ("masked_sgd_", 1, {"momentum": 0.8, "nesterov": True, "maximize": True}),
    ("masked_sgd_", 0, {"weight_decay": 0.1}),
)


def flat(x: Tensor) -> Tensor:
    """All of the memory that ``x`` is a view of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


@dataclass(frozen=True)
class MaskedSample:
    """One call of a masked update; lists have one entry per tensor."""

    name: str
    op: str
    options: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    indices: list[Tensor | None]
    dims: list[int]
    scalars: list[Tensor | None]  # lr, step, grad_scale, clip_coef, seed
    compensations: list[Tensor] | None
    signed: list[Tensor] | None
    squared: list[Tensor] | None
    scales: list[list[Tensor]]  # of states in 8 bits
    found_inf: Tensor | None

    def run(self, backend: str, device: str) -> MaskedSample:
        """The sample with everything updated by ``backend``, back on the CPU."""
        mine = self.moved(device)
        states = (
            mine.states if self.op == "masked_adamw_" else [mine.states[0] if mine.states else None]
        )
        rest = (*mine.scalars, mine.compensations, mine.signed, mine.squared)
        scales = mine.scales or [None] * len(states)
        rest = (*rest, *scales, mine.found_inf)
        with backends.use(backend):
            getattr(torch.ops.ssah, self.op)(
                mine.params, mine.grads, *states, mine.indices, mine.dims, *rest, **self.options
            )
        return mine.moved("cpu")

    def moved(self, device: str) -> MaskedSample:
        lists = ("params", "grads", "states", "indices", "scalars")
        lists = (*lists, "compensations", "signed", "squared", "scales", "found_inf")
        return replace(self, **{name: copied(getattr(self, name), device) for name in lists})


def tensors(dtype: torch.dtype, g: torch.Generator) -> tuple[list[Tensor], list, list[int]]:
    """Rows, gathered columns, packed columns, a bias, a transposed view, nothing, odd columns, and
    more rows than a tile of column units has."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    few = torch.tensor([0, 3, 4, 8, 31])
    columns = torch.cat([torch.arange(400, 411), torch.tensor([519])])
    listed: tuple[tuple[Tensor, Tensor | None, int], ...] = (
        (randn(40, 264), few, 0),
        (randn(5, 520), columns, 1),
        (randn(37, 304)[:, 8:200], None, 1),
        (randn(77), torch.tensor([1, 70]), 0),
        (randn(20, 6).t(), None, 0),
        (randn(5, 40), few[:0], 0),
        (randn(35, 7), None, 1),
        (randn(33, 2, 4), few, 0),
        (randn(140, 40), None, 1),
    )
    return [t[0] for t in listed], [t[1] for t in listed], [t[2] for t in listed]


def samples(*, exhaustive: bool = False) -> Iterator[MaskedSample]:
    """Every rule with two pairs of types, or with every pair; the other choices vary with them."""
    for i, ((op, buffers, options), (dtype, state)) in enumerate(product(RULES, TYPES)):
        if not exhaustive and (i // len(TYPES) + i) % 3:
            continue
        g = torch.Generator().manual_seed(i)
        compensated = i // len(TYPES) % 2 == 0 and dtype in (BF16, F16)
        units, noisy, step = i % 2 == 0, i % 3 != 1, 1 + i % 4
        params, indices, dims = tensors(dtype, g)
        compact = [
            p if index is None else p.index_select(dim, index)
            for p, index, dim in zip(params, indices, dims, strict=True)
        ]
        like = [torch.randn(c.shape, generator=g) for c in compact]
        states, scales = [], []
        for which in range(buffers):
            values = [(x * 0.1).square() for x in like]
            if state == U8:
                coded = [
                    quantize(as_matrix(x, dim), signed=which == 0)
                    for x, dim in zip(values, dims, strict=True)
                ]
                values = [codes.view(x.shape) for (codes, _), x in zip(coded, like, strict=True)]
                shapes = [scales_shape(x.shape, dim) for x, dim in zip(like, dims, strict=True)]
                scales.append([s.view(at) for (_, s), at in zip(coded, shapes, strict=True)])
            states.append([x.to(state) for x in values])
        if buffers == 1 and step == 1:
            unused = scales[0][0] if scales else states[0][0]
            unused.fill_(float("nan"))  # not used at the first step
        sums = [torch.ones(c.shape[d], dtype=F64) for c, d in zip(compact, dims, strict=True)]
        of_grads = F32 if i % 5 < 2 and dtype in (BF16, F16) else dtype
        whole = [torch.randn(p.shape, generator=g) for p in params]  # read at the index
        # Of the last one transposed: no neighbours lie side by side.
        whole[4:] = [w.mT.contiguous().mT if w.dim() == 2 else w for w in whole[4:]]
        grads = [w if i % 3 == 2 else x.flip(0) for w, x in zip(whole, like, strict=True)]
        scalars = [torch.tensor(0.01), torch.tensor(float(step))]
        yield MaskedSample(
            f"{op} {options} {dtype} {state} {compensated=} {units=} noise={noisy} step={step}",
            op,
            options,
            params,
            [x.to(of_grads) for x in grads],
            states,
            indices,
            dims,
            [
                *scalars,
                torch.tensor(8.0) if units else None,
                torch.tensor(0.3) if i % 4 < 2 else None,
                torch.tensor(2**40 + 12345 + i) if noisy else None,
            ],
            [compensation(c, g) for c in compact] if compensated else None,
            sums if units else None,
            [s.clone() for s in sums] if units else None,
            scales,
            torch.tensor(0.0) if i % 4 == 3 else None,
        )


def bits_in(value: Any) -> list[Tensor]:
    """The bytes of all memory that the tensors in nested lists are views of."""
    if isinstance(value, list):
        return [bits for each in value for bits in bits_in(each)]
    return [] if value is None else [flat(value).view(torch.uint8)]


def check_skipped(sample: MaskedSample, device: str = "cpu") -> None:
    """Assert that nothing is written where an infinite gradient was found."""
    overflowed = [torch.full_like(g, torch.inf) for g in sample.grads]
    sample = replace(sample, grads=overflowed, found_inf=torch.tensor(1.0))
    mine = sample.run("triton", device)
    for name in ("params", "states", "compensations", "signed", "squared", "scales"):
        before, after = (bits_in(getattr(each, name)) for each in (sample, mine))
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b), name


def check_update(sample: MaskedSample, device: str = "cpu") -> None:
    """Compare every tensor that the update writes; what is not trained has the same bits, and so
    has what is rounded with noise, but for one value in a thousand."""
    noisy = sample.scalars[4] is not None
    mine, expected = sample.run("triton", device), sample.run("reference", "cpu")
    dtype = sample.params[0].dtype
    for i, (index, dim) in enumerate(zip(sample.indices, sample.dims, strict=True)):
        actual, wanted = mine.params[i], expected.params[i]
        trained = torch.zeros(flat(actual).numel(), dtype=torch.bool)
        inside = trained.as_strided(actual.shape, actual.stride(), actual.storage_offset())
        inside.fill_(True) if index is None else inside.index_fill_(dim, index, True)
        assert torch.equal(flat(actual)[~trained], flat(sample.params[i])[~trained])
        if mine.compensations is not None and expected.compensations is not None:
            if index is not None:
                actual, wanted = actual.index_select(dim, index), wanted.index_select(dim, index)
            pair = [
                whole_weight(p, c)
                for p, c in ((actual, mine.compensations[i]), (wanted, expected.compensations[i]))
            ]
            bits = {BF16: 3e-7, F16: 1e-6}[dtype]
            torch.testing.assert_close(*pair, rtol=bits, atol=bits)
        else:
            compare(actual, wanted, dtype)
            if noisy:
                check_bits(actual, wanted)
        for kind, state in enumerate(mine.states):
            compare(state[i], expected.states[kind][i], dtype)
            if noisy:
                check_bits(state[i], expected.states[kind][i])
        for kind, scale in enumerate(mine.scales):
            compare(scale[i], expected.scales[kind][i], dtype)
        for name in ("signed", "squared"):
            if getattr(mine, name) is not None:
                compare(getattr(mine, name)[i], getattr(expected, name)[i], dtype)


def check_norms(device: str = "cpu") -> int:
    """``masked_grad_norm`` of dense and compact gradients in every type."""
    checked = 0
    for dtype, scale in product((F64, F32, BF16, F16), (None, torch.tensor(4.0))):
        grads, indices, dims = tensors(dtype, torch.Generator().manual_seed(3))
        norms = []
        for backend, at in (("triton", device), ("reference", "cpu")):
            with backends.use(backend):
                args = [g.to(at) for g in grads], [None if i is None else i.to(at) for i in indices]
                norm = torch.ops.ssah.masked_grad_norm(*args, dims, scale)
                norms.append(norm.cpu())
        compare(*norms, dtype)
        checked += 1
    return checked
