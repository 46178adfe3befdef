"""``ssah verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result
from ssah.cli.selecting import check_selected, counted, described, selected_in
from ssah.cli.shared import Model

ORDER = 55


def verify(
    model: Model,
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="The model before, likewise.")
    ],
    units: Annotated[
        list[str],
        typer.Option(
            help="`scu`, `cu:0.06` (its top, as a fraction of all units), `heads:2.26`, "
            "`layers:6-12`, ...; may be repeated."
        ),
    ],
    groups: Annotated[
        Path | None,
        typer.Option("--groups", metavar="DIR", help="What `ssah classify` saved, for groups."),
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Check the reverse: everything except these units.")
    ] = False,
) -> Result:
    """Prove that a trained model has chosen units or weights exactly as the model before.

    Example: `ssah verify runs/merged --base smollm2 --groups runs/groups --units scu`

    MODEL may have been trained by any program. It may also be the folder of a LoRA adapter, which
    must then add exactly zero to these. The exit code is 1 if an entry differs, and the
    parameters are named.
    """
    import ssah
    from ssah.models import empty_model
    from ssah.report.terminal import facts_table

    # Of groups no model is needed here: `verify` loads both.
    chosen = check_selected(units, groups, "units") or selected_in(
        empty_model(base), units, groups, "any"
    )
    ssah.verify(model, base, chosen, only=only)  # raises where the two differ
    found = {
        "model": model,
        "base": base,
        **counted(chosen),
        "only": only,
        "equal": True,
    }
    what = "everything except " if only else ""
    facts = {
        "compared": what + described(chosen),
        "with": base,
        "result": "equal, bit for bit",
    }
    return Result(found, (facts_table("Verified", facts),))
