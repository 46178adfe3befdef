"""Merging an update into the model that it was trained from.

Everything is checked before anything is changed: that the update is whole and fits the model, and,
by hashes, that what it kept frozen is what the model has. `ssah.training.updates.saving` says what
an update is made of.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssah.interventions import check_not_ablated
from ssah.models import check_idle, check_plain, digests
from ssah.storage import TEXT, Fields, Stored, check_fields, hub_folder
from ssah.training.optimising import check_unplanned
from ssah.training.splitting import complement_rows
from ssah.training.updates.placed import Placed
from ssah.training.updates.saving import UPDATE
from ssah.units import check_parameters, check_same_model, find_modules
from ssah_kernels.bit_masks import packed_size, unpack_bits

_FIELDS: Fields = {
    "base_model": str,
    "units_hash": TEXT,
    "keep": bool,
    "dims": dict,
    "experts": list,
    "single": list,
    "frozen": dict,
}

# Of updates that were written before there was such a field.
_MISSING: dict[str, Any] = {"units_hash": None, "experts": [], "single": []}


def load_update(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Merge what :meth:`UpdatePlan.save_pretrained` wrote into the model that it started from.

    Afterwards the model is, bit for bit, the one that was trained. `attach` does it for a while.

    Args:
        model: the base model, in the dtype that it was trained in; changed in place.
        directory: a folder, or ``"hf:user/name"`` for a repository on the Hugging Face Hub. A
            folder's name that was mistyped must not fetch what somebody put there.

    Raises:
        FileNotFoundError: there is no such folder, or nothing was saved there.
        ValueError: the folder holds something else or is damaged; the model is inside `ablate`, has
            an active plan, other units or another dtype, packed weights, or other weights where
            the update kept them frozen. Nothing is changed then.
    """
    merge_update(model, read_update(directory))


def read_update(directory: str | os.PathLike[str]) -> Stored:
    """What :func:`load_update` merges, read and checked as far as no model is needed."""
    stored = Stored(hub_folder(directory), UPDATE, _FIELDS, _MISSING)
    meta = stored.meta
    check_fields(stored.path, meta["dims"], dict.fromkeys(meta["dims"], int))
    check_fields(stored.path, meta["frozen"], dict.fromkeys(meta["frozen"], str))
    for field in ("experts", "single"):
        if any(not isinstance(name, str) or name not in meta["dims"] for name in meta[field]):
            raise stored.damaged(f"the field {field!r} has more than parameters that train in part")
    return stored


def merge_update(model: nn.Module, stored: Stored) -> None:
    """Merge what :func:`read_update` read; everything as of :func:`load_update`."""
    for each in placed_update(model, stored):
        each.write(each.values)


def placed_update(model: nn.Module, stored: Stored) -> list[Placed]:
    """What an update would write into ``model``, once all of it is known to fit.

    Arguments and errors as of :func:`merge_update`. Nothing is changed.
    """
    check_unplanned(model)
    params = [param for module in find_modules(model).values() for param in module.params]
    check_idle(model, "to be given an update")
    check_not_ablated(model, "to be given an update")
    check_plain(model, "to be given an update")
    check_parameters(model, params, "to be given an update")
    meta = stored.meta
    check_same_model(model, meta["units_hash"], expected_name=meta["base_model"], what="the update")
    own = dict(model.named_parameters())
    experts = frozenset(meta["experts"])
    dims: dict[str, tuple[int, ...]] = {
        name: (0, dim) if name in experts else (dim,) for name, dim in meta["dims"].items()
    }
    for name in own.keys() & set(meta["single"]):
        dims[name] = tuple(range(own[name].dim()))
        stored.tensors[f"index/{name}"] = _index_of_bits(stored, name, own[name])
    values = _checked_values(own, stored, dims)
    silent = [name for name in own if name not in values and name not in meta["frozen"]]
    if silent:
        raise ValueError(
            f"the update says nothing of {len(silent)} parameters of the model, {silent[0]!r} for "
            "one: it is not whole, or belongs to another model"
        )
    _check_frozen(own, stored, dims)
    return [
        Placed(name, own[name], dims.get(name), stored.tensors.get(f"index/{name}"), value)
        for name, value in values.items()
    ]


def _checked_values(
    own: dict[str, nn.Parameter], stored: Stored, dims: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Trained values by parameter, once they are known to fit the model: nothing is changed yet.

    Args:
        own: the model's parameters.
        stored: the update.
        dims: parameter that trains in part -> the dimensions that its entries run along.
    """
    prefix, tensors = "values/", stored.tensors
    values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for name, own_dims in dims.items():
        if name not in values:
            raise stored.damaged(f"it has no values of {name!r}, which it trains in part")
        if name in own and not all(0 <= dim < own[name].dim() for dim in own_dims):
            raise stored.damaged(f"the field 'dims' has {own_dims[-1]} for {name!r}")
    for name, value in values.items():
        if name not in own:
            raise ValueError(f"the update trains {name!r}, which the model lacks")
        shape = list(own[name].shape)
        if name in dims:
            index = stored.tensor(f"index/{name}", dtype=torch.int64)
            n_entries = math.prod(shape[dim] for dim in dims[name])
            if len(index) and (index[0] < 0 or index[-1] >= n_entries or (index.diff() <= 0).any()):
                raise ValueError(
                    f"the update trains entries of {name!r} that are not ascending numbers from 0 "
                    f"to {n_entries - 1}: it is damaged"
                )
            if len(index) < n_entries and name not in stored.meta["frozen"]:
                raise stored.damaged(
                    f"it trains {len(index)} of {n_entries} entries of {name!r}, and the field "
                    "'frozen' says nothing of the rest"
                )
            # Unit-major: trained entries first, then the dimensions that no entries run along.
            rest = (size for dim, size in enumerate(shape) if dim not in dims[name])
            shape = [len(index), *rest]
        if value.dtype != own[name].dtype or list(value.shape) != shape:
            raise ValueError(
                f"the update has {name!r} as {value.dtype} {list(value.shape)}, the model needs "
                f"{own[name].dtype} {shape}: load it in the dtype that it was trained in"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"the update has NaN or infinite values of {name!r}")
    return values


def _index_of_bits(stored: Stored, name: str, parameter: Tensor) -> Tensor:
    """The elements of ``parameter`` ``[...]`` that trained: int64 ``[trained]``."""
    shape = (packed_size(parameter.numel()),)
    bits = stored.tensor(f"bits/{name}", dtype=torch.uint8, shape=shape)
    return unpack_bits(bits, parameter.shape).flatten().nonzero()[:, 0]


def _check_frozen(
    own: dict[str, nn.Parameter], stored: Stored, dims: dict[str, tuple[int, ...]]
) -> None:
    """Refuse a model whose weights differ where the update kept them frozen."""
    pieces: dict[str, Callable[[], Iterable[Tensor]]] = {}
    for name in stored.meta["frozen"]:
        if name not in own:
            raise ValueError(f"the update keeps {name!r} frozen, which the model lacks")
        pieces[name] = partial(_frozen, own[name], dims.get(name), stored.tensors, name)
    now = digests(pieces)
    other = [name for name, value in stored.meta["frozen"].items() if now[name] != value]
    if other:
        raise ValueError(
            f"the update was trained from other weights (base {stored.meta['base_model']!r}): "
            f"{len(other)} frozen weights differ, the first is {other[0]!r}"
        )


def _frozen(
    weight: Tensor, dims: tuple[int, ...] | None, tensors: Mapping[str, Tensor], name: str
) -> Iterable[Tensor]:
    """What of a weight the update kept frozen: all of it, or the entries that did not train."""
    return (weight if dims is None else complement_rows(weight, dims, tensors[f"index/{name}"]),)
