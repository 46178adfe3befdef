"""What a model is asked: lists of requests, each under every system prompt, or under its own.

With the system prompts none and "Be kind.", requests and policies, three lists are answered:

    requests under none, requests under "Be kind.", policies, each request under its own
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

from ssah.evaluation import (
    category_rates,
    check_room,
    fitting,
    macro_difference,
    policy_rates,
    prompts,
    room_of,
)
from ssah.studies.choosing import ALL, Choosing
from ssah.studies.evaluate.record import (
    BENIGN,
    INTACT,
    OVER_REFUSAL,
    REQUESTS,
    coherent_success,
)

if TYPE_CHECKING:
    from ssah.data import Asked
    from ssah.evaluation import Judge, Request
    from ssah.studies.evaluate.ablations import Evaluated
    from ssah.studies.evaluate.record import Judged
    from ssah.studies.evaluate.settings import EvaluateSettings
    from ssah.studies.sources import Sources
    from ssah.studies.study import Study

POLICIES = "policies"
ALLOWED = "allowed"  # the column says which answers are within their policy


def read_lists(
    sources: Sources,
    requests: str | Sequence[str],
    over_refusal: str | None,
    benign: str | None,
    policy: str | None,
    choosing: Choosing,
) -> dict[str, Sequence[Request]]:
    """The requests of each role, of those that were given."""
    found: dict[str, Sequence[Request]] = {REQUESTS: sources.asked(REQUESTS, requests, choosing)}
    for role, source in ((OVER_REFUSAL, over_refusal), (BENIGN, benign)):
        if source is not None:
            found[role] = sources.requests(role, source)
    if policy is not None:
        found[POLICIES] = sources.policies(POLICIES, policy)
    return found


def lists_asked(
    roles: Mapping[str, Sequence[Request]], settings: EvaluateSettings
) -> list[tuple[int, str]]:
    """The number of a system prompt and the role of each list that every model answers."""
    conditions = range(len(settings.system_prompts))
    found = list(product(conditions, [role for role in roles if role != POLICIES]))
    return [*found, *((0, role) for role in roles if role == POLICIES)]


def said_before(condition: int, role: str, settings: EvaluateSettings) -> str | None:
    """The system prompt of a list; None where there is none, or each request has its own."""
    return None if role == POLICIES else settings.system_prompts[condition]


def with_room(study: Study, role: str, requests: Sequence[Request]) -> Sequence[Request]:
    """Requests that leave room for an answer under every system prompt; the record says how many
    do not."""
    settings, room = study.settings, room_of(study.model)  # None: the model has no such limit
    most = None if room is None else room - settings.max_new_tokens
    for condition, _ in lists_asked({role: requests}, settings):
        system_prompt = said_before(condition, role, settings)
        encoded = prompts(study.tokenizer, requests, system_prompt=system_prompt, name=role)
        overlong = study.loading.reading.overlong
        kept = fitting(requests, encoded, most, overlong=overlong, name=role)
        if len(kept) == len(requests):
            check_room(study.model, encoded, settings.max_new_tokens, role)
            continue
        record = study.sources.record[role]
        record["overlong"] = record.get("overlong", 0) + len(requests) - len(kept)
        requests = kept
    return requests


def split_judges(judges: Sequence[Judge], policy: str | None) -> tuple[list[Judge], list[Judge]]:
    """The judges of refusals, and those that read a policy, which judge requests that have one.

    Raises:
        ValueError: there is none of refusals, or there are no policies to read.
    """
    reading = [each for each in judges if each.reads_policy]
    if reading and (policy is None or len(reading) == len(judges)):
        lacking = "requests that have one (--policy FILE)" if policy is None else "another --judge"
        raise ValueError(
            f"judge {reading[0].name!r} reads a policy and says which answers are outside of it: "
            f"it needs {lacking}"
        )
    return [each for each in judges if not each.reads_policy], reading


def by_row(
    models: Sequence[Evaluated],
    judges: Sequence[str],
    judged: Judged,
    asked: Mapping[str, Sequence[Any]],
    choosing: Choosing,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """What is told of requests by what is known of each; nothing where nothing is.

    Args:
        models, settings: of the evaluation.
        judges: names of those of refusals.
        judged: of each model, number of a system prompt, and role of the requests.
        asked: role -> requests.
        choosing: which of the harmful requests were asked, and by which columns.

    Returns:
        ``by_category`` and ``policies``, records as the functions below yield them, and
        ``choosing``, where it chose anything.
    """
    found: dict[str, Any] = {} if choosing == ALL else {"choosing": asdict(choosing)}
    if choosing.by:
        own = _by_category(models, judged, asked[REQUESTS], choosing.by, settings)
        found["by_category"] = list(own)
    if POLICIES in asked:
        told = _by_policy(models, judges, judged, asked[POLICIES], settings)
        found["policies"] = list(told)
    return found


def _by_category(
    models: Sequence[Evaluated],
    judged: Judged,
    asked: Sequence[Asked],
    columns: Sequence[str],
    settings: EvaluateSettings,
) -> Iterator[dict[str, Any]]:
    """ASR by category: one record a column, model, system prompt and judge.

    Yields:
        ``column``, ``ablated``, ``system_prompt``, ``judge``, what ``category_rates`` returns of
        the ASR, and ``macro_coherent``, the macro mean of the ASR of coherent answers; of an
        ablated model ``macro_rise``, its macro mean less that of the intact one, with its interval.
    """
    conditions = enumerate(settings.system_prompts)
    for column, each, (number, said) in product(columns, models, list(conditions)):
        categories = [row["categories"][column] for row in asked]
        found = judged[each.name, number, REQUESTS]
        for judge, success in found["success"].items():
            sense = category_rates(coherent_success(found, judge), categories, settings.level)
            row = {
                "column": column,
                "ablated": each.ablated,
                "system_prompt": said,
                "judge": judge,
                **category_rates(success, categories, settings.level),
                "macro_coherent": sense["macro"],
            }
            if each.units is not None:
                before = judged[INTACT, number, REQUESTS]["success"][judge]
                rise, interval = macro_difference(
                    success, before, categories, level=settings.level, seed=settings.seed
                )
                row |= {"macro_rise": rise, "macro_rise_interval": interval}
            yield row


def _by_policy(
    models: Sequence[Evaluated],
    judges: Sequence[str],
    judged: Judged,
    asked: Sequence[Asked],
    settings: EvaluateSettings,
) -> Iterator[dict[str, Any]]:
    """CoSA-Score and its parts: one record a model, judge of refusals, and what says ``within``.

    Yields:
        ``ablated``, ``judge``, ``within`` (``"allowed"``, the column of the requests, or the name
        of a judge that read the policies), and what ``policy_rates`` returns.
    """
    allowed = [row["allowed"] for row in asked]
    options: dict[str, Any] = {"level": settings.level, "seed": settings.seed}
    for each in models:
        found = judged[each.name, 0, POLICIES]
        outside = {name: own for name, own in found["success"].items() if name not in judges}
        for judge, (within, own) in product(judges, [(ALLOWED, None), *outside.items()]):
            rates = policy_rates(found, judge, allowed, outside=own, **options)
            yield {"ablated": each.ablated, "judge": judge, "within": within, **rates}
