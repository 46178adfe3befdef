"""A depth-2 module, f(X) = B sigma(A X), and which entries of the model's weights its units own.

Unit j owns row j of every A, with A's bias there, and column j of B. B's bias belongs to no unit.
Take an FFN of hidden size 2 and three units, down(act(gate(x)) * up(x)):

    gate.weight [3, 2]   up.weight [3, 2]   down.weight [2, 3]
    unit 1 owns row 1    and row 1          and column 1

In attention A is V and B is O. With four query heads over two key/value heads of one channel each,
the channels 0, 1, 2, 3 that enter O come from the rows 0, 0, 1, 1 of V: units may share a row.
Of a mixture of experts each expert is a depth-2 module of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.choices import Kind
from ssah.compat.modules import has_hooks
from ssah.models import runs_own_forward, scheme_of
from ssah.units.experts import DOWN, RoutedExperts
from ssah.units.projections import features

KINDS: tuple[str, ...] = get_args(Kind)

# Class of the activation module -> the name under which `gated_moments` knows its function.
_ACT_NAMES: dict[str, str] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def act_name(activation: nn.Module) -> str | None:
    """The name under which `gated_moments` knows the function of an activation module, or None."""
    return _ACT_NAMES.get(type(activation).__name__)


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """Which entries of one parameter the units of a module own.

    Attributes:
        param: name in ``model.named_parameters()``.
        dim: dimension of the parameter that runs over units.
        index: int64 ``[n_units]``, the entry along ``dim`` that unit j owns. Several units map to
            one entry where key/value heads are shared. Of heads ``[n_heads, entries of one]``.
        expert: which expert's part of the parameter is meant (its first dimension runs over
            experts; ``dim`` counts without it); None for the whole parameter.
        offset: how many entries of the parameter belong to the experts before this one.
    """

    param: str
    dim: int
    index: Tensor  # [units]
    expert: int | None = None
    offset: int = 0

    @property
    def entries(self) -> Tensor:
        """int64 ``[n_units]``, the entry of unit j among those of all experts."""
        return self.index + self.offset if self.offset else self.index

    def tensor(self, model: nn.Module) -> Tensor:
        """The parameter, or the expert's part of it as a view; writing to it changes the model.

        ``[out, in]`` (``[in, out]`` of a Conv1D), or ``[out]`` of a bias.
        """
        parameter = model.get_parameter(self.param)
        return parameter if self.expert is None else parameter.detach()[self.expert]

    def width(self, model: nn.Module) -> int:
        """How many weights one entry has, those that a packed one stands for."""
        owner = model.get_submodule(self.param.rpartition(".")[0])
        if self.param.endswith(".weight") and scheme_of(owner) is not None:
            return features(owner)[self.dim]  # a row has the inputs, a column the outputs
        shape = self.tensor(model).shape
        return shape.numel() // shape[self.dim]


def output_rows(name: str, module: nn.Module, index: Tensor) -> list[UnitSlice]:
    """Outputs ``index``, int64 ``[units]``, of a projection: rows of its weight and of its bias."""
    # transformers' Conv1D keeps its weight as [in, out], every other projection as [out, in].
    slices = [UnitSlice(f"{name}.weight", 1 if isinstance(module, Conv1D) else 0, index)]
    if module.bias is not None:
        slices.append(UnitSlice(f"{name}.bias", 0, index))
    return slices


@dataclass(frozen=True, eq=False)
class GatedFFN:
    """The gated part of an FFN, for running it through one fused operator.

    Attributes:
        module: the module whose forward is ``down(act(gate) * up)``.
        project: maps the module's input ``[..., hidden]`` to gate and up, each ``[..., n_units]``;
            views of one tensor where the projection is fused.
        activation: the activation's module.
        act: its name in :func:`ssah_kernels.ops.gated_moments`.
        final: whether no other depth-2 module of the model depends on the output.
    """

    module: nn.Module
    project: Callable[[Tensor], tuple[Tensor, Tensor]]
    activation: nn.Module
    act: str
    final: bool

    @property
    def is_plain(self) -> bool:
        """Whether its forward may be replaced by a fused one, now: nobody has hung anything on it.

        Hooks inside see what the model's own forward gives them, and what they return counts. The
        fused operator goes around the activation, and B's hooks would come after the moments.
        """
        inside = list(self.module.modules())[1:]
        replaced = not all(runs_own_forward(part) for part in (self.module, self.activation))
        return not replaced and not any(has_hooks(part) for part in inside)


@dataclass(frozen=True, eq=False)
class DepthTwoModule:
    """One depth-2 module of a model: f(X) = B sigma(A X), as in Li & Kim, arXiv 2410.10862.

    Attributes:
        name: B's qualified name in the model; scores and unit sets are keyed by it. Of expert e
            it is the name of the 3-D parameter and the number: ``"...mlp.experts.down_proj[3]"``.
        kind: ``"mlp"`` or ``"attention"``.
        n_units: the inner dimension, the number of columns of B.
        down: B, an ``nn.Linear`` (weight ``[out, in]``), a transformers ``Conv1D`` (weight
            ``[in, out]``) or one of `ssah.models.packed` (packed, meant as ``[out, in]``);
            of an expert, the module that holds all experts of the layer.
        inputs: rows of A: weights and biases.
        output: columns of B.
        gated: the fused path of a gated FFN, or None where B's input can only be watched.
        routed: of an expert, all experts of the layer; None for any other module.
    """

    name: str
    kind: str
    n_units: int
    down: nn.Module
    inputs: tuple[UnitSlice, ...]
    output: UnitSlice
    gated: GatedFFN | None = None
    routed: RoutedExperts | None = None

    @property
    def expert(self) -> int | None:
        """The number of the expert, None for any other module."""
        return self.output.expert

    @property
    def params(self) -> list[str]:
        """Names in the model of the tensors that its units own entries of."""
        return list(dict.fromkeys(owned.param for owned in (*self.inputs, self.output)))

    @property
    def weight(self) -> Tensor:
        """B's weight, of an expert a view: ``[hidden, n_units]``, or as ``output.dim`` says.

        A packed one has the shape that its blocks have.
        """
        if self.routed is None:
            return self.down.weight  # type: ignore[return-value]
        return getattr(self.down, DOWN).detach()[self.expert]

    @property
    def bias(self) -> Tensor | None:
        """B's bias ``[out]``, of an expert a view; None where there is none."""
        if self.routed is None:
            return self.down.bias  # type: ignore[return-value]
        assert self.expert is not None
        bias = self.routed.bias(DOWN, self.expert)
        return None if bias is None else bias.detach()


def of_projections(
    name: str,
    kind: str,
    down: nn.Module,
    inputs: list[UnitSlice],
    gated: GatedFFN | None = None,
) -> DepthTwoModule:
    """The module whose B is the projection ``down``, called ``name``: unit j is its input j."""
    n_units = features(down)[0]
    dim = 0 if isinstance(down, Conv1D) else 1
    columns = UnitSlice(f"{name}.weight", dim, torch.arange(n_units))
    return DepthTwoModule(name, kind, n_units, down, tuple(inputs), columns, gated)
