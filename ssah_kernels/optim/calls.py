"""The tensors of one call of an update operator, and the state of each of their pieces.

An operator takes lists. One call serves every parameter of one group, dtype, device and step
count: a model with 300 trained parameters in bfloat16 is updated by one call, and by two if
some of these parameters were added after the first step.

A parameter is one entry of the lists. A parameter that holds experts, of which some units train, is
one entry for each expert of this rank: its rows [experts, units, other] become matrices
[units, other].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssah_kernels.sharded import cut

_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: calls of one step get seeds far apart


def scales_of(name: str) -> str:
    """The name of the scales [rows, blocks] of state in 8 bits that has this name."""
    return f"{name}_scales"


class Scalars(NamedTuple):
    """The numbers of one call, on its device and in the order that the operators take them."""

    lr: Tensor  # float64 []
    step: Tensor  # float64 [], counted from 1
    grad_scale: Tensor | None  # float32 []
    clip_coef: Tensor | None  # float64 []
    seed: Tensor | None  # int64 []


@dataclass
class Call:
    """One call of an operator: one group, dtype, device and step count."""

    number: int  # of its first parameter in the optimiser: tells calls of one step apart
    params: list[Tensor] = field(default_factory=list)  # each [units, other], or of any shape
    grads: list[Tensor] = field(default_factory=list)  # each of the parameter's shape
    indices: list[Tensor | None] = field(default_factory=list)  # int64 [trained]
    dims: list[int] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)  # compact: [trained, other]
    counted: list[dict[str, Any]] = field(default_factory=list)  # whose "step" goes up with it

    def state(self, name: str) -> list[Tensor] | None:
        """The state of that name of every entry, [trained, other] each; None: it has none."""
        return [s[name] for s in self.states] if name in self.states[0] else None

    def scalars(
        self, group: dict[str, Any], clip_coef: Tensor | None, grad_scale: Tensor | None
    ) -> Scalars:
        """The numbers that this step's update takes; ``clip_coef`` is float64 []."""
        device = self.params[0].device
        lr = torch.as_tensor(group["lr"], dtype=torch.float64).to(device)
        step = (self.counted[0]["step"] + 1).to(device)
        seed = None
        if group["rounding"] != "nearest":
            # A seed is any whole number; what an operator takes is a signed word of 64 bits.
            word = (group["seed"] + _SEED_STRIDE * self.number + (1 << 63)) % (1 << 64)
            seed = torch.tensor(word - (1 << 63), dtype=torch.int64, device=device)
        return Scalars(lr, step, grad_scale, clip_coef, seed)

    def count(self, found_inf: Tensor | None) -> None:
        """One step more, unless ``found_inf`` [] is not zero.

        Whether a GPU has found one, the host does not know. The count moves to the GPU then, as one
        tensor for the whole call. It is never changed in place: a parameter that shares it may have
        no gradient in the next step, and keeps the old one.
        """
        step = self.counted[0]["step"]
        away = [x.device for x in (step, found_inf) if x is not None and not on_host(x)]
        more = 1 if found_inf is None else found_inf == 0
        if not away:
            for state in self.counted:
                state["step"] += more
            return
        step = step.to(away[0]) + (more.to(away[0]) if isinstance(more, Tensor) else more)
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


def cut_state(state: dict[str, Any], shapes: Sequence[torch.Size]) -> list[dict[str, Any]]:
    """The state of every piece of a parameter, of ``shapes`` [trained, other]: views."""
    if len(shapes) == 1:
        return [state]
    pieces = {name: cut(value, shapes) for name, value in state.items() if name != "step"}
    return [{name: each[i] for name, each in pieces.items()} for i in range(len(shapes))]
