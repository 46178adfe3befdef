"""The folder of a fine-tuning run: what the run is, and how it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssah.distributed import Ranks
from ssah.storage import LOCK, Fields, check_fields, read_record, write_whole
from ssah.training.finetune.checkpoints import CHECKPOINTS, differences, sealed_identities
from ssah.version import __version__

RUN = "run.json"

_FIELDS = {"version": str, "identity": dict}
_RESULT: Fields = {
    "steps": int,
    "epochs": float,
    "resumed_from": int,
    "loss_first": float,
    "loss_last": float,
    "eval_loss_before": (float, type(None)),
    "eval_loss": (float, type(None)),
}


def check_folder(out: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds anything but a run.

    Raises:
        ValueError: it is a file, or has files but no ``run.json``.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out is the file {str(out)!r}; it must be a folder")
    if not folder.is_dir() or (folder / RUN).is_file():
        return
    # The lock file of a run that has written nothing yet is nothing to lose.
    if any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(
            f"out is {str(out)!r}, which holds something else than a run; it must be a new or "
            "empty folder, or that of a run to go on with"
        )


def open_run(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the run in ``folder``, begun if there is none.

    Args:
        folder: of the run.
        identity: plain data, all that decides with which weights the run ends.

    Raises:
        ValueError: another run is finished or has a checkpoint there, or the record is damaged.
    """
    record: dict[str, Any] = {"version": __version__, "identity": dict(identity)}
    path = folder / RUN
    if path.is_file():
        earlier = read_record(path, _FIELDS)
        if "result" in earlier:
            check_fields(path, earlier["result"], _RESULT)
        other = differences(earlier["identity"], identity)
        if not other:
            return earlier
        # A run that left no checkpoint has nothing to lose: its folder is taken over.
        if "result" in earlier or sealed_identities(folder / CHECKPOINTS):
            raise ValueError(
                f"out is {str(folder)!r}, the folder of a run that differs: {'; '.join(other)}. "
                "Give what it began with to go on, or another folder to start anew"
            )
    write_run(folder, record)
    return record


def write_run(folder: Path, record: Mapping[str, Any], ranks: Ranks | None = None) -> None:
    """Write the record of a run: whole, or not at all; the first of ``ranks`` does, for all."""
    ranks = ranks or Ranks()
    with ranks.agreeing():
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / RUN, (json.dumps(record, indent=2) + "\n").encode())
