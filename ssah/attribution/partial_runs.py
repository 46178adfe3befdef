"""What an unfinished run leaves in a folder, so that the same call goes on from there.

A run has parts, each a folder of its own: a layer of a streamed run, a rank of one in memory. A
part is written whole or not at all, with checksums, and with the identity of its run: everything
that changes the result.

Example: rank 1 of 2 has done 40 batches. Its part ``rank-0001-of-0002`` holds ``mean/NAME`` and the
other sums of every module, ``{"batches": 40, ...}`` as how far it has come, and an identity such as
``{"metric": "variance", "tokens": "labels", ...}``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ssah.attribution.sums import Sums
from ssah.storage import META, check_fields, load_tensors, save_tensors

_SUMS = tuple(field.name for field in fields(Sums))


def keep(
    part: Path,
    identity: Mapping[str, Any],
    sums: Mapping[str, Sums],
    *,
    norms: Mapping[str, Tensor] | None = None,
    **reached: Any,
) -> None:
    """Write a part, in the place of what it was before.

    Args:
        part: a folder, made if need be.
        identity: plain data, everything that changes the result.
        sums: B's name -> sums.
        norms: B's name -> squared norms ``[n_units]`` of B's columns, once the part has them.
        reached: plain data, how far the part has come.

    Raises:
        OSError: the disk is full, or the like; what the part was before is still there.
    """
    tensors = {f"norms/{name}": norm for name, norm in (norms or {}).items()}  # [n_units] each
    for kind in _SUMS:
        tensors |= {f"{kind}/{name}": getattr(each, kind) for name, each in sums.items()}
    save_tensors(part, tensors, {"identity": dict(identity), "reached": reached})


def load(
    part: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Sums], dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`keep` was given, on the CPU: sums, norms ``[n_units]`` and how far it has come.

    Returns:
        None if the part was never written.

    Raises:
        ValueError: it was damaged, or is of a run with another identity.
    """
    if not (part / META).is_file():
        return None
    try:
        tensors, meta = load_tensors(part)
        check_fields(part / META, meta, {"identity": dict, "reached": dict})
    except ValueError as error:
        raise damaged(part.parent, f"{error}") from error
    # A field that only one of the two has, as of another release, differs as well.
    for key in sorted({*meta["identity"], *identity}):
        refuse_other(part.parent, key, meta["identity"].get(key), identity.get(key))
    own: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        own.setdefault(kind, {})[name] = tensor
    names = own.get(_SUMS[0], {})
    for kind in _SUMS:
        if own.get(kind, {}).keys() != names.keys():
            raise damaged(part.parent, f"{str(part)!r} lacks {kind} of a module")
    sums = {name: Sums(*(own[kind][name] for kind in _SUMS)) for name in names}
    return sums, own.get("norms", {}), meta["reached"]


def refuse_other(folder: Path, key: str, before: Any, now: Any) -> None:
    """Raise ValueError if the run in ``folder`` is another one, as it differs in ``key``."""
    if before != now:
        raise ValueError(
            f"{str(folder)!r} has an unfinished run with {key} {before!r}, not {now!r}: take "
            "another folder, or remove this one"
        )


def damaged(folder: Path, how: str) -> ValueError:
    """The error of a run that cannot go on."""
    return ValueError(f"{how}; the unfinished run cannot go on: remove {str(folder)!r}")


def discard(folder: Path) -> None:
    """Remove a run that is finished; killed in the middle, it leaves nothing that looks like one.

    Args:
        folder: with all parts; it need not be there.
    """
    gone = folder.with_name(f".{folder.name}.gone")
    if gone.exists():  # of a process that was killed in here
        shutil.rmtree(gone)
    if folder.exists():
        # A rename happens at once; a folder that is half removed would look like a damaged run.
        os.replace(folder, gone)
        shutil.rmtree(gone)
