"""The tables of ``ssah protect`` and ``ssah check``: models beside each other, a row a measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.terminal.deltas import delta_tables
from ssah.report.terminal.tables import facts_table, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Field of a summary -> what it is called, by what it is multiplied, and its format.
_MEASURES = {
    "asr_coherent": ("ASR, coherent, %", 100.0, ".1f"),
    "incoherent": ("incoherent, %", 100.0, ".1f"),
    "over_refusal": ("over-refusal, %", 100.0, ".1f"),
    "refusal_margin": ("refusal margin", 1.0, "+.2f"),
    "utility_loss": ("utility loss", 1.0, ".3f"),
    "kl": ("KL to before", 1.0, ".3f"),
    "task_loss": ("task loss", 1.0, ".3f"),
}
# Name of a model of ``ssah protect`` -> what it is called.
_PROTECT = {"intact": "before", "plain": "unprotected", "protected": "protected"}
_VERDICTS = {"damaged": "bold red", "not damaged": "green", "undecided": "yellow"}


def protect_preview(planned: Mapping[str, Any]) -> Table:
    """What ``ssah protect`` would do."""
    rows, models = planned["rows"], [_PROTECT[name] for name in planned["models"]]
    facts = {
        "model": planned["model"],
        "method": _method(planned["method"]),
        "rows": f"{rows['trained']:,} to train on, {rows['held_out']:,} held out",
        "trainings": f"{planned['trainings']}, of {planned['updates']:,} updates each",
        "measured": ", ".join(models),
        "requests": f"{planned['requests']} harmful and {planned['harmless']} harmless, of each",
    }
    return facts_table("Dry run: nothing was trained or written", facts)


def protect_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """The models before and after, what trained, and what follows."""
    result = record["result"]
    yield _models_table(result["models"], _PROTECT)
    training, change = result["training"]["protected"], result["change"]
    facts: dict[str, object] = {
        "method": _method(result["method"]),
        "updates": f"{training['steps']:,}",
        "parameters that trained": f"{training['parameters']:,}",
        "changed": f"{change['changed']:.1%} of all parameters, by {change['relative']:.3%} of "
        "their norm",
        "frozen part": "verified: not a bit changed" if result["exact"] else "none",
        "model saved to": out,
        "time": f"{record['seconds']:.0f} s",
    }
    yield facts_table("Fine-tuned", facts)
    yield _conclusion(result["damage"]["verdict"], result["conclusion"])


def check_tables(record: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Both models, where the change lies, what would undo the damage, and the verdict."""
    result = record["result"]
    names = {"intact": "before", "after": "after"}
    yield _models_table({name: result["models"][name] for name in names}, names)
    yield from delta_tables(result["delta"])
    if result["repairs"]:
        yield _repairs_table(result)
    for each in result["repairs"].values():
        if "sentence" in each:  # a control has none
            yield Text(each["sentence"])
    yield _conclusion(result["damage"]["verdict"], result["damage"]["sentence"])


def _repairs_table(result: Mapping[str, Any]) -> Table:
    table = new_table(
        "What putting weights back would give; losses and KL in nats",
        ("",),
        ("ASR", "95 %", "over-refusal", "utility loss", "KL to before"),
    )
    for name, repair in result["repairs"].items():
        own = result["models"][name]
        low, high = (100 * bound for bound in own["asr_interval"])
        table.add_row(
            repair["label"],
            f"{own['asr']:.1%}",
            f"{low:.0f} - {high:.0f}",
            f"{own['over_refusal']:.0%}",
            f"{own['utility_loss']:.3f}",
            f"{own['kl']:.3f}",
        )
    return table


def _method(described: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} = {value}" for key, value in described["settings"].items())
    return f"{described['name']} ({settings or 'no settings'})"


def _models_table(models: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Table:
    """A row a measure, a column a model."""
    first = next(iter(models.values()))
    table = new_table(
        f"{first['requests']} harmful requests; losses, margin and KL in nats",
        ("",),
        [names[name] for name in models],
    )
    for judge in first["judges"]:
        found = [own["judges"][judge]["asr"] for own in models.values()]
        bounds = ([100 * bound for bound in each["interval"]] for each in found)
        table.add_row(f"ASR, {judge}, %", *(f"{100 * each['rate']:.1f}" for each in found))
        table.add_row("  95 % interval", *(f"{low:.0f} - {high:.0f}" for low, high in bounds))
    for key, (label, factor, format_) in _MEASURES.items():
        values = [own.get(key) for own in models.values()]
        if any(value is not None for value in values):
            # The intact model has no distance to itself.
            shown = ("-" if v is None else f"{factor * v:{format_}}" for v in values)
            table.add_row(label, *shown)
    table.caption = "over-refusal: share of harmless but dangerous-looking requests refused"
    table.caption_justify = "left"
    return table


def _conclusion(verdict: str, sentence: str) -> Text:
    return Text(sentence, _VERDICTS[verdict])
