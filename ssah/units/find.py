"""The depth-2 modules of a model, found where its family says they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedConfig

from ssah.models import check_bare, check_whole, text_config
from ssah.units.attention import AttentionHeads, attention_heads, attention_module
from ssah.units.depth_two import KINDS, DepthTwoModule
from ssah.units.families import FAMILIES, WITHOUT_MODULES
from ssah.units.family import Family, NotCovered, attribute_at
from ssah.units.ffn import mlp_modules
from ssah.units.unit_set import UnitSet


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
    check_whole(model)  # before anything is read: a flat or partitioned weight has other shapes
    family = family_of(model)
    layers = _layers(model)
    last = next(reversed(layers), None)  # what only its input is wanted of need not run to its end
    found: list[DepthTwoModule] = []
    for name, layer in layers.items():
        wanted = set(kinds) - _missing(family, model, layer)
        if family.attention is not None and "attention" in wanted:
            found.append(attention_module(model, name, family.attention))
        if "mlp" in wanted:
            found += mlp_modules(model, name, family, last=name == last)
    if not found:
        raise ValueError(f"model {type(model).__name__} has no depth-2 modules of kind {kinds!r}")
    return {module.name: module for module in found}


def find_heads(model: nn.Module) -> dict[int, AttentionHeads]:
    """The attention heads of ``model`` by the number of their layer, in the order of the layers.

    Layers whose attention has no heads of that kind are left out: linear attention, or keys and
    values that another layer computes.

    Raises:
        TypeError: ``model`` is not a transformers model, or wraps one.
        ValueError: its family has no attention, or one whose heads are not known; the family is
            named. Otherwise as of `find_modules`.
    """
    check_whole(model)
    family = family_of(model)
    if family.attention is None:
        raise ValueError(
            f"model is of the family {text_config(model).model_type!r}, which has no attention, so "
            "that it has no heads; select units, layers or parameters"
        )
    return {
        number: attention_heads(model, name, family.attention)
        for number, (name, layer) in enumerate(_layers(model).items())
        if "attention" not in _missing(family, model, layer)
    }


def layer_names(model: nn.Module) -> list[str]:
    """Qualified names of the decoder layers of ``model``, in the order in which they run.

    Raises:
        TypeError, ValueError: as of `family_of`.
    """
    return list(_layers(model))


def find_not_covered(model: nn.Module) -> dict[NotCovered, list[str]]:
    """The parts of ``model`` that its family names as holding no units, with their layers' names.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: unknown architecture.
    """
    layers = _layers(model)
    found = {
        part: [name for name, layer in layers.items() if _applies(part, model, layer)]
        for part in family_of(model).not_covered
    }
    return {part: names for part, names in found.items() if names}


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
    # Of a model that also sees or hears, units are those of the text model.
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
    decoder = check_bare(model).get_decoder()
    # A bare decoder, without a head, has its layers at its own top.
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return f"{prefix}.{family.layers}" if prefix else family.layers


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of ``model`` by qualified name, in the order in which they run."""
    path = layers_path(model)
    layers = attribute_at(model, path)
    if not isinstance(layers, nn.Module):
        raise ValueError(
            f"model {type(model).__name__} has no module {path!r}, where the entry of its family "
            f"says that its decoder ({type(check_bare(model).get_decoder()).__name__}) keeps its "
            "layers; register a family that fits it"
        )
    return {f"{path}.{i}": layer for i, layer in layers.named_children()}


def _missing(family: Family, model: nn.Module, layer: nn.Module) -> set[str | None]:
    """The kinds of depth-2 modules that ``layer`` goes without."""
    return {part.instead for part in family.not_covered if _applies(part, model, layer)}


def _applies(part: NotCovered, model: nn.Module, layer: nn.Module) -> bool:
    """Whether ``layer`` of ``model`` has ``part``."""
    # The attribute may be true where nothing makes use of it, which a setting then tells.
    if part.setting is not None and not getattr(text_config(model), part.setting, None):
        return False
    return bool(attribute_at(layer, part.at))


def check_units(model: nn.Module, units: UnitSet) -> dict[str, DepthTwoModule]:
    """The depth-2 modules of ``model`` that ``units`` is over, in model order.

    Raises:
        TypeError: ``units`` is no `UnitSet`.
        ValueError: ``units`` has modules that the model lacks, or of another size; they are named.
    """
    if not isinstance(units, UnitSet):
        raise TypeError(
            f"units is {type(units).__name__}; it must be a UnitSet, for instance groups['scu']; "
            "ssah.select makes a selection of text, and of masks of weights"
        )
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
