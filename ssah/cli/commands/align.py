"""``ssah align``."""

from __future__ import annotations

from typing import Annotated

import typer

from ssah.cli.running import Result
from ssah.cli.shared import Data, Groups, Model, Rows, Weights
from ssah.cli.training_run import RunOptions, Selected
from ssah.cli.training_run import train as run
from ssah.training.finetune import Settings

ORDER = 60


def align(
    model: Model,
    data: Data,
    groups: Groups,
    *,
    train: Annotated[
        list[str] | None,
        typer.Option(help="`ru` (default), `cu:0.06`, ...; may be repeated."),
    ] = None,
    options: RunOptions,
    settings: Settings,
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
    selected = Selected("train", train or ["ru"], groups)  # as the paper does
    return run(selected, model, data, settings, options, weights, rows)
