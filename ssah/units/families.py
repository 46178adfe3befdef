"""Where each architecture keeps its depth-2 modules: one declarative entry per family.

Only :mod:`ssah.units` reads these entries. All paths are relative to one decoder layer. To teach
the library another architecture, describe it with a :class:`Family` and call
:func:`register_family`; nothing else in the library knows about architectures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

ValueLayout = Literal["separate", "qkv", "qkv_per_head", "latent"]
VALUE_LAYOUTS: tuple[ValueLayout, ...] = ("separate", "qkv", "qkv_per_head", "latent")


@dataclass(frozen=True)
class FFN:
    """A feed-forward module: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` ungated.

    Attributes:
        down: path of B.
        up: path of the up projection; for ``fused`` the projection whose output is gate, then up.
        gate: path of the gate projection; None for an ungated or a fused module.
        fused: whether ``up`` holds gate (first half of its outputs) and up (second half).
        module: path of the module whose forward is exactly ``down(act(gate(x)) * up(x))``: the
            gated product then runs through one fused operator. None where there is no such module.
        act: path of the activation module; needed with ``module``.
        last: whether ``module`` runs after everything else in the layer that is a depth-2 module.
            B of the last layer then need not run where only its input is wanted.
    """

    down: str
    up: str
    gate: str | None = None
    fused: bool = False
    module: str | None = None
    act: str | None = None
    last: bool = False


@dataclass(frozen=True)
class Attention:
    """An attention module: B is the output projection O, A is the value projection V.

    How many query heads share a key/value head follows from the width of ``value``.

    Attributes:
        down: path of O.
        value: path of the projection that computes the values.
        layout: how the outputs of ``value`` are laid out. ``"separate"``: values alone, head by
            head. ``"qkv"``: all queries, all keys, all values. ``"qkv_per_head"``: of the first
            key/value head the queries that share it, its key and its value; then of the second,
            and so on. ``"latent"``: key (without position) and value of the first head, then of
            the second, both from one latent; A is what expands the latent, X the latent.
        gate: path of the query projection where it also computes a gate that multiplies what
            enters O: query and gate of the first head, then of the second. A is then V and gate.
    """

    down: str
    value: str
    layout: ValueLayout = "separate"
    gate: str | None = None


@dataclass(frozen=True)
class NotCovered:
    """A part of a layer that holds no units.

    Attributes:
        at: path of an attribute of the layer: this applies to every layer where it exists and is
            true.
        reason: why there are no units, for people.
        instead: the kind of depth-2 module that such a layer goes without, or None if the part is
            there beside them.
        setting: name of a setting of the configuration; where it is 0 or missing, this does not
            apply.
    """

    at: str
    reason: str
    instead: Literal["mlp", "attention"] | None = None
    setting: str | None = None


@dataclass(frozen=True)
class Experts:
    """Routed experts, whose weights are 3-D parameters, the first dimension running over experts.

    Attributes:
        module: path of the module that holds the parameters, of a class decorated with
            ``transformers.integrations.use_experts_implementation``, which says how they are laid
            out. Layers without such a module have the family's ``ffn``.
        shared: an FFN beside the routed experts that every token passes through, or None. Not in
            layers where the module that holds it is None.
    """

    module: str = "mlp.experts"
    shared: FFN | None = None


@dataclass(frozen=True)
class Family:
    """The depth-2 modules of one architecture.

    Attributes:
        layers: path of the list of decoder layers in the decoder (``model.get_decoder()``).
        ffn: the layer's feed-forward module, or None. Of a mixture of experts: that of its dense
            layers.
        attention: the layer's attention module, or None.
        maskless: whether a right-padded batch may be run without its attention mask, because
            attention is causal and positions default to 0, 1, 2, ... for the attended tokens.
        experts: the layer's mixture of experts, or None.
        not_covered: parts of its layers, or of some of them, that hold no units.
    """

    layers: str
    ffn: FFN | None
    attention: Attention | None
    maskless: bool = False
    experts: Experts | None = None
    not_covered: tuple[NotCovered, ...] = ()


def _gated_ffn(module: str) -> FFN:
    return FFN(
        down=f"{module}.down_proj",
        up=f"{module}.up_proj",
        gate=f"{module}.gate_proj",
        module=module,
        act=f"{module}.act_fn",
        last=True,
    )


_GATED_FFN = _gated_ffn("mlp")
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

_SELF_ATTENTION = Attention(down="self_attn.o_proj", value="self_attn.v_proj")
_FUSED_SELF_ATTENTION = Attention(
    down="self_attention.dense", value="self_attention.query_key_value", layout="qkv_per_head"
)

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

_LLAMA = Family(layers="layers", ffn=_GATED_FFN, attention=_SELF_ATTENTION, maskless=True)
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
_QWEN_HYBRID = replace(
    _LLAMA,
    attention=replace(_SELF_ATTENTION, gate="self_attn.q_proj"),
    not_covered=(_LINEAR_ATTENTION,),
)
_QWEN_HYBRID_EXPERTS = replace(_QWEN_HYBRID, experts=_SHARED_EXPERT.experts)

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
        experts=Experts("experts", shared=_GATED_FFN),
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
        attention=Attention(down="attn.out_proj", value="attn.v_proj"),
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
        attention=Attention(down="self_attn.out_proj", value="self_attn.v_proj"),
        maskless=True,
    ),
}

_STATE_SPACE = (
    "its layers are selective state spaces, with neither an FFN nor attention: there is no V -> O"
)
# Architectures that have no depth-2 module, and why.
WITHOUT_MODULES: dict[str, str] = dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _STATE_SPACE)


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
    if not isinstance(family, Family):
        raise TypeError(f"family is a {type(family).__name__}, must be a Family")
    if model_type in FAMILIES and not replace:
        raise ValueError(
            f"model_type {model_type!r} is already registered; pass replace=True to redefine it"
        )
    attention, experts = family.attention, family.experts
    if family.ffn is None and attention is None and experts is None:
        raise ValueError("family has no ffn, attention or experts; it must have at least one")
    _check_ffn("family.ffn", family.ffn)
    _check_ffn("family.experts.shared", None if experts is None else experts.shared)
    if attention is not None and attention.layout not in VALUE_LAYOUTS:
        raise ValueError(
            f"family.attention.layout is {attention.layout!r}, must be one of {VALUE_LAYOUTS}"
        )
    for part in family.not_covered:
        if part.instead not in (None, "mlp", "attention"):
            raise ValueError(
                f"family.not_covered has a part instead of {part.instead!r}, must be instead of "
                "'mlp', 'attention' or None"
            )
    FAMILIES[model_type] = family


def _check_ffn(name: str, ffn: FFN | None) -> None:
    if ffn is None:
        return
    if ffn.module is not None and (ffn.act is None or not (ffn.fused or ffn.gate is not None)):
        raise ValueError(f"{name}.module needs {name}.act, and a gate or fused=True")
    if ffn.fused and ffn.gate is not None:
        raise ValueError(f"{name} is fused: {name}.gate must be None")
