"""Which rows of Q, K and V make which head and channel that enter O, however they are laid out.

Channel c of query head h enters O at h * head_dim + c. It is made by the value head that h shares
with others: of ``queries = n_heads / n_kv_heads`` heads each. Count the outputs of the projection
in blocks of ``head_dim`` (q0 is the query of head 0, k0 and v0 the key and value of the first
key/value head). With four heads over two key/value heads, ``queries`` is 2:

    "separate"      v0 v1                       head h has block  h // 2
    "qkv"           q0 q1 q2 q3 k0 k1 v0 v1     head h has block  4 + 2 + h // 2
    "qkv_per_head"  q0 q1 k0 v0 q2 q3 k1 v1     head h has block  h // 2 * (2 + 2) + 2 + 1

Row block * head_dim + c is then what unit h * head_dim + c owns: heads that share values share it.
Queries and keys are found likewise. With ``"separate"`` they have projections of their own, where
head h has the rows h * n to (h + 1) * n - 1 of Q if Q has n rows a head (twice ``head_dim`` where
it computes a gate too). The fourth layout, ``"latent"`` (DeepSeek-V2, arXiv 2405.04434), has a key
and a value of different widths for each head and shares nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ssah.models import config_size, text_config
from ssah.units.depth_two import DepthTwoModule, UnitSlice, of_projections, output_rows
from ssah.units.family import Attention, ValueLayout
from ssah.units.projections import check_width, features, projection


@dataclass(frozen=True, eq=False)
class AttentionHeads:
    """The query heads of one attention module, and which entries of weights each one has.

    Attributes:
        name: O's qualified name in the model, by which the module of its units is known too.
        n_heads: how many query heads.
        n_kv_heads: how many key/value heads these share.
        inputs: rows of Q, K and V, and their biases: the index of each is int64
            ``[n_heads, entries of one head]``. Heads that share keys and values have the same.
        output: columns of O, likewise.
    """

    name: str
    n_heads: int
    n_kv_heads: int
    inputs: tuple[UnitSlice, ...]
    output: UnitSlice


def attention_module(model: nn.Module, layer: str, attention: Attention) -> DepthTwoModule:
    """V -> O of the decoder layer called ``layer``.

    Raises:
        ValueError: a projection is not what ``attention`` says, or its outputs are no values of so
            many heads.
    """
    name, value_name = f"{layer}.{attention.down}", f"{layer}.{attention.value}"
    down, value = projection(model, name), projection(model, value_name)
    n_units, n_heads = features(down)[0], config_size(model, "num_attention_heads")
    head_dim = n_units // n_heads
    units = torch.arange(n_units)
    head, channel = units // head_dim, units % head_dim  # [units] each
    if attention.layout == "latent":
        # Of one head: its key without position, its value.
        own = config_size(model, "qk_nope_head_dim") + head_dim
        check_width(value_name, value, n_heads * own, name)
        rows = (head + 1) * own - head_dim + channel
    else:
        n_kv_heads = _n_kv_heads(value, attention.layout, n_heads, head_dim)
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"module {value_name!r} has {features(value)[1]} outputs, which are no values of "
                f"{n_heads} heads of {head_dim} for {name!r}; register a family that fits the model"
            )
        blocks = _blocks(attention.layout, n_heads, n_kv_heads)
        check_width(value_name, value, blocks.count * head_dim, name)
        rows = blocks.value[head] * head_dim + channel
    inputs = output_rows(value_name, value, rows)
    if attention.gate is not None:
        # Query and gate of each head, head by head: the gate is the second half of a head's part.
        gate_name = f"{layer}.{attention.gate}"
        gate = projection(model, gate_name)
        check_width(gate_name, gate, 2 * n_units, name)
        inputs += output_rows(gate_name, gate, (2 * head + 1) * head_dim + channel)
    return of_projections(name, "attention", down, inputs)


def attention_heads(model: nn.Module, layer: str, attention: Attention) -> AttentionHeads:
    """The heads of the decoder layer called ``layer``.

    Raises:
        ValueError: the entry of the family does not say where queries and keys are, they come from
            a latent that all heads share, or as of `attention_module`.
    """
    family = text_config(model).model_type
    if attention.layout == "latent":
        raise ValueError(
            f"model is of the family {family!r}, whose heads cannot be selected: a part of the "
            "keys is one for all heads (latent attention); select units, layers or parameters"
        )
    module = attention_module(model, layer, attention)
    n_heads = config_size(model, "num_attention_heads")
    head_dim = module.n_units // n_heads
    value_name = f"{layer}.{attention.value}"
    value = model.get_submodule(value_name)
    n_kv_heads = _n_kv_heads(value, attention.layout, n_heads, head_dim)
    blocks = _blocks(attention.layout, n_heads, n_kv_heads)
    # A gate beside the query is a row of Q, which is a head's as a whole.
    inputs = [own for own in module.inputs if own.param.startswith(f"{value_name}.")]
    if attention.layout != "separate":
        for block in (blocks.query, blocks.key):
            inputs += output_rows(value_name, value, _rows(block, head_dim))
    elif attention.query is None or attention.key is None:
        raise ValueError(
            f"model is of the family {family!r}, whose heads cannot be selected: its entry does "
            "not say where queries and keys are; register it with Attention(query=..., key=...)"
        )
    else:
        kinds = ((attention.query, n_heads, blocks.query), (attention.key, n_kv_heads, blocks.key))
        for path, n, block in kinds:
            name = f"{layer}.{path}"
            own = projection(model, name)
            width = features(own)[1] // n
            check_width(name, own, n * width, module.name)
            inputs += output_rows(name, own, _rows(block, width))
    return AttentionHeads(
        module.name,
        n_heads,
        n_kv_heads,
        tuple(replace(own, index=own.index.reshape(n_heads, -1)) for own in inputs),
        replace(module.output, index=module.output.index.reshape(n_heads, -1)),
    )


def _n_kv_heads(value: nn.Module, layout: ValueLayout, n_heads: int, head_dim: int) -> int:
    """How many key/value heads the width of the projection that computes values has room for."""
    blocks = features(value)[1] // head_dim
    # A fused one has the queries too, and as many keys as values.
    return blocks if layout == "separate" else (blocks - n_heads) // 2


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Which block of outputs is whose; with ``"separate"``, each in its own projection.

    Attributes:
        count: blocks of the projection that computes the values.
        query, key, value: int64 ``[n_heads]``, the block of each query head.
    """

    count: int
    query: Tensor
    key: Tensor
    value: Tensor


def _blocks(layout: ValueLayout, n_heads: int, n_kv_heads: int) -> _Blocks:
    """The blocks of each query head; ``layout`` is not ``"latent"``."""
    head = torch.arange(n_heads)
    queries = n_heads // n_kv_heads  # that share a key/value head
    shared = head // queries  # [n_heads], which key/value head
    if layout == "separate":
        return _Blocks(n_kv_heads, head, shared, shared)
    count = n_heads + 2 * n_kv_heads
    if layout == "qkv":
        return _Blocks(count, head, n_heads + shared, n_heads + n_kv_heads + shared)
    first = shared * (queries + 2)  # the first block of the key/value head
    return _Blocks(count, first + head % queries, first + queries, first + queries + 1)


def _rows(block: Tensor, size: int) -> Tensor:
    """All rows of blocks ``[n_heads]`` of ``size`` rows each: int64 ``[n_heads * size]``."""
    return (block[:, None] * size + torch.arange(size)).flatten()
