"""Depth-2 modules of a model and the units they hold.

A depth-2 module is f(X) = B sigma(A X): in an FFN, A is gate and up, B is down; in attention, A is
V and B is O. Unit j is row j of every A (with A's bias there) and column j of B. B's bias belongs
to no unit. Each expert of a mixture is a depth-2 module of its own. This is the only module that
knows about architectures (through :mod:`ssah.units.families`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah.compat.modules import has_hooks
from ssah.models import check_bare, check_whole, runs_own_forward, scheme_of
from ssah.units.experts import DOWN, RoutedExperts
from ssah.units.families import (
    FAMILIES,
    FFN,
    WITHOUT_MODULES,
    Attention,
    Experts,
    Family,
    NotCovered,
    register_family,
)
from ssah.units.projections import check_unsplit, check_weight, features, projection
from ssah.units.unit_set import UnitSet

__all__ = [
    "FFN",
    "KINDS",
    "Attention",
    "DepthTwoModule",
    "Experts",
    "Family",
    "GatedFFN",
    "NotCovered",
    "UnitSet",
    "UnitSlice",
    "check_units",
    "family_of",
    "family_of_config",
    "find_modules",
    "find_not_covered",
    "layers_path",
    "register_family",
]

KINDS: tuple[str, ...] = ("mlp", "attention")

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


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """Which entries of one parameter the units of a module own.

    Attributes:
        param: name in ``model.named_parameters()``.
        dim: dimension of the parameter that runs over units.
        index: int64 ``[n_units]``, the entry along ``dim`` that unit j owns. Several units map to
            one entry where key/value heads are shared.
        expert: which expert's part of the parameter is meant (its first dimension runs over
            experts; ``dim`` counts without it); None for the whole parameter.
        offset: how many entries of the parameter belong to the experts before this one.
    """

    param: str
    dim: int
    index: Tensor
    expert: int | None = None
    offset: int = 0

    @property
    def entries(self) -> Tensor:
        """int64 ``[n_units]``, the entry of unit j among those of all experts."""
        return self.index + self.offset if self.offset else self.index

    def tensor(self, model: nn.Module) -> Tensor:
        """The parameter, or the expert's part of it as a view; writing to it changes the model."""
        parameter = model.get_parameter(self.param)
        return parameter if self.expert is None else parameter.detach()[self.expert]

    def width(self, model: nn.Module) -> int:
        """How many weights one entry has, those that a packed one stands for."""
        owner = model.get_submodule(self.param.rpartition(".")[0])
        if self.param.endswith(".weight") and scheme_of(owner) is not None:
            return features(owner)[self.dim]  # a row has the inputs, a column the outputs
        shape = self.tensor(model).shape
        return shape.numel() // shape[self.dim]


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
    """One depth-2 module of a model.

    Attributes:
        name: B's qualified name, e.g. ``"model.layers.0.mlp.down_proj"``, and of an expert
            ``"model.layers.0.mlp.experts.down_proj[3]"``; the key everywhere.
        kind: ``"mlp"`` or ``"attention"``.
        n_units: inner dimension, the number of columns of B.
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
        """B's weight, with units along ``output.dim`` unless packed; of an expert, a view."""
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


def family_of(model: nn.Module) -> Family:
    """The declarative entry of ``model``'s architecture.

    Raises:
        TypeError: ``model`` is not a transformers model, or wraps one.
        ValueError: its architecture is unknown; the message says how to register it.
    """
    return family_of_config(check_bare(model).config)


def family_of_config(config: PreTrainedConfig) -> Family:
    """The declarative entry of the architecture that ``config`` describes.

    Raises:
        ValueError: it is unknown, or has no depth-2 modules; the message says how to register it.
    """
    model_type = config.get_text_config(decoder=True).model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in WITHOUT_MODULES:
        raise ValueError(
            f"model has the architecture {model_type!r}, which has no depth-2 modules: "
            f"{WITHOUT_MODULES[model_type]}"
        )
    raise ValueError(
        f"model has the unknown architecture {model_type!r} ({type(config).__name__}); known: "
        f"{', '.join(sorted(FAMILIES))}. To add it, say where it keeps its projections: "
        f"ssah.register_family({model_type!r}, ssah.Family(layers='layers', "
        "ffn=ssah.FFN(down=..., up=..., gate=...), experts=ssah.Experts(module=...), "
        "attention=ssah.Attention(down=..., value=...)))"
    )


def layers_path(model: nn.Module) -> str:
    """Qualified name of the list of decoder layers of ``model``, of a known family."""
    family = family_of(model)
    assert isinstance(model, PreTrainedModel)
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return f"{prefix}.{family.layers}" if prefix else family.layers


def find_modules(model: nn.Module, modules: Iterable[str] = KINDS) -> dict[str, DepthTwoModule]:
    """The depth-2 modules of ``model`` by B's qualified name, in the order in which they run.

    Of a mixture of experts the routed experts of a layer come before the shared one.

    Args:
        model: a transformers model of a known family.
        modules: which kinds, of ``"mlp"`` and ``"attention"``.

    Raises:
        TypeError: ``model`` is not a transformers model, or wraps one.
        ValueError: unknown architecture or kind, no such modules, an active plan, weights that
            FSDP1 or ZeRO stage 3 holds, or a projection that computes something else than
            ``nn.Linear`` or ``Conv1D`` does (see :mod:`ssah.units.projections`).
    """
    kinds = (modules,) if isinstance(modules, str) else tuple(modules)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"modules is {kinds!r}, must be one or more of {KINDS}")
    check_whole(model)
    family, path = family_of(model), layers_path(model)
    layers = dict(model.get_submodule(path).named_children())
    last = next(reversed(layers), None)
    found: dict[str, DepthTwoModule] = {}
    for i, parts in layers.items():
        layer = f"{path}.{i}"
        missing = {part.instead for part in family.not_covered if _applies(part, model, parts)}
        if family.attention is not None and "attention" in set(kinds) - missing:
            module = _attention_module(model, layer, family.attention)
            found[module.name] = module
        if "mlp" in set(kinds) - missing:
            for module in _mlp_modules(model, layer, family, last=i == last):
                found[module.name] = module
    if not found:
        raise ValueError(f"model {type(model).__name__} has no depth-2 modules of kind {kinds!r}")
    return found


def act_name(activation: nn.Module) -> str | None:
    """The name under which `gated_moments` knows the function of an activation module, or None."""
    return _ACT_NAMES.get(type(activation).__name__)


def find_not_covered(model: nn.Module) -> dict[NotCovered, list[str]]:
    """The parts of ``model`` that its family names as holding no units, with their layers' names.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: unknown architecture.
    """
    family, path = family_of(model), layers_path(model)
    layers = list(model.get_submodule(path).named_children())
    found = {
        part: [f"{path}.{i}" for i, layer in layers if _applies(part, model, layer)]
        for part in family.not_covered
    }
    return {part: names for part, names in found.items() if names}


def _applies(part: NotCovered, model: nn.Module, layer: nn.Module) -> bool:
    """Whether ``layer`` of ``model`` has ``part``."""
    if part.setting is not None:
        config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        if not getattr(config, part.setting, None):
            return False
    return bool(_at(layer, part.at))


def _at(module: nn.Module, path: str) -> object:
    """The attribute at ``path``, None where there is none."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _left_out(model: nn.Module, name: str) -> bool:
    """Whether the module that would hold the projection ``name`` is None."""
    holder, _, leaf = name.rpartition(".")[0].rpartition(".")
    return getattr(model.get_submodule(holder), leaf, name) is None


def _rows(name: str, module: nn.Module, index: Tensor) -> list[UnitSlice]:
    """Outputs ``index`` of a projection: rows of its weight, entries of its bias."""
    slices = [UnitSlice(f"{name}.weight", 1 if isinstance(module, Conv1D) else 0, index)]
    if module.bias is not None:
        slices.append(UnitSlice(f"{name}.bias", 0, index))
    return slices


def _columns(name: str, module: nn.Module) -> UnitSlice:
    """All inputs of a projection: columns of its weight."""
    dim = 0 if isinstance(module, Conv1D) else 1
    return UnitSlice(f"{name}.weight", dim, torch.arange(features(module)[0]))


def _mlp_modules(
    model: nn.Module, layer: str, family: Family, *, last: bool
) -> Iterator[DepthTwoModule]:
    """The FFN of one layer, or its routed and shared experts."""
    experts, ffn = family.experts, family.ffn
    if experts is not None and _at(model, f"{layer}.{experts.module}") is not None:
        yield from _expert_modules(model, f"{layer}.{experts.module}", final=last)
        shared = experts.shared
        ffn = None if shared is None or _left_out(model, f"{layer}.{shared.down}") else shared
    if ffn is not None:
        yield _ffn_module(model, layer, ffn, final=ffn.last and last)


def _expert_modules(model: nn.Module, name: str, *, final: bool) -> Iterator[DepthTwoModule]:
    module = model.get_submodule(name)
    check_unsplit(name, module)
    routed = RoutedExperts.of(name, module, final=final)
    leaves = {f"{name}.{routed.up}": 1 if module.is_transposed else 0}
    if module.has_bias:
        leaves[f"{name}.{routed.up}_bias"] = 0
    for leaf in (routed.up, DOWN):
        check_weight(f"{name}.{leaf}", getattr(module, leaf))
    dim = 0 if module.is_transposed else 1
    rows, units = routed.rows(), torch.arange(routed.n_units)
    for expert in range(routed.n_experts):
        first = expert * routed.n_units
        inputs = [
            UnitSlice(leaf, own, index, expert, first * len(rows))
            for index in rows
            for leaf, own in leaves.items()
        ]
        output = UnitSlice(f"{name}.{DOWN}", dim, units, expert, first)
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
    name = f"{layer}.{ffn.down}"
    down = projection(model, name)
    n_units = features(down)[0]
    up_name = f"{layer}.{ffn.up}"
    up = projection(model, up_name)
    _check_width(up_name, up, (2 if ffn.fused else 1) * n_units, name)
    units = torch.arange(n_units)
    inputs: list[UnitSlice] = []
    gate = None
    if ffn.fused:
        inputs += _rows(up_name, up, units) + _rows(up_name, up, n_units + units)
    else:
        if ffn.gate is not None:
            gate_name = f"{layer}.{ffn.gate}"
            gate = projection(model, gate_name)
            _check_width(gate_name, gate, n_units, name)
            inputs += _rows(gate_name, gate, units)
        inputs += _rows(up_name, up, units)
    return DepthTwoModule(
        name,
        "mlp",
        n_units,
        down,
        tuple(inputs),
        _columns(name, down),
        _gated(model, layer, ffn, gate, up, down, final),
    )


def _gated(
    model: nn.Module,
    layer: str,
    ffn: FFN,
    gate: nn.Module | None,
    up: nn.Module,
    down: nn.Module,
    final: bool,
) -> GatedFFN | None:
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
        first, second = up(x).chunk(2, dim=-1)
        return first, second

    return GatedFFN(module, project, activation, act, final)


def _is_of(model: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is of a class that came with the model's, not one that replaced it."""
    place = type(module).__module__
    return place.startswith("transformers.") or place in {k.__module__ for k in type(model).__mro__}


def _attention_module(model: nn.Module, layer: str, attention: Attention) -> DepthTwoModule:
    name = f"{layer}.{attention.down}"
    down = projection(model, name)
    n_units = features(down)[0]
    value_name = f"{layer}.{attention.value}"
    value = projection(model, value_name)
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    n_heads = config.num_attention_heads
    head_dim = n_units // n_heads
    units = torch.arange(n_units)
    head, channel = units // head_dim, units % head_dim
    if attention.layout == "latent":
        own = config.qk_nope_head_dim + head_dim
        _check_width(value_name, value, n_heads * own, name)
        inputs = _rows(value_name, value, (head + 1) * own - head_dim + channel)
        return DepthTwoModule(name, "attention", n_units, down, tuple(inputs), _columns(name, down))
    n_kv_heads = features(value)[1] // head_dim
    if attention.layout != "separate":
        n_kv_heads = (n_kv_heads - n_heads) // 2
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"module {value_name!r} has {features(value)[1]} outputs, which are no values of "
            f"{n_heads} heads of {head_dim} for {name!r}; register a family that fits the model"
        )
    queries = n_heads // n_kv_heads  # that share a key/value head
    if attention.layout == "separate":
        width, at = n_kv_heads, head // queries
    elif attention.layout == "qkv":
        width, at = n_heads + 2 * n_kv_heads, n_heads + n_kv_heads + head // queries
    else:
        width, at = n_heads + 2 * n_kv_heads, head // queries * (queries + 2) + queries + 1
    _check_width(value_name, value, width * head_dim, name)
    inputs = _rows(value_name, value, at * head_dim + channel)
    if attention.gate is not None:
        gate_name = f"{layer}.{attention.gate}"
        gate = projection(model, gate_name)
        _check_width(gate_name, gate, 2 * n_units, name)
        inputs += _rows(gate_name, gate, (2 * head + 1) * head_dim + channel)
    return DepthTwoModule(name, "attention", n_units, down, tuple(inputs), _columns(name, down))


def _check_width(name: str, module: nn.Module, width: int, down: str) -> None:
    if features(module)[1] != width:
        raise ValueError(
            f"module {name!r} has {features(module)[1]} outputs, must have {width} to feed "
            f"{down!r}; register a family that fits the model"
        )


def check_units(model: nn.Module, units: UnitSet) -> dict[str, DepthTwoModule]:
    """The depth-2 modules of ``model`` that ``units`` is over, in model order.

    Raises:
        ValueError: ``units`` has modules that the model lacks, or of another size; they are named.
    """
    found = find_modules(model)
    missing = [name for name in units if name not in found]
    if missing:
        raise ValueError(
            f"units has modules that the model {type(model).__name__} lacks: {', '.join(missing)}"
        )
    for name, size in units.sizes.items():
        if found[name].n_units != size:
            raise ValueError(
                f"units has {size} units in {name!r}, the model has {found[name].n_units}"
            )
    return {name: module for name, module in found.items() if name in units}
