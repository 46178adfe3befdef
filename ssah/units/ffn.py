"""The FFN of one layer, or its experts: one depth-2 module for each that every token may take."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ssah.models import scheme_of
from ssah.units.depth_two import (
    DepthTwoModule,
    GatedFFN,
    UnitSlice,
    act_name,
    of_projections,
    output_rows,
)
from ssah.units.experts import DOWN, RoutedExperts
from ssah.units.family import FFN, Family, attribute_at
from ssah.units.projections import check_unsplit, check_weight, check_width, features, projection


def mlp_modules(
    model: nn.Module, layer: str, family: Family, *, last: bool
) -> Iterator[DepthTwoModule]:
    """The FFN of the decoder layer called ``layer``, or its routed experts and then the shared one.

    Args:
        model: of ``family``.
        layer: qualified name of the layer.
        family: where the layer keeps them.
        last: whether it is the model's last layer.

    Raises:
        ValueError: a projection or the class of the experts is not what ``family`` says.
    """
    experts, ffn = family.experts, family.ffn
    # The first layers of a mixture may be dense: they have the family's own FFN.
    if experts is not None and attribute_at(model, f"{layer}.{experts.module}") is not None:
        yield from _expert_modules(model, f"{layer}.{experts.module}", final=last)
        shared = experts.shared
        ffn = None if shared is None or _left_out(model, f"{layer}.{shared.down}") else shared
    if ffn is not None:
        yield _ffn_module(model, layer, ffn, final=ffn.last and last)


def _left_out(model: nn.Module, name: str) -> bool:
    """Whether the module that would hold the projection ``name`` is None: meant, not misnamed."""
    holder, _, leaf = name.rpartition(".")[0].rpartition(".")
    return getattr(model.get_submodule(holder), leaf, name) is None


def _expert_modules(model: nn.Module, name: str, *, final: bool) -> Iterator[DepthTwoModule]:
    module = model.get_submodule(name)
    check_unsplit(name, module)
    routed = RoutedExperts.of(name, module, final=final)
    for leaf in (routed.up, DOWN):
        check_weight(f"{name}.{leaf}", getattr(module, leaf))
    # Of an expert's matrix [out, in]; a transposed one is [in, out].
    out_dim, in_dim = (1, 0) if module.is_transposed else (0, 1)
    leaves = {f"{name}.{routed.up}": out_dim}
    if module.has_bias:
        leaves[f"{name}.{routed.up}_bias"] = 0
    rows, units = routed.rows(), torch.arange(routed.n_units)
    for expert in range(routed.n_experts):
        first = expert * routed.n_units  # among the columns of B of all experts
        inputs = [
            # A has gate and up, so that an expert has twice as many rows as units.
            UnitSlice(leaf, dim, index, expert, first * len(rows))
            for index in rows
            for leaf, dim in leaves.items()
        ]
        output = UnitSlice(f"{name}.{DOWN}", in_dim, units, expert, first)
        yield DepthTwoModule(
            f"{output.param}[{expert}]",
            "mlp",
            routed.n_units,
            module,
            tuple(inputs),
            output,
            routed=routed,
        )


def _ffn_module(model: nn.Module, layer: str, ffn: FFN, *, final: bool) -> DepthTwoModule:
    name, up_name = f"{layer}.{ffn.down}", f"{layer}.{ffn.up}"
    down, up = projection(model, name), projection(model, up_name)
    n_units = features(down)[0]
    if not ffn.fused and ffn.gate is None and features(up)[1] == 2 * n_units:
        raise ValueError(
            f"module {up_name!r} has {features(up)[1]} outputs, twice what {name!r} takes: if they "
            "are gate and then up, register a family whose FFN says fused=True"
        )
    check_width(up_name, up, (2 if ffn.fused else 1) * n_units, name)
    units = torch.arange(n_units)
    gate, inputs = None, []
    if ffn.fused:  # one projection, [gate; up]: gate is its first half
        inputs += output_rows(up_name, up, units)
        inputs += output_rows(up_name, up, n_units + units)
    else:
        if ffn.gate is not None:
            gate_name = f"{layer}.{ffn.gate}"
            gate = projection(model, gate_name)
            check_width(gate_name, gate, n_units, name)
            inputs += output_rows(gate_name, gate, units)
        inputs += output_rows(up_name, up, units)
    gated = _gated(model, layer, ffn, gate, up, down, final=final)
    return of_projections(name, "mlp", down, inputs, gated)


def _gated(
    model: nn.Module,
    layer: str,
    ffn: FFN,
    gate: nn.Module | None,
    up: nn.Module,
    down: nn.Module,
    *,
    final: bool,
) -> GatedFFN | None:
    """The fused path, or None where only the model's own forward is known to be right."""
    if ffn.module is None or ffn.act is None:
        return None
    if any(part is not None and scheme_of(part) is not None for part in (gate, up, down)):
        # A scheme may round a token by the others of its batch: they are not to be run in pieces.
        return None
    activation = model.get_submodule(f"{layer}.{ffn.act}")
    act = act_name(activation)
    module = model.get_submodule(f"{layer}.{ffn.module}")
    if act is None or not _is_of(model, module):
        return None

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        if gate is not None:
            return gate(x), up(x)
        first, second = up(x).chunk(2, dim=-1)  # [..., 2 * units] -> gate and up, [..., units] each
        return first, second

    return GatedFFN(module, project, activation, act, final)


def _is_of(model: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is of a class that came with the model's, not one that replaced it."""
    place = type(module).__module__
    return place.startswith("transformers.") or place in {k.__module__ for k in type(model).__mro__}
