"""Routed experts of one layer, whose weights transformers keeps as 3-D parameters.

Modules' hooks do not see what happens inside: here it is run step by step. The class of the
experts says how it lays its weights out (``transformers.integrations.use_experts_implementation``).
Of 8 experts with 3 units each, over a hidden size of 2:

                       gate_up_proj  down_proj   gate of unit j   up of unit j
    Mixtral            [8, 6, 2]     [8, 2, 3]   row j            row 3 + j       is_concatenated
    GPT-OSS            [8, 2, 6]     [8, 3, 2]   column 2j        column 2j + 1   is_transposed

The first dimension runs over experts. ``has_gate`` is False where there is ``up_proj`` alone, and
``has_bias`` says whether both projections have a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssah.compat.transformers import (
    dispatches,
    expert_gate,
    has_expert_layout,
    has_usual_gate,
    is_expert_parallel,
)
from ssah.models import runs_own_forward
from ssah.units.routing import Routing

DOWN = "down_proj"


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """The routed experts of one layer.

    Attributes:
        module: holds the 3-D parameters; its forward takes hidden states ``[tokens, hidden]``, the
            experts chosen for each token and their weights, both ``[tokens, k]``.
        up: name in ``module`` of A: gate and up, or up alone.
        n_experts: how many.
        n_units: channels of one expert.
        final: whether no other depth-2 module of the model depends on the output.
    """

    module: nn.Module
    up: str
    n_experts: int
    n_units: int
    final: bool

    @classmethod
    def of(cls, name: str, module: nn.Module, *, final: bool) -> RoutedExperts:
        """Read the layout from ``module``.

        Raises:
            ValueError: ``module``, called ``name``, is no such class, normalises what an expert
                puts out, or its parameters have other shapes (quantised).
            ImportError: this release of transformers says it in another way.
        """
        if not has_expert_layout(module):
            raise ValueError(
                f"module {name!r} is a {type(module).__name__}, must be a class of experts that "
                "transformers.integrations.use_experts_implementation decorates (dequantise the "
                "model first)"
            )
        # The layout is told by flags, so that a forward which ignores them would be scored wrongly.
        if not dispatches(module) or not runs_own_forward(module):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has a forward of its own, in its class "
                "or put in its place, which is not known here: it must be that of the class that "
                "transformers.integrations.use_experts_implementation decorates"
            )
        if is_expert_parallel(module):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has the experts of one rank (expert "
                "parallelism), must have all of the layer's: load the model without, or shard it "
                "with fully_shard"
            )
        if module.has_post_expert_norm:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) normalises the output of each expert: "
                "its B is not linear, so that it is no depth-2 module"
            )
        up = up_name(module)
        shapes = {leaf: tuple(getattr(module, leaf).shape) for leaf in (up, DOWN)}
        transposed = bool(module.is_transposed)
        plain = all(len(shape) == 3 for shape in shapes.values())
        if plain:
            n_experts, first, second = shapes[DOWN]  # [experts, hidden, units], or transposed
            hidden, n_units = (second, first) if transposed else (first, second)
            width = 2 * n_units if module.has_gate else n_units
            # B alone would fit another layout too: A's shape must agree with it.
            wanted = (n_experts, hidden, width) if transposed else (n_experts, width, hidden)
            plain = shapes[up] == wanted
        if not plain:
            raise ValueError(
                f"module {name!r} has parameters of shapes {shapes}, must have one matrix an "
                "expert in each (dequantise the model first)"
            )
        return cls(module, up, n_experts, n_units, final)

    @property
    def activation(self) -> nn.Module | None:
        """The activation of a gate that is act(gate) * up, gate first; None for any other."""
        return self.module.act_fn if has_usual_gate(self.module) else None  # type: ignore[return-value]

    def rows(self) -> list[Tensor]:
        """int64 ``[n_units]`` each: the outputs of A that unit j owns, gate before up."""
        units = torch.arange(self.n_units)
        if not self.module.has_gate:
            return [units]
        if self.module.is_concatenated:  # all gates, then all ups
            return [units, self.n_units + units]
        return [2 * units, 2 * units + 1]  # gate and up of unit 0, of unit 1, ...

    def bias(self, leaf: str, expert: int) -> Tensor | None:
        """One expert's bias ``[out]``, a view, or None."""
        return getattr(self.module, f"{leaf}_bias")[expert] if self.module.has_bias else None

    def project(self, x: Tensor, routing: Routing) -> Tensor:
        """A of every expert: its rows of ``[pairs, hidden]`` to what its gate takes."""
        return self._linear(self.up, x, routing)

    def project_alone(self, x: Tensor, expert: int) -> Tensor:
        """A of one expert: ``[tokens, hidden]`` to what its gate takes."""
        weight = getattr(self.module, self.up)[expert]  # [out, in], or transposed
        weight = weight.t() if self.module.is_transposed else weight
        return F.linear(x, weight, self.bias(self.up, expert))

    def gate(self, projected: Tensor) -> Tensor:
        """The model's own arithmetic between A and B: ``[tokens, n_units]``."""
        return expert_gate(self.module)(projected)

    def put_out(self, a: Tensor, routing: Routing) -> Tensor:
        """B of every expert: its rows of ``[pairs, n_units]`` to ``[pairs, hidden]``."""
        return self._linear(DOWN, a, routing)

    def _linear(self, leaf: str, x: Tensor, routing: Routing) -> Tensor:
        weight = getattr(self.module, leaf)  # [experts, out, in], or transposed
        out = routing.product(x, weight if self.module.is_transposed else weight.mT)
        if not self.module.has_bias:
            return out
        return out + getattr(self.module, f"{leaf}_bias")[routing.expert].to(out.dtype)


def up_name(module: nn.Module) -> str:
    """The name of A among the parameters of experts."""
    return "gate_up_proj" if module.has_gate else "up_proj"
