"""Quantised models of every scheme, and what their weights stand for.

That is read from the module itself: its output on the identity. The fixtures that make the models
are in tests/models/conftest.py.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import bnb_layouts
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution import METRICS
from ssah.units import find_modules

Build = Callable[..., PreTrainedModel]


def missing(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")


def _bnb(**options: Any) -> Any:
    missing("bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    # It warns of every product that its input is cast.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**options)


def _torchao(name: str, **options: Any) -> Any:
    missing("torchao")
    from torchao import quantization
    from transformers import TorchAoConfig

    if "group" in options:
        options["granularity"] = quantization.PerGroup(options.pop("group"))
    return TorchAoConfig(getattr(quantization, name)(**options))


# What each scheme is called, and its configuration; some activations are over the threshold.
SCHEMES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bnb-8bit": (
        "bitsandbytes 8-bit",
        lambda: _bnb(load_in_8bit=True, llm_int8_threshold=1.5),
    ),
    "bnb-fp4": ("bitsandbytes 4-bit", lambda: _bnb(load_in_4bit=True)),
    "bnb-nf4": (
        "bitsandbytes 4-bit",
        lambda: _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "torchao-int8": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao-int8-dynamic": ("torchao", lambda: _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao-int4": (
        "torchao",
        lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32),
    ),
    "gguf": ("packed GGUF", lambda: missing("gguf", "accelerate")),
}
FOUR_BIT = ("bnb-fp4", "bnb-nf4")
# 4-bit schemes on a CPU with AVX512-BF16, which computes with bfloat16: before a model has run,
# and after it.
LAID_OUT = tuple(f"{name} {layout}" for name in FOUR_BIT for layout in bnb_layouts.NEW)
SCHEMES |= {name: SCHEMES[name.split()[0]] for name in LAID_OUT}
# How far the product of value and scale moves at most when both are rounded to bfloat16.
ROUNDED = (1 + 2**-8) ** 2 - 1
# Those that round what enters a module; the first two by the largest of its channels.
ROUNDING = ("bnb-8bit", "torchao-int8-dynamic", *LAID_OUT)


def stands_for(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[out, in]`` that a packed module computes with, from what it puts out."""
    if getattr(module.weight, "act_quant_kwargs", None) is not None:
        return module.weight.qdata * module.weight.scale  # it rounds even the identity
    with torch.no_grad():
        out = module(torch.eye(module.in_features, dtype=dtype))
        out = out - module(torch.zeros(1, module.in_features, dtype=dtype))
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        return bnb_layouts.computed(module)  # it rounds what it puts out
    return out.t()


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: stands_for(m.down, model.dtype) for n, m in find_modules(model).items()}


def passing(model: PreTrainedModel, metric: str) -> nn.Module:
    """``model``, or where it passes no gradient although the metric needs one, a copy that does."""
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    laid_out = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return bnb_layouts.differentiable(model) if laid_out and metric in METRICS[2:] else model
