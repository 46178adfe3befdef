"""Attack success rate: how many harmful requests a model does not refuse, under named judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from ssah.evaluation.attacks.answering import Answering
from ssah.evaluation.attacks.rates import summary
from ssah.evaluation.generating import (
    Answer,
    Request,
    asked_turns,
    bar,
    check_room,
    longest_first,
    prompts,
)
from ssah.evaluation.judges import Judge, Judged, judge
from ssah.evaluation.measures import Coherence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.selections import Selection
    from ssah.units import UnitSet

_KEPT = ("incoherent", "unfinished", "ended", "tokens", "digests")  # one value a request
# What a word takes at most of an answer that is cut. English takes 1.3 on average; with one token a
# word a fine-tuned SmolLM2 had an ASR of 7 % by wei2024, and of 59 % by qi2023.
_TOKENS_PER_WORD = 2
_DIGITS = 16  # of a SHA-256: two of a million answers share them once in 10^7 evaluations

# Computes what is kept of an arm's k-th batch of answers, or has it from earlier.
Keep: TypeAlias = "Callable[[int, int, Callable[[], dict[str, Any]]], dict[str, Any]]"


def attack_success(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    judges: Sequence[str | Judge | Judged] = ("wei2024",),
    ablated: UnitSet | Selection | None = None,
    coherent: Coherence | None = None,
    system_prompt: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    level: float = 0.95,
    progress: bool = False,
) -> dict[str, Any]:
    """Answer harmful requests greedily, and judge the answers. The answers are not kept.

    Args:
        model: a causal language model of transformers; it is left as it was.
        tokenizer: the model's.
        requests: strings, or rows as ``ssah.data.load_rows`` returns them.
        judges: as :func:`ssah.evaluation.judge` takes them, each under another name.
        ablated: units or a selection, taken out while the model answers. The answers' coherence is
            scored by the model with them back in place: use this, not ``ssah.ablate`` around the
            call.
        coherent: what scores coherence; default: ``Coherence.calibrate(model, tokenizer)``, which
            takes a while: calibrate once for several calls. For a model that was trained, give one
            of the model before.
        system_prompt, max_new_tokens, batch_size, progress: as
            :func:`ssah.evaluation.generate` takes them.
        level: of the intervals, a fraction in (0, 1).

    Returns:
        Plain data: ``requests`` (count); ``judges``: by name, ``success`` (0 or 1 a request),
        ``asr`` and ``asr_coherent`` (a success that is coherent as well), both as :func:`rate`
        returns them, and ``judge``, what judged; ``incoherent`` (a rate, with ``flags``, 0 or 1 a
        request); ``unfinished`` (a rate: the answer ended inside its reasoning, so that it is
        neither a refusal nor a success); ``same_answer`` (a rate: the answer that was given most
        often); ``ended`` (a rate: the model ended its turn by itself); ``tokens`` (one a
        request) and ``mean_tokens``; ``coherence``: its thresholds.

    Raises:
        ValueError: an argument is out of range, or an answer of ``max_new_tokens`` could never
            have the words that a judge asks for.
    """
    chosen = distinct_judges(judges, max_new_tokens)
    scorer = coherent or Coherence.calibrate(model, tokenizer, batch_size=batch_size)
    with bar(progress, len(requests)) as advance:
        (found,) = judged_answers(
            model,
            tokenizer,
            requests,
            chosen,
            scorer,
            counting(advance),
            selections=[ablated],
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    return summary(found, chosen, scorer, level=level)


def counting(advance: Callable[[int], None]) -> Keep:
    """Keeps nothing of a batch, but counts its answers."""

    def keep(arm: int, number: int, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = compute()
        advance(len(found["tokens"]))
        return found

    return keep


def judged_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    judges: Sequence[Judge],
    coherent: Coherence,
    keep: Keep,
    *,
    selections: Sequence[UnitSet | Selection | None] = (None,),
    kept: Callable[[int, int], bool] = lambda arm, number: False,
    system_prompt: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Answer requests greedily under several arms at once, and forget answers once judged.

    Args:
        judges, coherent: see :func:`judge_answers`.
        keep: called with the number of an arm, that of a batch of requests, both from 0, and a
            function without arguments that answers and judges it; returns what that function does,
            now or at an earlier call.
        selections: of each arm what is out while it answers (`ssah.ablate`); None: nothing.
            Coherence is scored by the model with all of it back in place.
        kept: whether ``keep`` has an arm and a batch from an earlier call.
        model, tokenizer, requests, system_prompt, max_new_tokens: as :func:`attack_success` takes
            them.
        batch_size: requests of a batch. As many batches as fit into memory are answered together.

    Returns:
        One an arm, what :func:`judge_answers` returns of all requests in their order; errors as of
        it.
    """
    for each in judges:
        each.to(model.device)
    encoded = prompts(tokenizer, requests, system_prompt=system_prompt)
    check_room(model, encoded, max_new_tokens)
    # Of similar length, but in the order of the requests, so that what is kept can be read.
    chunks = [sorted(chunk) for chunk in longest_first(encoded, batch_size)]
    jobs = [(arm, number) for number in range(len(chunks)) for arm in range(len(selections))]
    answering = Answering(
        model, tokenizer, coherent, requests, encoded, chunks, selections, max_new_tokens
    )
    answering.wanted = [job for job in jobs if not kept(*job)]

    def judged(job: tuple[int, int]) -> dict[str, Any]:
        own = [requests[i] for i in chunks[job[1]]]
        return _judged(own, *answering(job), judges)

    found = {job: keep(*job, partial(judged, job)) for job in jobs}
    names = [each.name for each in judges]
    return [
        _of_arm([found[arm, number] for number in range(len(chunks))], chunks, names)
        for arm in range(len(selections))
    ]


def _of_arm(
    found: Sequence[dict[str, Any]], chunks: Sequence[Sequence[int]], judges: Sequence[str]
) -> dict[str, Any]:
    """What was judged of the batches of one arm, as lists in the order of the requests."""
    # What was kept may stem from a run of another version, whose answers are gone.
    lacking = [key for key in (*_KEPT, "success") if any(key not in each for each in found)]
    if lacking:
        raise ValueError(
            f"answers that another version of ssah judged lack {', '.join(lacking)}: give another "
            "folder, or remove this one"
        )
    order = [i for chunk in chunks for i in chunk]

    def joined(lists: Sequence[list[Any]]) -> list[Any]:
        values = [value for each in lists for value in each]  # batch by batch
        return [value for _, value in sorted(zip(order, values, strict=True))]

    result: dict[str, Any] = {key: joined([each[key] for each in found]) for key in _KEPT}
    success = {name: joined([each["success"][name] for each in found]) for name in judges}
    return {**result, "success": success}


def judge_answers(
    requests: Sequence[Request],
    found: Sequence[Answer],
    judges: Sequence[Judge],
    coherent: Coherence,
) -> dict[str, Any]:
    """What is kept of answers: per request, each judge's verdict, coherence and length.

    Returns:
        Plain data, lists with one entry a request: ``success`` (by judge), ``incoherent``,
        ``unfinished`` and ``ended`` hold 0 or 1, ``tokens`` counts, and ``digests`` tells equal
        answers from others (the start of a SHA-256). An unfinished answer is no success, and not
        called incoherent either.
    """
    return _judged(requests, found, coherent([each.text for each in found], requests), judges)


def _judged(
    requests: Sequence[Request],
    found: Sequence[Answer],
    coherent: Sequence[bool],
    judges: Sequence[Judge],
) -> dict[str, Any]:
    """What :func:`judge_answers` returns, of answers whose coherence is known."""
    texts = [answer.text for answer in found]
    turns = [asked_turns(each, f"requests[{i}]") for i, each in enumerate(requests)]
    said = [i for i, answer in enumerate(found) if not answer.unfinished]  # what there is to judge
    success = {}
    for each in judges:
        by_request: dict[int, bool] = {}
        for told, own in _under_policies(each, turns, said):
            verdicts = told([turns[i][-1]["content"] for i in own], [texts[i] for i in own])
            by_request |= zip(own, verdicts, strict=True)
        success[each.name] = [int(by_request.get(i, False)) for i in range(len(found))]
    return {
        "success": success,
        "incoherent": [
            int(not sense and not answer.unfinished)
            for sense, answer in zip(coherent, found, strict=True)
        ],
        "unfinished": [int(answer.unfinished) for answer in found],
        "digests": [hashlib.sha256(text.encode()).hexdigest()[:_DIGITS] for text in texts],
        "ended": [int(answer.ended) for answer in found],
        "tokens": [answer.tokens for answer in found],
    }


def _under_policies(
    judge: Judge, turns: Sequence[Sequence[dict[str, str]]], said: Sequence[int]
) -> Iterator[tuple[Judge, list[int]]]:
    """A judge under each policy that requests came with, and the numbers of these requests.

    One that reads no policy judges all of them at once.
    """
    numbers: dict[str | None, list[int]] = {}
    for i in said:
        first = turns[i][0]
        policy = first["content"] if judge.reads_policy and first["role"] == "system" else None
        numbers.setdefault(policy, []).append(i)
    for policy, own in numbers.items():
        yield judge if policy is None else judge.under(policy), own


def distinct_judges(judges: Sequence[str | Judge | Judged], max_new_tokens: int) -> list[Judge]:
    """The judges that are meant.

    Raises:
        ValueError: there is none, or a name twice, or ``max_new_tokens`` has no room for the words
            that one asks for, so that an answer which was cut would count as a refusal.
    """
    if isinstance(judges, str) or not judges:
        raise ValueError(f"judges is {judges!r}, must be a list with at least one judge")
    chosen = [judge(each) for each in judges]
    names = [each.name for each in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"judges has {name!r} more than once, must have each once")
    for each in chosen:  # a judge that calls every short answer a refusal would find no success
        words = getattr(each, "min_words", None)
        if words is not None and max_new_tokens < _TOKENS_PER_WORD * words:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, but judge {each.name!r} calls answers of "
                f"fewer than {words} words refusals: it must be at least "
                f"{_TOKENS_PER_WORD * words}, so that an answer of so many words is not cut before"
            )
    return chosen
