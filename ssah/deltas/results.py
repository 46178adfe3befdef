"""Where a computed model goes: a folder that ``from_pretrained`` reads, or a state dict."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssah.deltas.matching import Deltas
from ssah.deltas.weights import FolderWeights, MemoryWeights
from ssah.models import copy_beside, write_checkpoint
from ssah.storage import check_new, whole_folder
from ssah.version import __version__

RECORD = "delta.json"  # beside the weights: what they were computed from, and how

Out: TypeAlias = "str | os.PathLike[str] | None"

# Gives the tensor of a name, [...] in the dtype that the first tuned model has it in.
Maker: TypeAlias = Callable[[str], Tensor]


def finished(
    deltas: Deltas, out: Out, edit: Mapping[str, Any], plan: Callable[[], Maker]
) -> Path | dict[str, Tensor]:
    """Compute a model: a folder where the tuned model is one, else a state dict.

    Args:
        deltas: the models.
        out: the folder, where the first tuned model is one; else None.
        edit: plain data, what is done, for the record.
        plan: looks at the weights as far as need be, and gives what makes each tensor. Called once
            it is known that there is a place for the result.

    Returns:
        the folder; or name -> tensor ``[...]`` on the CPU, which shares no memory with the models,
        for ``model.load_state_dict``. Tied names have one tensor.

    Raises:
        ValueError: ``out`` is missing, or given where there is nothing to write it beside.
        FileExistsError: it has something in it.
    """
    first = deltas.tuned[0]
    if isinstance(first, FolderWeights):
        if out is None:
            raise ValueError("out is None, must be a folder where the tuned model is one")
        check_new(out)
        return _written(deltas, first, Path(out), edit, plan())
    if out is not None:
        raise ValueError(
            f"out is {os.fspath(out)!r}, must be None where {first.about!r} is no folder of "
            "safetensors: give the result to model.load_state_dict, and call model.save_pretrained"
        )
    assert isinstance(first, MemoryWeights)
    make = plan()
    made = {name: make(name).clone() for name in deltas.names}
    # All names in the order of the model, so that it loads strictly.
    return {name: made[first.tied.get(name, name)] for name in first.state}


@torch.no_grad()
def put_weights(model: PreTrainedModel, made: Path | dict[str, Tensor]) -> float:
    """Give a model in memory, in place, the weights that were computed of models in memory.

    Args:
        model: gets them.
        made: what an edit returned: name -> ``[...]``.

    Returns:
        The fraction of all parameters that are others now.

    Raises:
        TypeError: the weights were written to a folder.
    """
    if not isinstance(made, dict):
        raise TypeError(f"made is the folder {os.fspath(made)!r}, must be a state dict: load it")
    changed = total = 0
    # Of tied weights there is one here, under one of the names that the state has.
    for name, own in model.named_parameters():
        changed += int((made[name].to(own) != own).sum())
        total += own.numel()
    model.load_state_dict(made)
    return changed / total


def _written(
    deltas: Deltas, first: FolderWeights, out: Path, edit: Mapping[str, Any], make: Maker
) -> Path:
    names = {first.key(name): name for name in deltas.names}
    with whole_folder(out) as folder:
        copy_beside(first.folder, folder)
        record = {"version": __version__, **edit, **deltas.describe()}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_checkpoint(folder, first.checkpoint, list(names), lambda key: make(names[key]))
    return out
