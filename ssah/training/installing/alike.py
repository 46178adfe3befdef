"""Whether every rank trains and keeps the same, told before anything trains.

DistributedDataParallel averages gradients by their position, so that with other units on each rank
the gradient of unit 3 would go to unit 7. Example: rank 1 has drawn units with another seed. Every
rank raises, and names the rank and the first parameter that differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from ssah.distributed import Ranks
from ssah.training.entries import Entries


def check_alike(
    ranks: Ranks,
    fingerprint: str,
    entries: Mapping[str, Entries],
    frozen: Mapping[str, str] | None = None,
) -> None:
    """Compare plans over ranks; all of them have to call this.

    Args:
        ranks: those that train together.
        fingerprint: of the plan.
        entries: parameter -> which of its entries train.
        frozen: hashes of what is frozen; None: each rank holds other rows, or none that count.

    Raises:
        ValueError: the plans train or freeze different things; on every rank.
    """
    own = "" if frozen is None else _hash(json.dumps(sorted(frozen.items())).encode())
    told = ranks.tell([fingerprint, own])
    for i, what in enumerate(("trains other units", "has other frozen weights")):
        other = next((rank for rank, each in enumerate(told) if each[i] != told[0][i]), None)
        if other is None:
            continue
        if i == 0:
            parts = {name: _hash(each.trains.numpy().tobytes()) for name, each in entries.items()}
        else:
            parts = dict(frozen or {})
        # Every rank knows now that they differ, so that all of them tell where.
        details = ranks.tell(parts)
        first, theirs = details[0], details[other]
        names = [n for n in first | theirs if first.get(n) != theirs.get(n)]
        where = f"first {names[0]!r}, of {len(names)} parameters" if names else "another model"
        raise ValueError(
            f"rank {other} {what} than rank 0 does ({where}): they must be the same on every rank. "
            "Draw units with one seed, or load them from one file, and make the plan on equal "
            "weights"
        )


def _hash(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()
