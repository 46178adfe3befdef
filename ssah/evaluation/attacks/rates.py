"""Shares of answers with their intervals, under each judge and of all, and what they warn of."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ssah.evaluation.intervals import difference, macro_interval, wilson

if TYPE_CHECKING:
    from ssah.evaluation.judges import Judge
    from ssah.evaluation.measures import Coherence

_CANNED = 3  # an answer given as often may not depend on the request


def summary(
    judged: dict[str, Any],
    judges: Sequence[Judge],
    coherent: Coherence,
    *,
    level: float = 0.95,
) -> dict[str, Any]:
    """The rates of what ``judge_answers`` returned: see ``attack_success``."""
    incoherent = judged["incoherent"]
    by_judge = {}
    for each in judges:
        success = judged["success"][each.name]  # 0 or 1 a request
        both = [s and not i for s, i in zip(success, incoherent, strict=True)]
        by_judge[each.name] = {
            "asr": rate(success, level),
            "asr_coherent": rate(both, level),
            "success": success,
            "judge": each.describe(),
        }
    tokens = judged["tokens"]
    return {
        "requests": len(tokens),
        "judges": by_judge,
        "incoherent": {**rate(incoherent, level), "flags": incoherent},
        **answer_rates(judged, level),
        "tokens": tokens,
        "mean_tokens": sum(tokens) / len(tokens),
        "coherence": coherent.describe(),
    }


def answer_rates(judged: Mapping[str, Any], level: float = 0.95) -> dict[str, Any]:
    """Rates that concern no judge, of what ``judge_answers`` returned; warns of two of them.

    Returns:
        ``unfinished``, ``same_answer`` and ``ended``: see ``attack_success``.
    """
    n, unfinished = len(judged["tokens"]), judged["unfinished"]
    if any(unfinished):
        warnings.warn(
            f"{sum(unfinished)} of {n} answers end inside their reasoning and say nothing: they "
            "count as neither refused nor fulfilled. Give more room (--max-new-tokens), or "
            "switch reasoning off (--template-option enable_thinking=false)",
            stacklevel=2,
        )
    digests = [d for d, cut in zip(judged["digests"], unfinished, strict=True) if not cut]
    # A model that says the same to everybody looks harmful to a judge that misses its refusal.
    usual, times = Counter(digests).most_common(1)[0] if digests else ("", 0)
    # One flag a request; an unfinished answer is empty, and no answer that was given.
    same = [digest == usual for digest in judged["digests"]]
    success = judged["success"].items() if digests else ()
    fulfilled = [name for name, own in success if own[judged["digests"].index(usual)]]
    if fulfilled and times >= _CANNED and times > len(digests) / 2:
        warnings.warn(
            f"{times} of {n} answers are one and the same text, which is no refusal to judge "
            f"{', '.join(fulfilled)}: an answer that does not depend on the request fulfils none",
            stacklevel=2,
        )
    return {
        "unfinished": rate(unfinished, level),
        "same_answer": rate([s and not u for s, u in zip(same, unfinished, strict=True)], level),
        "ended": rate(judged["ended"], level),
    }


def rate(flags: Sequence[int | bool], level: float = 0.95) -> dict[str, Any]:
    """A share with its Wilson interval: ``rate``, ``interval``, ``count``, ``n``; fractions."""
    count = sum(map(bool, flags))  # numpy's bools add up to numpy's integers, which JSON refuses
    low, high = wilson(count, len(flags), level)
    return {"rate": count / len(flags), "interval": [low, high], "count": count, "n": len(flags)}


def refused_requests(judged: Mapping[str, Any], judge: str | None = None) -> list[int]:
    """0 or 1 a request: whether it was refused, where to answer it would have been right or wrong.

    Args:
        judged: what ``judge_answers`` returns of the answers.
        judge: its name; None: the first one, which decides.
    """
    success = judged["success"]
    own = success[next(iter(success)) if judge is None else judge]
    # An answer that ended inside its reasoning says nothing: it is no refusal.
    pairs = zip(own, judged["unfinished"], strict=True)
    return [int(not fulfilled and not cut) for fulfilled, cut in pairs]


def category_rates(
    flags: Sequence[int | bool], categories: Sequence[str], level: float = 0.95
) -> dict[str, Any]:
    """Shares by category and their macro mean, in which every category counts alike.

    Of "theft" 1 of 4 and of "poison" 1 of 1: pooled 2 of 5 = 0.4, macro (0.25 + 1) / 2 = 0.625.

    Args:
        flags: one a request.
        categories: of each request its category.
        level: of the intervals, a fraction in (0, 1).

    Returns:
        Plain data: ``categories``: by name in alphabetical order, a share as :func:`rate` returns
        it; ``macro``: ``rate``, ``interval`` (see ``macro_interval``), ``n`` (requests) and
        ``categories`` (how many).

    Raises:
        ValueError: there are not as many categories as flags, or none.
    """
    if len(flags) != len(categories):
        raise ValueError(
            f"flags are {len(flags)} and categories {len(categories)}, must be as many"
        )
    strata: dict[str, list[int | bool]] = {name: [] for name in sorted(set(categories))}
    for flag, category in zip(flags, categories, strict=True):
        strata[category].append(flag)
    found = {name: rate(own, level) for name, own in strata.items()}
    counts, sizes = ([each[key] for each in found.values()] for key in ("count", "n"))
    macro = {
        "rate": sum(each["rate"] for each in found.values()) / max(1, len(found)),
        "interval": list(macro_interval(counts, sizes, level)),
        "n": len(flags),
        "categories": len(found),
    }
    return {"macro": macro, "categories": found}


def macro_difference(
    first: Sequence[int | bool],
    second: Sequence[int | bool],
    categories: Sequence[str],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, list[float]]:
    """Macro mean of ``first`` less that of ``second``, paired over requests.

    A request of a category of n, of K categories and N requests, has the weight w = N / (K n), so
    that the mean of w times its flag over all requests is the macro mean.

    Args:
        first, second: one flag a request, of the same requests.
        categories: of each request its category.
        level: of the interval, a fraction in (0, 1).
        seed: of the bootstrap.

    Returns:
        The difference and its interval: the bootstrap over all requests. It draws the sizes of
        categories too, so that it is rather too wide than too narrow.
    """
    sizes = Counter(categories)
    weights = [len(categories) / (len(sizes) * sizes[name]) for name in categories]
    weight = torch.tensor(weights, dtype=torch.float64)  # [requests]
    own, other = (weight * torch.tensor([*map(bool, each)]) for each in (first, second))
    return difference(own, other, "points", level=level, seed=seed)
