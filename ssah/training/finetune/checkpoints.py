"""Checkpoints of a fine-tuning run: which run each is of, and whether it is whole.

`transformers.Trainer` writes the files of a checkpoint one after the other, and resumes from what
it finds: without ``optimizer.pt`` it starts the moments anew and says nothing. A checkpoint
therefore gets a seal when it is whole: ``seal.json`` with the identity of the run and the hash of
every file, written last. Nothing is resumed from a checkpoint whose seal is not this run's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ssah.storage import file_hash, naming, read_sealed, sealed, sync, write_whole

CHECKPOINTS, SEAL = "checkpoints", "seal.json"
_NAME = re.compile(r"checkpoint-\d+")
_FIELDS = {"identity": dict, "files": dict}


def seal(checkpoint: Path, needed: tuple[str, ...], identity: Mapping[str, Any]) -> None:
    """Say that a checkpoint is whole and which run it is of; all of it is on the disk then.

    Args:
        checkpoint: its folder, with every file of it.
        needed: names of files that it must have.
        identity: plain data, all that decides with which weights the run ends.

    Raises:
        RuntimeError: it lacks one of them.
        OSError: the disk is full, or the like; the file is named.
    """
    files = sorted(path for path in checkpoint.iterdir() if path.name != SEAL)
    lacking = sorted({*needed} - {path.name for path in files})
    if lacking:
        raise RuntimeError(
            f"checkpoint {str(checkpoint)!r} was written without {lacking[0]}: this release of "
            "transformers keeps it elsewhere, and no run could be resumed"
        )
    # On the disk before the seal says so: after a power cut there is no seal without its files.
    for path in files:
        with naming(path):
            sync(path)
    with ThreadPoolExecutor(4) as pool:
        hashes = dict(zip((path.name for path in files), pool.map(file_hash, files), strict=True))
    record = {"identity": dict(identity), "files": hashes}
    write_whole(checkpoint / SEAL, sealed(record))


def sealed_identities(folder: Path) -> list[Mapping[str, Any]]:
    """The identities of the runs that the sealed checkpoints of a folder are of.

    A seal that cannot be read is left to :func:`last_sound`.
    """
    records = [_read_seal(checkpoint) for checkpoint in _sealed(folder)]
    return [record["identity"] for record in records if not isinstance(record, str)]


def last_sound(
    folder: Path, identity: Mapping[str, Any], tell: Callable[[str], None]
) -> Path | None:
    """The latest checkpoint of this run that is whole; what is not whole is removed.

    A checkpoint without a seal was interrupted while it was written. One with a seal that is not
    whole was damaged later: the one before it serves, which is said.

    Args:
        folder: of the checkpoints; it need not be there.
        identity: of the run that wants to go on.
        tell: called with a line for every checkpoint that is passed over.

    Returns:
        None if there is none: the run starts anew.

    Raises:
        ValueError: a checkpoint is of another run (what differs is named), or all that were whole
            were damaged (the file is named).
    """
    for checkpoint in _all(folder):
        if not (checkpoint / SEAL).is_file():
            tell(f"{checkpoint} has no {SEAL}: it was not written to its end, and is passed over")
            shutil.rmtree(checkpoint)
    damages: dict[Path, str] = {}
    # From the latest on. Those behind a damaged one are removed only once a whole one is found.
    for checkpoint in reversed(_sealed(folder)):
        damage = _damage(checkpoint, identity)
        if damage is None:
            for other, how in damages.items():
                tell(f"{how}; {checkpoint} before it is whole, and the run goes on from there")
                shutil.rmtree(other)
            return checkpoint
        damages[checkpoint] = damage
    if damages:
        raise ValueError(
            f"{next(iter(damages.values()))}; no earlier checkpoint is whole: remove "
            f"{str(folder)!r} to start the run anew"
        )
    return None


def _all(folder: Path) -> list[Path]:
    """The folders of checkpoints, the earliest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def _sealed(folder: Path) -> list[Path]:
    return [checkpoint for checkpoint in _all(folder) if (checkpoint / SEAL).is_file()]


def step_of(checkpoint: Path) -> int:
    """The number of updates after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _read_seal(checkpoint: Path) -> dict[str, Any] | str:
    """The seal, or in which way it is damaged."""
    try:
        return read_sealed(checkpoint / SEAL, _FIELDS)
    except ValueError as error:
        return str(error)


def _damage(checkpoint: Path, identity: Mapping[str, Any]) -> str | None:
    """In which way a sealed checkpoint is not what was sealed; None: it is.

    Raises:
        ValueError: it is of another run.
    """
    record = _read_seal(checkpoint)
    if isinstance(record, str):
        return record
    other = differences(record["identity"], identity)
    if other:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} is of a run that differs: {'; '.join(other)}. Give "
            "what it began with to go on, or another folder to start anew"
        )
    for name, expected in record["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"checkpoint {str(checkpoint)!r} is damaged: {name} is missing"
        if file_hash(path) != expected:
            return f"file {str(path)!r} is damaged: it is not as it was written"
    return None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the identities of two runs, in words."""
    names = [*now, *(name for name in saved if name not in now)]
    return [
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in names  # what one of them leaves out has its default there
        if saved.get(name) != now.get(name)
    ]
