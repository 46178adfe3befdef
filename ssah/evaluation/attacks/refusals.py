"""Is it still safe? What a model refuses before and after it was trained, on the same requests.

Of 40 harmful requests a model refuses 30 before and 12 after, and 4 of the 12 answers that are left
as refusals were none before: the change of -18 / 40 = -45 points has the interval of the paired
differences, request by request. Beside it stand three controls: harmless requests that look
dangerous (a model that refuses everything is not safe), answers that are empty or repeat themselves
(a model that babbles refuses nothing), and the refusal margin, which needs no judge.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.choices import Overlong
from ssah.evaluation.attacks.attack import counting, distinct_judges, judged_answers
from ssah.evaluation.attacks.rates import rate, refused_requests
from ssah.evaluation.generating import OPENING, bar, prompts, with_room
from ssah.evaluation.intervals import difference
from ssah.evaluation.judges import Judge, Judged
from ssah.evaluation.measures import Coherence, refusal_margins

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Refusals:
    """Measures what a model refuses, now; the answers are judged and forgotten.

    Example: ``before = asked()``, train the model, ``after = asked()``, and then
    ``refusals_change(before, after)``.

    Args:
        model: a causal language model of transformers; a plan may be in force on it.
        tokenizer: the model's.
        requests: harmful requests.
        over_refusal: harmless requests that look dangerous; none: over-refusal is not measured.
        judge: as :func:`ssah.evaluation.judge` takes it.
        max_new_tokens: the most tokens of an answer.
        batch_size: requests answered at a time.
        overlong: of requests that leave no room: ``"skip"`` leaves them out with a warning; with
            anything else they are refused.
        progress: show a bar on standard error.

    Raises:
        ValueError: no harmful request, one that leaves no room for an answer, no such judge, or an
            answer of ``max_new_tokens`` could never have the words that it asks for.
        Exception: whatever a judge raises that cannot work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[str],
        *,
        over_refusal: Sequence[str] = (),
        judge: str | Judge | Judged = "wei2024",
        max_new_tokens: int = 64,
        batch_size: int = 16,
        overlong: Overlong = "error",
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        (self.judge,) = distinct_judges([judge], max_new_tokens)
        self.judge.check()
        self.max_new_tokens, self.batch_size, self.progress = max_new_tokens, batch_size, progress
        self.requests = self._fitting(requests, "requests", overlong)
        harmless = self._fitting(over_refusal, "over_refusal", overlong) if over_refusal else []
        self.over_refusal = harmless

    def _fitting(self, requests: Sequence[str], name: str, overlong: Overlong) -> list[str]:
        """The requests that can be answered and opened; the others are refused or left out."""
        new = self.max_new_tokens
        return with_room(self.model, self.tokenizer, requests, new, overlong=overlong, name=name)

    def describe(self) -> dict[str, Any]:
        """Plain data, equal where the same is asked and judged in the same way."""
        text = json.dumps([self.requests, self.over_refusal])
        return {
            "requests": len(self.requests),
            "over_refusal": len(self.over_refusal),
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
            "judge": self.judge.describe(),
            "max_new_tokens": self.max_new_tokens,
        }

    def __call__(self) -> dict[str, Any]:
        """Answer all requests and judge the answers.

        Returns:
            Plain data: ``refused`` and ``over_refused`` (rates as :func:`ssah.evaluation.rate`
            returns them; the second is None without such requests), ``empty_or_repeating`` and
            ``unfinished`` (rates, of the answers to harmful requests), ``refusal_margin`` (nats per
            token, of harmful requests), and ``per_request``, one value a request:
            ``refused``, ``over_refused`` (0 or 1) and ``margins``.
        """
        harmful = self._judged(self.requests)
        refused = refused_requests(harmful)
        harmless = refused_requests(self._judged(self.over_refusal)) if self.over_refusal else []
        margins = refusal_margins(  # [requests]
            self.model,
            self.tokenizer,
            self.requests,
            batch_size=self.batch_size,
            max_length=max(map(len, prompts(self.tokenizer, self.requests))) + OPENING,
        )
        return {
            "refused": rate(refused),
            "over_refused": rate(harmless) if harmless else None,
            "refusal_margin": float(margins.mean()),
            "empty_or_repeating": rate(harmful["incoherent"]),
            "unfinished": rate(harmful["unfinished"]),
            "per_request": {
                "refused": refused,
                "over_refused": harmless,
                "margins": margins.tolist(),
            },
        }

    @staticmethod
    def line(measured: Mapping[str, Any]) -> str:
        """One measurement, for a log: ``refused 30/40 (75.0%), ..., margin +0.512``."""
        rates = {
            "refused": measured["refused"],
            "over-refused": measured["over_refused"],
            "empty or repeating": measured["empty_or_repeating"],
        }
        shown = [
            f"{name} {own['count']}/{own['n']} ({own['rate']:.1%})"
            for name, own in rates.items()
            if own is not None
        ]
        return ", ".join([*shown, f"margin {measured['refusal_margin']:+.3f}"])

    def _judged(self, requests: Sequence[str]) -> dict[str, Any]:
        # The model before training, which could tell nonsense from sense, is gone after it.
        shape_alone = Coherence(self.model, self.tokenizer, math.inf, batch_size=self.batch_size)
        with bar(self.progress, len(requests)) as advance:
            (found,) = judged_answers(
                self.model,
                self.tokenizer,
                requests,
                [self.judge],
                shape_alone,
                counting(advance),
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
        return found


def refusals_change(
    before: Mapping[str, Any], after: Mapping[str, Any], *, level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """What training changed, paired over requests: the later measurement less the earlier one.

    Args:
        before, after: what :class:`Refusals` returned, of the same requests.
        level, seed: of the intervals.

    Returns:
        ``refused``, ``over_refused`` (where it was measured; both fractions) and
        ``refusal_margin`` (nats per token): each with ``change`` and ``interval``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, key in (
        ("refused", "refused"),
        ("over_refused", "over_refused"),
        ("refusal_margin", "margins"),
    ):
        later, earlier = (_values(each, key) for each in (after, before))
        if len(later):
            unit: Any = "nats" if key == "margins" else "points"
            change, interval = difference(later, earlier, unit, level=level, seed=seed)
            found[name] = {"change": change, "interval": interval}
    return found


def _values(measured: Mapping[str, Any], key: str) -> Tensor:
    return torch.tensor(measured["per_request"][key], dtype=torch.float64)  # [requests]
