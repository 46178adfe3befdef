"""Is a part of one model, bit for bit, that of another? ``verify`` needs no plan.

After LoRA and a merge, after another program's trainer, or after an edit, it compares what units
own in two models. A model in a folder is read one decoder layer at a time, so that two models of
14 GB take little more memory than two of their layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ssah.attribution import LayeredModel
from ssah.compat import peft
from ssah.models import at_hand, check_whole, dequantised, load_weights, locate
from ssah.selections import Selection
from ssah.training.adapters.entries import changed_entries, may_change
from ssah.training.installing import listed
from ssah.training.updates import is_update, load_trained
from ssah.units import UnitSet

# Name of a parameter -> how to get it: [...] as the model keeps it, what a packed one stands for.
_Weights = Mapping[str, Callable[[], Tensor]]


def verify(
    model: nn.Module | str | os.PathLike[str],
    base: nn.Module | str | os.PathLike[str],
    units: UnitSet | Selection,
    *,
    only: bool = False,
) -> None:
    """Check that ``model`` has what ``units`` own exactly as ``base`` has it.

    Example: ``ssah.verify("runs/merged", "smollm2", groups["scu"])`` after a LoRA run.

    Args:
        model: the one that was trained: a transformers model, a ``PeftModel``, what
            `ssah.models.load_model` takes, or the folder of an update or an adapter of ``base``. An
            adapter must add exactly zero to these entries.
        base: the one that it was trained from: a model, or what `ssah.models.load_model` takes.
        units: of either, or a selection of either (`ssah.select`). Of units, with shared key/value
            heads, a row of V counts if any column of O that it feeds does.
        only: check the reverse: everything except what ``units`` own.

    Raises:
        RuntimeError: an entry differs; the parameters are named, with how many of their rows or
            columns differ. A zero is equal to a zero of the other sign, as a merge adds zeros.
        ValueError: units of another model, or models that cannot be compared: other shapes, or
            another dtype.
        TypeError: ``model`` is the folder of an adapter and ``base`` a model in memory.
        ModelError: a model cannot be loaded.
    """
    if not isinstance(model, nn.Module) and peft.is_adapter(model):
        if isinstance(base, nn.Module):
            raise TypeError(
                f"base is a {type(base).__name__}, must be a folder or hub id where model is the "
                f"folder of an adapter ({os.fspath(model)!r}): the adapter is put on it"
            )
        model = peft.with_adapter(load_weights(os.fspath(base)), os.fspath(model))
    elif not isinstance(model, nn.Module) and is_update(os.fspath(model)):
        start = None if isinstance(base, nn.Module) else os.fspath(base)
        model, _ = load_trained(os.fspath(model), base=start)
    moved: dict[str, tuple[int, int]] = {}
    for weights, before, stays in _pieces(model, base, units, only=only):
        for name in stays:
            for which, own_weights in (("model", weights), ("base", before)):
                if name not in own_weights:
                    raise ValueError(
                        f"{which} has no parameter {name!r}, which its architecture has: if a plan "
                        "is in force on it, close the plan first"
                    )
            differ, n = _compare(name, weights[name](), before[name](), stays.mask(name))
            if differ:
                moved[name] = (differ, n)
    if isinstance(model, nn.Module):
        moved |= changed_entries(model, units, only=only)
    if moved:
        found = listed([f"{name} ({differ} of {n})" for name, (differ, n) in moved.items()])
        raise RuntimeError(
            f"entries of {found} are not those of the base model, although the units that own them "
            "were to stay"
        )


def _pieces(
    model: nn.Module | str | os.PathLike[str],
    base: nn.Module | str | os.PathLike[str],
    units: UnitSet | Selection,
    *,
    only: bool,
) -> Iterator[tuple[_Weights, _Weights, Selection]]:
    """The parameters of both models, some at a time, and which of their entries must not differ."""
    if not isinstance(model, nn.Module) and not isinstance(base, nn.Module):
        names = (os.fspath(model), os.fspath(base))
        if all(map(_in_layers, names)):
            models = [LayeredModel(each, device="cpu") for each in names]
            _check_depth(names, models)
            stays = ~may_change(models[0].model, units, only=only)
            if all(name.startswith(f"{models[0].path}.") for name in stays):
                yield from _by_layers(models, stays)
                return
    first, second = (
        each if isinstance(each, nn.Module) else load_weights(os.fspath(each))
        for each in (model, base)
    )
    inner = peft.inner_model(first)
    stays = ~may_change(check_whole(first if inner is None else inner), units, only=only)
    yield _weights(first), _weights(second), stays


def _in_layers(name: str) -> bool:
    """Whether ``name`` is a folder of plain safetensors, which can be read layer by layer."""
    source = locate(name)
    folder = Path(source.place)
    if source.gguf_file or not source.local or not any(folder.glob("*.safetensors")):
        return False
    return '"quantization_config"' not in (folder / "config.json").read_text(encoding="utf-8")


def _check_depth(names: Sequence[str], models: Sequence[LayeredModel]) -> None:
    if len(models[0].layers) != len(models[1].layers):
        counts = " and ".join(str(len(each.layers)) for each in models)
        raise ValueError(
            f"model {names[0]!r} and base {names[1]!r} have {counts} layers: must be as many"
        )


def _by_layers(
    models: Sequence[LayeredModel], stays: Selection
) -> Iterator[tuple[_Weights, _Weights, Selection]]:
    """Of a selection that is in decoder layers alone."""
    for index in range(len(models[0].layers)):
        for each in models:
            each.load(index, each.read(index))
        start = f"{models[0].path}.{index}."
        yield _weights(models[0].model), _weights(models[1].model), stays.within(start)
        for each in models:
            each.unload(index)


def _weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Every parameter by the name that it has without adapters."""
    inner = peft.inner_model(model)
    active = peft.active_adapters(model) if inner is not None else ()
    whole = check_whole(model if inner is None else inner)
    layers, saved = peft.adapted(whole), peft.saved_whole(whole)
    # Of a module that trains whole, the copy that the forward pass uses counts.
    used = {}
    for each, wrapper in saved.items():
        copies = [f"modules_to_save.{adapter}" for adapter in active]
        own = {part for part, _ in wrapper.named_modules()}
        used[each] = next((copy for copy in copies if copy in own), "original_module")
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in whole.named_modules():
        if any(name.startswith(f"{each}.") and f"{each}.base_layer" not in name for each in layers):
            continue  # a tensor of an adapter
        plain = name.replace(".base_layer", "")
        for each, part in used.items():
            kept = f"{each}.{part}"
            if name == kept or name.startswith(f"{kept}."):
                plain = each + name[len(kept) :]
            elif name.startswith(f"{each}."):
                plain = ""
        for leaf in module._parameters:
            if plain or not name:
                found[f"{plain}.{leaf}" if plain else leaf] = _getter(module, leaf)
    return found


def _getter(module: nn.Module, leaf: str) -> Callable[[], Tensor]:
    def get() -> Tensor:
        with torch.no_grad(), at_hand(module):
            unpacked = dequantised(module) if leaf == "weight" else None
            own = module._parameters[leaf] if unpacked is None else unpacked
            assert own is not None
            return own.detach().cpu()

    return get


def _compare(name: str, now: Tensor, before: Tensor, stays: Tensor) -> tuple[int, int]:
    """How many of the entries ``stays``, bool ``[...]``, differ, and how many there are.

    Counted as the mask does: where whole rows must stay, rows; of a parameter that must stay whole,
    its entries along the first dimension.
    """
    if now.shape != before.shape or now.dtype != before.dtype:
        raise ValueError(
            f"parameter {name!r} is {now.dtype} {list(now.shape)} in model and {before.dtype} "
            f"{list(before.shape)} in base: load both in one dtype, and with one vocabulary"
        )
    if stays.numel() == 1 and now.dim():
        stays = stays.expand(len(now), *stays.shape[1:])
    differ = (now != before) & ~(now.isnan() & before.isnan()) & stays  # [...]
    along = [dim for dim, size in enumerate(stays.shape) if size == 1]
    return int((differ.any(along) if along else differ).sum()), int(stays.sum())
