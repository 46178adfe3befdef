"""``ssah export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssah.cli.running import Result
from ssah.cli.selecting import check_selected, selected_in
from ssah.cli.shared import Model, Out, Weights

if TYPE_CHECKING:
    from ssah.training import LoraExport

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
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            metavar="DIR",
            help="What `ssah attribute` saved: write it as llama.cpp's importance matrix.",
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, help="Refuse a larger rank; default: 512, as vLLM."),
    ] = None,
    weights: Weights,
) -> Result:
    """Write an update or an ablation as an exact LoRA adapter, or scores for llama.cpp.

    Example: `ssah export smollm2 --change runs/update --out runs/adapter`

    MODEL is the base model. The change must be on rows or columns of projections, as that of units
    is. With --units the adapter switches these units or heads off. With --imatrix the file --out is
    what `llama-quantize --imatrix` reads.
    """
    import ssah
    from ssah.models import quiet
    from ssah.report.terminal import facts_table

    _check(change, groups, units, imatrix, weights)
    if imatrix is not None:
        return _importance_matrix(model, imatrix, out, weights, max_rank)
    # Groups are read before the model is loaded, which may take minutes.
    what: Any = check_selected(units, groups, "units") if units else change
    base, _ = weights.load(model)
    if what is None and units:
        what = selected_in(base, units, groups, "all")
    limit = {} if max_rank is None else {"max_rank": max_rank}
    with quiet():  # a tuned model is loaded, too
        made = ssah.export_lora(what, out, base=base, **limit)
    facts = {
        "adapters": f"{len(made.ranks)}, of rank {min(made.ranks.values())} to {made.rank}",
        "changed": f"{made.changed:,} elements",
        "exact": _how_exact(made),
        "written to": str(out),
    }
    data = {"model": model, "out": str(out), **made.to_dict()}
    return Result(data, (facts_table("Exported", facts),))


def _how_exact(made: LoraExport) -> str:
    if not made.inexact:
        return "all, bit for bit, once merged"
    return f"all but {made.inexact:,}, which are off by at most {made.error:.1e} once merged"


def _importance_matrix(
    model: str, scores: Path, out: Path, weights: Weights, max_rank: int | None
) -> Result:
    """Mean squares of what enters B, for llama-quantize; no weight is read."""
    from ssah.attribution import Attribution, save_imatrix
    from ssah.models import empty_model, quiet
    from ssah.report.terminal import facts_table

    _check_unused(max_rank, weights)
    attribution = Attribution.load(scores)
    with quiet():
        empty = empty_model(model, trust_remote_code=weights.trust_remote_code)
    squares = save_imatrix(attribution, out, empty)
    tokens = max(attribution.count.values())
    facts = {
        "weights": f"{len(squares):,}: mean square of each input channel",
        "tokens": f"{tokens:,} ({attribution.tokens})",
        "written to": str(out),
    }
    data = {"model": model, "out": str(out), "weights": list(squares), "tokens": tokens}
    return Result(data, (facts_table("Importance matrix", facts),))


def _check(
    change: str | None,
    groups: Path | None,
    units: list[str] | None,
    imatrix: Path | None,
    weights: Weights,
) -> None:
    """One of the three: what was trained, what is ablated, or scores. The base is whole."""
    from ssah.models import check_on_one_device

    check_on_one_device(weights.places, "the base of an adapter")
    given = [bool(units), change is not None, imatrix is not None]
    if sum(given) != 1 or (groups is not None and not units):
        raise ValueError(
            "either --change (what was trained), --units (what is ablated) or --imatrix (scores) "
            "must be given, and no two of them; --groups is for --units"
        )


def _check_unused(max_rank: int | None, weights: Weights) -> None:
    """What says how an adapter is made would change nothing of an importance matrix."""
    given = {name: getattr(weights, name) for name in ("dtype", "device", "base")}
    for name, value in {"max_rank": max_rank, **given}.items():
        if value != getattr(Weights, name, None):
            raise ValueError(
                f"{name} is {value!r}, must be left out with --imatrix: no weight is read, and no "
                "adapter is made"
            )
