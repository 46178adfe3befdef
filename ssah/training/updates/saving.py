"""Saving what a plan trained, and merging it into the model that it was trained from.

An update is a folder with safetensors and ``meta.json``. Of a parameter that trained whole the
tensors have ``values/NAME``. Of one that trained in part they have its trained entries alone,
unit-major, and which they are. Example: of a B ``[out, 4]`` the columns 1 and 3 trained:

    index/NAME    int64 [2]      1, 3: ascending
    values/NAME   [2, out]       column 1, column 3
    dims          NAME: 1        the dimension that entries run along; of experts also dimension 0
    bits/NAME     uint8          where single weights trained, in the place of their index
    frozen        NAME: SHA-256 of columns 0 and 2, which the model that takes the update must have
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn

from ssah.distributed import Ranks
from ssah.interventions import check_not_ablated
from ssah.models import check_idle, check_plain, digests
from ssah.storage import FORMAT, TEXT, Fields, Stored, check_fields, save_tensors
from ssah.training.entries import TrainedSlice
from ssah.training.installing import trained_values
from ssah.training.optimising import check_unplanned
from ssah.training.splitting import complement_rows
from ssah.training.updates.placed import Placed
from ssah.units import check_parameters, check_same_model, find_modules
from ssah.version import __version__
from ssah_kernels.bit_masks import pack_bits, packed_size, unpack_bits

HUB = "hf:"  # before the id of a repository
UPDATE = "update"  # kind of result
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


def save_update(
    slices: Iterable[TrainedSlice],
    about: Mapping[str, Any],
    directory: str | os.PathLike[str],
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> None:
    """Write trained slices to ``directory``: whole, or not at all.

    Args:
        slices: what trained.
        about: the plan: ``base_model``, ``units_hash``, ``weights_hash``, ``fingerprint``,
            ``keep`` and ``frozen``, the hash of every weight's frozen entries.
        directory: the folder.
        ranks: those that the slices are sharded over. All of them put tensors together, and the
            first one writes.
    """
    by_name: dict[str, list[TrainedSlice]] = {}
    for each in slices:
        by_name.setdefault(each.name, []).append(each)
    dims = {name: own[0].entries.dims for name, own in by_name.items() if not _is_whole(own)}
    meta = {
        "content": UPDATE,
        "format": FORMAT,
        "version": __version__,
        **about,
        "dims": {name: each[-1] for name, each in dims.items()},
        "experts": [name for name in dims if by_name[name][0].entries.experts],
        "single": [name for name in dims if by_name[name][0].entries.single],
    }
    with ranks.agreeing():
        tensors = _tensors(by_name)
        try:
            if ranks.rank == 0:
                save_tensors(directory, tensors, meta)
        finally:
            if ranks.size > 1:  # all put together what the first one writes, also if it cannot
                deque(tensors, maxlen=0)


def _is_whole(slices: Sequence[TrainedSlice]) -> bool:
    """Whether the slices of a parameter are all of it, in its own order."""
    # Packed, a parameter that trains whole is split too: its rows are not in their order.
    return slices[0].entries.whole and not slices[0].split


def _tensors(by_name: Mapping[str, Sequence[TrainedSlice]]) -> Iterator[tuple[str, Tensor]]:
    """What is written, one parameter at a time: only what is asked for is put together."""
    for name, own in by_name.items():
        values = [trained_values(each).cpu() for each in own]
        if _is_whole(own):
            yield f"values/{name}", values[0]
            continue
        if own[0].entries.single:  # 50 % of a matrix: a bit for each, not 64 for every second
            yield f"bits/{name}", pack_bits(own[0].entries.trains)
            yield f"values/{name}", values[0]
            continue
        index = torch.cat([each.index for each in own])
        ascending = index.argsort()  # slices are in the order that the plan packs
        yield f"index/{name}", index[ascending]
        yield f"values/{name}", torch.cat(values)[ascending]  # [trained, ...]


def push_update(
    slices: Iterable[TrainedSlice],
    about: Mapping[str, Any],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload update",
) -> str:
    """Upload trained slices to the Hugging Face Hub. No path of this machine goes with them.

    Args:
        slices, about: as `save_update` takes them.
        repo_id: ``"user/name"``; created if it does not exist.
        private, token, commit_message: as in ``huggingface_hub``.

    Returns:
        the address of the commit.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_update(slices, {**about, "base_model": public_name(about["base_model"])}, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        )


def public_name(name: str) -> str:
    """A hub id as it is; of a path on this machine the last part alone, which tells nobody more."""
    is_id = name.count("/") <= 1 and not name.startswith((".", "~", "/")) and "\\" not in name
    return name if is_id and not Path(name).exists() else Path(name).name


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
    stored = Stored(update_folder(directory), UPDATE, _FIELDS, _MISSING)
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


def update_folder(directory: str | os.PathLike[str]) -> str:
    """The folder that is meant, fetched if it is a repository; FileNotFoundError without one."""
    name = os.fspath(directory)
    if name.startswith(HUB):
        return snapshot_download(name.removeprefix(HUB))
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"there is no folder {name!r}; for a repository on the Hugging Face Hub write "
            f"'{HUB}{name if name.count('/') == 1 else 'user/name'}'"
        )
    return name


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
