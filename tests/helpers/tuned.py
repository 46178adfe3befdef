"""Tiny models beside what training might have made of them, in memory and as folders."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tiny_models import build
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama_tied", "gpt2", "mixtral", "gemma3")  # tied, and grouped-query attention; Conv1D


def tuned_from(base: PreTrainedModel, seed: int = 1, share: float = 0.7) -> PreTrainedModel:
    """A copy of a model in which that share of every weight has changed by a few per cent."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            moved = torch.rand(parameter.shape, generator=generator) < share
            parameter.add_((noise * moved).to(parameter.dtype))
    return model


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and a model tuned from it."""
    base = build(name, dtype=dtype)
    return base, tuned_from(base)


def saved(model: PreTrainedModel, folder: Path, shard: str = "50GB") -> str:
    """The folder that a model was written to; ``shard`` is the size of its files."""
    model.save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def loaded(folder: Path | str) -> dict[str, Tensor]:
    """What ``from_pretrained`` makes of a folder: a state dict, tied names included."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    return dict(model.state_dict())


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        same = found[name].contiguous().flatten().view(torch.uint8)
        assert same.equal(tensor.contiguous().flatten().view(torch.uint8)), name
