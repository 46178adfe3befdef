"""Biases that a model lacks and its configuration can express.

Example: `mlp_bias=True` of a Llama configuration gives gate, up and down of every layer a bias. To
get one for a single down, all of them are created, as zeros, so that the saved model can be loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def create_biases(model: nn.Module, lacking: list[str]) -> None:
    """Give the B of these modules a zero bias that the model's configuration knows about.

    Which flag adds which bias is found by building the model without memory from a changed
    configuration, so that what is created is what `from_pretrained` will look for.
    """
    flags, created = _bias_flags(model, lacking)
    for name, shape in created.items():
        owner = name.removesuffix(".bias")
        weight = model.get_parameter(f"{owner}.weight")
        bias = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        parameter = nn.Parameter(bias, requires_grad=weight.requires_grad)
        model.get_submodule(owner).register_parameter("bias", parameter)
    for config, flag in flags:
        setattr(config, flag, True)


def _bias_flags(
    model: nn.Module, lacking: list[str]
) -> tuple[list[tuple[Any, str]], dict[str, torch.Size]]:
    """Configuration flags that give these modules a bias, and every parameter that they add."""
    missing = {f"{name}.bias": name for name in lacking}
    flags: list[tuple[Any, str]] = []
    created: dict[str, torch.Size] = {}
    if isinstance(model, PreTrainedModel):
        present = _shapes(model)
        for part in ("", *type(model.config).sub_configs):
            config = getattr(model.config, part) if part else model.config
            if config is None:  # a part that this model goes without
                continue
            off = [f for f, v in vars(config).items() if v is False and f.endswith("bias")]
            for flag in off:
                # What the flag does is not read but tried: on the meta device it costs no memory.
                variant = copy.deepcopy(model.config)
                setattr(getattr(variant, part) if part else variant, flag, True)
                with torch.device("meta"):
                    shapes = _shapes(type(model)(variant))
                added = {name: shape for name, shape in shapes.items() if name not in present}
                # A flag may do more than add biases, and is left alone then.
                unchanged = present.items() <= shapes.items()
                if unchanged and missing.keys() & added.keys() and _are_biases(model, added):
                    flags.append((config, flag))
                    created |= added
    for parameter, name in missing.items():
        if parameter not in created:
            raise ValueError(
                f"{name} has no bias, and the configuration of {type(model).__name__} can express "
                "none, so that compensate=True has nowhere to put the units' mean output; "
                "use compensate=False, or leave these units out"
            )
    return flags, created


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}


def _are_biases(model: nn.Module, names: Mapping[str, torch.Size]) -> bool:
    """Whether all are biases of linear layers, so that zero in each changes no output."""
    modules = dict(model.named_modules())
    return all(
        name.endswith(".bias") and isinstance(modules.get(name.removesuffix(".bias")), nn.Linear)
        for name in names
    )
