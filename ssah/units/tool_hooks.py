"""Hooks by which TransformerLens and nnterp ablate units: their channels are zero before B.

A module computes B a, the sum over units j of a_j times column j of B. So it does not matter
whether a_j or column j is set to zero. Both tools have a place for a:

    units of            TransformerLens           nnterp, nnsight
    an FFN, layer 3     blocks.3.mlp.hook_post    model.layers[3].mlp.down_proj.input
    attention, layer 3  blocks.3.attn.hook_z      model.layers[3].self_attn.o_proj.input

hook_z is ``[batch, position, heads, channels of a head]``. Unit 20 of heads with 16 channels is
channel 4 of head 1.

Source: TransformerLens 4.3 (``model_bridge``), nnsight 0.6 (``Envoy.input``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ssah.units.places import is_expert, kind_of, layer_of

_POINTS = {"mlp": "mlp.hook_post", "attention": "attn.hook_z"}

LensHook = tuple[str, Callable[..., Tensor]]


def transformer_lens_hooks(
    indices: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> list[LensHook]:
    """Names of hook points and what to do there, as ``run_with_hooks(fwd_hooks=...)`` takes them.

    Args:
        indices: B's name -> int64 ``[n]``, the units to ablate.
        sizes: B's name -> how many units the module has.

    Raises:
        ValueError: a module has no hook point of its own; it is named.
    """
    # There hook_post is what the whole block puts out, and no activation of units.
    mixed = {layer_of(name) for name in sizes if is_expert(name)}
    hooks: list[LensHook] = []
    for name, index in _some_units(indices).items():
        kind, layer = kind_of(name), layer_of(name)
        if kind is None or layer is None or (kind == "mlp" and layer in mixed):
            raise ValueError(
                f"units has some of {name!r}, which has no hook point of its own in "
                "TransformerLens: leave that module out, or use ssah.ablate"
            )
        hooks.append((f"blocks.{layer}.{_POINTS[kind]}", _zeros(name, index, sizes[name])))
    return hooks


def _zeros(name: str, index: Tensor, n_units: int) -> Callable[..., Tensor]:
    """What sets channels ``index``, int64 ``[n]``, of an activation to zero."""

    def zero(value: Tensor, hook: Any = None) -> Tensor:
        flat = value.flatten(2)  # [batch, position, units], of heads too
        if flat.shape[-1] != n_units:
            raise ValueError(
                f"units has {n_units} units in {name!r}, where the model has "
                f"{flat.shape[-1]} channels: it must be the same model"
            )
        return flat.index_fill(-1, index.to(value.device), 0).view_as(value)

    return zero


def nnterp_hook(indices: Mapping[str, Tensor]) -> Callable[[Any], None]:
    """A function of the model, to be called inside ``with model.trace(...)``.

    Args:
        indices: B's name -> int64 ``[n]``, in the order in which the modules run.
    """
    chosen = _some_units(indices)

    def zero(model: Any) -> None:
        for name, index in chosen.items():
            module = model
            for part in name.split("."):
                module = module[int(part)] if part.isdigit() else getattr(module, part)
            module.input[..., index] = 0

    return zero


def _some_units(indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The modules with units in them, once it is known that a hook can reach them."""
    chosen = {name: index for name, index in indices.items() if len(index)}
    inside = [name for name in chosen if is_expert(name)]
    if inside:
        raise ValueError(
            f"units has some of the routed expert {inside[0]!r}, which no hook sees: leave experts "
            "out, or use ssah.ablate"
        )
    return chosen
