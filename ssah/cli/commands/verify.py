"""``ssah verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from ssah.cli.running import Result
from ssah.cli.shared import Groups, Model

ORDER = 55


def verify(
    model: Model,
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="The model before, likewise.")
    ],
    groups: Groups,
    units: Annotated[
        list[str],
        typer.Option(
            help="`scu`, `cu:0.06` (its top, as a fraction of all units), ...; may be repeated."
        ),
    ],
    only: Annotated[
        bool, typer.Option("--only", help="Check the reverse: everything except these units.")
    ] = False,
) -> Result:
    """Prove that a trained model has chosen units exactly as the model before.

    Example: `ssah verify runs/merged --base smollm2 --groups runs/groups --units scu`

    MODEL may have been trained by any program. It may also be the folder of a LoRA adapter, which
    must then add exactly zero to these units. The exit code is 1 if an entry differs, and the
    parameters are named.
    """
    import ssah
    from ssah.groups import UnitGroups
    from ssah.report.terminal import facts_table
    from ssah.training.finetune import select_units

    kept = UnitGroups.load(groups)  # without a model, which `verify` loads
    chosen = select_units(units, kept)
    ssah.verify(model, base, chosen, only=only)  # raises where the two differ
    found = {
        "model": model,
        "base": base,
        "units": len(chosen),
        "share": len(chosen) / sum(kept.sizes.values()),
        "only": only,
        "equal": True,
    }
    what = "everything except " if only else ""
    facts = {
        "compared": f"{what}{len(chosen):,} units ({found['share']:.1%})",
        "with": base,
        "result": "equal, bit for bit",
    }
    return Result(found, (facts_table("Verified", facts),))
