"""What a model is asked: lists of requests, each under every system prompt, or under its own.

With the system prompts none and "Be kind.", requests and policies, three lists are answered:

    requests under none, requests under "Be kind.", policies, each request under its own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

from ssah.evaluation import with_room
from ssah.studies.evaluate.record import BENIGN, OVER_REFUSAL, REQUESTS

if TYPE_CHECKING:
    from ssah.evaluation import Judge, Request
    from ssah.studies.choosing import Choosing
    from ssah.studies.evaluate.settings import EvaluateSettings
    from ssah.studies.sources import Sources
    from ssah.studies.study import Study

POLICIES = "policies"


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
    # Policies once: their requests bring the system prompt with them.
    found = list(product(conditions, [role for role in roles if role != POLICIES]))
    return [*found, *((0, role) for role in roles if role == POLICIES)]


def said_before(condition: int, role: str, settings: EvaluateSettings) -> str | None:
    """The system prompt of a list; None where there is none, or each request has its own."""
    return None if role == POLICIES else settings.system_prompts[condition]


def answerable(study: Study, role: str, requests: Sequence[Request]) -> Sequence[Request]:
    """Requests that leave room for an answer under every system prompt; the record says how many
    do not."""
    settings = study.settings
    for condition, _ in lists_asked({role: requests}, settings):
        kept = with_room(
            study.model,
            study.tokenizer,
            requests,
            settings.max_new_tokens,
            overlong=study.loading.reading.overlong,
            name=role,
            system_prompt=said_before(condition, role, settings),
        )
        if len(kept) < len(requests):
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
    # Alone it could not say how helpful an answer is: to decline is within every policy.
    if reading and (policy is None or len(reading) == len(judges)):
        lacking = "requests that have one (--policy FILE)" if policy is None else "another --judge"
        raise ValueError(
            f"judge {reading[0].name!r} reads a policy and says which answers are outside of it: "
            f"it needs {lacking}"
        )
    return [each for each in judges if not each.reads_policy], reading
