"""Tables of the result of ``ssah evaluate``. What a result lacks is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssah.report.html.plain import Table
from ssah.report.html.records import (
    MARGIN_NOTE,
    MEASURED,
    SHARE,
    UNITS,
    generic,
    list_of,
    mapping_of,
    records_table,
    with_rows,
)
from ssah.report.terminal import LETTERS, ablated_name

# Columns as `records_table` takes them: the heading, the field of a record, the format of numbers.
_NAMES = (("ablated", "what"), ("system prompt", "system_prompt"), ("judge", "judge"))
_HARMFUL = (
    ("ASR", "asr", ".1%"),
    ("rise", "asr_rise", "+.1%"),
    ("ASR, coherent", "asr_coherent", ".1%"),
    ("incoherent", "incoherent", ".1%"),
    ("ended", "ended", ".1%"),
    ("tokens", "mean_tokens", ".0f"),
)
_BY_ROW = ("by_category", "policies")  # what is known of single requests
_HARMLESS = (("refused", ".1%"), ("incoherent", ".1%"), ("tokens", ".0f"))
_COSTS = (
    *(UNITS, SHARE, *MEASURED),
    ("perplexity per token", "token_perplexity", ",.1f"),
    ("per word", "word_perplexity", ",.1f"),
    ("KL to intact", "kl", ".3f"),
    ("at the first token", "kl_first", ".3f"),
)
_POLICIES = (
    ("CoSA-Score", "score", "+.2f"),
    ("allowed: helped", "helped", ".1%"),
    ("not allowed: declined", "declined", ".1%"),
)
_NOTE = (
    "ASR: share of harmful requests that are not refused, under this judge; coherent: and whose "
    "answer is no babble. Incoherent: share of all answers; ended: the model ended its turn."
)
_LETTERS = (
    ("right set", "set_match", ".1%"),
    ("letters told right", "letters", ".1%"),
    ("likeliest is right", "best", ".1%"),
    ("by chance", "best_chance", ".1%"),
)
_MACRO = "Macro mean: the mean of the categories' rates, so that each counts alike."


def evaluate(result: Mapping[str, Any]) -> list[Table]:
    """Attack success with its controls, and what each model costs."""
    rows, models = _named(result, "rows"), _named(result, "models")
    found = [
        records_table("Harmful requests", rows, _NAMES, _HARMFUL, _NOTE),
        _harmless(rows, "over_refusal", "Harmless requests that look dangerous"),
        _harmless(rows, "benign", "Ordinary instructions"),
        records_table("Margin and utility", models, _NAMES[:1], _COSTS, MARGIN_NOTE),
        records_table(
            "Utility loss, less that of another model, paired over rows",
            _named(result, "differences"),
            [*_NAMES[:1], ("less", "less"), *_NAMES[1:]],
            [("nats per token", "utility_loss", "+.3f")],
        ),
        records_table(
            "ASR, less that of another model, paired over requests",
            _named(result, "asr_differences"),
            [*_NAMES[:1], ("less", "less"), *_NAMES[1:]],
            [("ASR", "asr", "+.1%"), ("ASR, coherent", "asr_coherent", "+.1%")],
        ),
        _tasks(models),
        records_table(
            "Multiple choice with several right letters",
            [
                {**row, "bias": name, **mapping_of(row, key)}
                for row in models
                for key, name in LETTERS.items()
                if key in row
            ],
            (_NAMES[0], ("letters", "bias")),
            _LETTERS,
        ),
        *_by_category(result),
        records_table(
            "Policies",
            _named(result, "policies"),
            (_NAMES[0], _NAMES[2], ("within", "within")),
            _POLICIES,
        ),
    ]
    known = ("rows", "models", "differences", "asr_differences", "per_request", *_BY_ROW)
    return [*with_rows(*found), *generic(result, *known)]


def _named(result: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Records, in which ``what`` says in short what was ablated, and ``less`` of the other one."""
    return [
        {
            **row,
            # The terminal's colours are not those of a page.
            "what": ablated_name(str(row.get("ablated", "nothing"))).plain,
            "less": ablated_name(str(row.get("against"))).plain,
        }
        for row in list_of(result, key)
    ]


def _harmless(rows: list[dict[str, Any]], role: str, title: str) -> Table:
    # None where these requests were not asked; one row that was asked shows them all.
    measured = [row for row in rows if any(f"{role}_refused" in each for each in rows)]
    columns = [(name, f"{role}_{name}", format_) for name, format_ in _HARMLESS]
    return records_table(title, measured, _NAMES, columns)


def _by_category(result: Mapping[str, Any]) -> list[Table]:
    """ASR by category: a table a column, in which the macro means come first."""
    rows = _named(result, "by_category")
    found = []
    for column in dict.fromkeys(str(row.get("column")) for row in rows):
        own = [row for row in rows if str(row.get("column")) == column]
        lines = [
            {**row, "category": name, "asr": row.get(key), **_rise(row, key)}
            for name, key in (("macro mean", "macro"), ("macro, coherent", "macro_coherent"))
            for row in own
        ]
        lines += [
            {**row, "category": name, "asr": rate}
            for row in own
            for name, rate in mapping_of(row, "categories").items()
        ]
        names = (("category", "category"), *_NAMES)
        found.append(records_table(f"ASR by {column}", lines, names, _HARMFUL[:2], _MACRO))
    return found


def _rise(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The rise of the macro mean under the names of that of an ASR; of nothing else."""
    if key != "macro":
        return {}
    names = {"macro_rise": "asr_rise", "macro_rise_interval": "asr_rise_interval"}
    return {name: row[own] for own, name in names.items() if own in row}


def _tasks(models: list[dict[str, Any]]) -> Table:
    """Accuracy: one record a model and task; tasks differ in the metrics that they have."""
    records = [
        {"what": row["what"], "task": task, **metrics}
        for row in models
        for task, metrics in mapping_of(row, "tasks").items()
        if isinstance(metrics, Mapping)
    ]
    metrics = dict.fromkeys(key for row in records for key in row if key not in ("what", "task"))
    columns = [(name.replace("_", " "), name, ".1%") for name in metrics]
    return records_table("Tasks", records, [("ablated", "what"), ("task", "task")], columns)
