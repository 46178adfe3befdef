"""The tensors of one call of an update operator, and the state of each of their pieces.

An operator takes lists. One call serves every parameter of one group, dtype, device and step
count: a model with 300 trained parameters in bfloat16 is updated by one call, and by two if
some of these parameters were added after the first step.

A parameter is one entry of the lists. So is one that holds experts, of which some units train, if
units are rows: [experts, units, other] becomes a matrix [experts * units, other]. If they are
columns, it is one entry for each expert of this rank that trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..sharded import Cut, is_sharded, local

# A matrix of a call: parameter, gradient, index [trained], dimension and compact state.
Piece: TypeAlias = tuple[Tensor, Tensor, "Tensor | None", int, dict[str, Any]]
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: calls of one step get seeds far apart


def scales_of(name: str) -> str:
    """The name of the scales [rows, blocks] of state in 8 bits that has this name."""
    return f"{name}_scales"


class Scalars(NamedTuple):
    """The numbers of one call, in the order that the operators take them.

    Those of the host stay there: an operator passes their values on, and no GPU waits for a copy.
    """

    lr: Tensor  # float64 []
    step: Tensor  # float64 [], counted from 1
    grad_scale: Tensor | None  # float32 []
    clip_coef: Tensor | None  # float64 []
    seed: Tensor | None  # int64 []


@dataclass
class Call:
    """One call of an operator: one group, dtype, device and step count."""

    number: int  # of its first parameter in the optimiser: tells calls of one step apart
    pieces: list[Piece] = field(default_factory=list)  # whole parameters, or parts of them
    counted: list[dict[str, Any]] = field(default_factory=list)  # whose "step" goes up with it

    def __post_init__(self) -> None:
        self.params: Sequence[Tensor] = ()  # each [units, other], or of any shape
        self.grads: Sequence[Tensor] = ()  # each of the parameter's shape, or compact
        self.indices: Sequence[Tensor | None] = ()  # int64 [trained]
        self.dims: Sequence[int] = ()
        self.states: Sequence[dict[str, Any]] = ()  # compact: [trained, other]

    def closed(self) -> Call:
        """Itself, with the lists that the operator takes: all pieces are there by now."""
        if self.pieces:
            columns = map(list, zip(*self.pieces, strict=True))
            self.params, self.grads, self.indices, self.dims, self.states = columns
        return self

    def add_cut(self, p: Tensor, grad: Tensor, cut: Cut, state: dict[str, Any]) -> None:
        """Add what this rank has of a parameter: its rows [rows, ...], or pieces of them."""
        pieces = cut.rows(local(p)), cut.rows(local(grad)), cut.state(state)
        skips = is_sharded(p) or len(cut.parts) > 1
        for part, shape, rows, own_grad, own in zip(cut.parts, cut.shapes, *pieces, strict=True):
            if skips and not math.prod(shape):
                continue  # other ranks have what trains, or other experts
            self.pieces.append((rows, own_grad, part.index, part.dim, own))

    def state(self, name: str) -> list[Tensor] | None:
        """The state of that name of every entry, [trained, other] each; None: it has none."""
        return [s[name] for s in self.states] if name in self.states[0] else None

    def scalars(
        self, group: dict[str, Any], clip_coef: Tensor | None, grad_scale: Tensor | None
    ) -> Scalars:
        """The numbers that this step's update takes; ``clip_coef`` is float64 []."""
        lr = torch.as_tensor(group["lr"], dtype=torch.float64)
        step = self.counted[0]["step"] + 1
        seed = None
        if group["rounding"] != "nearest":
            # A seed is any whole number; what an operator takes is a signed word of 64 bits.
            word = (group["seed"] + _SEED_STRIDE * self.number + (1 << 63)) % (1 << 64)
            seed = torch.tensor(word - (1 << 63), dtype=torch.int64)
        return Scalars(lr, step, grad_scale, clip_coef, seed)

    def count(self, found_inf: Tensor | None) -> None:
        """One step more, unless ``found_inf`` [] is not zero.

        Whether a GPU has found one, the host does not know: the count lives on the GPU then. It is
        one tensor for the whole call, and never changed in place: a parameter that shares it may
        have no gradient in the next step, and keeps the old one.
        """
        step: Tensor = self.counted[0]["step"]
        if found_inf is None:
            step = step + 1
        else:
            if on_host(step) and not on_host(found_inf):
                # By value, as a copy from the host would be awaited.
                step = torch.full((), float(step), dtype=step.dtype, device=found_inf.device)
            step = step + (found_inf == 0).reshape(()).to(step.device)
        for state in self.counted:
            state["step"] = step


def on_host(x: Tensor) -> bool:
    """Whether nobody waits to read ``x`` [...]."""
    return x.device.type == "cpu"


def count_of(step: Tensor) -> float:
    """What parameters of one call have in common: how many steps ``step`` [] counts.

    On a GPU it cannot be read. One tensor is one count there, and two tensors are taken for two.
    """
    return float(step) if on_host(step) else id(step)
