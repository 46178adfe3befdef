"""Routed experts of one layer, whose weights transformers keeps as 3-D parameters.

Modules' hooks do not see what happens inside: here each expert is run by itself. The class of the
experts says how it lays its weights out (``transformers.integrations.use_experts_implementation``).
Of 8 experts with 3 units each, over a hidden size of 2:

                       gate_up_proj  down_proj   gate of unit j   up of unit j
    Mixtral            [8, 6, 2]     [8, 2, 3]   row j            row 3 + j       is_concatenated
    GPT-OSS            [8, 2, 6]     [8, 3, 2]   column 2j        column 2j + 1   is_transposed

The first dimension runs over experts. ``has_gate`` is False where there is ``up_proj`` alone, and
``has_bias`` says whether both projections have a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssah.compat.transformers import dispatches, expert_gate, has_expert_layout, has_usual_gate
from ssah.models import runs_own_forward

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

    def weight(self, leaf: str, expert: int) -> Tensor:
        """One expert's matrix ``[out, in]``, a view."""
        matrix = getattr(self.module, leaf)[expert]  # [experts, out, in] -> [out, in]
        return matrix.t() if self.module.is_transposed else matrix

    def bias(self, leaf: str, expert: int) -> Tensor | None:
        """One expert's bias ``[out]``, a view, or None."""
        return getattr(self.module, f"{leaf}_bias")[expert] if self.module.has_bias else None

    def project(self, x: Tensor, expert: int) -> Tensor:
        """A of one expert: ``[tokens, hidden]`` to what its gate takes."""
        return F.linear(x, self.weight(self.up, expert), self.bias(self.up, expert))

    def gate(self, projected: Tensor) -> Tensor:
        """The model's own arithmetic between A and B: ``[tokens, n_units]``."""
        return expert_gate(self.module)(projected)

    def put_out(self, a: Tensor, expert: int) -> Tensor:
        """B of one expert: ``[tokens, n_units]`` to ``[tokens, hidden]``."""
        return F.linear(a, self.weight(DOWN, expert), self.bias(DOWN, expert))


def up_name(module: nn.Module) -> str:
    """The name of A among the parameters of experts."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def route(chosen: Tensor, n_experts: int) -> list[tuple[Tensor, Tensor]]:
    """The tokens of every expert, ascending, and the place of the expert among a token's choices.

    Example: token 0 chose experts 1 and 0, token 1 chose 1 and 2. Expert 1 has tokens [0, 1], at
    places [0, 0].

    Args:
        chosen: integers ``[tokens, k]``; numbers from ``n_experts`` on mean no expert.
        n_experts: how many there are.
    """
    flat = chosen.flatten()  # [tokens * k], pair p is choice p % k of token p // k
    order = flat.argsort(stable=True)  # stable: the tokens of one expert stay ascending
    # What lies behind the last expert are pairs without one.
    ends = torch.bincount(flat, minlength=n_experts)[:n_experts].cumsum(0).tolist()
    k = chosen.shape[1]
    pieces = order[: ends[-1]].tensor_split(ends[:-1])
    return [(pairs // k, pairs % k) for pairs in pieces]


def run_routed(
    run: Callable[[Tensor, int], Tensor],
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    n_experts: int,
    *,
    every: bool = False,
) -> Tensor:
    """Sum over each token's experts of their weight times their output, ``[tokens, hidden]``.

    Args:
        run: gives the output ``[n, hidden]`` of an expert (its number) for tokens (int64 ``[n]``).
        x: hidden states ``[tokens, hidden]``.
        chosen, weights: the experts of each token and what they are weighed with, ``[tokens, k]``.
        n_experts: how many there are.
        every: run those that no token chose too.
    """
    out = torch.zeros_like(x)
    for expert, (token, place) in enumerate(route(chosen, n_experts)):
        if every or len(token):
            weighed = run(token, expert) * weights[token, place, None]  # [n, hidden]
            # No token is here twice for one expert, so that the order of additions is fixed.
            out.index_add_(0, token, weighed.to(out.dtype))
    return out
