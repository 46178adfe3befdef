"""Options of all studies: training and measuring."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_TRAINING, _MEASURING = "Training", "Measuring"


def training_option(name: str, help: str, **options: Any) -> Any:
    """An option of the panel on training."""
    return typer.Option(name, help=help, rich_help_panel=_TRAINING, **options)


Seeds = Annotated[
    list[int] | None, training_option("--seeds", "Of row order, random units, adapters.", min=0)
]
Rate = Annotated[float, training_option("--lr", "Learning rate of AdamW, constant.")]
Epochs = Annotated[float, training_option("--epochs", "Passes of the first arm over the data.")]
MaxSteps = Annotated[
    int | None,
    training_option("--max-steps", "Updates of the first arm, in place of epochs.", min=1),
]
TargetLoss = Annotated[
    float | None,
    training_option("--target-loss", "Training loss of all arms; default: the first's."),
]
Patience = Annotated[
    float,
    training_option("--patience", "The most updates of the others, times the first's.", min=1.0),
]
Rows = Annotated[int, training_option("--train-batch-size", "Rows of an update.", min=1)]
TrainLength = Annotated[
    int, training_option("--train-max-length", "Tokens kept of a row trained on.", min=2)
]
Sample = Annotated[int, training_option("--sample", "Rows whose loss is the training loss.", min=1)]
CheckEvery = Annotated[
    int, training_option("--check-every", "The fewest updates between measuring it.", min=1)
]
Autocast = Annotated[
    bool | None,
    training_option("--bf16/--no-bf16", "Train in bfloat16 by autocast; default: if faster here."),
]
SaveModel = Annotated[
    bool, training_option("--save-model", "Keep the trained models in DIR/models.")
]
Asr = Annotated[
    int | None,
    typer.Option(
        "--asr", min=1, help="Requests answered; default: all.", rich_help_panel=_MEASURING
    ),
]
