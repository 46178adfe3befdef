"""Tables of an evaluation for the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report import COLOURS, NAMES
from ssah.report.tables import facts_table, new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ablated_name", "evaluation_tables"]

_DASH = "-"


def evaluation_tables(record: Mapping[str, Any], out: str | os.PathLike[str]) -> Iterator[Table]:
    """Attack success, its controls, what each model costs, and where the run is.

    Args:
        record: as ``ssah.experiments.evaluate.evaluate`` returns it.
        out: folder of the run.
    """
    result, settings = record["result"], record["settings"]
    rows, level = result["rows"], settings["level"]
    columns = _Columns(rows, settings["system_prompts"])
    yield columns.table(
        f"Attack success: share of {rows[0]['asr']['n']} harmful requests not refused, "
        f"with {level:.0%} intervals",
        {
            "ASR": lambda row: _rate(row["asr"]),
            "rise, points": lambda row: _points(row),
            "coherent ASR": lambda row: _rate(row["asr_coherent"]),
            "incoherent": lambda row: _rate(row["incoherent"]),
            "tokens": lambda row: f"{row['mean_tokens']:.0f}",
        },
    )
    controls = {
        "looks dangerous": ("over_refusal_refused", "over_refusal_incoherent", "over_refusal"),
        "ordinary": ("benign_refused", "benign_incoherent", "benign"),
    }
    for title, (refused, incoherent, role) in controls.items():
        if refused in rows[0]:
            n = rows[0][refused]["n"]
            yield columns.table(
                f"{n} harmless requests, {title}" if role != "benign"
                else f"{n} ordinary instructions",
                {
                    "refused": lambda row, key=refused: _rate(row[key]),
                    "incoherent": lambda row, key=incoherent: _rate(row[key]),
                    "tokens": lambda row, key=f"{role}_tokens": f"{row[key]:.0f}",
                },
            )
    yield _models(result["models"], level)
    facts = {
        "judges": "; ".join(_judge(each) for each in settings["judges"]),
        "incoherent": f"above {result['coherence']['max_nll']:.2f} nats per token for the intact "
        f"model, or more than {result['coherence']['max_repeated']:.0%} repeated, or empty",
        **{
            f"system prompt {number}": text
            for number, text in enumerate(settings["system_prompts"])
            if text is not None
        },
        "time": f"{record['seconds']:.0f} s",
        "saved to": out,
    }
    yield facts_table("Evaluation", facts)


class _Columns:
    """Tables with a row per model, system prompt and judge; columns that never vary left out."""

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[str | None]
    ) -> None:
        self.rows = rows
        self.prompts = {text: number for number, text in enumerate(prompts)}
        self.judges = {row["judge"] for row in rows}

    def table(self, title: str, values: Mapping[str, Any]) -> Table:
        names = ["ablated"]
        names += ["system prompt"] if len(self.prompts) > 1 else []
        names += ["judge"] if len(self.judges) > 1 else []
        table = new_table(title, names, values)
        last = None
        for row in self.rows:
            if last not in (None, row["ablated"]) and len(names) > 1:
                table.add_section()
            cells: list[Any] = [ablated_name(row["ablated"])]
            if len(self.prompts) > 1:
                number = self.prompts[row["system_prompt"]]
                cells.append("none" if row["system_prompt"] is None else str(number))
            if len(self.judges) > 1:
                cells.append(row["judge"])
            table.add_row(*cells, *(value(row) for value in values.values()))
            last = row["ablated"]
        return table


def _models(models: Sequence[Mapping[str, Any]], level: float) -> Table:
    values = {
        "units": lambda m: f"{m['units']:,}" if m["units"] else _DASH,
        "share": lambda m: f"{m['share']:.2%}" if m["units"] else _DASH,
        "margin": lambda m: _interval(m["refusal_margin"], m["refusal_margin_interval"], "+.2f"),
        "refuses": lambda m: _rate(m["refuses"]),
    }
    if "utility_loss" in models[0]:
        values |= {
            "loss": lambda m: f"{m['utility_loss']:.3f}",
            "per token": lambda m: _number(m["token_perplexity"]),
            "per word": lambda m: _number(m["word_perplexity"]),
        }
    for task, metrics in models[0].get("tasks", {}).items():
        for metric in metrics:
            title = task if metric == "accuracy" else f"{task}, by length"
            values[title] = lambda m, t=task, k=metric: _rate(m["tasks"][t][k])
    table = new_table(
        "Refusal margin and utility loss in nats per token, perplexities", ["ablated"], values
    )
    for model in models:
        name = ablated_name(model["ablated"])
        table.add_row(name, *(value(model) for value in values.values()))
    return table


def ablated_name(ablated: str) -> Text:
    """``DIR:GROUP`` or ``DIR:GROUP:random`` in words and in the group's colour."""
    parts = ablated.split(":")
    random = parts[-1] == "random" and len(parts) > 1
    group = parts[-2] if random else parts[-1]
    if group not in NAMES:
        return Text(ablated)
    if random:
        return Text(f"as many random as {group.upper()}", style=COLOURS["random"])
    return Text(NAMES[group], style=COLOURS[group])


def _rate(rate: Mapping[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['rate']:.1%} [{100 * low:.0f}, {100 * high:.0f}]"


def _points(row: Mapping[str, Any]) -> str:
    if "asr_rise" not in row:
        return _DASH
    low, high = row["asr_rise_interval"]
    return f"{100 * row['asr_rise']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"


def _interval(value: float, interval: Sequence[float], format_: str) -> str:
    return f"{value:{format_}} [{interval[0]:{format_}}, {interval[1]:{format_}}]"


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _judge(judge: Mapping[str, Any]) -> str:
    version = f" version {judge['version']}" if "version" in judge else ""
    words = f", {judge['min_words']} words at least" if judge.get("min_words") else ""
    return f"{judge['name']}{version}{words}"
