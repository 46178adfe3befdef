"""Tiny models of which units are taken out, and what of them is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
)

from ssah.units import UnitSet, find_modules

SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TOKENS = torch.arange(1, 25).view(2, 12)


def make(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = Auto.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # transformers starts biases at zero
    return model


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return make(LlamaConfig(**{**SIZE, **options}), dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return make(GPT2Config(n_embd=16, n_inner=24, n_layer=2, n_head=4, vocab_size=40), dtype)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-bf16": lambda: llama(torch.bfloat16),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(mlp_bias=True, attention_bias=True),
    "gpt2": gpt2,
    "gpt2-bf16": lambda: gpt2(torch.bfloat16),
    "phi3": lambda: make(Phi3Config(**SIZE)),
}


def some_units(model: nn.Module, share: float = 0.3, seed: int = 0) -> UnitSet:
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return UnitSet.random(int(share * sum(sizes.values())), sizes, seed)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter as integers, so that -0.0 and NaN payloads count as well."""
    kinds = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    return {
        name: parameter.detach().clone().view(kinds[parameter.element_size()])
        for name, parameter in model.named_parameters()
    }


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = bits(model)
    assert list(after) == list(before)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved == []


def columns(model: nn.Module, name: str) -> Tensor:
    """B's weight with units first."""
    weight = model.get_submodule(name).weight
    return weight.T if isinstance(model.get_submodule(name), nn.Linear) else weight


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
