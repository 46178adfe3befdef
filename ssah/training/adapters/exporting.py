"""An update or an ablation as a LoRA adapter that other programs load: ``export_lora``.

Whatever changes k rows or k columns of a projection is a product of rank k
(`ssah.training.adapters.factors`). Written in PEFT's form it loads without this library. Example:
of each FFN 12 units trained, so that gate and up changed in 12 rows, and down in 12 columns: three
adapters of rank 12 a layer. Each module has its own rank (``rank_pattern``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ssah.models import nonfinite
from ssah.storage import check_new, public_name, whole_folder
from ssah.training.adapters.card import SERVED, LoraExport, exported_card
from ssah.training.adapters.changed import Change, changed_weights, checked_base
from ssah.training.adapters.factors import Factors, factors
from ssah.training.adapters.writing import LoraFactors, write_adapter
from ssah.training.installing import listed
from ssah.units import features, model_name


@dataclass
class _Adapter:
    """Of one projection: the changes of its weight, and of its bias as a column ``[out, 1]``."""

    weight: Factors | None = None
    bias: Factors | None = None


def export_lora(
    change: Change,
    directory: str | os.PathLike[str],
    *,
    base: nn.Module | str | os.PathLike[str] | None = None,
    max_rank: int | None = SERVED[-1],
) -> LoraExport:
    """Write a change on some units of a model as a LoRA adapter, exactly.

    Example: ``ssah.export_lora("runs/update", "runs/adapter", base="smollm2")``; then
    ``peft.PeftModel.from_pretrained(model, "runs/adapter")``.

    Args:
        change: what `UpdatePlan.save_pretrained` wrote; a plan that is in force, whose
            ``keep_originals()`` was called before training; a tuned model, or its folder; or the
            units, or a selection such as heads, that are to be ablated.
        directory: the folder to make; it may be there, but empty.
        base: the model that the change belongs to, in the dtype that it was trained in: a model,
            or what `ssah.models.load_model` takes. Not with a plan, which has it.
        max_rank: refuse adapters of a larger rank; None for any. vLLM serves up to 512.

    Returns:
        the ranks, and how exact the adapter is.

    Raises:
        TypeError, ValueError: the change is not on rows or columns of projections alone (an
            embedding, a norm, packed experts changed), or on more than ``max_rank``; nothing
            changed; base and change do not belong together.
        FileExistsError: the folder has something in it.
        FloatingPointError: a changed weight is NaN or infinite.
        ModelError: a model cannot be loaded.

    Source: LoRA, Hu et al., arXiv 2106.09685 (the form); S2FT, Yang et al., arXiv 2412.06289
    (updates of selected rows and columns, and merging them as adapters).
    """
    folder = check_new(directory)
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}, must be at least 1, or None for any rank")
    model = checked_base(change, base)
    found = _adapters(model, change, max_rank)
    made = _record(public_name(model_name(model)), found, model)
    modules = {name: model.get_submodule(name) for name in found}
    adapters = {
        name: _factors(modules[name], each, with_bias=bool(made.biases))
        for name, each in found.items()
    }
    conv = any(isinstance(each, Conv1D) for each in modules.values())
    with whole_folder(folder) as inside:
        write_adapter(inside, made.base_model, adapters, exported_card(made), fan_in_fan_out=conv)
    return made


def _adapters(model: nn.Module, change: Change, max_rank: int | None) -> dict[str, _Adapter]:
    """Projection -> its adapter, of those that ``change`` changed."""
    found: dict[str, _Adapter] = {}
    refused: list[str] = []
    # Closed at once where something is refused: meanwhile the model is inside `ablate`, say.
    with closing(changed_weights(change, model)) as pairs:
        for name, before, after in pairs:
            if torch.equal(before, after):
                continue
            bad = nonfinite([(name, before), (name, after)])
            if bad is not None:
                raise FloatingPointError(
                    f"{bad} is NaN or infinite before or after the change: no adapter can add that"
                )
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if not isinstance(module, nn.Linear | Conv1D) or leaf not in ("weight", "bias"):
                refused.append(f"{name} ({type(module).__name__})")
                continue
            pair = [each[:, None] if leaf == "bias" else each for each in (before, after)]
            if isinstance(module, Conv1D) and leaf == "weight":  # which keeps it as [in, out]
                pair = [each.t() for each in pair]
            made = factors(*pair)
            if made is None:  # zeros that differ in their sign alone
                continue
            if max_rank is not None and made.rank > max_rank:
                raise ValueError(
                    f"the change of {owner!r} has rank {made.rank}, must be at most "
                    f"max_rank={max_rank} (vLLM serves up to 512): train fewer units a module, "
                    "ship the update itself (ssah.load_update), or pass max_rank=None for programs "
                    "that take any rank"
                )
            setattr(found.setdefault(owner, _Adapter()), leaf, made)
    if refused:
        raise ValueError(
            f"{listed(refused)} changed, to which LoRA adds nothing: a change on rows or columns "
            "of nn.Linear or Conv1D projections is an adapter, one of embeddings, norms and packed "
            "experts is not. Train units of projections alone (train_only), or ship the update "
            "itself (ssah.load_update, ssah.attach)"
        )
    if not found:
        raise ValueError("nothing changed: the weights are those of the base model")
    # In the order of the model, so that the same change gives the same files, however it came.
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _record(name: str, found: Mapping[str, _Adapter], model: nn.Module) -> LoraExport:
    parts = [part for each in found.values() for part in (each.weight, each.bias) if part]
    return LoraExport(
        base_model=name,
        # A bias alone needs an adapter to stand in: one of rank 1 that adds zero.
        ranks={owner: each.weight.rank if each.weight else 1 for owner, each in found.items()},
        biases=tuple(owner for owner, each in found.items() if each.bias),
        changed=sum(part.changed for part in parts),
        inexact=sum(part.inexact for part in parts),
        error=max(part.error for part in parts),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _factors(module: nn.Module, own: _Adapter, *, with_bias: bool) -> LoraFactors:
    """What is added to a projection; where nothing is, zeros of rank one."""
    n, out = features(module)
    dtype = next(part.change.dtype for part in (own.weight, own.bias) if part)
    a, b = torch.zeros(1, n, dtype=dtype), torch.zeros(out, 1, dtype=dtype)
    if own.weight is not None:
        a, b = own.weight.a, own.weight.b
    if not with_bias:
        return LoraFactors(b, a)
    bias = torch.zeros(out, dtype=dtype)
    if own.bias is not None:
        bias = (own.bias.b @ own.bias.a)[:, 0]  # [out]
    return LoraFactors(b, a, bias)
