"""``ssah ablate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ssah.choices import Group
from ssah.cli.running import Result
from ssah.cli.shared import BatchSize, Groups, Limit, MaxLength, Model, PackedWeights, Rows

ORDER = 30


def ablate(
    model: Model,
    groups: Groups,
    group: Annotated[list[Group], typer.Option("--group", help="Repeat for several rows.")],
    *,
    random: Annotated[
        bool, typer.Option("--random", help="Also ablate as many random units of each module.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the random units.")] = 0,
    utility: Annotated[
        str, typer.Option("--utility", help="Instructions with answers, for the loss.")
    ] = "builtin:utility_eval",
    requests: Annotated[
        str, typer.Option("--requests", help="Harmful requests, for the margin.")
    ] = "builtin:safety_eval",
    limit: Limit = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    weights: PackedWeights,
    rows: Rows,
) -> Result:
    """Switch a group of units off, and measure utility loss and refusal margin before and after.

    Example: `ssah ablate smollm2 --groups runs/groups --group scu --random`
    """
    from rich.console import Console
    from rich.progress import track

    from ssah.data import Counts, rows_read
    from ssah.evaluation import OPENING, Measures, ablations, fitting, prompts
    from ssah.groups import UnitGroups
    from ssah.report.terminal import ablation_table

    reading, counts, asked_counts = rows.reading(), Counts(), Counts()
    answers = reading.rows(utility, limit=limit, counts=counts)
    asked = reading.requests(requests, limit, asked_counts)
    UnitGroups.load(groups)  # a wrong folder is refused before the model is loaded
    loaded, tokenizer = weights.load(model)
    found = UnitGroups.load(groups, loaded)
    sizes = {"batch_size": batch_size, "max_length": max_length}
    loader = reading.loader(answers, tokenizer, counts, **sizes)
    encoded = prompts(tokenizer, asked)
    # The margin appends the opening of a refusal and of a compliance: a request leaves room.
    asked = fitting(asked, encoded, max_length - OPENING, overlong=reading.overlong)
    measures = Measures(loaded, tokenizer, loader=loader, requests=asked, **sizes)
    names = list(dict.fromkeys(group))  # a group that is named twice is measured once
    steps = ablations(measures, found, names, random=random, seed=seed)
    # The intact model is measured first, then each group, and its control behind it.
    total, stderr = 1 + len(names) * (2 if random else 1), Console(stderr=True)
    measured = list(track(steps, "measuring", total=total, console=stderr, transient=True))
    result = {
        "model": found.metadata["model_name"],
        "groups": str(groups),
        "utility": utility,
        "requests": requests,
        "seed": seed,
        "rows_read": rows_read(tokenizer, counts),
        "requests_read": asked_counts.to_dict(),
        "rows": measured,
    }
    return Result(result, (ablation_table(measured),))
