"""Tables of the result of each kind of experiment. What a result lacks is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssah.report.colours import NAMES
from ssah.report.html.plain import Table, number, share
from ssah.report.html.records import (
    MEASURED,
    MEASURED_NOTE,
    SHARE,
    UNITS,
    generic,
    in_unit,
    list_of,
    mapping_of,
    records_table,
    with_rows,
)


def scan(result: Mapping[str, Any]) -> list[Table]:
    """The points chosen, every curve, and the ways of grouping compared."""
    points = mapping_of(result, "chosen")
    chosen = [{"what": "nothing", **mapping_of(result, "intact")}]
    chosen += [
        {"what": NAMES.get(group, group), **point}
        for group, point in points.items()
        if isinstance(point, Mapping)
    ]
    # A group of which no share will do has None in the place of its point.
    none = [NAMES.get(group, group) for group, point in points.items() if point is None]
    note = "".join(f" No share of {name} units keeps what it must." for name in none)
    note = f"{result.get('rule', '')}{note} {MEASURED_NOTE}".strip()
    kept = (("utility kept", "utility_kept", ""), ("safety kept", "safety_kept", ""))
    columns = [SHARE, UNITS, ("seed", "seed", ""), *MEASURED, *kept]
    curves, compared = mapping_of(result, "curves"), mapping_of(result, "compare")
    found = [
        records_table("Chosen", chosen, [("ablated", "what")], [SHARE, UNITS, *MEASURED], note),
        *(
            records_table(
                f"Ablated: {NAMES.get(group, group)}", list_of(curves, group), [], columns
            )
            for group in curves
        ),
        records_table(
            "Ways of grouping, best first",
            list_of(compared, "ways"),
            [("ranked per", "scope"), ("normalised", "normalize"), ("tokens", "tokens")],
            [("taken", "taken", "+.2f"), ("at share", "share", ".2%")],
            str(compared.get("criterion", "")),
        ),
    ]
    rest = generic(result, "intact", "chosen", "curves", "compare", "rule")
    return [*with_rows(*found), *rest]


# How long each seed trained; below ``training`` in its record.
_TRAINING = (
    ("steps", "training steps", ""),
    ("tokens trained on", "training tokens", ""),
    ("parameters trained", "training parameters", ""),
    ("target loss reached", "training reached", ""),
)


def study(result: Mapping[str, Any]) -> list[Table]:
    """Ways to train compared: their means, every seed, and paired differences."""
    labels, frozen = mapping_of(result, "labels"), mapping_of(result, "frozen_units")
    varied = str(result.get("varied", ""))
    means, seeds = [], []  # a record an arm, and a record an arm and seed
    for arm in mapping_of(result, "arms"):
        own = mapping_of(mapping_of(result, "arms"), arm)
        label = labels.get(arm, arm)
        means.append({"arm": label, "frozen": frozen.get(arm), **mapping_of(own, "mean")})
        for seed in mapping_of(own, "seeds"):
            one = mapping_of(mapping_of(own, "seeds"), seed)
            training = {f"training {k}": v for k, v in mapping_of(one, "training").items()}
            seeds.append({"arm": label, "seed": seed, **one, **training})
    differences = [
        {
            **row,
            "arm": labels.get(str(row.get("arm")), row.get("arm")),
            "against": labels.get(str(row.get("against")), row.get("against")),
            "what": "ASR" if row.get("what") == "asr" else str(row.get("what")).replace("_", " "),
            **in_unit(row),
        }
        for row in list_of(result, "differences")
    ]
    way = (varied, "arm")  # the study says what its arms vary: a heading
    found = [
        records_table(
            "Ways to train",
            means,
            [way],
            [("units frozen", "frozen", ""), *MEASURED],
            f"Means over seeds. {MEASURED_NOTE} Maths and training loss: nats per token.",
        ),
        records_table("Every seed", seeds, [way, ("seed", "seed")], [*MEASURED, *_TRAINING]),
        records_table(
            "Differences, paired over requests or rows, and seeds",
            differences,
            [way, ("less", "against"), ("of", "what")],
            [("difference", "shown", "")],
        ),
    ]
    rest = generic(result, "labels", "varied", "frozen_units", "arms", "differences")
    return [*with_rows(*found), *rest]


def stability(result: Mapping[str, Any]) -> list[Table]:
    """Overlap of the groups and correlation of the scores, by number of prompts."""
    sizes = list_of(result, "sizes")
    groups = list(dict.fromkeys(g for size in sizes for g in mapping_of(size, "groups")))
    overlaps, others, correlations = [], [], []
    for size in sizes:
        overlap: dict[str, Any] = {"size": size.get("size")}
        other, correlation = dict(overlap), dict(overlap)
        for group in groups:
            own = mapping_of(mapping_of(size, "groups"), group)
            # `records_table` shows what is called x_interval in brackets behind x.
            overlap |= {group: own.get("overlap"), f"{group}_interval": own.get("overlap_middle")}
            other |= {group: own.get("overlap_with_all"), f"{group} chance": own.get("by_chance")}
        for order, own in mapping_of(size, "spearman").items():
            if isinstance(own, Mapping):
                correlation[order] = own.get("value")
                correlation[f"{order}_interval"] = own.get("value_middle")
        overlaps.append(overlap)
        others.append(other)
        correlations.append(correlation)
    suffices = tuple(
        (NAMES.get(group, group), "none of these" if size is None else number(size))
        for group, size in mapping_of(result, "suffices").items()
    )
    first = [("prompts", "size")]
    middle = "In brackets the middle 80 % of the draws."
    columns = [(group.upper(), group, ".2f") for group in groups]
    chance = [(f"{group.upper()} by chance", f"{group} chance", ".3f") for group in groups]
    orders = [
        key for key in (correlations[0] if correlations else {}) if not key.endswith("_interval")
    ]
    scores = [(order, order, ".2f") for order in orders if order != "size"]
    rule = str(result.get("rule", ""))
    found = [
        records_table("Overlap (Jaccard) of two draws", overlaps, first, columns, middle),
        Table("Prompts that suffice", ("group", "prompts"), suffices, note=rule),
        records_table("Overlap with the groups of all rows", others, first, columns + chance),
        records_table("Rank correlation of the scores", correlations, first, scores, middle),
    ]
    return [*with_rows(*found), *generic(result, "sizes", "suffices", "rule")]


def transfer(result: Mapping[str, Any]) -> list[Table]:
    """The 4 x 4 flow, with sums, and how much of each group stayed."""
    groups = [str(group) for group in result.get("groups") or ()]
    matrix = result.get("matrix") or ()  # [before, after], fractions of all units
    if not groups or len(matrix) != len(groups):  # of another version: shown as it is
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
    # Of the matrix [before, after]: rows add up to the groups before, columns to those after.
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
    """Lists of equal length as records; ``x_intervals`` becomes the ``x_interval`` of each.

    ``{"refusal": [0.1, 0.2]}`` becomes ``{"place": 0, "refusal": 0.1}`` and the same of place 1.
    """
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    # Of a damaged record, the part that all of its lists have.
    n = min((len(value) for value in lists.values()), default=0)
    names = {key: key.replace("_intervals", "_interval") for key in lists}
    return [
        {"place": first + i, **{names[key]: value[i] for key, value in lists.items()}}
        for i in range(n)
    ]
