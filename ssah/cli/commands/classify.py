"""``ssah classify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.choices import Normalize, Scope
from ssah.cli.running import Result
from ssah.cli.shared import Out

ORDER = 20

Share = Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of all units.")]


def classify(
    safety: Annotated[Path, typer.Argument(metavar="SAFETY_DIR", help="Scores on safety data.")],
    utility: Annotated[Path, typer.Argument(metavar="UTILITY_DIR", help="Scores on utility data.")],
    scu: Share,
    ucu: Share,
    ru: Share,
    out: Out,
    scope: Annotated[Scope, typer.Option(help="What is ranked together.")] = "model",
    normalize: Annotated[
        Normalize, typer.Option(help="Scores of a module, before they are ranked.")
    ] = "zscore",
) -> Result:
    """Sort units into safety-critical, utility-critical, redundant and complex ones.

    Example: `ssah classify runs/safety runs/utility --scu 0.008 --ucu 0.008 --ru 0.15
    --out runs/groups`
    """
    from ssah.attribution import Attribution
    from ssah.groups import classify as sort
    from ssah.report.terminal import facts_table, groups_table, layers

    # No model is needed: the scores say what units it has.
    scores = Attribution.load(safety), Attribution.load(utility)
    groups = sort(*scores, scu=scu, ucu=ucu, ru=ru, scope=scope, normalize=normalize)
    groups.save(out)  # before anything is printed, which may fail
    result = {
        "out": str(out),
        "model": groups.metadata["model_name"],
        "shares": groups.shares,
        "scope": groups.scope,
        "normalize": groups.normalize,
        **groups.summary(),
        "layers": layers(groups),
    }
    facts = {
        "model": groups.metadata["model_name"],
        "ranked": f"per {groups.scope}, normalisation: {groups.normalize}",
        "saved to": out,
    }
    return Result(result, (groups_table(groups), facts_table("Groups", facts)))
