"""Tables of an evaluation by what is known of its rows: categories, policies, right letters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.terminal.evaluation import ablated_name, percent, points
from ssah.report.terminal.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

# Field of a model, and what it says of the log-probabilities of letters.
LETTERS = {"letters": "as they are", "letters_without_bias": "without bias"}
_MOST = 20  # categories that a table shows; the record has all of them


def row_tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """Rates by category, policies and letters, of what a record of ``ssah evaluate`` has."""
    result, level = record["result"], record["settings"]["level"]
    yield from _categories(result, level, record["settings"]["system_prompts"])
    yield from _policies(result, level)
    yield from _letters(result)


def _categories(
    result: Mapping[str, Any], level: float, prompts: Sequence[str | None]
) -> Iterator[Table]:
    """ASR by category, a table a column, system prompt and judge: the macro mean first."""
    together: dict[tuple[str, str | None, str], list[Mapping[str, Any]]] = {}
    for row in result.get("by_category", []):
        key = row["column"], row["system_prompt"], row["judge"]
        together.setdefault(key, []).append(row)
    for (column, prompt, judge), own in together.items():
        # By its number, as the other tables name it: a system prompt may be long.
        number = "none" if prompt is None else str(prompts.index(prompt))
        under = f", prompt {number}" if len(prompts) > 1 else ""
        title = f"{judge}: ASR by {column} in %{under} ({level:.0%} interval)"
        table = new_table(title, ["category", "requests"], [_short(each) for each in own])
        first = own[0]  # the model as it is: its order holds for all
        for name, mean in (("macro mean", "macro"), ("macro mean, coherent", "macro_coherent")):
            table.add_row(name, str(first[mean]["n"]), *(percent(each[mean]) for each in own))
        if len(own) > 1:  # nothing rises in the model as it is
            rises = [points(each, "macro_rise") for each in own]
            table.add_row("its rise, points", str(first["macro"]["n"]), *rises)
        names = sorted(first["categories"], key=lambda name: -first["categories"][name]["rate"])
        for name in names[:_MOST]:
            cells = [percent(each["categories"][name]) for each in own]
            table.add_row(Text(name), str(first["categories"][name]["n"]), *cells)
        if len(names) > _MOST:
            table.caption = f"{len(names) - _MOST} more categories are in the record"
        yield table


def _policies(result: Mapping[str, Any], level: float) -> Iterator[Table]:
    """CoSA-Score and its parts; none where no policy was given."""
    rows = result.get("policies", [])
    if rows:
        title = f"Policies: CoSA-Score from -1 to 1, and its parts in % ({level:.0%} interval)"
        table = new_table(title, ["ablated", "judge", "within"], ["score", "helped", "declined"])
        # Below, because headings that say it would leave no room for the numbers.
        table.caption = "helped: of requests that the policy allows; declined: of the others"
        table.caption_justify = "left"
        for row in rows:
            low, high = row["score_interval"]
            parts = [percent(row[k]) if k in row else "-" for k in ("helped", "declined")]
            score = f"{row['score']:+.2f} ({low:+.2f} {high:+.2f})"
            table.add_row(
                ablated_name(row["ablated"]), Text(row["judge"]), Text(row["within"]), score, *parts
            )
        yield table


def _letters(result: Mapping[str, Any]) -> Iterator[Table]:
    """Multiple choice with several right letters; none where there were no questions."""
    models = [model for model in result["models"] if "letters" in model]
    if models:
        n, chance = models[0]["letters"]["best"]["n"], models[0]["letters"]["best_chance"]
        title = f"Letters of {n} questions in %; by chance the likeliest is right in {chance:.0%}"
        values = ["right set", "letters told right", "likeliest right"]
        table = new_table(title, ["ablated", "letters"], values)
        for model, (key, name) in product(models, LETTERS.items()):
            own = model[key]
            share = percent({"rate": own["letters"], "interval": own["letters_interval"]})
            cells = [percent(own["set_match"]), share, percent(own["best"])]
            table.add_row(ablated_name(model["ablated"]), name, *cells)
        yield table


def _short(row: Mapping[str, Any]) -> str:
    """Heading of a model; markup in its name would be read."""
    return ablated_name(row["ablated"]).markup
