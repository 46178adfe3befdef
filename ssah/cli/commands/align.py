"""``ssah align``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result
from ssah.cli.shared import Data, Model, Rows, Weights
from ssah.cli.training_options import AskedSafety, RunOptions, Selected
from ssah.cli.training_run import train as run
from ssah.settings import setting
from ssah.training.finetune import Settings

ORDER = 60


@dataclass(frozen=True)
class TrainedBeside:
    """What trains beside units."""

    rows: tuple[str, ...] = setting(
        (),
        "Rows of an embedding or a head that train too: `lm_head.weight:300-310,512`, or a file of "
        "such lines; may be repeated.",
        metavar="NAME:ROWS",
    )


def align(
    model: Model,
    data: Data,
    *,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="`ru` (default), `cu:0.06`, `layers:6-12`, `heads:2.26`, ...; may be repeated. "
            "`none`: nothing."
        ),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            "--groups", metavar="DIR", help="What `ssah classify` saved, where groups are named."
        ),
    ] = None,
    beside: TrainedBeside,
    options: RunOptions,
    settings: Settings,
    asked: AskedSafety,
    weights: Weights,
    rows: Rows,
) -> Result:
    """Align a model by training its redundant units and nothing else.

    Example: `ssah align smollm2 --data builtin:safety --groups runs/groups --lr 1e-4 --epochs 3
    --out runs/aligned`

    The loss is that of the response. An interrupted run goes on when the same command is given
    again. The folder then holds the update alone, see `ssah.load_update`; `--merge` adds the whole
    model.
    """
    selected = Selected("train", train or ["ru"], groups, beside.rows)  # as the paper does
    return run(selected, model, data, settings, options, asked, weights, rows)
