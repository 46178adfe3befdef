"""What every study does alike: read, load, open the folder, choose a precision, score, group.

A study of its own is one file (docs/architecture.md has a whole one):

    study = Study(loading, out, "mine", settings, batch_size=settings.batch_size)
    rows = study.scored_rows(safety, utility)
    requests = study.sources.requests("requests", requests)
    study.load()
    evaluation = Evaluation(study, requests, {})
    with study.under_way(4) as steps:               # precision, two scores, and the step below
        groups = grouped(settings, study.scores(rows), scu=0.01)
        found = steps("ablated", lambda: evaluation.measure(study.model, groups["scu"]))
    return steps.run.finish(found, pictures)

Everything that can be wrong is found before the folder is opened: reading, loading and the checks
of a study come before ``under_way``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ssah.attribution import Attribution, attribute
from ssah.data import DataError, Encoded, Row, encode, make_loader, rows_read
from ssah.groups import UnitGroups, classify
from ssah.models import move, weights_hash
from ssah.storage import check_free
from ssah.studies.loading import Loading
from ssah.studies.run_folder import Run
from ssah.studies.sources import Sources
from ssah.studies.step_bars import Steps

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.choices import Normalize, Scope
    from ssah.data import Loader

SCORES = "scores"  # folder of a run


class Study:
    """One study of one model in one folder, resumable.

    Attributes:
        sources: reads its data, and has the record of it.
        model, tokenizer: once `load` was called.
        steps, dtype, bf16: inside `under_way`: its steps, the precision of scoring and measuring,
            and whether training computes in bfloat16.

    Args:
        loading: of the model.
        out: folder of the run.
        kind: of the run, e.g. ``"scan"``.
        settings: a dataclass of plain fields: all that changes the result, beside model and data.
        batch_size: sequences scored or measured at a time.

    Raises:
        ValueError: another run is under way in the folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    steps: Steps
    dtype: str
    bf16: bool

    def __init__(
        self,
        loading: Loading,
        out: str | os.PathLike[str],
        kind: str,
        settings: Any,
        *,
        batch_size: int,
    ) -> None:
        check_free(out)  # first of all, because everything after it takes a while
        self.loading, self.out, self.kind = loading, Path(out), kind
        self.settings, self.batch_size = settings, batch_size
        self.sources = Sources(loading.reading)

    def scored_rows(self, safety: str, utility: str) -> dict[str, list[Row]]:
        """The rows that units are scored on: ``"safety"`` and ``"utility"``."""
        given = {"safety": safety, "utility": utility}
        return {role: self.sources.rows(role, source) for role, source in given.items()}

    def load(self) -> PreTrainedModel:
        """Load the model, in the dtype of its checkpoint, and its tokenizer."""
        self.model, self.tokenizer = self.loading("auto")
        return self.model

    def encoded(self, role: str, rows: Sequence[Row], max_length: int) -> list[Encoded]:
        """Rows as the model reads them, at most ``max_length`` tokens each.

        Raises:
            DataError: every row was too long, and left out.
        """
        examples = list(
            encode(
                rows,
                self.tokenizer,
                max_length=max_length,
                overlong=self.loading.reading.overlong,
            )
        )
        if not examples:
            raise DataError(f"{role}: every prompt has {max_length} tokens or more")
        return examples

    def loader(self, rows: Sequence[Row]) -> Loader:
        """Batches of rows, to score units on or to measure a loss of."""
        return make_loader(
            rows,
            self.tokenizer,
            batch_size=self.batch_size,
            max_length=self.settings.max_length,
            overlong=self.loading.reading.overlong,
        )

    @cached_property
    def weights(self) -> str:
        """Hash of the model's weights as its checkpoint has them: taken before it is moved."""
        return weights_hash(self.model)

    @contextmanager
    def under_way(self, total: int, *, bf16: bool | None = None, **more: Any) -> Iterator[Steps]:
        """Open the folder, or go on with what it has; the model is moved to the precision chosen.

        Args:
            total: steps that the study has.
            bf16: whether training computes in bfloat16; None: where that is faster.
            more: further settings for the record, or others in the place of a field.

        Raises:
            ValueError: the folder has another study, or one with other settings, data or weights.
        """
        with Steps(self.run(**more), total) as self.steps:
            self.dtype, self.bf16 = self.loading.precision(self.steps, self.model.device, bf16)
            move(self.model, getattr(torch, self.dtype))
            yield self.steps

    def run(self, **more: Any) -> Run:
        """What the folder has of this study; nothing is written. Arguments and errors as above."""
        # With the weights: a folder of the same name may hold another model by now.
        identity = {**self.loading.settings(), "weights": self.weights}
        identity |= {**asdict(self.settings), **more}
        return Run(self.out, self.kind, identity, self.sources.record)

    def scores(
        self, rows: Mapping[str, Sequence[Row]], tokens: str | None = None
    ) -> dict[str, Attribution]:
        """Scores of all units on each set of rows: one pass and one step a set, kept in the folder.

        Args:
            rows: name of the set, e.g. ``"safety"``, -> its rows.
            tokens: as :func:`ssah.attribute` takes it; None: as the settings have it.
        """
        chosen = tokens or self.settings.tokens
        return {name: self._score(name, own, chosen) for name, own in rows.items()}

    def _score(self, name: str, rows: Sequence[Row], tokens: str) -> Attribution:
        folder = self.out / SCORES / f"{name}-{tokens}"

        def compute() -> dict[str, Any]:
            loader = self.loader(rows)
            attribution = attribute(self.model, loader, tokens=tokens)
            attribution.save(folder)
            return {
                # Experts see fewer tokens than other modules: the largest count is of all of them.
                "tokens": max(attribution.count.values()),
                "data_fingerprint": attribution.data_fingerprint,
                "rows_read": rows_read(self.tokenizer, loader.counts),
            }

        # Attributions are large and have a format of their own: the step itself keeps a summary.
        self.steps(f"score-{name}-{tokens}", compute, lambda found: f"{found['tokens']:,} tokens")
        return Attribution.load(folder)


class _Grouping(Protocol):
    @property
    def scope(self) -> Scope: ...
    @property
    def normalize(self) -> Normalize: ...


def grouped(
    settings: _Grouping,
    scores: Mapping[str, Attribution] | Mapping[str, Mapping[str, Tensor]],
    *,
    scu: float = 0.0,
    ucu: float = 0.0,
    ru: float = 0.0,
) -> UnitGroups:
    """Groups of these shares, fractions of all units, as the settings say.

    Args:
        settings: with ``scope`` and ``normalize``, as :func:`ssah.classify` takes them.
        scores: ``"safety"`` and ``"utility"``: an attribution, or B's name -> ``[n_units]``.
        scu, ucu, ru: as :func:`ssah.classify` takes them.
    """
    return classify(
        scores["safety"],
        scores["utility"],
        scu=scu,
        ucu=ucu,
        ru=ru,
        scope=settings.scope,
        normalize=settings.normalize,
    )
