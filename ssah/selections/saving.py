"""The folder of a selection: the bits of its masks, and the model that it is of.

Of a norm ``[64]`` that is whole and of rows 1 and 3 of a weight ``[4, 64]`` there are two tensors
of one byte each:

    "model.norm.weight"    1     its mask is [1], and bit 0 is set
    "...q_proj.weight"    10     its mask is [4, 1], and bits 1 and 3 are set

``meta.json`` has the shapes of the masks, and those of all parameters of the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ssah.choices import Shared
from ssah.selections.granularities import KINDS, SHARED, Kind
from ssah.selections.outline import Outline
from ssah.storage import FORMAT, Fields, Stored, save_tensors
from ssah.units import BitMask
from ssah.version import __version__

_CONTENT = "ssah selection"
_FIELDS: Fields = {
    "model_name": str,
    "units_hash": str,
    "fingerprint": str,
    "shapes": dict,
    "masks": dict,
    "made_of": list,
}
# The kinds of things that a selection was made of, and when what they share is chosen.
Made = frozenset[tuple[Kind, Shared]]


def save_masks(
    directory: str | os.PathLike[str], masks: Mapping[str, BitMask], outline: Outline, made_of: Made
) -> None:
    """Write a selection; arguments as of `ssah.selections.Selection`."""
    meta = {
        "content": _CONTENT,
        "format": FORMAT,
        "version": __version__,
        "model_name": outline.model_name,
        "units_hash": outline.units_hash,
        "fingerprint": outline.fingerprint,
        "shapes": {name: list(shape) for name, shape in outline.shapes.items()},
        "masks": {name: list(mask.shape) for name, mask in masks.items()},
        "made_of": sorted(map(list, made_of)),
    }
    save_tensors(directory, {name: mask.bits for name, mask in masks.items()}, meta)


def load_masks(
    directory: str | os.PathLike[str],
) -> tuple[dict[str, BitMask], Outline, Made]:
    """Read what `save_masks` wrote.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: the directory holds something else, or is damaged.
    """
    stored = Stored(directory, _CONTENT, _FIELDS)
    meta = stored.meta
    shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
    outline = Outline(shapes, meta["units_hash"], meta["model_name"])
    if outline.fingerprint != meta["fingerprint"]:
        raise stored.damaged("its shapes are not those of its fingerprint")
    made_of = frozenset((kind, shared) for kind, shared in meta["made_of"])
    if not all(kind in KINDS and shared in SHARED for kind, shared in made_of):
        raise stored.damaged(f"the field 'made_of' is {meta['made_of']!r}")
    masks = {}
    for name, own in meta["masks"].items():
        if name not in shapes or not _broadcasts(own, shapes[name]):
            raise stored.damaged(f"the mask of {name!r} has the shape {own}")
        size = -(-torch.Size(own).numel() // 8)
        bits = stored.tensor(name, dtype=torch.uint8, shape=(size,))
        masks[name] = BitMask(tuple(own), bits)
    return masks, outline, made_of


def _broadcasts(own: Any, shape: tuple[int, ...]) -> bool:
    """Whether a mask of shape ``own`` broadcasts over a parameter of this shape, dim by dim."""
    return len(own) == len(shape) and all(
        n in (1, size) for n, size in zip(own, shape, strict=True)
    )
