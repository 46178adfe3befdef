"""Which row of V makes which channel that enters O, for every way of laying values out.

Channel c of query head h enters O at h * head_dim + c. It is made by the value head that h shares
with others: of ``queries = n_heads / n_kv_heads`` heads each. Count the outputs of the projection
in blocks of ``head_dim`` (q0 is the query of head 0, k0 and v0 the key and value of the first
key/value head). With four heads over two key/value heads, ``queries`` is 2:

    "separate"      v0 v1                       head h has block  h // 2
    "qkv"           q0 q1 q2 q3 k0 k1 v0 v1     head h has block  4 + 2 + h // 2
    "qkv_per_head"  q0 q1 k0 v0 q2 q3 k1 v1     head h has block  h // 2 * (2 + 2) + 2 + 1

Row block * head_dim + c is then what unit h * head_dim + c owns: heads that share values share it.
The fourth layout, ``"latent"`` (DeepSeek-V2, arXiv 2405.04434), has a key and a value of different
widths for each head and shares nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssah.models import config_size
from ssah.units.depth_two import DepthTwoModule, of_projections, output_rows
from ssah.units.family import Attention, ValueLayout
from ssah.units.projections import check_width, features, projection


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
        n_kv_heads = features(value)[1] // head_dim
        if attention.layout != "separate":  # queries, and as many keys as values
            n_kv_heads = (n_kv_heads - n_heads) // 2
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"module {value_name!r} has {features(value)[1]} outputs, which are no values of "
                f"{n_heads} heads of {head_dim} for {name!r}; register a family that fits the model"
            )
        blocks, block = _value_block(attention.layout, head, n_heads, n_kv_heads)
        check_width(value_name, value, blocks * head_dim, name)
        rows = block * head_dim + channel
    inputs = output_rows(value_name, value, rows)
    if attention.gate is not None:
        # Query and gate of each head, head by head: the gate is the second half of a head's part.
        gate_name = f"{layer}.{attention.gate}"
        gate = projection(model, gate_name)
        check_width(gate_name, gate, 2 * n_units, name)
        inputs += output_rows(gate_name, gate, (2 * head + 1) * head_dim + channel)
    return of_projections(name, "attention", down, inputs)


def _value_block(
    layout: ValueLayout, head: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[int, Tensor]:
    """How many blocks of head_dim outputs there are, and the block of each unit's value.

    Args:
        layout: not ``"latent"``.
        head: int64 ``[units]``, the query head of each unit; the result has this shape.
        n_heads, n_kv_heads: query heads, and key/value heads that they share.
    """
    queries = n_heads // n_kv_heads  # that share a key/value head
    shared = head // queries  # [units], which key/value head
    if layout == "separate":
        return n_kv_heads, shared
    blocks = n_heads + 2 * n_kv_heads
    if layout == "qkv":
        return blocks, n_heads + n_kv_heads + shared
    return blocks, shared * (queries + 2) + queries + 1
