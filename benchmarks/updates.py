"""The AdamW steps that ``bench_update.py`` compares: parameters, gradients, state, and a call each.

A Llama layer of width 1,024 has gate, up and down [2816, 1024] and V and O [1024, 1024]. Of 12
layers 20 % of the units are drawn at random, so that about 563 rows of an FFN's matrices train.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssah_kernels import ops
from ssah_kernels.dynamic_map import quantize

HIDDEN, INTERMEDIATE = 1024, 2816
FFN, ATTENTION = ("gate", "up", "down"), ("v", "o")
LR, DECAY = 1e-5, 0.01
Call = Callable[[int], Any]


def shape_of(name: str) -> tuple[int, int]:
    """[units, other] of an FFN's matrices as a plan packs them; attention's as the model has it."""
    return (INTERMEDIATE, HIDDEN) if name in FFN else (HIDDEN, HIDDEN)


def draw_units(layers: int, fraction: float) -> list[tuple[Tensor, Tensor]]:
    """Per layer the sorted units of the FFN and of attention, at random over all of them."""
    total = layers * (INTERMEDIATE + HIDDEN)
    chosen = torch.zeros(total, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    chosen[torch.randperm(total, generator=generator)[: round(fraction * total)]] = True
    per_layer = chosen.view(layers, INTERMEDIATE + HIDDEN)  # the FFN's units, then attention's
    return [
        (row[:INTERMEDIATE].nonzero()[:, 0], row[INTERMEDIATE:].nonzero()[:, 0])
        for row in per_layer
    ]


def random(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape).normal_(std=scale).to(dtype)


@dataclass
class Ours:
    """The arguments of ``masked_adamw_`` for one selection of units."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    indices: list[Tensor | None] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    signed: list[Tensor] = field(default_factory=list)
    squared: list[Tensor] = field(default_factory=list)
    compensations: list[Tensor] = field(default_factory=list)
    exp_avg_scales: list[Tensor] = field(default_factory=list)  # of state in 8 bits alone
    exp_avg_sq_scales: list[Tensor] = field(default_factory=list)
    packing_seconds: float = 0.0

    def elements(self) -> int:
        return sum(m.numel() for m in self.exp_avgs)

    def gathered(self) -> list[Tensor]:
        """The gradients of what trains, copied out: compact [trained, other]."""
        return [
            g if index is None else g.index_select(dim, index)
            for g, index, dim in zip(self.grads, self.indices, self.dims, strict=True)
        ]

    def call(self, *, importance: bool, seed: bool, remainder: bool, gathers: bool = False) -> Call:
        rate = torch.tensor(LR, dtype=torch.float64)
        step = torch.tensor(100.0, dtype=torch.float64)

        def run(_: int) -> None:
            step.add_(1)
            ops.masked_adamw_(
                self.params,
                self.gathered() if gathers else self.grads,
                self.exp_avgs,
                self.exp_avg_sqs,
                self.indices,
                self.dims,
                rate,
                step,
                seed=torch.tensor(1) if seed else None,
                compensations=self.compensations if remainder else None,
                signed=self.signed if importance else None,
                squared=self.squared if importance else None,
                exp_avg_scales=self.exp_avg_scales or None,
                exp_avg_sq_scales=self.exp_avg_sq_scales or None,
                weight_decay=DECAY,
            )

        return run


def build_ours(
    layers: int,
    fraction: float,
    dtype: torch.dtype,
    state: torch.dtype,
    remainder: bool,
) -> Ours:
    ours = Ours()
    for ffn, attention in draw_units(layers, fraction):
        chosen = torch.zeros(INTERMEDIATE, dtype=torch.bool)
        chosen[ffn] = True
        # Chosen units first, so that what trains is one block of rows.
        order = torch.cat([ffn, (~chosen).nonzero()[:, 0]])  # [INTERMEDIATE]
        for name in (*FFN, *ATTENTION):
            units = ffn if name in FFN else attention
            if name == "down":
                weight = random((HIDDEN, INTERMEDIATE), 0.02, dtype)
            else:
                weight = random(shape_of(name), 0.02, dtype)
            if name in FFN:
                start = time.perf_counter()
                packed = (weight.t() if name == "down" else weight)[order].contiguous()
                ours.packing_seconds += time.perf_counter() - start
                weight = packed[: len(units)]
            shape = (len(units), weight.shape[1])  # compact: [trained, other]
            ours.params.append(weight)
            ours.grads.append(random(shape, 1e-3, dtype))
            m, v = (random(shape, 1e-3, torch.float32) for _ in "mv")
            v.square_()
            if state == torch.uint8:
                m, scales = quantize(m, signed=True)
                ours.exp_avg_scales.append(scales)
                v, scales = quantize(v, signed=False)
                ours.exp_avg_sq_scales.append(scales)
            ours.exp_avgs.append(m.to(state))
            ours.exp_avg_sqs.append(v.to(state))
            ours.indices.append(None if name in FFN else units)
            ours.dims.append(0)
            ours.signed.append(torch.zeros(len(units), dtype=torch.float64))
            ours.squared.append(torch.zeros(len(units), dtype=torch.float64))
            if remainder:
                ours.compensations.append(torch.zeros(shape, dtype=torch.int16))
    return ours


def build_indexed(layers: int, fraction: float, dtype: torch.dtype, grads: torch.dtype) -> Ours:
    """Whole weights and gradients, as a stack without plans has them, of which units train.

    Units are rows of gate, up and V, and columns of down and O. State is in ``dtype``.
    """
    ours = Ours()
    for ffn, attention in draw_units(layers, fraction):
        for name in (*FFN, *ATTENTION):
            units, shape = (ffn if name in FFN else attention), shape_of(name)
            dim = int(name in ("down", "o"))
            shape = shape[::-1] if dim else shape
            ours.params.append(random(shape, 0.02, dtype))
            ours.grads.append(random(shape, 1e-3, grads))
            compact = list(shape)
            compact[dim] = len(units)
            for states in (ours.exp_avgs, ours.exp_avg_sqs):
                states.append(random(tuple(compact), 1e-3, dtype).square_())
            ours.indices.append(units)
            ours.dims.append(dim)
    return ours


def build_dense(
    layers: int, dtype: torch.dtype
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Every parameter with its gradient, and torch's fused AdamW with its state made."""
    parameters = []
    for _ in range(layers):
        for name in (*FFN, *ATTENTION):
            parameter = torch.nn.Parameter(random(shape_of(name), 0.02, dtype))
            parameter.grad = random(shape_of(name), 1e-3, dtype)
            parameters.append(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, fused=True)
    optimizer.step()
    return parameters, optimizer


def masked_step(
    layers: int,
    fraction: float,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Call:
    """Multiply by mask, step, put the frozen entries back: each tensor on its own, in place."""
    masks = []
    for ffn, attention in draw_units(layers, fraction):
        for name in (*FFN, *ATTENTION):
            mask = torch.zeros(shape_of(name))
            mask[ffn if name in FFN else attention] = 1
            masks.append((mask, mask.bool()))
    frozen = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def run(_: int) -> None:
        for p, (factor, _trains) in zip(parameters, masks, strict=True):
            p.grad.mul_(factor)  # type: ignore[union-attr]
        optimizer.step()
        for p, (_factor, trains), before in zip(parameters, masks, frozen, strict=True):
            torch.where(trains, p, before, out=p)

    return run


def copy_bandwidth(n_bytes: int = 512 << 20) -> Call:
    """A call that reads and writes ``n_bytes`` in place: AdamW's pattern without its arithmetic."""
    x = torch.zeros(n_bytes // 4)
    return lambda _: x.add_(1.0)
