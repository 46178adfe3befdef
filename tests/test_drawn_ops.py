"""The CPU kernels against the reference on drawn calls: shapes, strides, offsets, masks, types."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import ACTIVATIONS, CASES, DTYPES, check_sample
from cpu_compare import on
from samples import Sample, normal
from torch import Tensor

DRAWS = 40  # a seed


class Draw:
    """Everything of one call, from one generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.g = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)

    def size(self, most: int = 70) -> int:
        """0 and 1 as often as sizes around the widths of registers, and larger ones."""
        return self.random.choice([0, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, most])

    def values(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Contiguous, with offset and gaps, with dimensions in another order, or expanded."""
        dtype = dtype or self.dtype
        layout = self.random.choice(["contiguous", "gaps", "order", "expanded"])
        if layout == "gaps":
            steps = [self.random.choice([1, 1, 2, 3]) for _ in shape]
            first = [self.random.randrange(4) for _ in shape]
            size = [f + max(n, 1) * s for n, f, s in zip(shape, first, steps, strict=True)]
            cut = (
                slice(f, f + n * s, s) if n else slice(0, 0)
                for n, f, s in zip(shape, first, steps, strict=True)
            )
            return normal(tuple(size), dtype, self.g)[tuple(cut)]
        if layout == "order":
            order = [*range(len(shape))]
            self.random.shuffle(order)
            x = normal(tuple(shape[d] for d in order), dtype, self.g)
            return x.permute([order.index(d) for d in range(len(shape))])
        if layout == "expanded" and len(shape) > 1:
            return normal((1, *shape[1:]), dtype, self.g).expand(shape)
        return normal(shape, dtype, self.g)

    def moments(self) -> tuple[tuple[int, ...], tuple[Tensor, ...], Tensor | None]:
        """A shape [..., channels], a state of it and a mask of its rows."""
        lead = tuple(self.size(300 if d == 0 else 3) for d in range(self.random.randrange(4)))
        channels = self.size(1100)
        state = [normal((channels,), torch.float64, self.g) for _ in range(2)]
        count = torch.tensor(float(self.random.choice([0, 7])), dtype=torch.float64)
        state = [s * (count > 0) for s in state]
        mask = None
        if self.random.random() < 0.6:
            mask = self.values(lead, torch.float64) > self.random.choice([-9, 0, 9])
        return (*lead, channels), (count, state[0], state[1].abs()), mask

    def lists(self) -> dict[str, list[Any]]:
        """Parameters in every layout, and what is compact with them."""
        names = ("params", "grads", "first", "second", "indices", "dims", "kahan", "signed")
        lists: dict[str, list[Any]] = {name: [] for name in (*names, "squared")}
        state = torch.float64 if self.dtype == torch.float64 else torch.float32
        if state == torch.float32 and self.random.random() < 0.5:
            state = torch.bfloat16
        for _ in range(self.random.randrange(1, 4)):
            shape = (self.size(), self.size(1100))
            dim = self.random.randrange(2)
            param = self.values(shape)
            if any(s == 0 and n > 1 for s, n in zip(param.stride(), shape, strict=True)):
                param = param.clone()  # an element must lie in one place
            index, compact = None, [*shape]
            if self.random.random() < 0.6:
                chosen = torch.rand(shape[dim], generator=self.g) < self.random.random()
                index = chosen.nonzero().flatten()
                compact[dim] = len(index)
            trained = param if index is None else param.index_select(dim, index)
            lists["params"].append(param)
            lists["grads"].append(normal(tuple(compact), self.dtype, self.g))
            lists["first"].append(normal(tuple(compact), state, self.g))
            lists["second"].append(normal(tuple(compact), torch.float64, self.g).square().to(state))
            lists["indices"].append(index)
            lists["dims"].append(dim)
            lists["kahan"].append((trained * 2**-10).contiguous())
            lists["signed"].append(normal((compact[dim],), torch.float64, self.g))
            lists["squared"].append(normal((compact[dim],), torch.float64, self.g).abs())
        return lists

    def scalar(self, *values: float | None) -> Tensor | None:
        value = self.random.choice(values)
        return None if value is None else torch.tensor(value, dtype=torch.float64)

    def update(self, op: str) -> Sample:
        lists = self.lists()
        narrow = self.dtype in (torch.bfloat16, torch.float16)
        compensations = lists["kahan"] if narrow and self.random.random() < 0.3 else None
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
        return Sample("drawn", (*args, *scalars, compensations, *sums), options)

    def call(self, op: str) -> Sample:
        if op in ("masked_adamw_", "masked_sgd_"):
            return self.update(op)
        if op == "masked_grad_norm":
            lists = self.lists()
            args = (lists["params"], lists["indices"], lists["dims"], self.scalar(None, 8))
            return Sample("drawn", args)
        if op == "column_sq_norms":
            return Sample("drawn", (self.values((self.size(300), self.size(1100))),))
        shape, state, mask = self.moments()
        act = {"act": self.random.choice(ACTIVATIONS)}
        if op == "channel_moments_":
            return Sample("drawn", (self.values(shape), *state, mask))
        if op == "taylor_moments_":
            return Sample("drawn", (self.values(shape), self.values(shape), *state[1:], mask))
        if op == "gated_moments":
            return Sample("drawn", (self.values(shape), self.values(shape), *state, mask), act)
        return Sample("drawn", tuple(self.values(shape) for _ in range(3)), act)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(1, 5))]
)
@pytest.mark.parametrize("op", CASES)
def test_drawn_calls(op: str, seed: int) -> None:
    for number in range(DRAWS):
        sample = Draw(seed * DRAWS + number).call(op)
        try:
            check_sample(CASES[op], on("cpu", op), on("reference", op), sample)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise AssertionError(f"seed {seed}, draw {number}: {error}") from error
