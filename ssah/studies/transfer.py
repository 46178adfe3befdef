"""Transfer (Li & Kim, figures 5 and 6): which units change their group when a model is trained."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from ssah.groups import Transfer, UnitGroups, transfer
from ssah.report.pictures import plot_transfer
from ssah.studies.run_folder import Run

KIND = "transfer"


def run_transfer(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    title: str = "Attribute transfer",
) -> dict[str, Any]:
    """Compare two groupings of the same units, and keep numbers and picture in a folder.

    Args:
        before, after: folders of ``UnitGroups``.
        out: folder of the run.
        title: over the picture.

    Returns:
        The record, as ``experiment.json`` has it.
    """
    groups = {"before": UnitGroups.load(before), "after": UnitGroups.load(after)}
    moved = transfer(groups["before"], groups["after"])
    found = transfer_summary(moved, groups["before"], groups["after"])
    data = {
        role: {
            "source": str(folder),
            "rows": found["units"],
            "fingerprint": _fingerprint(groups[role]),
        }
        for role, folder in (("before", before), ("after", after))
    }
    # No model is loaded and nothing takes long, so that a folder without steps will do.
    run = Run(out, KIND, {"before": str(before), "after": str(after), "title": title}, data)
    names = {role: f"{role}: {Path(found['models'][role] or role).name}" for role in groups}
    with run.begin():
        picture = plot_transfer(moved, run.out / "transfer.png", title, **names)
        return run.finish(found, [picture])


def transfer_summary(moved: Transfer, before: UnitGroups, after: UnitGroups) -> dict[str, Any]:
    """A transfer as plain data.

    Returns:
        ``units`` (a count), ``groups`` (names), ``matrix`` (fractions of all units, from row to
        column), ``kept`` (group -> fraction of its units that are in it afterwards too, None for an
        empty one), ``models`` and ``shares`` of both sides, ``scope`` and ``normalize``.
    """
    units = sum(before.sizes.values())
    kept = {}
    for i, group in enumerate(moved.groups):
        own = float(moved.matrix[i].sum())  # matrix: [groups before, groups after]
        kept[group] = float(moved.matrix[i, i]) / own if own else None
    sides = {"before": before, "after": after}
    return {
        "units": units,
        "groups": list(moved.groups),
        "matrix": moved.matrix.tolist(),
        "kept": kept,
        "models": {role: groups.metadata["model_name"] for role, groups in sides.items()},
        "shares": {role: groups.shares for role, groups in sides.items()},
        "scope": before.scope,
        "normalize": {role: groups.normalize for role, groups in sides.items()},
    }


def _fingerprint(groups: UnitGroups) -> str:
    """SHA-256 (hex) of which unit is in which group."""
    digest = hashlib.sha256()
    for name in groups.sizes:
        # One byte a unit, after the name and the size: no two groupings have the same bytes.
        labels = groups.labels(name).to(torch.uint8).numpy()
        digest.update(f"{name} {len(labels)}\n".encode() + labels.tobytes())
    return digest.hexdigest()
