"""Answers of several arms, made together and handed out batch by batch.

Two arms, and requests in batches 0, 1 and 2, of which two at a time fit into memory:

    asked for             arm 0 of batch 0   arm 1 of 0   arm 0 of 1   arm 1 of 1   arm 0 of 2
    answered and scored   both arms of 0, 1  -            -            -            both arms of 2

So weights are read once for all arms, and what is kept between two calls stays small. What the
intact model said itself was scored as it said it: no pass of its own is needed for its coherence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from ssah.evaluation.generating import Answer, Request, answers_of_arms, fitting_rows
from ssah.evaluation.measures import Coherence
from ssah.interventions import changes_some_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.selections import Selection
    from ssah.units import UnitSet

Job: TypeAlias = tuple[int, int]  # an arm, and a batch of requests


@dataclass
class Answering:
    """Answers one arm and batch after the other, ahead where they share a pass.

    Attributes:
        model, tokenizer, selections, max_new_tokens: as ``answers_of_arms`` takes them.
        coherent: says which answers are coherent, with no units out.
        requests, encoded: as given, and as tokens.
        chunks: numbers of the requests of each batch.
        wanted: what will be asked for, in this order.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    coherent: Coherence
    requests: Sequence[Request]
    encoded: Sequence[Sequence[int]]
    chunks: Sequence[Sequence[int]]
    selections: Sequence[UnitSet | Selection | None]
    max_new_tokens: int
    wanted: list[Job] = field(default_factory=list)
    _ready: dict[Job, tuple[list[Answer], list[bool]]] = field(default_factory=dict)

    @cached_property
    def at_once(self) -> int:
        """Rows of a pass: measured when there is something to answer."""
        least = max(map(len, self.chunks))
        return fitting_rows(self.model, self.tokenizer, self.encoded, self.max_new_tokens, least)

    def __call__(self, job: Job) -> tuple[list[Answer], list[bool]]:
        """The answers of an arm to a batch, and which are coherent; both are forgotten here."""
        if job not in self._ready:
            self._answer(self._ahead(job))
        return self._ready.pop(job)

    def _ahead(self, job: Job) -> list[Job]:
        """This one and those after it that share a pass with it."""
        start = self.wanted.index(job)
        # All arms of a batch, however many: they are answered in several passes where need be.
        ahead = [each for each in self.wanted[start:] if each[1] == job[1]]
        rows = sum(len(self.chunks[number]) for _, number in ahead)
        for each in self.wanted[start + len(ahead) :]:
            rows += len(self.chunks[each[1]])
            if rows > self.at_once:
                break
            ahead.append(each)
        return ahead

    def _answer(self, ahead: Sequence[Job]) -> None:
        jobs = [(arm, i) for arm, number in ahead for i in self.chunks[number]]
        # The model that scores coherence is this one, and sees what it said as it says it.
        scored = self.coherent.model is self.model and not changes_some_positions(self.model)
        found = answers_of_arms(
            self.model,
            self.tokenizer,
            self.encoded,
            jobs,
            self.selections,
            max_new_tokens=self.max_new_tokens,
            at_once=self.at_once,
            scored=scored,
        )
        # In one go: arms that give the same answer are scored once.
        fine = self.coherent(
            [each.text for each in found],
            [self.requests[i] for _, i in jobs],
            [
                (self.encoded[i], *each.said) if each.said[1] else None
                for each, (_, i) in zip(found, jobs, strict=True)
            ],
        )
        start = 0
        for job in ahead:
            stop = start + len(self.chunks[job[1]])
            self._ready[job] = found[start:stop], fine[start:stop]
            start = stop
