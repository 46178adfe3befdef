"""Tables of the results of ``ssah protect`` and ``ssah check``. What a result lacks is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ssah.report.html.plain import Table
from ssah.report.html.records import (
    MEASURED,
    MEASURED_NOTE,
    generic,
    in_unit,
    mapping_of,
    records_table,
    with_rows,
)

_NOTE = (
    f"{MEASURED_NOTE} Over-refusal: share of harmless but dangerous-looking requests that are "
    "refused. KL: nats to the intact model on ordinary rows."
)
_COLUMNS = (
    *MEASURED,
    ("over-refusal", "over_refusal", ".1%"),
    ("KL", "kl", ".3f"),
    ("task loss", "task_loss", ".3f"),
)
_PROTECT = {"intact": "before", "plain": "unprotected", "protected": "protected"}
_CHECK = {"intact": "before", "after": "after"}
_SIZE = (
    ("parameters", "parameters", ""),
    ("||delta||", "norm", ".4g"),
    ("/ ||base||", "relative", ".3%"),
)
_GROUP = (
    ("units", "units", ""),
    ("of parameters", "parameters", ".2%"),
    ("of ||delta||²", "share", ".2%"),
    ("as many random units", "random", ".2%"),
    ("± sd", "random_sd", ".2%"),
)


def protect(result: Mapping[str, Any]) -> list[Table]:
    """The models before and after, and how the protected one differs from each."""
    apart = [
        {"what": f"protected, less {_PROTECT.get(name, name)}", "of": of, **own}
        for name, by_measure in mapping_of(result, "differences").items()
        for of, own in _mappings(by_measure)
    ]
    known = ("models", "differences", "damage", "conclusion")
    found = [_models(result, _PROTECT, str(result.get("conclusion", ""))), _differences(apart)]
    return [*with_rows(*found), *generic(result, *known)]


def check(result: Mapping[str, Any]) -> list[Table]:
    """Both models and the repaired ones, how they differ, and where the change lies."""
    tried = dict(_mappings(mapping_of(result, "repairs")))
    labels = _CHECK | {name: str(own.get("label", name)).strip() for name, own in tried.items()}
    apart = [
        {"what": "after, less before", "of": of, **own}
        for of, own in _mappings(mapping_of(result, "differences"))
    ]
    for name, repair in tried.items():
        beside = (("differences", "after"), ("beside_control", "its control"))
        apart += [
            {"what": f"{labels[name]}, less {other}", "of": of, **own}
            for key, other in beside
            for of, own in _mappings(mapping_of(repair, key))
        ]
    delta = mapping_of(result, "delta")
    parts = [{"part": part, **own} for part, own in _mappings(mapping_of(delta, "parts"))]
    groups = [
        {"group": name if " " in name else name.upper(), **own}
        for name, own in _mappings(mapping_of(delta, "groups"))
    ]
    found = [
        _models(result, labels, str(mapping_of(result, "damage").get("sentence", ""))),
        _differences(apart),
        records_table("Where the change lies", parts, [("part", "part")], _SIZE),
        records_table("Whose weights changed", groups, [("group", "group")], _GROUP),
    ]
    known = ("models", "differences", "damage", "delta", "repairs")
    return [*with_rows(*found), *generic(result, *known)]


def _models(result: Mapping[str, Any], labels: Mapping[str, str], said: str) -> Table:
    rows = [
        {"model": labels.get(name, name), **own}
        for name, own in _mappings(mapping_of(result, "models"))
    ]
    return records_table(
        "Models beside each other", rows, [("model", "model")], _COLUMNS, f"{said} {_NOTE}".strip()
    )


def _differences(rows: Iterable[Mapping[str, Any]]) -> Table:
    shown = [{**row, "of": str(row["of"]).replace("_", " "), **in_unit(row)} for row in rows]
    return records_table(
        "Differences, paired over requests or rows",
        shown,
        [("", "what"), ("of", "of")],
        [("difference", "shown", "")],
    )


def _mappings(data: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and values of a mapping, where these are mappings too."""
    items = data.items() if isinstance(data, Mapping) else ()
    return [(str(name), own) for name, own in items if isinstance(own, Mapping)]
