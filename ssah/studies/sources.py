"""What a study reads: rows and requests, with the record of what was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from ssah.data import (
    Asked,
    Counts,
    DataError,
    Lettered,
    Pair,
    Reading,
    Row,
    draw_by_category,
    drop_category,
    drop_seen,
    load_lettered,
    load_preferences,
    request_of,
    warn_of_shared,
)
from ssah.studies.choosing import ALL, Choosing

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

    def asked(
        self, role: str, sources: str | Sequence[str], choosing: Choosing
    ) -> list[str] | list[Asked]:
        """Requests, with their categories where there are any, as ``choosing`` says.

        The record has ``left_out`` and ``seen``, counts, and ``drawn_of``, the rows that were drawn
        from, where there is something to tell.

        Raises:
            DataError, ValueError: as of the functions of ``ssah.data`` that read and choose; or a
                request was seen, and such requests are not to be left out.
        """
        if choosing == ALL:
            return self.requests(role, sources)
        names = [sources] if isinstance(sources, str) else list(sources)
        counts = [Counts() for _ in names]
        rows = [
            row
            for name, own in zip(names, counts, strict=True)
            for row in self.reading.asked(name, choosing.columns, counts=own)
        ]
        told: dict[str, int] = {}
        # Before the draw, so that as many as were asked for are drawn of what is left.
        kept = rows
        for unwanted in choosing.leave_out:
            kept = drop_category(kept, unwanted)
        told["left_out"] = len(rows) - len(kept)
        known = [text for name in choosing.seen for text in self.reading.requests(name)]
        unseen = drop_seen(kept, known)
        told["seen"] = len(kept) - len(unseen)
        _check_unseen(role, told["seen"], len(kept), choosing)
        if choosing.per_category is not None:
            last, seed = choosing.by[-1], choosing.draw_seed
            told["drawn_of"] = len(unseen)
            unseen = draw_by_category(unseen, last, choosing.per_category, seed=seed)
        # Of the prompts alone: a run may be told apart by another column without new answers.
        prompts = [row["prompt"] for row in unseen]
        self.kept(role, " + ".join(names), prompts, prompts, counts)
        self.record[role] |= {key: number for key, number in told.items() if number}
        return unseen

    def policies(self, role: str, source: str) -> list[Asked]:
        """Requests with a policy each, as ``ssah.data.load_asked`` takes them."""
        counts = Counts()
        rows = self.reading.asked(source, policy=True, counts=counts)
        return self.kept(role, source, rows, [row["prompt"] for row in rows], [counts])

    def lettered(self, role: str, source: str) -> list[Lettered]:
        """Multiple-choice questions, as ``ssah.data.load_lettered`` takes them."""
        counts = Counts()
        rows = load_lettered(source, invalid=self.reading.invalid, counts=counts)
        return self.kept(role, source, rows, [row["prompt"] for row in rows], [counts])

    def preferences(self, source: str) -> list[Pair]:
        """Two answers to each request, as ``ssah.data.load_preferences`` takes them."""
        counts = Counts()
        pairs = load_preferences(source, invalid=self.reading.invalid, counts=counts)
        return self.kept("preferences", source, pairs, list(map(request_of, pairs)), [counts])

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


def _check_unseen(role: str, seen: int, n: int, choosing: Choosing) -> None:
    """Refuse, with DataError, requests that were seen where they are to stay, or all are."""
    where = f"{role}: {seen} of {n} requests are also in {', '.join(choosing.seen)}"
    # Refused by default, as rows that are not valid are: to leave rows out changes the result.
    if seen and not choosing.skip_seen:
        raise DataError(
            f"{where}: what is measured on them was seen before. Leave them out (--skip-seen)"
        )
    if seen == n:
        raise DataError(f"{where}, so that none is left")
