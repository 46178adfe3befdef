"""What an evaluation tells of requests by what is known of each: their categories, their policies.

Of two categories with 1 of 4 and 1 of 1 requests answered, ``by_category`` has both rates, and the
macro mean 0.625. Of two policies, one that allows an answer and one that does not, ``policies`` has
the CoSA-Score of a model that helps with the first and declines the second: 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

from ssah.evaluation import category_rates, macro_difference, policy_rates
from ssah.studies.choosing import ALL, Choosing
from ssah.studies.evaluate.asking import POLICIES
from ssah.studies.evaluate.record import INTACT, REQUESTS, coherent_success

if TYPE_CHECKING:
    from ssah.data import Asked
    from ssah.studies.evaluate.ablations import Evaluated
    from ssah.studies.evaluate.record import Judged
    from ssah.studies.evaluate.settings import EvaluateSettings

ALLOWED = "allowed"  # the column says which answers are within their policy


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
            if each.units is not None:  # the intact model has nothing to rise from
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
    allowed = [row["allowed"] for row in asked]  # a column that every row was read with
    options: dict[str, Any] = {"level": settings.level, "seed": settings.seed}
    for each in models:
        found = judged[each.name, 0, POLICIES]
        # What is no judge of refusals read the policies, and judged these requests alone.
        outside = {name: own for name, own in found["success"].items() if name not in judges}
        for judge, (within, own) in product(judges, [(ALLOWED, None), *outside.items()]):
            rates = policy_rates(found, judge, allowed, outside=own, **options)
            yield {"ablated": each.ablated, "judge": judge, "within": within, **rates}
