"""Which tensors of an adapter write entries that must stay, and whether they do.

LoRA adds s B A to a weight ``[out, in]``, with B ``[out, r]`` and A ``[r, in]``. What writes row i
of the weight is row i of B; what writes column j is column j of A. Of routed experts each has its
own A and B, which PEFT keeps in one tensor each: A as ``[experts * r, in]``, the rows of the first
expert first, and B as ``[out, r * experts]``, with the columns of all experts in turn. MiSS adds
its block ``[r, out]``, transposed and repeated along the inputs: column i of the block writes row i
of the weight, and row k writes every r-th column from k on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah.compat import peft
from ssah.models import check_whole
from ssah.selections import Outline, Selection, of_units
from ssah.training.entries import Entries, select_entries
from ssah.training.splitting import complement_rows
from ssah.units import UnitSet, find_modules
from ssah_kernels.sharded import is_sharded


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of one adapter tensor that must be zero.

    Attributes:
        name: of the adapted projection, for messages.
        tensor: it.
        shape: as what it is seen, with one dimension of the adapter's rank: ``[out, r]``, or of
            experts ``[out, r, experts]``.
        rank_dim: which dimension that is.
        frozen: bool, what must be zero: of ``shape`` with a one for the rank.
    """

    name: str
    tensor: nn.Parameter
    shape: tuple[int, ...]
    rank_dim: int
    frozen: Tensor

    def written(self) -> int:
        """How many of these entries are not zero."""
        seen = self.tensor.detach().view(self.shape)
        return int((seen.ne(0) & self._mask(seen)).any(self.rank_dim).sum())

    def clear(self) -> None:
        seen = self.tensor.detach().view(self.shape)
        seen.masked_fill_(self._mask(seen), 0)

    def mask(self, grad: Tensor) -> Tensor:
        """The gradient ``[...]`` of the tensor, with zeros at these entries."""
        seen = grad.reshape(self.shape)
        return seen.masked_fill(self._mask(seen), 0).reshape(grad.shape)

    def _mask(self, seen: Tensor) -> Tensor:
        return self.frozen.to(seen.device)


def may_change(
    model: PreTrainedModel, units: UnitSet | Selection, *, only: bool = False
) -> Selection:
    """What may change while ``units`` stay what they are.

    Args:
        model: a transformers model of a known family. Its weights are not looked at, so that they
            may be packed, or inside adapters.
        units: what stays, units or a selection; with ``only``, what alone may change.

    Returns:
        The entries, of the bare architecture, which may lack parameters that the model has.

    Raises:
        ValueError: ``units`` are of another model.
    """
    return _may_change(_bare(model), units, only=only)


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """A model of that architecture, without weights."""
    with torch.device("meta"):
        return type(model)(model.config)


def _may_change(bare: PreTrainedModel, units: UnitSet | Selection, *, only: bool) -> Selection:
    if isinstance(units, Selection):
        chosen = units.of(bare)
    else:
        # With shared key/value heads a row of V stays if any unit that it feeds does.
        chosen = of_units(Outline.of(bare), units, "all" if only else "any")
    return chosen if only else ~chosen


def frozen_entries(
    model: PreTrainedModel, units: UnitSet | Selection, *, only: bool = False
) -> dict[str, Entries]:
    """The same as entries along one dimension of every parameter; arguments as of `may_change`.

    Returns:
        Name of a parameter -> its entries, of which those that train may change.

    Raises:
        ValueError: as of `may_change`, and of `ssah.training.entries.select_entries`.
    """
    bare = _bare(model)
    return select_entries(find_modules(bare), _may_change(bare, units, only=only))


def inner_of(model: nn.Module) -> PreTrainedModel:
    """The model under the adapters of a PEFT model; TypeError where ``model`` is none."""
    inner = peft.inner_model(model)
    if inner is None:
        raise TypeError(
            f"model is a {type(model).__name__}, must be a peft.PeftModel: make one with "
            "peft.get_peft_model, or use ssah.freeze on a model without adapters"
        )
    return check_whole(inner)


def touched(
    model: nn.Module, trains: Mapping[str, Entries], *, only: bool
) -> Iterator[tuple[str, nn.Module, str, Part | None, Entries]]:
    """Every active adapter of a projection with entries that must stay.

    Yields:
        The parameter, its layer, the adapter, and the part of it that must be zero: None for all.
    """
    for name, layer in peft.adapted(inner_of(model)).items():
        param = _param_of(name, layer)
        # What the bare architecture lacks (a head that is tied there) follows the rest of it.
        entries = trains.get(param, Entries(0, torch.tensor([not only])))
        for adapter in peft.active_adapters(model):
            if entries.whole or next(tensors(layer, adapter), None) is None:
                continue
            _check_layer(name, layer, adapter)
            part = _part(name, layer, adapter, entries) if entries.partial else None
            yield param, layer, adapter, part, entries


def changed_entries(
    model: nn.Module, units: UnitSet | Selection, *, only: bool = False
) -> dict[str, tuple[int, int]]:
    """Where the active adapters of ``model`` add something to what must stay.

    Arguments as of :func:`protect_adapter`; a ``model`` that is no ``PeftModel`` has no adapters.

    Returns:
        Name of a parameter -> how many of the entries that must stay the adapter can write, and how
        many there are.

    Raises:
        ValueError: an adapter of another kind than LoRA or MiSS of a linear projection.
    """
    inner = peft.inner_model(model)
    found: dict[str, tuple[int, int]] = {}
    if inner is None:
        return found
    trains = frozen_entries(check_whole(inner), units, only=only)
    for param, layer, adapter, part, entries in touched(model, trains, only=only):
        if changes(layer, adapter, entries):
            n = int(entries.trains.logical_not().sum())
            found[param] = (n if part is None else part.written(), n)
    return found


def changes(layer: nn.Module, adapter: str, entries: Entries) -> bool:
    """Whether an adapter changes entries of its projection that must stay.

    Args:
        layer: the adapted projection.
        adapter: the name of the adapter.
        entries: of its parameter; what does not train must stay.
    """
    held: Any = layer
    frozen = ~entries.trains
    if hasattr(layer, "miss_block"):
        block = held.miss_block[adapter].detach()  # [r, out]
        # Another number of entries: a projection out of units, of which nothing trains.
        block = block[:, frozen.to(block.device)] if len(frozen) == block.shape[1] else block
        return bool(block.any())
    a, b = (each[adapter].weight.detach().float() for each in (held.lora_A, held.lora_B))
    if not bool(b.any()):  # a fresh adapter: then the product, the dear part of this, is not needed
        return False
    if entries.experts:
        with torch.no_grad():
            delta = held.get_delta_weight(adapter)  # [experts, ...] as the parameter
    else:
        delta = b @ a  # [out, in]
        delta = delta.t() if isinstance(held.get_base_layer(), Conv1D) else delta
    return bool(complement_rows(delta, entries.dims, entries.index).any())


def _param_of(name: str, layer: nn.Module) -> str:
    """The parameter that the adapter at ``name`` changes; experts are adapted by parameter."""
    leaf: Any = getattr(layer, "parameter_name", "weight")
    return f"{name.removesuffix('.base_layer')}.{leaf}"


def tensors(layer: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """The parameters of one adapter in one layer: LoRA's are ``[rank, in]`` and ``[out, rank]``."""
    for kind in layer.adapter_layer_names:  # type: ignore[union-attr]
        held: Any = getattr(layer, kind, {})
        if adapter in held:
            own = held[adapter]
            yield from [own] if isinstance(own, nn.Parameter) else own.parameters()


def _check_layer(name: str, layer: nn.Module, adapter: str) -> None:
    """Refuse an adapter in which the rows or columns of the change cannot be kept apart."""
    kind = type(layer).__name__
    module = type(layer).__module__
    what = f"the adapter {adapter!r} of {name!r}"
    if any(is_sharded(parameter) for parameter in tensors(layer, adapter)):
        raise ValueError(f"{what} is sharded: protect it before fully_shard")
    if adapter in getattr(layer, "merged_adapters", ()):
        raise ValueError(f"{what} is merged into the weight: model.unmerge_adapter() first")
    if module.startswith("peft.tuners.miss."):
        if getattr(layer, "miss_fn", None) in ("bat", "mini"):
            raise ValueError(
                f"{what} is MiSS with init_weights={layer.miss_fn!r}, which couples units: use "
                "init_weights=True, or LoRA"
            )
        return
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        variant = getattr(variant, "__name__", type(variant).__name__)
        raise ValueError(
            f"{what} is LoRA as {variant}, which couples rows and columns of the weight (DoRA "
            "scales by the norm of each whole row), so that no unit stays: use plain LoRA"
        )
    held: Any = layer
    plain = adapter in getattr(layer, "lora_A", {})
    if not plain or not isinstance(held.lora_A[adapter], nn.Linear):
        raise ValueError(
            f"{what} is a {kind} ({module}), must be LoRA or MiSS of a linear projection: leave "
            "this module out of target_modules"
        )
    if held.lora_B[adapter].bias is not None:
        raise ValueError(f"{what} has lora_bias=True, which changes A's bias: leave it off")


def _part(name: str, layer: nn.Module, adapter: str, entries: Entries) -> Part:
    """What of the adapter writes entries that must stay."""
    frozen = ~entries.trains  # [entries], of experts [experts * entries]
    held: Any = layer
    if entries.experts:
        return _experts_part(name, held, adapter, entries, frozen.view(held.num_experts, -1))
    # A Conv1D keeps its weight as [in, out], everything else as [out, in].
    writes_rows = (
        (entries.dim == 1) if isinstance(held.get_base_layer(), Conv1D) else (entries.dim == 0)
    )
    if hasattr(layer, "miss_block"):
        if not writes_rows:
            raise ValueError(
                f"the adapter {adapter!r} of {name!r} is MiSS on a projection out of units: one of "
                "its rows writes every r-th column, so that no unit stays. Leave this module out "
                "of target_modules, or use LoRA"
            )
        block = held.miss_block[adapter]  # [r, out]
        return Part(name, block, tuple(block.shape), 0, frozen[None])
    if writes_rows:
        b = held.lora_B[adapter].weight  # [out, r]
        return Part(name, b, tuple(b.shape), 1, frozen[:, None])
    a = held.lora_A[adapter].weight  # [r, in]
    return Part(name, a, tuple(a.shape), 0, frozen[None])


def _experts_part(name: str, held: Any, adapter: str, entries: Entries, frozen: Tensor) -> Part:
    """The same of the experts of a layer; ``frozen`` is ``[experts, entries]``."""
    experts, rank = held.num_experts, held.r[adapter]
    if entries.dim == peft.experts_out_dim(held):
        b = held.lora_B[adapter].weight  # [out, r * experts]
        return Part(name, b, (len(b), rank, experts), 1, frozen.t()[:, None])
    a = held.lora_A[adapter].weight  # [experts * r, in]
    return Part(name, a, (experts, rank, a.shape[1]), 1, frozen[:, None])
