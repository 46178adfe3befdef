"""The words in which an architecture is described: where a decoder layer keeps its depth-2 modules.

All paths are relative to one decoder layer. Llama, for example, is

    Family(
        layers="layers",
        ffn=FFN(down="mlp.down_proj", up="mlp.up_proj", gate="mlp.gate_proj"),
        attention=Attention(down="self_attn.o_proj", value="self_attn.v_proj"),
    )

which says that B of the FFN of layer 3 is ``model.layers.3.mlp.down_proj``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

ValueLayout = Literal["separate", "qkv", "qkv_per_head", "latent"]
VALUE_LAYOUTS: tuple[ValueLayout, ...] = get_args(ValueLayout)


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

    How many query heads share a key/value head follows from the width of ``value``. Units are
    channels of V and O; the rows of Q and K that a head has are in no unit.

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
        query, key: paths of the projections that compute queries and keys, head by head, where
            ``layout`` is ``"separate"``. Without them units are known, and heads are not.
    """

    down: str
    value: str
    layout: ValueLayout = "separate"
    gate: str | None = None
    query: str | None = None
    key: str | None = None

    @property
    def has_heads(self) -> bool:
        """Whether it says which rows of queries, keys and values each head has."""
        if self.layout == "separate":
            return self.query is not None and self.key is not None
        return self.layout != "latent"


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


def attribute_at(module: nn.Module, path: str) -> object:
    """The attribute of ``module`` at a dotted path of an entry, None where there is none."""
    # Not get_submodule: some paths name a flag or a number of the layer, or nothing.
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def check_family(family: Family) -> None:
    """Refuse an entry that contradicts itself; what of it a model lacks is seen with the model.

    Raises:
        TypeError: ``family`` is not a :class:`Family`.
        ValueError: it has no FFN, attention or experts, or two of its fields do not go together.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family is a {type(family).__name__}, must be a Family")
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


def _check_ffn(name: str, ffn: FFN | None) -> None:
    if ffn is None:
        return
    # Only a gated product has a fused operator, and its name is that of the activation.
    if ffn.module is not None and (ffn.act is None or not (ffn.fused or ffn.gate is not None)):
        raise ValueError(f"{name}.module needs {name}.act, and a gate or fused=True")
    if ffn.fused and ffn.gate is not None:
        raise ValueError(f"{name} is fused: {name}.gate must be None")
