"""Tables of the experiments, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ssah.report.colours import COLOURS
from ssah.report.terminal.tables import facts_table, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHORT = ("utility", "maths")  # what ``utility_loss`` and ``math_loss`` are called in a column


def scan_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """Curves, chosen shares, claims and the comparison of a scan."""
    result = record["result"]
    asked = "asr" in result["intact"]  # a scan without a judge measures losses and margins alone
    columns = ["units", "share", "loss", "rise", "margin", "refuses"]
    table = new_table(
        "Utility loss and refusal margin in nats per token",
        ("ablated",),
        columns + (["ASR", "babble"] if asked else []) + [""],
    )
    _scan_row(table, "nothing", "", result["intact"], asked, "")
    for group, points in result["curves"].items():
        table.add_section()
        chosen = result["chosen"].get(group)
        for point in points:
            mark = "chosen" if chosen is not None and point["share"] == chosen["share"] else ""
            name = group if group == "random" else group.upper()
            _scan_row(table, name, COLOURS[group], point, asked, mark)
    table.caption = "babble: answers that the intact model finds incoherent" if asked else None
    table.caption_justify = "left"
    yield table
    yield Text(result["rule"], style="dim")
    if result["compare"] is not None:
        yield _compare_table(result["compare"])
    yield claims_text(result["claims"])
    yield facts_table("Written", {"groups": out / "groups", "everything": out})


def _scan_row(
    table: Any, name: str, style: str, point: Mapping[str, Any], asked: bool, mark: str
) -> None:
    cells = [
        f"{point['units']:,}" if point["units"] else "",
        f"{point['share']:.2%}" if point["share"] else "",
        f"{point['utility_loss']:.3f}",
        f"{point['loss_rise']:+.3f}" if point["units"] else "",
        f"{point['refusal_margin']:+.2f}",
        f"{point['refuses']:.0%}",
    ]
    if asked:
        cells += [f"{point['asr']:.0%}", f"{point['incoherent']:.0%}"]
    table.add_row(Text(name, style=style), *cells, mark)


def _compare_table(compared: Mapping[str, Any]) -> RenderableType:
    table = new_table(
        "Ways of grouping, best first",
        ("tokens", "scope", "normalize"),
        (compared["by"], "at SCU", *(f"{p['share']:.2%}" for p in compared["ways"][0]["points"])),
    )
    for way in compared["ways"]:
        table.add_row(
            way["tokens"],
            way["scope"],
            way["normalize"],
            f"{way['taken']:+.2f}",
            "-" if way["share"] is None else f"{way['share']:.2%}",
            *(f"{p['taken']:+.2f} {p['loss_rise']:+.2f}" for p in way["points"]),
        )
    table.caption = f"{compared['criterion']} Columns by share: the same / rise of the utility loss"
    table.caption_justify = "left"
    return table


def study_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """Arms and claims of a study that trains."""
    result = record["result"]
    arms = result["arms"]
    rows = [
        key for key in ("utility_loss", "math_loss") if key in next(iter(arms.values()))["mean"]
    ]
    table = new_table(
        "Means over seeds; losses and margin in nats per token",
        (result["varied"],),
        ("steps", "train", "ASR", "95 %", "babble", "margin", *_SHORT[: len(rows)]),
    )
    for name, found in arms.items():
        mean = found["mean"]
        low, high = (100 * bound for bound in mean["asr_interval"])
        steps = [own["training"]["steps"] for own in found["seeds"].values()]
        # Arms are compared at the same training loss: one that did not reach it is marked.
        missed = any(own["training"].get("reached") is False for own in found["seeds"].values())
        table.add_row(
            result["labels"][name],
            f"{sum(steps) / len(steps):.0f}" if any(steps) else "",  # the model before: no steps
            f"{mean['training_loss']:.3f}{'*' if missed else ''}",
            f"{mean['asr']:.1%}",
            f"{low:.0f} - {high:.0f}",
            f"{mean['incoherent']:.0%}",
            f"{mean['refusal_margin']:+.2f}",
            *(f"{mean[key]:.3f}" for key in rows),
        )
    table.caption = (
        "train: loss of fixed rows of the training data (*: that of the first arm was not "
        "reached); babble: answers that the model before training finds incoherent"
    )
    table.caption_justify = "left"
    yield table
    yield claims_text(result["claims"])
    yield facts_table("Written", {"everything": out})


def stability_tables(record: Mapping[str, Any], out: Path) -> Iterator[RenderableType]:
    """Overlaps and correlations at every size."""
    result = record["result"]
    groups = list(result["suffices"])
    table = new_table(
        "Overlap of groups from disjoint prompts, means over resamples",
        (),
        ("prompts", *(group.upper() for group in groups), "rho I_S", "rho I_U", "rho I_S - I_U"),
    )
    for row in result["sizes"]:
        overlaps = (f"{row['groups'][group]['overlap']:.2f}" for group in groups)
        rho = (row["spearman"][order]["value"] for order in ("safety", "utility", "difference"))
        table.add_row(f"{row['size']}", *overlaps, *(f"{value:.3f}" for value in rho))
    table.add_section()
    chance = result["sizes"][0]["groups"]  # which the number of prompts does not change
    table.add_row("by chance", *(f"{chance[group]['by_chance']:.3f}" for group in groups))
    enough = (
        # None: not even the largest size that was drawn.
        "more" if result["suffices"][group] is None else str(result["suffices"][group])
        for group in groups
    )
    table.add_row("suffice", *enough)
    table.caption = f"{result['rule']} rho: Spearman, mean over modules"
    table.caption_justify = "left"
    yield table
    yield facts_table("Written", {"everything": out})


def claims_text(claims: Sequence[Mapping[str, Any]]) -> Text:
    """One sentence a claim, marked by whether it holds."""
    text = Text()
    for each in claims:
        text.append("yes " if each["holds"] else "no  ", "green" if each["holds"] else "bold red")
        text.append(f"{each['sentence']}\n")
    return text
