"""Tiny random models of every family, and ragged batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 128
IGNORED = -100

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {**_COMMON, "intermediate_size": 72, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}

# Family -> a configuration with two small layers. Those with shared key/value heads have two
# query heads for each; those with a window have one shorter than the batches below.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama_tied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama_bias": lambda: LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_LLAMA, head_dim=16, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_GEMMA, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA),
    "granite": lambda: GraniteConfig(**_LLAMA, logits_scaling=3.0, residual_multiplier=0.7),
    "phi3": lambda: Phi3Config(**_LLAMA),
    "olmo2": lambda: Olmo2Config(**_LLAMA),
    "gpt2": lambda: GPT2Config(**{k: v for k, v in _COMMON.items() if k != "pad_token_id"}),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=72, word_embed_proj_dim=32),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=72),
}

_ROUTED = {**_LLAMA, "num_experts_per_tok": 2}
_LATENT = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}

# Mixtures of experts; two families have a dense first layer, three an FFN beside the experts.
EXPERTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**_ROUTED, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_ROUTED,
        num_experts=5,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_ROUTED, num_experts=4, moe_intermediate_size=24, head_dim=16
    ),
    "olmoe": lambda: OlmoeConfig(**_ROUTED, num_experts=4),
    "gpt_oss": lambda: GptOssConfig(
        **_ROUTED, num_local_experts=4, head_dim=16, sliding_window=6, swiglu_limit=0.5
    ),
    "deepseek_v2": lambda: DeepseekV2Config(**_LATENT),
    "deepseek_v3": lambda: DeepseekV3Config(**_LATENT, n_group=2, topk_group=1),
}


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The family's tiny model with random weights, biases and norms, in evaluation mode."""
    config = {**FAMILIES, **EXPERTS}[name]()
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or key.endswith("_bias"):  # experts have a bias each
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    return model.eval()


LENGTHS = (11, 4, 9, 7)


def rows(lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of every row; the first third of a row is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3 + 1] = IGNORED
        result.append((ids, labels))
    return result


def collate(
    data: Sequence[tuple[Tensor, Tensor]], *, side: str = "right", labels: bool = True
) -> dict[str, Tensor]:
    """One padded batch with ``input_ids``, ``attention_mask`` and, unless told, ``labels``."""
    length = max(len(ids) for ids, _ in data)
    batch = {
        "input_ids": torch.zeros(len(data), length, dtype=torch.int64),
        "attention_mask": torch.zeros(len(data), length, dtype=torch.int64),
        "labels": torch.full((len(data), length), IGNORED),
    }
    for i, (ids, own) in enumerate(data):
        here = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        batch["input_ids"][i, here] = ids
        batch["attention_mask"][i, here] = 1
        batch["labels"][i, here] = own
    if not labels:
        del batch["labels"]
    return batch
