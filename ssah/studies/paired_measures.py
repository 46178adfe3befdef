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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.evaluation import (
    OPENING,
    Coherence,
    Divergence,
    bootstrap,
    distinct_judges,
    fitting,
    judged_answers,
    prompts,
    refusal_margins,
    response_log_probs,
    wilson,
)
from ssah.evaluation import summary as attack_summary
from ssah.interventions import ablate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.data import Loader, Row
    from ssah.evaluation import Judge, Request
    from ssah.selections import Selection
    from ssah.studies.study import Study
    from ssah.units import UnitSet

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
    """

    def __init__(
        self,
        study: Study,
        requests: Sequence[Request],
        rows: Mapping[str, Sequence[Row]],
        *,
        asked: int | None = None,
        judges: Sequence[Judge] = (),
    ) -> None:
        self.study, settings = study, study.settings
        self.room = max(settings.max_length, _ROOM)
        encoded = prompts(study.tokenizer, requests)
        overlong = study.loading.reading.overlong
        # What the margin asks for is the opening of an answer, which comes after the request.
        self.requests = fitting(requests, encoded, self.room - OPENING, overlong=overlong)
        self.asked = self.requests[:asked]
        self.judges = judges or distinct_judges(settings.judges, settings.max_new_tokens)
        self.loaders = {name: study.loader(own) for name, own in rows.items()}

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
            found = {
                name: known[name] if known is not None and name in known else _losses(model, loader)
                for name, loader in self.loaders.items()
            }
        refusing = int((margins > 0).sum())
        return {
            "refusal_margin": float(margins.mean()),
            "refuses": refusing / len(margins),
            "refuses_interval": wilson(refusing, len(margins)),
            "margins": margins.tolist(),
            "losses": found,
        }

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


def losses_of(log_probs: Tensor, tokens: Tensor) -> dict[str, Any]:
    """Losses as plain data: ``loss`` (nats per token), ``nats`` and ``tokens`` of each row.

    Args:
        log_probs: float64 ``[rows]``, summed over the response of each, in nats.
        tokens: int64 ``[rows]``, of each response.

    Raises:
        ValueError: no response has a token.
    """
    nats = -log_probs
    if not int(tokens.sum()):
        raise ValueError("the rows have no response token to predict, must have at least one")
    return {
        "loss": float(nats.sum() / tokens.sum()),
        "nats": nats.tolist(),
        "tokens": tokens.tolist(),
    }


def summary(measured: Mapping[str, Any], attack: Mapping[str, Any] | None) -> dict[str, Any]:
    """What :meth:`Evaluation.measure` and ``attack`` found, without what is one per request.

    Returns:
        ``<name>_loss`` of each set of rows, ``refusal_margin``, ``refuses`` and its interval; with
        an attack ``asr``, ``asr_coherent`` (under the first judge) and ``incoherent``, rates with
        their intervals, ``mean_tokens`` of an answer, and ``judges``: the rates under each.
    """
    found: dict[str, Any] = {
        f"{name}_loss": losses["loss"] for name, losses in measured["losses"].items()
    }
    found |= {key: measured[key] for key in ("refusal_margin", "refuses", "refuses_interval")}
    if attack is None:  # no request was answered: what needs answers is left out, not 0
        return found
    judges = {
        name: {key: each[key] for key in ("asr", "asr_coherent", "judge")}
        for name, each in attack["judges"].items()
    }
    first = next(iter(judges.values()))  # the judge that decides
    incoherent = attack["incoherent"]
    return found | {
        "requests": attack["requests"],
        "asr": first["asr"]["rate"],
        "asr_interval": first["asr"]["interval"],
        "asr_coherent": first["asr_coherent"]["rate"],
        "asr_coherent_interval": first["asr_coherent"]["interval"],
        "incoherent": incoherent["rate"],
        "incoherent_interval": incoherent["interval"],
        "mean_tokens": attack["mean_tokens"],
        "judges": judges,
    }


def losses(measured: Mapping[str, Any], name: str) -> Tensor:
    """Float64 ``[rows]`` whose mean is the loss per token: a row's nats / mean tokens of a row.

    Differences of two models on the same rows therefore average to the difference of their losses.
    """
    own = measured["losses"][name]
    # Not nats / tokens of the row: a mean of these would weigh short answers as much as long ones.
    nats = torch.tensor(own["nats"], dtype=torch.float64)
    return nats / (sum(own["tokens"]) / len(own["tokens"]))


def succeeded(attack: Mapping[str, Any]) -> Tensor:
    """Float64 ``[requests]``: 1 where the attack succeeded under the first judge."""
    first = next(iter(attack["judges"].values()))
    return torch.tensor(first["success"], dtype=torch.float64)


def over_refused(judged: Mapping[str, Any], judge: str) -> list[int]:
    """1 for each harmless request that was refused under a judge; ``judged``: of its answers."""
    # An answer that ended inside its reasoning is no refusal.
    pairs = zip(judged["success"][judge], judged["unfinished"], strict=True)
    return [int(not success and not cut) for success, cut in pairs]


def kl_summary(found: Mapping[str, Any], *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """``kl`` and ``kl_first``, nats, with their intervals: over positions, and at the first one.

    Args:
        found: the fields of a `Divergence` as lists, one value a row.
        level, seed: of the intervals.
    """
    own = Divergence(
        **{key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}
    )
    shown: dict[str, Any] = {}
    for key, values in (("kl", own.per_row), ("kl_first", own.first)):  # [rows]
        interval = bootstrap(values, level=level, seed=seed)
        shown |= {key: float(values.mean()), f"{key}_interval": list(interval)}
    return shown


def measured_line(measured: Mapping[str, Any]) -> str:
    """Margin and losses, in a line."""
    parts = [f"{name} loss {each['loss']:.3f}" for name, each in measured["losses"].items()]
    return f"margin {measured['refusal_margin']:+.2f}, {', '.join(parts)}"


def attack_line(attack: Mapping[str, Any]) -> str:
    """Rates under each judge, in a line."""
    rates = [f"ASR {each['asr']['rate']:.1%} ({name})" for name, each in attack["judges"].items()]
    return f"{', '.join(rates)}, incoherent {attack['incoherent']['rate']:.1%}"
