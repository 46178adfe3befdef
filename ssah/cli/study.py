"""``ssah study budget`` and ``ssah study freeze``."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from ssah.cli.experiments import (
    WEI,
    BatchSize,
    Counted,
    DtypeOption,
    Folder,
    Judges,
    MaxLength,
    NewTokens,
    NormalizeOption,
    Requests,
    Safety,
    ScopeOption,
    Share,
    TokensOption,
    Utility,
    UtilityEval,
    quiet_threads,
)
from ssah.cli.many import many_values
from ssah.cli.reading import reading_rows
from ssah.cli.study_options import (
    Asr,
    Autocast,
    CheckEvery,
    Epochs,
    MaxSteps,
    Patience,
    Rate,
    Rows,
    Sample,
    SaveModel,
    Seeds,
    TargetLoss,
    TrainLength,
    training_option,
)
from ssah.cli.support import (
    Device,
    Dtype,
    Json,
    Model,
    Normalize,
    RemoteCode,
    Result,
    Scope,
    reporting,
)

__all__ = ["register"]

_GROUPS = "Groups"


class FreezeArm(str, Enum):
    """As ``ssah.studies.training.freeze.ARMS``."""

    none = "none"
    scu = "scu"
    scu_cu = "scu-cu"
    random = "random"
    scu_all_cu = "scu-all-cu"
    random_all = "random-all"
    lora = "lora"


def budget(
    model: Model,
    safety: Safety,
    utility: Utility,
    requests: Requests,
    utility_eval: UtilityEval,
    out: Folder,
    reading: Any,
    math: Annotated[
        str | None,
        typer.Option("--math", help="Rows for the loss on mathematics.", rich_help_panel="Data"),
    ] = None,
    ru: Share = 0.2,
    scope: ScopeOption = Scope.model,
    normalize: NormalizeOption = Normalize.zscore,
    tokens: TokensOption = Counted.labels,
    seeds: Seeds = None,
    lr: Rate = 1e-4,
    ru_lr: Annotated[
        float | None, training_option("--ru-lr", "Of RU alone; default: the same.")
    ] = None,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    target_loss: TargetLoss = None,
    patience: Patience = 3.0,
    train_batch_size: Rows = 8,
    train_max_length: TrainLength = 192,
    sample: Sample = 32,
    check_every: CheckEvery = 2,
    bf16: Autocast = None,
    save_model: SaveModel = False,
    asr: Asr = None,
    judge: Judges = None,
    max_new_tokens: NewTokens = 64,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Align a model by training everything, and by training its redundant units alone.

    Example: `ssah study budget smollm2 --safety builtin:safety --utility builtin:utility
    --requests builtin:safety_eval --utility-eval builtin:utility_eval --save-model
    --out runs/budget`

    Half of every batch are refusals (`--safety`), half ordinary answers (`--utility`). Both arms
    end with the same loss on a fixed sample of the refusals. An interrupted study goes on when the
    same command is given again.
    """
    quiet_threads()
    from ssah.report.terminal.experiments import study_tables
    from ssah.studies.inputs import Loading
    from ssah.studies.training.budget import BudgetSettings
    from ssah.studies.training.budget import budget as run

    settings = BudgetSettings(
        seeds=tuple(seeds or (0,)),
        scope=scope.value,
        normalize=normalize.value,
        tokens=tokens.value,
        lr=lr,
        epochs=epochs,
        max_steps=max_steps,
        target_loss=target_loss,
        patience=patience,
        batch_size=train_batch_size,
        train_max_length=train_max_length,
        sample=sample,
        check_every=check_every,
        asr=asr,
        judges=tuple(judge or (WEI,)),
        max_new_tokens=max_new_tokens,
        eval_batch_size=batch_size,
        max_length=max_length,
        bf16=bf16,
        ru=ru,
        ru_lr=ru_lr,
    )
    record = run(
        Loading(model, dtype.value, device, trust_remote_code, reading),
        out,
        settings,
        safety=safety,
        utility=utility,
        requests=requests,
        utility_eval=utility_eval,
        math=math,
        save_model=save_model,
    )
    return Result(record, tuple(study_tables(record, out)))


def freeze(
    model: Model,
    safety: Safety,
    utility: Utility,
    finetune: Annotated[
        str, typer.Option("--finetune", help="Rows of the benign task.", rich_help_panel="Data")
    ],
    requests: Requests,
    utility_eval: UtilityEval,
    out: Folder,
    reading: Any,
    arms: Annotated[
        list[FreezeArm] | None,
        training_option("--arms", "Default: none scu-cu random scu-all-cu random-all lora."),
    ] = None,
    scu: Share = 0.01,
    ucu: Share = 0.01,
    ru: Share = 0.15,
    cu: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="CU frozen beside SCU.", rich_help_panel=_GROUPS),
    ] = 0.06,
    scope: ScopeOption = Scope.model,
    normalize: NormalizeOption = Normalize.zscore,
    tokens: TokensOption = Counted.labels,
    seeds: Seeds = None,
    lr: Rate = 5e-5,
    lora_rank: Annotated[int, training_option("--lora-rank", "Of the adapters.", min=1)] = 16,
    lora_lr: Annotated[
        float | None, training_option("--lora-lr", "Of the adapters; default: 10 times --lr.")
    ] = None,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    target_loss: TargetLoss = None,
    patience: Patience = 3.0,
    train_batch_size: Rows = 8,
    train_max_length: TrainLength = 256,
    sample: Sample = 32,
    check_every: CheckEvery = 2,
    bf16: Autocast = None,
    save_model: SaveModel = False,
    asr: Asr = None,
    judge: Judges = None,
    max_new_tokens: NewTokens = 64,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Fine-tune an aligned model on a benign task with different units frozen, to equal loss.

    Example: `ssah study freeze runs/aligned --safety builtin:safety --utility builtin:utility
    --finetune task.jsonl --requests builtin:safety_eval --utility-eval builtin:utility_eval
    --seeds 0 1 2 --out runs/freeze`

    Every arm trains until the loss of a fixed sample of the task is that of the arm that freezes
    nothing. An interrupted study goes on when the same command is given again.
    """
    quiet_threads()
    from ssah.report.terminal.experiments import study_tables
    from ssah.studies.inputs import Loading
    from ssah.studies.training.freeze import FreezeSettings
    from ssah.studies.training.freeze import freeze as run

    own: dict[str, Any] = {"arms": tuple(arm.value for arm in arms)} if arms else {}
    settings = FreezeSettings(
        seeds=tuple(seeds or (0, 1, 2)),
        scope=scope.value,
        normalize=normalize.value,
        tokens=tokens.value,
        lr=lr,
        epochs=epochs,
        max_steps=max_steps,
        target_loss=target_loss,
        patience=patience,
        batch_size=train_batch_size,
        train_max_length=train_max_length,
        sample=sample,
        check_every=check_every,
        asr=asr,
        judges=tuple(judge or (WEI,)),
        max_new_tokens=max_new_tokens,
        eval_batch_size=batch_size,
        max_length=max_length,
        bf16=bf16,
        scu=scu,
        ucu=ucu,
        ru=ru,
        cu=cu,
        lora_rank=lora_rank,
        lora_lr=lora_lr,
        **own,
    )
    record = run(
        Loading(model, dtype.value, device, trust_remote_code, reading),
        out,
        settings,
        safety=safety,
        utility=utility,
        finetune=finetune,
        requests=requests,
        utility_eval=utility_eval,
        save_model=save_model,
    )
    return Result(record, tuple(study_tables(record, out)))


def register(app: typer.Typer) -> None:
    """Add ``study`` with its commands to ``app``."""
    study = typer.Typer(
        help="Train a model in several ways, and measure every result alike.",
        no_args_is_help=True,
    )
    arms = [arm.value for arm in FreezeArm]
    study.command("budget", cls=many_values("--seeds"))(reporting(reading_rows(budget)))
    study.command("freeze", cls=many_values("--seeds", arms=arms))(reporting(reading_rows(freeze)))
    app.add_typer(study, name="study")
