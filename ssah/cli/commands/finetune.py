"""``ssah finetune``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result
from ssah.cli.shared import Data, Model, Rows, Weights
from ssah.cli.training_options import AskedSafety, RunOptions, Selected
from ssah.cli.training_run import train
from ssah.settings import setting
from ssah.training.finetune import Settings

ORDER = 50


@dataclass(frozen=True)
class FrozenBeside:
    """What is frozen beside units."""

    keep: tuple[str, ...] = setting(
        (),
        "Parameters that are frozen whole: a name, or a pattern such as `*norm*`; may be repeated.",
        metavar="NAME",
    )
    rows: tuple[str, ...] = setting(
        (),
        "Rows of an embedding or a head that are frozen: `lm_head.weight:300-310,512`, or a file "
        "of such lines; may be repeated.",
        metavar="NAME:ROWS",
    )


def finetune(
    model: Model,
    data: Data,
    freeze: Annotated[
        list[str],
        typer.Option(
            help="`scu`, `cu:0.06` (its top, as a fraction of all units), `layers:6-12`, "
            "`heads:2.26`, ...; may be repeated. `none`: nothing."
        ),
    ],
    *,
    groups: Annotated[
        Path | None,
        typer.Option(
            "--groups", metavar="DIR", help="What `ssah classify` saved, where groups are named."
        ),
    ] = None,
    beside: FrozenBeside,
    options: RunOptions,
    settings: Settings,
    asked: AskedSafety,
    weights: Weights,
    rows: Rows,
) -> Result:
    """Fine-tune a model while the units or weights you name stay bit for bit what they are.

    Example: `ssah finetune smollm2 --data task.jsonl --groups runs/groups --freeze scu
    --freeze cu --requests harmful.txt --out runs/tuned`

    How much is frozen protects what the model refuses, more than which units: measure it with
    `--requests`, before and after.

    The loss is that of the response. An interrupted run goes on when the same command is given
    again. The folder then holds the update alone, see `ssah.load_update`; `--merge` adds the whole
    model.
    """
    selected = Selected("freeze", freeze, groups, beside.rows, beside.keep)
    return train(selected, model, data, settings, options, asked, weights, rows)
