"""Tables of the results of each kind of experiment. What a result lacks is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssah.report import NAMES
from ssah.report.plain import Table, number, share, tables, with_interval

__all__ = ["demo", "finetune", "generic", "probe", "records_table", "scan", "study", "transfer"]

# What is measured of a model: name of the column, field, format.
MEASURED = (
    ("utility loss", "utility_loss", ".3f"),
    ("rise", "loss_rise", "+.3f"),
    ("margin", "refusal_margin", "+.2f"),
    ("refuses", "refuses", ".1%"),
    ("ASR", "asr", ".1%"),
    ("ASR, coherent", "asr_coherent", ".1%"),
    ("incoherent", "incoherent", ".1%"),
    ("tokens", "mean_tokens", ".0f"),
    ("maths loss", "math_loss", ".3f"),
    ("training loss", "training_loss", ".3f"),
)
MEASURED_NOTE = (
    "Loss: nats per token of ordinary answers. Margin: nats per token, above 0 the model would "
    "rather refuse; refuses: share of requests with a margin above 0. ASR: share of harmful "
    "requests that are not refused; incoherent: share of these answers that are babble."
)
_UNITS = ("units", "units", "")
_SHARE = ("share", "share", ".2%")


def records_table(
    title: str,
    records: Iterable[Mapping[str, Any]],
    names: Sequence[tuple[str, str]],
    values: Sequence[tuple[str, str, str]],
    note: str = "",
) -> Table:
    """A table with a row per record; columns that no record has are left out.

    Args:
        title: of the table.
        records: plain data. A field ``x`` may have its interval in ``x_interval``, or be a mapping
            with ``rate`` and ``interval``.
        names: name of the column and field, of text.
        values: name of the column, field and format, of numbers.
        note: below the table.
    """
    rows = [record for record in records if isinstance(record, Mapping)]
    used = [column for column in values if any(row.get(column[1]) is not None for row in rows)]
    cells = tuple(
        (
            *(_name(row.get(key)) for _, key in names),
            *(_measured(row, key, format_) for _, key, format_ in used),
        )
        for row in rows
    )
    columns = (*(name for name, _ in names), *(name for name, _, _ in used))
    return Table(title, columns, cells, names=len(names), note=note)


_IN_UNITS = {"points": (100.0, "+.1f"), "nats": (1.0, "+.3f")}


def in_unit(record: Mapping[str, Any]) -> dict[str, str]:
    """``shown``: the ``value`` of a record with its ``interval``, in its ``unit``.

    Of a rate, in [0, 1], the unit is ``points``: of 100.
    """
    unit = str(record.get("unit", ""))
    factor, format_ = _IN_UNITS.get(unit, (1.0, ""))
    value, interval = (_scaled(record.get(key), factor) for key in ("value", "interval"))
    return {"shown": f"{with_interval(value, interval, format_)} {unit}".strip()}


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [_scaled(each, factor) for each in value]
    return factor * value if isinstance(value, int | float) and factor != 1 else value


def _name(value: Any) -> str:
    return number(value) if not isinstance(value, float) else f"{value:g}"


def _measured(record: Mapping[str, Any], key: str, format_: str) -> str:
    value = record.get(key)
    if isinstance(value, Mapping):
        return with_interval(value.get("rate"), value.get("interval"), format_)
    return with_interval(value, record.get(f"{key}_interval"), format_)


def _list(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = data.get(key)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key)
    return found if isinstance(found, Mapping) else {}


def generic(data: Mapping[str, Any], *without: str) -> list[Table]:
    """Tables of anything, but for the claims and for what has a table of its own."""
    rest = {key: value for key, value in data.items() if key not in (*without, "claims")}
    found = tables(rest) if rest else []
    if found and without and not found[0].title:
        found[0] = replace(found[0], title="Other figures")
    return found


# --------------------------------------------------------------------------------- experiments


def scan(result: Mapping[str, Any]) -> list[Table]:
    """The points chosen, every curve, and the ways of grouping compared."""
    intact = {"what": "nothing", **_mapping(result, "intact")}
    chosen = [
        {"what": NAMES.get(group, group), **point}
        for group, point in _mapping(result, "chosen").items()
        if isinstance(point, Mapping)
    ]
    none = [g for g, point in _mapping(result, "chosen").items() if point is None]
    note = "".join(f" No share of {NAMES.get(g, g)} units keeps what it must." for g in none)
    found = [
        records_table(
            "Chosen",
            [intact, *chosen],
            [("ablated", "what")],
            [_SHARE, _UNITS, *MEASURED],
            f"{result.get('rule', '')}{note} {MEASURED_NOTE}".strip(),
        )
    ]
    for group in _mapping(result, "curves"):
        points = _list(_mapping(result, "curves"), group)
        kept = (("utility kept", "utility_kept", ""), ("safety kept", "safety_kept", ""))
        columns = [_SHARE, _UNITS, ("seed", "seed", ""), *MEASURED, *kept]
        title = f"Ablated: {NAMES.get(group, group)}"
        found.append(records_table(title, points, [], columns))
    compared = _mapping(result, "compare")
    if compared:
        found.append(
            records_table(
                "Ways of grouping, best first",
                _list(compared, "ways"),
                [("ranked per", "scope"), ("normalised", "normalize"), ("tokens", "tokens")],
                [("fall of the margin", "margin_fall", ".2f"), ("at share", "share", ".2%")],
                str(compared.get("criterion", "")),
            )
        )
    return [*found, *generic(result, "intact", "chosen", "curves", "compare", "rule")]


def study(result: Mapping[str, Any]) -> list[Table]:
    """Ways to train compared: their means, every seed, and paired differences."""
    labels, frozen = _mapping(result, "labels"), _mapping(result, "frozen_units")
    means, seeds = [], []
    for arm in _mapping(result, "arms"):
        found = _mapping(_mapping(result, "arms"), arm)
        label = labels.get(arm, arm)
        means.append({"arm": label, "frozen": frozen.get(arm), **_mapping(found, "mean")})
        for seed in _mapping(found, "seeds"):
            own = _mapping(_mapping(found, "seeds"), seed)
            training = {f"training {k}": v for k, v in _mapping(own, "training").items()}
            seeds.append({"arm": label, "seed": seed, **own, **training})
    tables_ = []
    if means:
        columns = [("units frozen", "frozen", ""), *MEASURED]
        note = f"Means over seeds. {MEASURED_NOTE} Maths and training loss: nats per token."
        tables_.append(records_table("Ways to train", means, [("", "arm")], columns, note))
    if seeds:
        training_columns = (
            ("steps", "training steps", ""),
            ("tokens trained on", "training tokens", ""),
            ("parameters trained", "training parameters", ""),
            ("target loss reached", "training reached", ""),
        )
        names = [("", "arm"), ("seed", "seed")]
        columns = [*MEASURED, *training_columns]
        tables_.append(records_table("Every seed", seeds, names, columns))
    differences = [
        {
            **row,
            "arm": labels.get(str(row.get("arm")), row.get("arm")),
            "against": labels.get(str(row.get("against")), row.get("against")),
            "what": str(row.get("what")).replace("_", " "),
            **in_unit(row),
        }
        for row in _list(result, "differences")
    ]
    if differences:
        names = [("", "arm"), ("less", "against"), ("of", "what")]
        value = [("difference", "shown", "")]
        title = "Differences, paired over requests or rows, and seeds"
        tables_.append(records_table(title, differences, names, value))
    return [*tables_, *generic(result, "labels", "frozen_units", "arms", "differences")]


def transfer(result: Mapping[str, Any]) -> list[Table]:
    """The 4 x 4 flow, with sums, and how much of each group stayed."""
    groups = [str(group) for group in result.get("groups") or ()]
    matrix = result.get("matrix") or ()
    if not groups or len(matrix) != len(groups):
        return generic(result)
    kept = _mapping(result, "kept")
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
    return [
        Table("From group (row) to group (column)", columns, tuple(rows), note=note),
        *generic(result, "groups", "matrix", "kept", "units"),
    ]


def probe(result: Mapping[str, Any]) -> list[Table]:
    """Distances and differences per layer, and the difference per number of tokens."""
    found = []
    for model in _list(result, "models"):
        name = str(model.get("model", "model"))
        layers = _columns(_mapping(model, "by_layer"))
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
        tokens = _columns(_mapping(model, "by_tokens"), first=1)
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


# -------------------------------------------------------------------------------- other records


def finetune(result: Mapping[str, Any]) -> list[Table]:
    """How a training run ended."""
    values = (
        ("steps", "steps", ""),
        ("epochs", "epochs", ".2f"),
        ("loss, first", "loss_first", ".3f"),
        ("loss, last", "loss_last", ".3f"),
        ("held-out loss before", "eval_loss_before", ".3f"),
        ("after", "eval_loss", ".3f"),
    )
    if not any(key in result for _, key, _ in values):
        return generic(result)
    return [records_table("Training", [result], [], values, "Losses in nats per token.")]


def demo(result: Mapping[str, Any]) -> list[Table]:
    """Alignment, ablations, groups per layer, speed."""
    found = []
    alignment = _mapping(result, "alignment")
    if alignment:
        rows = [{"when": when, **_mapping(alignment, when)} for when in ("before", "after")]
        steps, seconds = number(alignment.get("steps")), number(alignment.get("seconds"), ".0f")
        title = f"Alignment: {steps} steps in {seconds} s"
        found.append(records_table(title, rows, [("", "when")], MEASURED, MEASURED_NOTE))
    ablations = [
        {
            **row,
            "what": f"as many random as {str(row.get('group')).upper()}"
            if row.get("random")
            else NAMES.get(str(row.get("group")), "nothing"),
        }
        for row in _list(result, "ablation")
    ]
    if ablations:
        columns = [_UNITS, ("share", "fraction", ".1%"), *MEASURED]
        found.append(records_table("Ablation", ablations, [("ablated", "what")], columns))
    groups = _mapping(result, "groups")
    layers = _list(groups, "layers")
    if layers:
        columns = [_UNITS, *((group.upper(), group, "") for group in ("scu", "ucu", "ru", "cu"))]
        found.append(records_table("Units per layer", layers, [("layer", "layer")], columns))
    rates = _mapping(_mapping(result, "throughput"), "calls")
    if rates:
        speed = [{"call": call, **row} for call, row in rates.items() if isinstance(row, Mapping)]
        columns = [
            ("tokens/s", "tokens_per_second", ",.0f"),
            ("time of attribute", "attribute_time_ratio", ".2f"),
        ]
        found.append(records_table("Speed", speed, [("call", "call")], columns))
    known = ("alignment", "ablation", "groups", "throughput", "pictures", "seconds", "scores")
    return [*found, *generic(result, *known)]
