"""Where each architecture keeps its depth-2 modules: one entry each, and nothing else anywhere.

Only :mod:`ssah.units` reads these entries. An architecture that is not here needs one line in
`FAMILIES`, or one call of :func:`register_family` by whoever uses it. One that keeps its layers as
Llama does, for example, is ``"smollm3": _LLAMA``. What the fields of an entry mean is told in
:mod:`ssah.units.family`.
"""

from __future__ import annotations

from dataclasses import replace

from ssah.units.family import FFN, Attention, Experts, Family, NotCovered, check_family


def _gated_ffn(module: str) -> FFN:
    return FFN(
        down=f"{module}.down_proj",
        up=f"{module}.up_proj",
        gate=f"{module}.gate_proj",
        module=module,
        act=f"{module}.act_fn",
        last=True,  # attention runs before it
    )


# ------------------------------------------------------------------- parts that several entries use

_GATED_FFN = _gated_ffn("mlp")
# One projection, whose output is gate and then up.
_FUSED_FFN = FFN(
    down="mlp.down_proj",
    up="mlp.gate_up_proj",
    fused=True,
    module="mlp",
    act="mlp.activation_fn",
    last=True,
)
_PLAIN_FFN = FFN(down="mlp.down_proj", up="mlp.up_proj")
_GPT2_FFN = FFN(down="mlp.c_proj", up="mlp.c_fc")
_NEOX_FFN = FFN(down="mlp.dense_4h_to_h", up="mlp.dense_h_to_4h")

_SELF_ATTENTION = Attention(
    down="self_attn.o_proj",
    value="self_attn.v_proj",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
)
_FUSED_SELF_ATTENTION = Attention(
    down="self_attention.dense", value="self_attention.query_key_value", layout="qkv_per_head"
)

# A layer has it in place of ``self_attn``: of such a layer only the FFN is scored.
_LINEAR_ATTENTION = NotCovered(
    "linear_attn",
    "linear attention: a recurrent state lies between its projections, not V -> O",
    instead="attention",
)
# A row of V that feeds several layers cannot be frozen or trained for one of them.
_SHARED_VALUES = (
    NotCovered(
        "self_attn.is_kv_shared_layer", "takes keys and values of an earlier layer", "attention"
    ),
    NotCovered(
        "self_attn.store_full_length_kv",
        "its keys and values also serve later layers",
        "attention",
        setting="num_kv_shared_layers",
    ),
)
_PER_LAYER_INPUT = NotCovered(
    "per_layer_input_gate", "per-layer embeddings: one factor is a table, not a projection"
)

# ------------------------------------------------------------- layers that several entries lay out

_LLAMA = Family(layers="layers", ffn=_GATED_FFN, attention=_SELF_ATTENTION, maskless=True)
# The FFN of `_LLAMA` stays: it is that of a mixture's dense layers.
_ROUTED = replace(_LLAMA, experts=Experts())
_SHARED_EXPERT = replace(_ROUTED, experts=Experts(shared=_gated_ffn("mlp.shared_expert")))
_SHARED_EXPERTS = replace(_ROUTED, experts=Experts(shared=_gated_ffn("mlp.shared_experts")))
_DEEPSEEK = replace(
    _SHARED_EXPERTS,
    attention=Attention(down="self_attn.o_proj", value="self_attn.kv_b_proj", layout="latent"),
)
_GLM = replace(_LLAMA, ffn=_FUSED_FFN)
_NEMOTRON = replace(_LLAMA, ffn=_PLAIN_FFN)
_BLOOM = Family(layers="h", ffn=_NEOX_FFN, attention=_FUSED_SELF_ATTENTION, maskless=True)
# Its query projection computes a gate beside each query, which multiplies what enters O.
_QWEN_HYBRID = replace(
    _LLAMA,
    attention=replace(_SELF_ATTENTION, gate="self_attn.q_proj"),
    not_covered=(_LINEAR_ATTENTION,),
)
_QWEN_HYBRID_EXPERTS = replace(_QWEN_HYBRID, experts=_SHARED_EXPERT.experts)

# ---------------------------------------------------------- `model_type` of the text model -> entry

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "granite": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "mixtral": _ROUTED,
    "qwen2_moe": _SHARED_EXPERT,
    "qwen3_moe": _ROUTED,
    "olmoe": _ROUTED,
    "gpt_oss": _ROUTED,
    "phimoe": _ROUTED,
    "granitemoe": replace(_ROUTED, experts=Experts("block_sparse_moe.experts")),
    "hunyuan_v1_moe": replace(_ROUTED, experts=Experts(shared=_gated_ffn("mlp.shared_mlp"))),
    "glm4_moe": _SHARED_EXPERTS,
    "ernie4_5_moe": _SHARED_EXPERTS,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "olmo3": _LLAMA,
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "exaone4": _LLAMA,
    "seed_oss": _LLAMA,
    "glm": _GLM,
    "glm4": _GLM,
    "arcee": _NEMOTRON,
    "nemotron": _NEMOTRON,
    "starcoder2": replace(_LLAMA, ffn=_GPT2_FFN),
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "qwen3_next": _QWEN_HYBRID_EXPERTS,
    "qwen3_5_text": _QWEN_HYBRID,
    "qwen3_5_moe_text": _QWEN_HYBRID_EXPERTS,
    "olmo_hybrid": replace(_LLAMA, not_covered=(_LINEAR_ATTENTION,)),
    "gemma3n_text": replace(
        _LLAMA,
        # In some layers only the largest gates pass: the model's own code runs.
        ffn=replace(_GATED_FFN, module=None, act=None, last=False),
        not_covered=(
            *_SHARED_VALUES,
            NotCovered("laurel", "learned augmented residual: of low rank, without activation"),
            _PER_LAYER_INPUT,
        ),
    ),
    "gemma4_text": replace(
        _LLAMA,
        experts=Experts("experts", shared=_GATED_FFN),  # beside the FFN, not in place of it
        not_covered=(
            *_SHARED_VALUES,
            NotCovered(
                "self_attn.use_alternative_attention",
                "one projection computes keys and values",
                "attention",
            ),
            _PER_LAYER_INPUT,
        ),
    ),
    "phi": replace(
        _LLAMA,
        ffn=FFN(down="mlp.fc2", up="mlp.fc1"),
        attention=replace(_SELF_ATTENTION, down="self_attn.dense"),
    ),
    "phi3": replace(
        _GLM,
        attention=Attention(down="self_attn.o_proj", value="self_attn.qkv_proj", layout="qkv"),
    ),
    "gpt2": Family(
        layers="h",
        ffn=_GPT2_FFN,
        attention=Attention(down="attn.c_proj", value="attn.c_attn", layout="qkv"),
        maskless=True,
    ),
    "gpt_bigcode": Family(
        layers="h",
        ffn=_GPT2_FFN,
        attention=Attention(down="attn.c_proj", value="attn.c_attn", layout="qkv_per_head"),
        maskless=True,
    ),
    "gptj": Family(
        layers="h",
        ffn=FFN(down="mlp.fc_out", up="mlp.fc_in"),
        attention=Attention(
            down="attn.out_proj", value="attn.v_proj", query="attn.q_proj", key="attn.k_proj"
        ),
        maskless=True,
    ),
    "gpt_neox": Family(
        layers="layers",
        ffn=_NEOX_FFN,
        attention=Attention(
            down="attention.dense", value="attention.query_key_value", layout="qkv_per_head"
        ),
        maskless=True,
    ),
    "opt": Family(
        layers="layers",
        ffn=FFN(down="fc2", up="fc1"),
        attention=replace(_SELF_ATTENTION, down="self_attn.out_proj"),
        maskless=True,
    ),
}

_STATE_SPACE = (
    "its layers are selective state spaces, with neither an FFN nor attention: there is no V -> O"
)
# Architectures that have no depth-2 module, and why.
WITHOUT_MODULES: dict[str, str] = dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _STATE_SPACE)

# Where llama.cpp has another word for an architecture than transformers: model_type -> its word.
_GGUF_WORDS = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "hunyuan_v1_moe": "hunyuan-moe",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_text": "qwen35",
}


def register_family(model_type: str, family: Family, *, replace: bool = False) -> None:
    """Teach the library the architecture ``model_type``.

    Args:
        model_type: ``model.config.get_text_config().model_type``, e.g. ``"llama"``.
        family: where that architecture keeps its depth-2 modules.
        replace: allow a known ``model_type`` to be described anew.

    Raises:
        TypeError: ``family`` is not a :class:`Family`.
        ValueError: ``model_type`` is known and ``replace`` is False, or the entry has no FFN,
            attention or experts, or contradicts itself.
    """
    check_family(family)
    if model_type in FAMILIES and not replace:
        raise ValueError(
            f"model_type {model_type!r} is already registered; pass replace=True to redefine it"
        )
    FAMILIES[model_type] = family


def gguf_architecture(model_type: str) -> str:
    """The word of GGUF files for an architecture: ``"llama"`` for ``"mistral"``."""
    return _GGUF_WORDS.get(model_type, model_type.removesuffix("_text"))
