"""Saving what a plan trained.

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

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssah.distributed import Ranks
from ssah.storage import FORMAT, public_name, result_card, save_tensors, upload
from ssah.training.entries import TrainedSlice
from ssah.training.installing import trained_values
from ssah.version import __version__
from ssah_kernels.bit_masks import pack_bits

UPDATE = "update"  # kind of result


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
    figures: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """Upload trained slices to the Hugging Face Hub, with a card, and without a local path.

    Args:
        slices, about: as `save_update` takes them.
        repo_id: ``"user/name"``; created if it does not exist.
        figures: for the card, what was measured: name -> what `ssah.evaluation.rate` gives.
        data: for the card, what it was trained on: name -> its fingerprint.
        options: ``private``, ``token`` and ``commit_message``, as in ``huggingface_hub``.

    Returns:
        the address of the commit.

    Raises:
        ValueError: a figure has no interval; it is named.
    """
    own = list(slices)
    public = {**about, "base_model": public_name(about["base_model"])}
    card = _card(own, public, figures, data or {})
    return upload(lambda folder: save_update(own, public, folder), card, repo_id, **options)


def _card(
    slices: Sequence[TrainedSlice],
    about: Mapping[str, Any],
    figures: Mapping[str, Any] | None,
    data: Mapping[str, str],
) -> str:
    """``README.md`` of an update on the Hub."""
    trained = sum(_n_trained(each) for each in slices)
    facts = {
        "trained": f"{trained:,} weights of {len({each.name for each in slices}):,} parameters",
        **{f"fingerprint of {name}": fingerprint for name, fingerprint in data.items()},
        "fingerprint of the plan": about["fingerprint"],
        "hash of the units": about["units_hash"],
        "hash of the weights before": about["weights_hash"],
    }
    return result_card(
        "Update",
        "It has the weights that a plan trained, and no others: all that it kept frozen is, bit "
        "for bit, as in the base model.",
        base_model=str(about["base_model"]),
        tags=("safety", "fine-tuning", "update"),
        code='model, tokenizer = ssah.training.load_trained("hf:user/name")  # this repository',
        facts=facts,
        figures=figures,
    )


def _n_trained(each: TrainedSlice) -> int:
    """How many weights of a parameter train: all of a part that was split off, else by entries."""
    trains, size = each.entries.trains, each.parameter.numel()
    return size if each.split else size // trains.numel() * int(trains.sum())
