"""What a study measures of a model, one value per request or row, so that models can be paired.

Two models are compared on the same requests, so the interval of their difference is that of the
differences, request by request, and much narrower than the intervals of both. For example, of 4
requests one model gives in to 1, 1, 1, 0 and the other to 1, 1, 0, 0: the rates 0.75 and 0.5 have
wide intervals, but the models differ on one request alone. Studies therefore keep the single
values, never the answers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ssah.evaluation import (
    OPENING,
    Coherence,
    distinct_judges,
    fitting,
    judged_answers,
    prompts,
    refusal_margins,
    response_log_probs,
    wilson,
    with_room,
)
from ssah.evaluation import summary as attack_summary
from ssah.interventions import ablate
from ssah.studies.measured_values import losses_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.data import Loader, Row
    from ssah.evaluation import Judge, Request
    from ssah.selections import Selection
    from ssah.studies.study import Study
    from ssah.units import UnitSet

Asking = TypeVar("Asking", bound="Request")

UTILITY, MATH = "utility", "math"
# Tokens that a request has at least, whatever ``max_length`` of rows is: it is never cut, because
# half a request may be harmless.
_ROOM = 512


class Evaluation:
    """The data that models are measured on, the same for each of them.

    Args:
        study: whose steps, tokenizer, sizes and settings are used.
        requests: harmful requests, for the refusal margin.
        rows: name, e.g. ``"utility"``, -> rows with answers, for the loss of these answers.
        asked: of the requests, how many are answered and judged: the first ones; None: all.
        judges: of the answers, where they were made already; the first one decides.
        name: of the requests, in messages.

    Raises:
        ValueError: a request that is asked leaves the model no room for an answer.
    """

    def __init__(
        self,
        study: Study,
        requests: Sequence[Request],
        rows: Mapping[str, Sequence[Row]],
        *,
        asked: int | None = None,
        judges: Sequence[Judge] = (),
        name: str = "requests",
    ) -> None:
        self.study, settings = study, study.settings
        self.room = max(settings.max_length, _ROOM)
        # What the margin asks for is the opening of an answer, which comes after the request.
        self.requests = self._fitting(requests, self.room - OPENING, name)
        self.asked = self._with_room(self.requests[:asked], name)
        self.judges = judges or checked_judges(settings)
        self.loaders = {name: study.loader(own) for name, own in rows.items()}

    def _fitting(self, requests: Sequence[Asking], most: int, name: str) -> list[Asking]:
        encoded = prompts(self.study.tokenizer, requests, name=name)
        overlong = self.study.loading.reading.overlong
        return fitting(requests, encoded, most, overlong=overlong, name=name)

    def answerable(
        self, requests: Sequence[Asking], name: str, *, asked: int | None = None
    ) -> list[Asking]:
        """The first requests of a set, once it is known that all of them can be answered.

        Long ones are left out where rows are; so a study refuses the others before it begins.

        Args:
            requests: harmful ones or others.
            name: of the set, in messages.
            asked: how many of those that are not left out; None: all.

        Raises:
            DataError: every one is too long.
            ValueError: one leaves the model no room for an answer.
        """
        return self._with_room(self._fitting(requests, self.room, name)[:asked], name)

    def _with_room(self, requests: Sequence[Asking], name: str) -> list[Asking]:
        if not requests:  # a study may ask nothing, and measure margins alone
            return []
        study, new = self.study, self.study.settings.max_new_tokens
        return with_room(study.model, study.tokenizer, requests, new, overlong="error", name=name)

    def measure(
        self,
        model: PreTrainedModel,
        ablated: UnitSet | Selection | None = None,
        *,
        known: Mapping[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Refusal margins and losses of a model, with units ablated or as it is.

        Args:
            model, ablated: what is measured.
            known: name of rows -> their losses as :func:`losses_of` gives them, where another pass
                has found them.

        Returns:
            ``margins`` (nats per token, one a request), ``refusal_margin`` (their mean),
            ``refuses`` (the share above 0), and ``losses``: name -> ``loss`` (nats per response
            token), ``nats`` and ``tokens`` (of the response of each row).
        """
        with nullcontext() if ablated is None else ablate(model, ablated):
            margins = refusal_margins(  # [requests]
                model,
                self.study.tokenizer,
                self.requests,
                batch_size=self.study.batch_size,
                max_length=self.room,
            )
            found = self.losses(model, known)
        refusing = int((margins > 0).sum())
        return {
            "refusal_margin": float(margins.mean()),
            "refuses": refusing / len(margins),
            "refuses_interval": wilson(refusing, len(margins)),
            "margins": margins.tolist(),
            "losses": found,
        }

    def losses(
        self, model: PreTrainedModel, known: Mapping[str, dict[str, Any]] | None = None
    ) -> dict[str, dict[str, Any]]:
        """The losses alone, of a model as it is; arguments and result as of `measure`."""
        found = dict(known or {})
        for name, loader in self.loaders.items():
            if name not in found:
                found[name] = _losses(model, loader)
        return {name: found[name] for name in self.loaders}

    def attacks(
        self,
        names: Sequence[str],
        model: PreTrainedModel,
        coherent: Coherence,
        selections: Sequence[UnitSet | Selection | None] = (None,),
    ) -> list[dict[str, Any]]:
        """What ``ssah.evaluation.attack_success`` returns of each; arguments as of `judged`."""
        found = self.judged(names, model, coherent, self.asked, selections=selections)
        return [attack_summary(each, self.judges, coherent) for each in found]

    def judged(
        self,
        names: Sequence[str],
        model: PreTrainedModel,
        coherent: Coherence,
        requests: Sequence[Request],
        *,
        selections: Sequence[UnitSet | Selection | None],
        system_prompt: str | None = None,
        judges: Sequence[Judge] = (),
    ) -> list[dict[str, Any]]:
        """Let a model answer requests under several arms at once; the answers are not kept.

        A batch of an arm's answers is a step, so that little is lost.

        Args:
            names: of the steps of each arm; the number of the batch follows it.
            model: what answers.
            coherent: says what is incoherent, by an intact model.
            requests: what it answers.
            selections: of each arm the units of ``model`` that are out while it answers.
            system_prompt: as ``ssah.evaluation.generate`` takes it.
            judges: further ones, which judge these answers alone.

        Returns:
            one an arm, what ``ssah.evaluation.judge_answers`` returns.
        """
        study, steps = self.study, self.study.steps
        with steps.part("answers", len(names) * len(requests)) as advance:
            answered: list[int] = []  # of each batch, how many

            def keep(
                arm: int, number: int, compute: Callable[[], dict[str, Any]]
            ) -> dict[str, Any]:
                # Not a step with a line of its own: there are hundreds of them.
                found: dict[str, Any] = steps.run.step(_batch(names[arm], number), compute)
                answered.append(len(found["tokens"]))
                advance(sum(answered))
                return found

            return judged_answers(
                model,
                study.tokenizer,
                requests,
                [*self.judges, *judges],
                coherent,
                keep,
                selections=selections,
                kept=lambda arm, number: steps.run.done(_batch(names[arm], number)),
                system_prompt=system_prompt,
                max_new_tokens=study.settings.max_new_tokens,
                batch_size=study.batch_size,
            )


def _batch(name: str, number: int) -> str:
    """The step of a batch of answers."""
    return f"{name}.{number:04d}"


def checked_judges(settings: Any) -> list[Judge]:
    """The judges that a study's settings name, asked whether they can work.

    Errors as of `ssah.evaluation.Judge.check`; so they come before a model is loaded.
    """
    judges = distinct_judges(settings.judges, settings.max_new_tokens)
    for judge in judges:
        judge.check()
    return judges


def intact_coherence(
    study: Study, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Coherence:
    """What scores coherence by an intact model, with a threshold that is a step of the study."""
    found = study.steps(
        "coherence",
        lambda: Coherence.calibrate(model, tokenizer, batch_size=study.batch_size).describe(),
        lambda found: f"threshold {found['max_nll']:.2f} nats",
    )
    return Coherence(model, tokenizer, found["max_nll"], batch_size=study.batch_size)


def _losses(model: PreTrainedModel, loader: Loader) -> dict[str, Any]:
    pairs = list(response_log_probs(model, loader))
    log_probs, tokens = (torch.cat(each) for each in zip(*pairs, strict=True))  # [rows] both
    return losses_of(log_probs, tokens)
