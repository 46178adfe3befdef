"""An update or an ablation as a LoRA adapter that other programs load: ``export_lora``.

Whatever changes k rows or k columns of a projection is a product of rank k
(`ssah.training.adapters.factors`). Written in PEFT's form it loads without this library. Example:
of each FFN 12 units trained, so that gate and up changed in 12 rows, and down in 12 columns: three
adapters of rank 12 a layer. Each module has its own rank (``rank_pattern``), and ``lora_alpha`` is
the rank, so that the product is added as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.models import nonfinite
from ssah.storage import check_new, whole_folder
from ssah.training.adapters.card import SERVED, LoraExport, card
from ssah.training.adapters.changed import Change, changed_weights, checked_base
from ssah.training.adapters.factors import Factors, factors
from ssah.training.in_place import listed
from ssah.training.saving import public_name
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
            units that are to be ablated.
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
    name = public_name(model_name(model))
    made = _record(name, found, model)
    conv = any(isinstance(model.get_submodule(each), Conv1D) for each in found)
    config = json.dumps(_config(made, fan_in_fan_out=conv), indent=2) + "\n"
    files = {
        "adapter_model.safetensors": safetensors.torch.save(
            _tensors(model, found, made), metadata={"format": "pt"}
        ),
        "adapter_config.json": config.encode(),
        "README.md": card(made).encode(),
    }
    with whole_folder(folder) as made_in:
        for name, content in files.items():
            (made_in / name).write_bytes(content)
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


def _tensors(
    model: nn.Module, found: Mapping[str, _Adapter], made: LoraExport
) -> dict[str, Tensor]:
    """The tensors of the adapter by PEFT's names for them."""
    tensors: dict[str, Tensor] = {}
    for owner, each in found.items():
        n, out = features(model.get_submodule(owner))
        dtype = next(part.change.dtype for part in (each.weight, each.bias) if part)
        a, b = torch.zeros(1, n, dtype=dtype), torch.zeros(out, 1, dtype=dtype)
        if each.weight is not None:
            a, b = each.weight.a, each.weight.b
        prefix = f"base_model.model.{owner}"
        tensors[f"{prefix}.lora_A.weight"] = a.contiguous()  # [rank, in]
        tensors[f"{prefix}.lora_B.weight"] = b.contiguous()  # [out, rank]
        if made.biases:  # all adapters of one file have a bias, or none of them
            shift = torch.zeros(out, dtype=dtype)
            if each.bias is not None:
                shift = (each.bias.b @ each.bias.a)[:, 0]
            tensors[f"{prefix}.lora_B.bias"] = shift  # [out]
    return tensors


def _config(made: LoraExport, *, fan_in_fan_out: bool) -> dict[str, Any]:
    """PEFT's ``adapter_config.json``. Programs that know no ``rank_pattern`` (vLLM) take each rank
    from its tensors, and the scale from ``lora_alpha / r``: both say one."""
    others = {name: rank for name, rank in made.ranks.items() if rank != made.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": made.base_model,
        "r": made.rank,
        "lora_alpha": made.rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(made.ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(made.biases),
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
