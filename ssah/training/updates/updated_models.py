"""A model that is kept as an update: the base model that its record names, and what trained.

    model, tokenizer = load_trained("runs/tuned")                  # base as the record says
    model, tokenizer = load_trained("runs/tuned", base="smollm2")  # or wherever it is now

Whatever else is given is loaded as `ssah.models.load_model` does, so that a command may take either
in the place of a model. An update of an update works too: its base is the earlier one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssah.models import ModelError, cheap_weights_hash, load_model, load_tokenizer, move
from ssah.storage import HUB, META, Stored, check_fields, hub_folder, kind_in, read_meta
from ssah.training.updates.merging import merge_update, read_update
from ssah.training.updates.saving import UPDATE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_update(name: str) -> bool:
    """Whether ``name`` is what `UpdatePlan.save_pretrained` or ``push_to_hub`` wrote."""
    if name.startswith(HUB):
        return True
    # A whole model in the same folder is what other programs would load: it counts.
    return not (Path(name) / "config.json").is_file() and kind_in(Path(name)) == UPDATE


def load_trained(
    name: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    packed: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, as `ssah.models.load_model` does, or an update with its base.

    Args:
        name: what ``load_model`` takes; or an update: the folder that
            `ssah.UpdatePlan.save_pretrained` or ``ssah finetune`` wrote, or ``"hf:owner/name"``.
        base: of an update, the model that it was trained from, as ``load_model`` takes it, or an
            earlier update; None: the one that its record names.
        dtype: as of ``load_model``; an update is merged in the dtype that it was trained in, and
            ``"auto"`` is that one.
        device, trust_remote_code, packed, device_map, offload_folder: as of ``load_model``; the
            last three are not for an update.

    Returns:
        the model, bit for bit the one that was trained, and the tokenizer of its base.

    Raises:
        ModelError: as of ``load_model``; the base is not where the record says; ``base`` is given
            and ``name`` is no update; an update is to stay packed or to be dealt.
        ValueError: the update is damaged, or the base has other weights than it was trained from.
    """
    if not is_update(name):
        _check_without_base(name, base)
        return load_model(
            name,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            packed=packed,
            device_map=device_map,
            offload_folder=offload_folder,
        )
    for option, value, no in (("packed", packed, False), ("device_map", device_map, None)):
        if value is not no:
            raise ModelError(
                f"{option} is {value!r}, must be {no}: {name!r} is merged into plain weights in "
                "memory"
            )
    stored = read_update(name)
    start, own = _base(name, base, stored.meta), _dtype(stored)
    try:
        model, tokenizer = load_trained(
            start, dtype=own, device=device, trust_remote_code=trust_remote_code
        )
    except ModelError as error:
        raise ModelError(_without(name, error)) from error
    _check_base(name, start, model, stored)
    merge_update(model, stored)
    model.config.name_or_path = name  # by this name it is found again
    return model if dtype in ("auto", own) else move(model, getattr(torch, dtype)), tokenizer


def load_trained_tokenizer(
    name: str, *, base: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer alone; arguments and errors as of :func:`load_trained`."""
    if not is_update(name):
        _check_without_base(name, base)
        return load_tokenizer(name, trust_remote_code=trust_remote_code)
    folder = Path(hub_folder(name))
    meta = read_meta(folder)
    check_fields(folder / META, meta, {"base_model": str})
    start = _base(name, base, meta)
    try:
        return load_trained_tokenizer(start, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(_without(name, error)) from error


def _check_without_base(name: str, base: str | None) -> None:
    if base is not None:
        raise ModelError(
            f"base is {base!r}, must not be given: model {name!r} is no update, which alone has one"
        )


def _base(name: str, base: str | None, meta: Mapping[str, Any]) -> str:
    """The model that an update was trained from, as the user or its record says."""
    start: str = base or meta["base_model"]
    if start == name:
        raise ModelError(f"base is {start!r}, the update itself; it must be the model before")
    return start


def _without(name: str, error: ModelError) -> str:
    return (
        f"the base of the update {name!r} cannot be loaded: {error}. Say where the model is that "
        "it was trained from: base=, on the command line --base"
    )


def _dtype(stored: Stored) -> str:
    """The dtype that an update was trained in, or ``"auto"`` where it has several."""
    values = {t.dtype for name, t in stored.tensors.items() if name.startswith("values/")}
    return str(values.pop()).removeprefix("torch.") if len(values) == 1 else "auto"


def _check_base(name: str, start: str, model: PreTrainedModel, stored: Stored) -> None:
    """Refuse another base, even one that differs only in what trained."""
    # None: it was offloaded or sharded then or now. Merging compares what stayed frozen as well.
    before, now = stored.meta.get("weights_hash"), cheap_weights_hash(model)
    if before is not None and now is not None and before != now:
        raise ValueError(
            f"the update {name!r} was trained from other weights than {start!r} has (their hash "
            f"was {before!s:.12}, is {now:.12}): give the model as it was then, base= or --base"
        )
