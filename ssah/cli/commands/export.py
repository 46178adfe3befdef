"""``ssah export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ssah.cli.running import Result
from ssah.cli.selecting import check_selected, selected_in
from ssah.cli.shared import Model, Out, Weights

ORDER = 58


def export(
    model: Model,
    out: Out,
    *,
    change: Annotated[
        str | None,
        typer.Option(
            "--change",
            metavar="DIR",
            help="What was trained: an update that a plan saved, or a tuned model.",
        ),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            "--groups", metavar="DIR", help="What `ssah classify` saved, where groups are named."
        ),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            help="What to ablate: `scu`, `cu:0.06` (its top), `heads:2.26`, ...; may be repeated."
        ),
    ] = None,
    max_rank: Annotated[
        int, typer.Option("--max-rank", min=1, help="Refuse a larger rank; vLLM serves 512.")
    ] = 512,
    weights: Weights,
) -> Result:
    """Write an update or an ablation as an exact LoRA adapter, for PEFT, vLLM and the Hub.

    Example: `ssah export smollm2 --change runs/update --out runs/adapter`

    MODEL is the base model. The change must be on rows or columns of projections, as that of units
    is. With --units the adapter switches these units or heads off.
    """
    import ssah
    from ssah.models import quiet
    from ssah.report.terminal import facts_table

    _check_one(change, groups, units)
    # Groups are read before the model is loaded, which may take minutes.
    what: Any = check_selected(units, groups, "units") if units else change
    base, _ = weights.load(model)
    if what is None and units:
        what = selected_in(base, units, groups, "all")
    with quiet():  # a tuned model is loaded, too
        made = ssah.export_lora(what, out, base=base, max_rank=max_rank)
    exact = "all, bit for bit, once merged"
    if made.inexact:
        exact = f"all but {made.inexact:,}, which are off by at most {made.error:.1e} once merged"
    facts = {
        "adapters": f"{len(made.ranks)}, of rank {min(made.ranks.values())} to {made.rank}",
        "changed": f"{made.changed:,} elements",
        "exact": exact,
        "written to": str(out),
    }
    data = {"model": model, "out": str(out), **made.to_dict()}
    return Result(data, (facts_table("Exported", facts),))


def _check_one(change: str | None, groups: Path | None, units: list[str] | None) -> None:
    """One of the two: what was trained, or what is ablated."""
    if (change is None) == (not units) or (change is not None and groups is not None):
        raise ValueError(
            "either --change (what was trained) or --units (what is ablated) must be given, and "
            "not both; --groups is for --units"
        )
