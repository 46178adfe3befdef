"""``ssah transfer``, ``ssah probe`` and ``ssah report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssah.cli.experiments import quiet_threads
from ssah.cli.reading import reading_rows
from ssah.cli.support import (
    BatchSize,
    Device,
    Dtype,
    DtypeOption,
    Json,
    MaxLength,
    Model,
    Out,
    RemoteCode,
    Result,
    reporting,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType
    from rich.table import Table

_SHOWN = 12  # layers in the terminal


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("transfer")(transfer)
    app.command("probe")(probe)
    app.command("report")(report)


@reporting
def transfer(
    before: Annotated[
        Path, typer.Argument(metavar="GROUPS_BEFORE", help="What `ssah classify` saved.")
    ],
    after: Annotated[
        Path, typer.Argument(metavar="GROUPS_AFTER", help="The same of the trained model.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Keep numbers and picture.")
    ] = None,
    title: Annotated[str, typer.Option(help="Over the picture.")] = "Attribute transfer",
    as_json: Json = False,
) -> Result:
    """Show which units changed their group when the model was trained.

    Example: `ssah transfer runs/groups runs/groups_tuned --out runs/transfer`
    """
    from ssah import transfer as compare
    from ssah.groups import UnitGroups
    from ssah.report.terminal.tables import facts_table
    from ssah.studies.transfer import run_transfer, summary

    if out is None:
        groups = UnitGroups.load(before), UnitGroups.load(after)
        found = summary(compare(*groups), *groups)
    else:
        found = {"out": str(out), **run_transfer(before, after, out, title=title)["result"]}
    facts = {
        "units": f"{found['units']:,}, ranked per {found['scope']}",
        "before": f"{before} ({found['models']['before']})",
        "after": f"{after} ({found['models']['after']})",
        **({} if out is None else {"saved to": out}),
    }
    return Result(found, (_flows(found), facts_table("Transfer", facts)))


def _flows(found: Mapping[str, Any]) -> Table:
    from rich.text import Text

    from ssah.report import COLOURS
    from ssah.report.terminal.tables import new_table

    groups = found["groups"]
    table = new_table(
        "Units that went from one group (row) to another (column), in % of all units",
        ("before \\ after",),
        (*(group.upper() for group in groups), "all", "kept"),
    )
    for group, row in zip(groups, found["matrix"], strict=True):
        kept = found["kept"][group]
        table.add_row(
            Text(group.upper(), style=COLOURS[group]),
            *(
                Text(f"{share:.2%}", style="bold" if name == group else "")
                for name, share in zip(groups, row, strict=True)
            ),
            f"{sum(row):.2%}",
            "-" if kept is None else f"{kept:.0%}",
        )
    columns = [sum(column) for column in zip(*found["matrix"], strict=True)]
    table.add_section()
    table.add_row("all", *(f"{share:.2%}" for share in columns), f"{sum(columns):.0%}", "")
    return table


@reporting
@reading_rows
def probe(
    model: Model,
    out: Out,
    reading: Any,
    beside: Annotated[
        str | None, typer.Option("--beside", metavar="OTHER", help="Compare with this model.")
    ] = None,
    requests: Annotated[
        list[str] | None,
        typer.Option(
            "--requests", help="Harmful: .txt, JSONL or built-in [`builtin:safety_eval`]; repeat."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Generated with each version.")] = 10,
    refusal: Annotated[
        str | None, typer.Option(help="Start of a refusal; default: that of the margin.")
    ] = None,
    compliance: Annotated[str | None, typer.Option(help="Start of a compliance.")] = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Measure whether hidden states are nearer to a refusal's or to a compliance's, per layer.

    Example: `ssah probe runs/aligned --beside smollm2 --out runs/probe`
    """
    quiet_threads()
    from ssah.evaluation import COMPLIANCE, REFUSAL
    from ssah.report.terminal.experiments import claims_text
    from ssah.report.terminal.tables import facts_table
    from ssah.studies.loading import Loading
    from ssah.studies.probe import run_probe

    record = run_probe(
        out,
        Loading(model, dtype.value, device, trust_remote_code, reading),
        requests or ["builtin:safety_eval"],
        beside=beside,
        tokens=tokens,
        refusal=REFUSAL if refusal is None else refusal,
        compliance=COMPLIANCE if compliance is None else compliance,
        batch_size=batch_size,
        max_length=max_length,
    )
    found = record["result"]
    facts = {"picture": out / record["pictures"][0], "saved to": out}
    shown: list[RenderableType] = [_layers(row) for row in found["models"]]
    shown += [claims_text(found["claims"]), facts_table("Written", facts)]
    return Result({"out": str(out), **found}, tuple(shown))


def _layers(row: Mapping[str, Any]) -> Table:
    from ssah.report.terminal.tables import new_table

    table = new_table(
        f"{row['model']}: cosine distance less baseline",
        (),
        ("layer", "to refusal", "to compliance", "difference", "95 % interval"),
    )
    values = row["by_layer"]
    last = len(values["difference"]) - 1
    step = max(1, -(-last // _SHOWN))
    for layer in (*range(0, last, step), last):
        low, high = values["difference_intervals"][layer]
        table.add_row(
            str(layer),
            f"{values['refusal'][layer]:+.3f}",
            f"{values['compliance'][layer]:+.3f}",
            f"{values['difference'][layer]:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
        )
    return table


@reporting
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the runs are.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: DIR/report.html."),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Safety-critical neurons",
    as_json: Json = False,
) -> Result:
    """Write one HTML file with the tables and pictures of every run found under DIR.

    Example: `ssah report runs --out report.html`
    """
    from ssah.report.html import write_report
    from ssah.report.terminal.tables import facts_table, new_table

    target = folder / "report.html" if out is None else out
    runs = write_report(folder, target, title=title)
    table = new_table("Runs", ("kind", "folder", "state"), ())
    for run in runs:
        table.add_row(run["kind"], run["folder"], "finished" if run["finished"] else "UNFINISHED")
    size = target.stat().st_size
    facts = {"report": target, "size": f"{size / 1e6:.1f} MB"}
    data = {"out": str(target), "bytes": size, "runs": runs}
    return Result(data, (table, facts_table("Written", facts)))
