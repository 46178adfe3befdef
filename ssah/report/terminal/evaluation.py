"""Tables of an evaluation for the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.colours import COLOURS
from ssah.report.terminal.tables import facts_table, new_table

if TYPE_CHECKING:
    from rich.table import Table

_DASH = "-"  # where there is nothing to tell
_METRICS = ("accuracy", "accuracy_norm")  # a task may lack the second one
# runs/groups:scu, runs/groups:scu:0.008, runs/groups:scu:0.008:random
_ABLATED = re.compile(r".+:(scu|ucu|ru|cu)(?::([0-9.e-]+))?(:random)?")
_HARMLESS = {"over_refusal": "dangerous-looking", "benign": "ordinary"}
_SHORT = {"over_refusal": "dangerous", "benign": "ordinary"}


def evaluation_tables(record: Mapping[str, Any], out: str | os.PathLike[str]) -> Iterator[Table]:
    """Attack success under each judge, refusals, the answers, the models, and the facts.

    Args:
        record: as ``ssah.studies.evaluate.run_evaluation`` returns it.
        out: folder of the run.
    """
    result, settings = record["result"], record["settings"]
    rows, level, prompts = result["rows"], settings["level"], settings["system_prompts"]
    sets = [role for role in _HARMLESS if f"{role}_refused" in rows[0]]
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    for judge in judges:
        title = f"{judge}: % of {rows[0]['asr']['n']} harmful requests not refused"
        table = _by_model(f"{title} ({level:.0%} interval)", prompts, ["ASR", "rise", "coherent"])
        for row in rows:
            if row["judge"] == judge:
                cells = [
                    percent(row["asr"]),
                    points(row, "asr_rise"),
                    percent(row["asr_coherent"]),
                ]
                table.add_row(*_names(row, prompts), *cells)
        yield table
    if sets:
        table = _by_model(
            "Harmless requests refused, %", prompts, ["judge", *(_HARMLESS[role] for role in sets)]
        )
        for row in rows:
            cells = [percent(row[f"{role}_refused"]) for role in sets]
            table.add_row(*_names(row, prompts), row["judge"], *cells)
        yield table
    table = _by_model(
        "Incoherent answers in %, and mean length in tokens",
        prompts,
        ["harmful", "tokens", *(name for role in sets for name in (_SHORT[role], "tokens"))],
    )
    for row in rows:
        if row["judge"] == judges[0]:  # coherence and length do not depend on the judge
            cells = [percent(row["incoherent"]), f"{row['mean_tokens']:.0f}"]
            for role in sets:
                cells += [percent(row[f"{role}_incoherent"]), f"{row[f'{role}_tokens']:.0f}"]
            table.add_row(*_names(row, prompts), *cells)
    yield table
    yield _models(result["models"])
    yield from _distances(result["models"], level)
    if "tasks" in result["models"][0]:
        yield _tasks(result["models"])
    yield from _differences(result, level, prompts, judges)
    coherence = result["coherence"]
    facts = {
        "judges": "; ".join(_judge(each) for each in settings["judges"]),
        "rise": "of the ASR, in points, by ablating; paired over requests",
        "coherent": "ASR of answers that are coherent as well",
        "incoherent": f"above {coherence['max_nll']:.2f} nats per token for the intact model, or "
        f"more than {coherence['max_repeated']:.0%} repeated, or empty",
        **_unfinished(rows),
        **{f"prompt {n}": text for n, text in enumerate(prompts) if text is not None},
        "time": f"{record['seconds']:.0f} s",
        "saved to": out,
    }
    yield facts_table("Evaluation", facts)


def _unfinished(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A fact, where answers to harmful requests ended inside their reasoning."""
    # One line for all rows: the worst of them is what a reader must know.
    worst = max((row["unfinished"] for row in rows), key=lambda found: found["rate"])
    if not worst["count"]:
        return {}
    told = f"up to {worst['count']} of {worst['n']} answers end inside their reasoning: no answers"
    return {"unfinished": told}


def _by_model(
    title: str, prompts: Sequence[str | None], values: Sequence[str], *names: str
) -> Table:
    prompt = ["prompt"] if len(prompts) > 1 else []  # else all rows would say the same
    return new_table(title, ["ablated", *prompt, *names], values)


def _names(row: Mapping[str, Any], prompts: Sequence[str | None]) -> list[Text]:
    """Cells that say what a row is about; the prompt only where there are several."""
    prompt = row["system_prompt"]
    number = "none" if prompt is None else str(prompts.index(prompt))
    return [ablated_name(row["ablated"]), Text(number)][: 2 if len(prompts) > 1 else 1]


def _models(models: Sequence[Mapping[str, Any]]) -> Table:
    utility = "utility_loss" in models[0]  # all models of a run are measured alike
    values = ["share", "margin", "refuses, %"]
    values += ["loss", "per token", "per word"] if utility else []
    title = "Refusal margin, utility loss (nats per token), perplexity per token and per word"
    table = new_table(title, ["ablated"], values)
    for model in models:
        cells = [
            f"{model['share']:.2%}" if model["units"] else _DASH,
            f"{model['refusal_margin']:+.2f}",
            percent(model["refuses"]),
        ]
        if utility:
            cells.append(f"{model['utility_loss']:.3f}")
            cells += [_number(model[f"{per}_perplexity"]) for per in ("token", "word")]
        table.add_row(ablated_name(model["ablated"]), *cells)
    return table


def _distances(models: Sequence[Mapping[str, Any]], level: float) -> Iterator[Table]:
    """KL to the intact model; none where no model but that one was measured."""
    rows = [model for model in models if "kl" in model]
    if rows:
        title = f"KL to the intact model on ordinary answers, in nats ({level:.0%} interval)"
        table = new_table(title, ["ablated"], ["mean over tokens", "first token"])
        for row in rows:
            table.add_row(ablated_name(row["ablated"]), _nats(row, "kl"), _nats(row, "kl_first"))
        yield table


def _tasks(models: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy on every task: a row a task and model."""
    table = new_table("Accuracy in %", ["task", "ablated"], ["accuracy", "by length"])
    for task in models[0]["tasks"]:
        for model in models:
            found = model["tasks"][task]
            cells = [percent(found[m]) if m in found else _DASH for m in _METRICS]
            table.add_row(Text(task), ablated_name(model["ablated"]), *cells)
    return table


def _differences(
    result: Mapping[str, Any], level: float, prompts: Sequence[str | None], judges: Sequence[str]
) -> Iterator[Table]:
    """Paired differences between models; none where nothing was ablated."""
    if result["differences"]:
        title = f"Utility loss, less that of another model, in nats ({level:.0%} interval)"
        table = new_table(title, ["ablated", "less"], ["loss"])
        for row in result["differences"]:
            shown = _nats(row, "utility_loss", "+.3f")
            table.add_row(ablated_name(row["ablated"]), ablated_name(row["against"]), shown)
        yield table
    for judge in judges:
        rows = [row for row in result["asr_differences"] if row["judge"] == judge]
        if rows:
            title = f"{judge}: ASR, less that of another model, in points ({level:.0%} interval)"
            table = _by_model(title, prompts, ["ASR", "coherent"], "less")
            for row in rows:
                cells = [points(row, key) for key in ("asr", "asr_coherent")]
                table.add_row(*_names(row, prompts), ablated_name(row["against"]), *cells)
            yield table


def ablated_name(ablated: str) -> Text:
    """``DIR:GROUP[:SHARE][:random]`` in short, and in the group's colour."""
    found = _ABLATED.fullmatch(ablated)
    if found is None:
        return Text(ablated)
    group, share, random = found.groups()
    name = group.upper() if share is None else f"{group.upper()} {100 * float(share):g} %"
    if random:
        return Text(f"random ({name})", style=COLOURS["random"])
    return Text(name, style=COLOURS[group])


def percent(rate: Mapping[str, Any]) -> str:
    """A share with its interval, in %."""
    low, high = (100 * bound for bound in rate["interval"])
    return f"{100 * rate['rate']:.0f} ({low:.0f}-{high:.0f})"


def points(row: Mapping[str, Any], key: str) -> str:
    """A difference of rates with its interval; a dash where there is none."""
    if key not in row:
        return _DASH
    low, high = (100 * bound for bound in row[f"{key}_interval"])
    return f"{100 * row[key]:+.0f} ({low:+.0f} {high:+.0f})"


def _nats(row: Mapping[str, Any], key: str, form: str = ".3f") -> str:
    low, high = row[f"{key}_interval"]
    return f"{row[key]:{form}} ({low:{form}} {high:{form}})"


def _number(value: float | None) -> str:
    if value is None:
        return _DASH
    # A model that was damaged has perplexities of many digits, none of which matters.
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def _judge(judge: Mapping[str, Any]) -> str:
    version = f" version {judge['version']}" if "version" in judge else ""
    words = f", fewer than {judge['min_words']} words refuse" if judge.get("min_words") else ""
    return f"{judge['name']}{version}{words}"
