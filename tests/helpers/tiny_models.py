"""Tiny random models of every family, and ragged batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
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
_HEADS = {**_LLAMA, "head_dim": 16}
_GEMMA = {**_HEADS, "query_pre_attn_scalar": 16, "sliding_window": 6}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.1,
}
_FALCON = {**_COMMON, "ffn_hidden_size": 72}
_GPT2 = {key: value for key, value in _COMMON.items() if key != "pad_token_id"}
_HYBRID = {
    **_LLAMA,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# The first layer keeps its values to itself, the next two give theirs to later ones of their type.
_SHARED_VALUES = {
    **_HEADS,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
    "num_kv_shared_layers": 1,
    "sliding_window": 6,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}


def _config(model_type: str, **options: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **options)


# Family -> a configuration with small layers, mostly two. Those with shared key/value heads have
# two query heads for each; those with a window have one shorter than the batches below.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("llama", **_LLAMA),
    "llama_tied": _config("llama", **_LLAMA, tie_word_embeddings=True),
    "llama_bias": _config("llama", **_LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": _config("mistral", **_HEADS, sliding_window=6),
    "ministral": _config(
        "ministral",
        **_HEADS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "ministral3": _config("ministral3", **_HEADS, rope_parameters=_YARN),
    "qwen2": _config("qwen2", **_LLAMA),
    "qwen3": _config("qwen3", **_HEADS),
    "gemma": _config("gemma", **_HEADS),
    "gemma2": _config("gemma2", **_GEMMA, final_logit_softcapping=3.0),
    "gemma3": _config("gemma3_text", **_GEMMA),
    "gemma3n": _config(
        "gemma3n_text",
        **_SHARED_VALUES,
        altup_num_inputs=2,
        laurel_rank=6,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "gemma4": _config(
        "gemma4_text", **_SHARED_VALUES, global_head_dim=24, use_double_wide_mlp=True
    ),
    "gemma4_one_projection": _config(
        "gemma4_text",
        **_HEADS,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=6,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "granite": _config("granite", **_LLAMA, logits_scaling=3.0, residual_multiplier=0.7),
    "olmo": _config("olmo", **_LLAMA, clip_qkv=1.0),
    "olmo2": _config("olmo2", **_LLAMA),
    "olmo3": _config(
        "olmo3",
        **_LLAMA,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cohere": _config("cohere", **_LLAMA, logit_scale=0.5, use_qk_norm=True),
    "cohere2": _config(
        "cohere2",
        **_HEADS,
        logit_scale=0.5,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "smollm3": _config("smollm3", **_LLAMA, no_rope_layers=[1, 0]),
    "stablelm": _config("stablelm", **_LLAMA, use_qkv_bias=True, partial_rotary_factor=0.5),
    "stablelm_parallel": _config(
        "stablelm",
        **_LLAMA,
        partial_rotary_factor=0.5,
        use_parallel_residual=True,
        qk_layernorm=True,
    ),
    "exaone4": _config(
        "exaone4",
        **_HEADS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "seed_oss": _config("seed_oss", **_HEADS, attention_bias=True),
    "glm": _config("glm", **{**_LLAMA, "head_dim": 12}, attention_bias=True),
    "glm4": _config("glm4", **{**_LLAMA, "head_dim": 12}),
    "arcee": _config("arcee", **_LLAMA),
    "nemotron": _config("nemotron", **_LLAMA),
    "starcoder2": _config("starcoder2", **_LLAMA, sliding_window=6),
    "bloom": _config("bloom", **_COMMON),
    # The layouts of Falcon-RW-1B, Falcon-7B and Falcon-40B.
    "falcon_alibi": _config(
        "falcon", **_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon": _config("falcon", **_FALCON),
    "falcon_new": _config("falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "qwen3_next": _config("qwen3_next", **_HYBRID, head_dim=16, num_experts=0),
    "qwen3_5": _config("qwen3_5_text", **_HYBRID, head_dim=16),
    "olmo_hybrid": _config("olmo_hybrid", **_HYBRID),
    "phi": _config("phi", **_LLAMA, qk_layernorm=True),
    "phi3": _config("phi3", **_LLAMA),
    "gpt2": _config("gpt2", **_GPT2),
    "gpt_bigcode": _config("gpt_bigcode", **_GPT2),
    "gpt_bigcode_heads": _config("gpt_bigcode", **_GPT2, multi_query=False),
    "gptj": _config("gptj", **_GPT2, rotary_dim=4),
    "gpt_neox": _config("gpt_neox", **_COMMON, intermediate_size=72),
    "opt": _config("opt", **_COMMON, ffn_dim=72, word_embed_proj_dim=32),
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

_SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}

# Mixtures of experts, some with a dense first layer, with an FFN beside the experts, or hybrids.
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
    "qwen3_next_experts": _config("qwen3_next", **_HYBRID, **_SHARED_EXPERT, head_dim=16),
    "qwen3_5_moe": _config("qwen3_5_moe_text", **_HYBRID, **_SHARED_EXPERT, head_dim=16),
    "gemma4_experts": _config(
        "gemma4_text",
        **_HEADS,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=6,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "phimoe": _config("phimoe", **_ROUTED, num_local_experts=4),
    "granitemoe": _config("granitemoe", **_ROUTED, num_local_experts=4, residual_multiplier=0.7),
    "hunyuan_v1_moe": _config(
        "hunyuan_v1_moe", **_LLAMA, head_dim=16, num_experts=4, moe_topk=[2, 2]
    ),
    "glm4_moe": _config(
        "glm4_moe",
        **_ROUTED,
        head_dim=16,
        moe_intermediate_size=24,
        n_routed_experts=4,
        first_k_dense_replace=1,
    ),
    "ernie4_5_moe": _config(
        "ernie4_5_moe",
        **_LLAMA,
        moe_k=2,
        moe_num_experts=4,
        moe_intermediate_size=24,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
}

# Tiny models that are checked whenever tests run. Every distinct entry of
# `ssah.units.families.FAMILIES` has one here at least.
CHOSEN = (
    *("llama_bias", "gemma2"),  # of 22 tiny models that share an entry
    *("gemma3n", "gemma4_experts", "glm", "nemotron", "starcoder2", "falcon_new", "bloom"),
    *("qwen3_next_experts", "qwen3_5", "olmo_hybrid", "phi", "phi3", "gpt2", "gpt_bigcode"),
    *("gpt_bigcode_heads", "gptj", "gpt_neox", "opt", "mixtral", "gpt_oss", "qwen2_moe"),
    *("deepseek_v3", "granitemoe", "hunyuan_v1_moe", "glm4_moe"),
)


def cases(*names: str) -> list[Any]:
    """Tiny models as cases of a test: whenever tests run those chosen, the others exhaustively."""
    return [
        pytest.param(name, marks=[] if name in CHOSEN else pytest.mark.exhaustive) for name in names
    ]


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The family's tiny model with random weights, biases and norms, in evaluation mode."""
    config = {**FAMILIES, **EXPERTS}[name]()
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if name in EXPERTS and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default one has no float64
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
