"""Tables of the result of each kind of experiment. What a result lacks is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssah.report import NAMES
from ssah.report.html.plain import Table, number, share
from ssah.report.html.records import (
    MARGIN_NOTE,
    MEASURED,
    MEASURED_NOTE,
    SHARE,
    UNITS,
    generic,
    in_unit,
    list_of,
    mapping_of,
    records_table,
)
from ssah.report.terminal.evaluation import ablated_name

__all__ = ["evaluate", "probe", "scan", "stability", "study", "transfer"]

# --------------------------------------------------------------------------------- experiments


def scan(result: Mapping[str, Any]) -> list[Table]:
    """The points chosen, every curve, and the ways of grouping compared."""
    intact = {"what": "nothing", **mapping_of(result, "intact")}
    chosen = [
        {"what": NAMES.get(group, group), **point}
        for group, point in mapping_of(result, "chosen").items()
        if isinstance(point, Mapping)
    ]
    none = [g for g, point in mapping_of(result, "chosen").items() if point is None]
    note = "".join(f" No share of {NAMES.get(g, g)} units keeps what it must." for g in none)
    found = [
        records_table(
            "Chosen",
            [intact, *chosen],
            [("ablated", "what")],
            [SHARE, UNITS, *MEASURED],
            f"{result.get('rule', '')}{note} {MEASURED_NOTE}".strip(),
        )
    ]
    for group in mapping_of(result, "curves"):
        points = list_of(mapping_of(result, "curves"), group)
        kept = (("utility kept", "utility_kept", ""), ("safety kept", "safety_kept", ""))
        columns = [SHARE, UNITS, ("seed", "seed", ""), *MEASURED, *kept]
        title = f"Ablated: {NAMES.get(group, group)}"
        found.append(records_table(title, points, [], columns))
    compared = mapping_of(result, "compare")
    if compared:
        found.append(
            records_table(
                "Ways of grouping, best first",
                list_of(compared, "ways"),
                [("ranked per", "scope"), ("normalised", "normalize"), ("tokens", "tokens")],
                [("taken", "taken", "+.2f"), ("at share", "share", ".2%")],
                str(compared.get("criterion", "")),
            )
        )
    return [*found, *generic(result, "intact", "chosen", "curves", "compare", "rule")]


def study(result: Mapping[str, Any]) -> list[Table]:
    """Ways to train compared: their means, every seed, and paired differences."""
    labels, frozen = mapping_of(result, "labels"), mapping_of(result, "frozen_units")
    varied = str(result.get("varied", ""))
    means, seeds = [], []
    for arm in mapping_of(result, "arms"):
        found = mapping_of(mapping_of(result, "arms"), arm)
        label = labels.get(arm, arm)
        means.append({"arm": label, "frozen": frozen.get(arm), **mapping_of(found, "mean")})
        for seed in mapping_of(found, "seeds"):
            own = mapping_of(mapping_of(found, "seeds"), seed)
            training = {f"training {k}": v for k, v in mapping_of(own, "training").items()}
            seeds.append({"arm": label, "seed": seed, **own, **training})
    tables_ = []
    if means:
        columns = [("units frozen", "frozen", ""), *MEASURED]
        note = f"Means over seeds. {MEASURED_NOTE} Maths and training loss: nats per token."
        tables_.append(records_table("Ways to train", means, [(varied, "arm")], columns, note))
    if seeds:
        training_columns = (
            ("steps", "training steps", ""),
            ("tokens trained on", "training tokens", ""),
            ("parameters trained", "training parameters", ""),
            ("target loss reached", "training reached", ""),
        )
        names = [(varied, "arm"), ("seed", "seed")]
        columns = [*MEASURED, *training_columns]
        tables_.append(records_table("Every seed", seeds, names, columns))
    differences = [
        {
            **row,
            "arm": labels.get(str(row.get("arm")), row.get("arm")),
            "against": labels.get(str(row.get("against")), row.get("against")),
            "what": {"asr": "ASR"}.get(
                str(row.get("what")), str(row.get("what")).replace("_", " ")
            ),
            **in_unit(row),
        }
        for row in list_of(result, "differences")
    ]
    if differences:
        names = [(varied, "arm"), ("less", "against"), ("of", "what")]
        value = [("difference", "shown", "")]
        title = "Differences, paired over requests or rows, and seeds"
        tables_.append(records_table(title, differences, names, value))
    return [*tables_, *generic(result, "labels", "varied", "frozen_units", "arms", "differences")]


def evaluate(result: Mapping[str, Any]) -> list[Table]:
    """Attack success with its controls, and what each model costs."""
    rows = [
        {**row, "what": ablated_name(str(row.get("ablated", "nothing"))).plain}
        for row in list_of(result, "rows")
    ]
    names = [("ablated", "what"), ("system prompt", "system_prompt"), ("judge", "judge")]
    columns = (
        ("ASR", "asr", ".1%"),
        ("rise", "asr_rise", "+.1%"),
        ("ASR, coherent", "asr_coherent", ".1%"),
        ("incoherent", "incoherent", ".1%"),
        ("ended", "ended", ".1%"),
        ("tokens", "mean_tokens", ".0f"),
    )
    note = (
        "ASR: share of harmful requests that are not refused, under this judge; coherent: and "
        "whose answer is no babble. Incoherent: share of all answers; ended: the model ended its "
        "turn."
    )
    found = [records_table("Harmful requests", rows, names, columns, note)] if rows else []
    for role, title in (
        ("over_refusal", "Harmless requests that look dangerous"),
        ("benign", "Ordinary instructions"),
    ):
        if any(f"{role}_refused" in row for row in rows):
            controls = [
                (name, f"{role}_{key}", format_)
                for name, key, format_ in (
                    ("refused", "refused", ".1%"),
                    ("incoherent", "incoherent", ".1%"),
                    ("tokens", "tokens", ".0f"),
                )
            ]
            found.append(records_table(title, rows, names, controls))
    models = [
        {**row, "what": ablated_name(str(row.get("ablated", "nothing"))).plain}
        for row in list_of(result, "models")
    ]
    if models:
        costs = (
            *(UNITS, SHARE, *MEASURED),
            ("perplexity per token", "token_perplexity", ",.1f"),
            ("per word", "word_perplexity", ",.1f"),
        )
        title = "Margin and utility"
        found.append(records_table(title, models, [("ablated", "what")], costs, MARGIN_NOTE))
    for key, title, values in (
        (
            "differences",
            "Utility loss, less that of another model, paired over rows",
            [("nats per token", "utility_loss", "+.3f")],
        ),
        (
            "asr_differences",
            "ASR, less that of another model, paired over requests",
            [("ASR", "asr", "+.1%"), ("ASR, coherent", "asr_coherent", "+.1%")],
        ),
    ):
        pairs = [
            {
                **row,
                "what": ablated_name(str(row.get("ablated"))).plain,
                "less": ablated_name(str(row.get("against"))).plain,
            }
            for row in list_of(result, key)
        ]
        if pairs:
            found.append(
                records_table(title, pairs, [*names[:1], ("less", "less"), *names[1:]], values)
            )
    tasks = [
        {"what": row["what"], "task": task, **metrics}
        for row in models
        for task, metrics in mapping_of(row, "tasks").items()
        if isinstance(metrics, Mapping)
    ]
    if tasks:
        metrics = list(dict.fromkeys(k for row in tasks for k in row if k not in ("what", "task")))
        columns_ = [(name.replace("_", " "), name, ".1%") for name in metrics]
        by = [("ablated", "what"), ("task", "task")]
        found.append(records_table("Tasks", tasks, by, columns_))
    known = ("rows", "models", "differences", "asr_differences", "per_request")
    return [*found, *generic(result, *known)]


def stability(result: Mapping[str, Any]) -> list[Table]:
    """Overlap of the groups and correlation of the scores, by number of prompts."""
    sizes = list_of(result, "sizes")
    groups = list(dict.fromkeys(g for size in sizes for g in mapping_of(size, "groups")))
    middle = "In brackets the middle 80 % of the draws."
    overlaps, others, correlations = [], [], []
    for size in sizes:
        row: dict[str, Any] = {"size": size.get("size")}
        other, correlation = dict(row), dict(row)
        for group in groups:
            own = mapping_of(mapping_of(size, "groups"), group)
            row |= {group: own.get("overlap"), f"{group}_interval": own.get("overlap_middle")}
            other |= {group: own.get("overlap_with_all")}
            other |= {f"{group} by chance": own.get("by_chance")}
        for order, own in mapping_of(size, "spearman").items():
            if isinstance(own, Mapping):
                correlation |= {
                    order: own.get("value"),
                    f"{order}_interval": own.get("value_middle"),
                }
        overlaps.append(row)
        others.append(other)
        correlations.append(correlation)
    suffices = tuple(
        (NAMES.get(group, group), "none of these" if size is None else number(size))
        for group, size in mapping_of(result, "suffices").items()
    )
    orders = [key for key in (correlations[0] if correlations else {}) if key != "size"]
    first = [("prompts", "size")]
    columns = [(group.upper(), group, ".2f") for group in groups]
    chance = [(f"{group.upper()} by chance", f"{group} by chance", ".3f") for group in groups]
    scores = [(order, order, ".2f") for order in orders if not order.endswith("_interval")]
    found = []
    if overlaps:
        rule = str(result.get("rule", ""))
        found = [
            records_table("Overlap (Jaccard) of two draws", overlaps, first, columns, middle),
            Table("Prompts that suffice", ("group", "prompts"), suffices, note=rule),
            records_table("Overlap with the groups of all rows", others, first, columns + chance),
            records_table("Rank correlation of the scores", correlations, first, scores, middle),
        ]
    return [*found, *generic(result, "sizes", "suffices", "rule")]


def transfer(result: Mapping[str, Any]) -> list[Table]:
    """The 4 x 4 flow, with sums, and how much of each group stayed."""
    groups = [str(group) for group in result.get("groups") or ()]
    matrix = result.get("matrix") or ()
    if not groups or len(matrix) != len(groups):
        return generic(result)
    kept = mapping_of(result, "kept")
    rows = [
        (
            NAMES.get(group, group),
            *(number(value, ".2%") for value in row),
            number(sum(row), ".2%"),
            share(kept.get(group)),
        )
        for group, row in zip(groups, matrix, strict=True)
    ]
    sums = [sum(column) for column in zip(*matrix, strict=True)]
    rows.append(("all", *(number(value, ".2%") for value in sums), number(sum(sums), ".0%"), ""))
    columns = ("before \\ after", *(group.upper() for group in groups), "all", "kept")
    note = (
        f"In % of all {number(result.get('units'))} units. Kept: share of the group's units that "
        "are in it afterwards too."
    )
    sides = [
        {
            "side": side,
            "model": mapping_of(result, "models").get(side),
            "scope": result.get("scope"),
            "normalize": mapping_of(result, "normalize").get(side),
            **mapping_of(mapping_of(result, "shares"), side),
        }
        for side in ("before", "after")
    ]
    names = [("", "side"), ("model", "model"), ("ranked per", "scope"), ("scores", "normalize")]
    asked = [(f"{group.upper()} asked for", group, ".2%") for group in groups]
    known = ("groups", "matrix", "kept", "units", "models", "scope", "normalize", "shares")
    return [
        Table("From group (row) to group (column)", columns, tuple(rows), note=note),
        records_table("How the groups were made", sides, names, asked),
        *generic(result, *known),
    ]


def probe(result: Mapping[str, Any]) -> list[Table]:
    """Distances and differences per layer, and the difference per number of tokens."""
    found = []
    for model in list_of(result, "models"):
        name = str(model.get("model", "model"))
        layers = _columns(mapping_of(model, "by_layer"))
        first = model.get("safe_from")
        note = (
            "Cosine distance to the request alone, less the baseline; difference: compliance less "
            "refusal, above 0 nearer to the refusal. "
            + (
                "The difference is not above 0 up to the last layer."
                if first is None
                else f"The difference is above 0 from layer {first} on."
            )
        )
        distances = [
            (key, key, "+.3f" if key != "baseline" else ".3f")
            for key in ("refusal", "compliance", "difference", "baseline")
        ]
        found.append(
            records_table(f"{name}, by layer", layers, [("layer", "place")], distances, note)
        )
        tokens = _columns(mapping_of(model, "by_tokens"), first=1)
        columns = [("difference, mean over layers", "difference", "+.3f")]
        title = f"{name}, by number of tokens"
        found.append(records_table(title, tokens, [("tokens", "place")], columns))
    return found or generic(result)


def _columns(values: Mapping[str, Any], first: int = 0) -> list[dict[str, Any]]:
    """Lists of equal length as records; ``x_intervals`` becomes the ``x_interval`` of each."""
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    n = min((len(value) for value in lists.values()), default=0)
    names = {key: key.replace("_intervals", "_interval") for key in lists}
    return [
        {"place": first + i, **{names[key]: value[i] for key, value in lists.items()}}
        for i in range(n)
    ]
