"""What experiments read: rows and requests with their record, models, scores and groups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ssah.attribution import Attribution, attribute
from ssah.choices import Counted
from ssah.data import Counts, Overlong, Reading, Row, make_loader, rows_read, warn_of_shared
from ssah.models import DTYPES, faster_dtype, load_model, quiet
from ssah.studies.steps import Steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "READING",
    "TOKENS",
    "Loading",
    "Sources",
    "score",
]

READING = Reading()
# Roles whose rows a model was calibrated or trained on; others measure it.
_SEEN = ("safety", "utility", "finetune")
SCORES = "scores"  # folder of a run
TOKENS: tuple[Counted, ...] = get_args(Counted)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        name: as ``ssah.models.load_model`` takes it.
        dtype: of scoring and measuring; ``"auto"``: what multiplies faster here.
        device: as ``load_model`` takes it.
        trust_remote_code: as ``load_model`` takes it.
        reading: how rows are read, and the chat template.
    """

    name: str
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    reading: Reading = READING

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)

    def __call__(
        self, dtype: str, name: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in ``dtype``, or another one (a folder) loaded in the same way."""
        with quiet():
            model, tokenizer = load_model(
                name or self.name,
                dtype=dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
        return model, self.reading.tokenizer(tokenizer)

    def settings(self) -> dict[str, Any]:
        """For the record of a run."""
        fields = asdict(self)
        del fields["reading"]
        return {"model": fields.pop("name"), **fields, **self.reading.settings()}

    def precision(
        self, steps: Steps, device: torch.device, bf16: bool | None = None
    ) -> tuple[str, bool]:
        """What ``dtype`` means on ``device``, and whether training computes in bfloat16.

        Which is faster is measured once: a run that goes on must not choose again.
        """

        def choose() -> dict[str, Any]:
            fast = str(faster_dtype(device)).removeprefix("torch.")
            return {
                "dtype": fast if self.dtype == "auto" else self.dtype,
                "bf16": fast == "bfloat16" if bf16 is None else bf16,
            }

        found = steps("precision", choose, lambda found: found["dtype"])
        return found["dtype"], found["bf16"]


class Sources:
    """Reads rows and requests, and keeps the record of what was read.

    Attributes:
        record: role -> ``source``, ``rows`` (a count) and ``fingerprint`` (SHA-256 of the text), as
            :class:`~ssah.studies.run.Run` takes it; ``invalid`` and ``repeated`` (counts) where
            rows were left out, or repeat a prompt.

    Args:
        reading: how they are read.
    """

    def __init__(self, reading: Reading = READING) -> None:
        self.reading = reading
        self.record: dict[str, dict[str, Any]] = {}
        self._prompts: dict[str, set[str]] = {}

    def rows(self, role: str, source: str) -> list[Row]:
        """Rows with answers; ``source`` as ``ssah.data.load_rows`` takes it."""
        counts = Counts()
        rows = list(self.reading.rows(source, counts=counts))
        return self._kept(role, source, rows, [row["prompt"] for row in rows], [counts])

    def requests(self, role: str, sources: str | Sequence[str]) -> list[str]:
        """Requests of one source or of several, as ``ssah.data.load_requests`` takes them."""
        names = [sources] if isinstance(sources, str) else list(sources)
        counts = [Counts() for _ in names]
        requests = [
            request
            for name, own in zip(names, counts, strict=True)
            for request in self.reading.requests(name, counts=own)
        ]
        return self._kept(role, " + ".join(names), requests, requests, counts)

    def _kept(
        self,
        role: str,
        source: str,
        items: list[Any],
        prompts: Sequence[str],
        counts: Sequence[Counts],
    ) -> list[Any]:
        text = json.dumps(items, sort_keys=True)
        self.record[role] = {
            "source": source,
            "rows": len(items),
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        }
        for key in ("invalid", "repeated"):
            if number := sum(getattr(each, key) for each in counts):
                self.record[role][key] = number
        for other, others in self._prompts.items():
            if (role in _SEEN) != (other in _SEEN):
                warn_of_shared(role, prompts, other, others)
        self._prompts[role] = set(prompts)
        return items


def score(
    steps: Steps,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Row]],
    *,
    tokens: str,
    batch_size: int,
    max_length: int,
    overlong: Overlong = "cut",
) -> dict[str, Attribution]:
    """Scores of all units on each set of rows: one pass a set, kept in the run's folder.

    Args:
        steps: of the run.
        model, tokenizer: what is scored.
        rows: name of the set, e.g. ``"safety"``, -> its rows.
        tokens: as :func:`ssah.attribute` takes it.
        batch_size, max_length, overlong: as ``ssah.data.make_loader`` takes them.
    """
    found = {}
    for name, own in rows.items():
        folder: Path = steps.run.out / SCORES / f"{name}-{tokens}"

        def compute(own: Sequence[Row] = own, folder: Path = folder) -> dict[str, Any]:
            loader = make_loader(
                own, tokenizer, batch_size=batch_size, max_length=max_length, overlong=overlong
            )
            attribution = attribute(model, loader, tokens=tokens)
            attribution.save(folder)
            return {
                "tokens": max(attribution.count.values()),
                "data_fingerprint": attribution.data_fingerprint,
                "rows_read": rows_read(tokenizer, loader.counts),
            }

        steps(f"score-{name}-{tokens}", compute, lambda found: f"{found['tokens']:,} tokens")
        found[name] = Attribution.load(folder)
    return found


def check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse, with ValueError, what is not among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{argument} is {value!r}; it must be one of {', '.join(allowed)}")
