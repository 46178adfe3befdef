"""What a study reads: rows and requests, with the record of what was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from ssah.data import Counts, Reading, Row, warn_of_shared

# Roles whose rows a model was calibrated or trained on; the others measure it, and a prompt that is
# on both sides makes a result look better than it is.
_SEEN = ("safety", "utility", "finetune", "borderline", "harmful", "preferences")

Item = TypeVar("Item")


class Sources:
    """Reads rows and requests, and keeps the record of what was read.

    Attributes:
        record: role -> ``source``, ``rows`` (a count) and ``fingerprint`` (SHA-256 of the text), as
            :class:`~ssah.studies.run_folder.Run` takes it; ``invalid`` and ``repeated`` (counts)
            where rows were left out, or repeat a prompt.

    Args:
        reading: how they are read.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.record: dict[str, dict[str, Any]] = {}
        self._prompts: dict[str, set[str]] = {}
        self._seen = set(_SEEN)

    def rows(self, role: str, source: str, *, measures: bool = False) -> list[Row]:
        """Rows with answers; ``source`` as ``ssah.data.load_rows`` takes it.

        With ``measures`` nothing is calibrated on them, whatever their role is called.
        """
        if measures:
            self._seen.discard(role)
        counts = Counts()
        rows = list(self.reading.rows(source, counts=counts))
        return self.kept(role, source, rows, [row["prompt"] for row in rows], [counts])

    def requests(self, role: str, sources: str | Sequence[str]) -> list[str]:
        """Requests of one source or of several, as ``ssah.data.load_requests`` takes them."""
        names = [sources] if isinstance(sources, str) else list(sources)
        counts = [Counts() for _ in names]
        requests = [
            request
            for name, own in zip(names, counts, strict=True)
            for request in self.reading.requests(name, counts=own)
        ]
        return self.kept(role, " + ".join(names), requests, requests, counts)

    def kept(
        self,
        role: str,
        source: str,
        items: list[Item],
        prompts: Sequence[str],
        counts: Sequence[Counts] = (),
    ) -> list[Item]:
        """The items, recorded as those of ``role``; ``prompts`` has what each of them asks."""
        # Of the text, not of the file: the same rows in another format are the same data.
        text = json.dumps(items, sort_keys=True)
        self.record[role] = {
            "source": source,
            "rows": len(items),
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        }
        for key in ("invalid", "repeated"):
            # A count of 0 is left out, so that the record of an ordinary run stays as it was.
            if number := sum(getattr(each, key) for each in counts):
                self.record[role][key] = number
        for other, others in self._prompts.items():
            if (role in self._seen) != (other in self._seen):
                warn_of_shared(role, prompts, other, others)
        self._prompts[role] = set(prompts)
        return items
