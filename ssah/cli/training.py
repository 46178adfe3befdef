"""``ssah finetune`` and ``ssah align``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssah.cli.reading import reading_rows
from ssah.cli.support import (
    Device,
    Dtype,
    DtypeOption,
    Json,
    Model,
    RemoteCode,
    Result,
    load,
    reporting,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ssah.data import Counts, Reading
    from ssah.training.finetune import Settings

__all__ = ["align", "finetune", "register"]

_NOTHING = "none"
_DATA, _TRAINING, _RUN = "Data", "Training", "Run"


class Scheduler(str, Enum):
    """As ``lr_scheduler`` of ``ssah.training.finetune.Settings``."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"


Data = Annotated[
    str,
    typer.Option("--data", help="File, `builtin:safety` or the like, or hub id."),
]
Groups = Annotated[
    Path, typer.Option("--groups", metavar="DIR", help="What `ssah classify` saved.")
]
OptionalGroups = Annotated[
    Path | None,
    typer.Option(
        "--groups", metavar="DIR", help="What `ssah classify` saved; not for `--freeze none`."
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder of the run; not for `--dry-run`."),
]
EvalData = Annotated[
    str | None,
    typer.Option(help="Rows whose loss is measured before and after.", rich_help_panel=_DATA),
]
Split = Annotated[str | None, typer.Option(help="Of a hub data set.", rich_help_panel=_DATA)]
Limit = Annotated[int | None, typer.Option(min=1, help="Rows read.", rich_help_panel=_DATA)]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens kept of a row.", rich_help_panel=_DATA)]
Rate = Annotated[
    float, typer.Option("--lr", help="Peak learning rate of AdamW.", rich_help_panel=_TRAINING)
]
Epochs = Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)]
MaxSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Updates, in place of epochs.", rich_help_panel=_TRAINING),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows.", rich_help_panel=_TRAINING)]
Accumulation = Annotated[
    int,
    typer.Option(
        "--gradient-accumulation", min=1, help="Batches of an update.", rich_help_panel=_TRAINING
    ),
]
Decay = Annotated[
    float,
    typer.Option("--weight-decay", min=0.0, help="Decoupled.", rich_help_panel=_TRAINING),
]
Warmup = Annotated[
    float,
    typer.Option(
        "--warmup-ratio",
        min=0.0,
        help="Share of the updates in which lr rises.",
        rich_help_panel=_TRAINING,
    ),
]
LrScheduler = Annotated[
    Scheduler, typer.Option("--lr-scheduler", help="Of lr.", rich_help_panel=_TRAINING)
]
GradNorm = Annotated[
    float,
    typer.Option(
        "--max-grad-norm", min=0.0, help="Clip to it; 0: never.", rich_help_panel=_TRAINING
    ),
]
Autocast = Annotated[
    bool,
    typer.Option("--bf16", help="Compute in bfloat16; weights stay.", rich_help_panel=_TRAINING),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Less memory, more time.",
        rich_help_panel=_TRAINING,
    ),
]
RunSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Of order and rounding.", rich_help_panel=_TRAINING)
]
SaveSteps = Annotated[
    int,
    typer.Option(min=0, help="Updates between checkpoints; 0: none.", rich_help_panel=_RUN),
]
LoggingSteps = Annotated[int, typer.Option(min=1, help="Updates per log.", rich_help_panel=_RUN)]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(help="`tensorboard`, `wandb`, ...; may be repeated.", rich_help_panel=_RUN),
]
Merge = Annotated[
    bool, typer.Option("--merge", help="Also save the whole model.", rich_help_panel=_RUN)
]
KeepCheckpoints = Annotated[
    bool,
    typer.Option("--keep-checkpoints", help="Also when the run is finished.", rich_help_panel=_RUN),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show what trains and the memory it takes.", rich_help_panel=_RUN
    ),
]


@reporting
@reading_rows
def finetune(
    model: Model,
    data: Data,
    freeze: Annotated[
        list[str],
        typer.Option(
            help="`scu`, `cu:0.06` (its top, as a fraction of all units), ...; may be repeated. "
            "`none`: everything trains."
        ),
    ],
    reading: Any,
    groups: OptionalGroups = None,
    out: RunFolder = None,
    eval_data: EvalData = None,
    split: Split = None,
    limit: Limit = None,
    max_length: MaxLength = 512,
    lr: Rate = 2e-5,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 8,
    gradient_accumulation: Accumulation = 1,
    weight_decay: Decay = 0.0,
    warmup_ratio: Warmup = 0.0,
    lr_scheduler: LrScheduler = Scheduler.linear,
    max_grad_norm: GradNorm = 1.0,
    bf16: Autocast = False,
    gradient_checkpointing: Checkpointing = False,
    seed: RunSeed = 0,
    save_steps: SaveSteps = 500,
    logging_steps: LoggingSteps = 10,
    report_to: ReportTo = None,
    merge: Merge = False,
    keep_checkpoints: KeepCheckpoints = False,
    dry_run: DryRun = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Fine-tune a model while the units you name stay bit for bit what they are.

    Example: `ssah finetune smollm2 --data task.jsonl --groups runs/groups --freeze scu
    --freeze cu:0.06 --out runs/tuned`

    The loss is that of the response. An interrupted run goes on when the same command is given
    again. The folder then holds the update alone, see `ssah.load_update`; `--merge` adds the whole
    model.
    """
    from ssah.training.finetune import Settings

    settings = Settings(
        lr=lr,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        weight_decay=weight_decay,
        warmup_ratio=warmup_ratio,
        lr_scheduler=lr_scheduler.value,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        logging_steps=logging_steps,
        report_to=tuple(report_to or ()),
    )
    return _train(
        "freeze",
        freeze,
        groups,
        settings,
        name=model,
        data=data,
        eval_data=eval_data,
        reading=reading,
        encoding=(split, limit, max_length),
        loading=(dtype, device, trust_remote_code),
        out=out,
        merge=merge,
        keep_checkpoints=keep_checkpoints,
        dry_run=dry_run,
    )


@reporting
@reading_rows
def align(
    model: Model,
    data: Data,
    groups: Groups,
    reading: Any,
    train: Annotated[
        list[str] | None,
        typer.Option(help="`ru` (default), `cu:0.06`, ...; may be repeated."),
    ] = None,
    out: RunFolder = None,
    eval_data: EvalData = None,
    split: Split = None,
    limit: Limit = None,
    max_length: MaxLength = 512,
    lr: Rate = 2e-5,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 8,
    gradient_accumulation: Accumulation = 1,
    weight_decay: Decay = 0.0,
    warmup_ratio: Warmup = 0.0,
    lr_scheduler: LrScheduler = Scheduler.linear,
    max_grad_norm: GradNorm = 1.0,
    bf16: Autocast = False,
    gradient_checkpointing: Checkpointing = False,
    seed: RunSeed = 0,
    save_steps: SaveSteps = 500,
    logging_steps: LoggingSteps = 10,
    report_to: ReportTo = None,
    merge: Merge = False,
    keep_checkpoints: KeepCheckpoints = False,
    dry_run: DryRun = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Align a model by training its redundant units and nothing else.

    Example: `ssah align smollm2 --data builtin:safety --groups runs/groups --lr 1e-4 --epochs 3
    --out runs/aligned`

    The loss is that of the response. An interrupted run goes on when the same command is given
    again. The folder then holds the update alone, see `ssah.load_update`; `--merge` adds the whole
    model.
    """
    from ssah.training.finetune import Settings

    settings = Settings(
        lr=lr,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        weight_decay=weight_decay,
        warmup_ratio=warmup_ratio,
        lr_scheduler=lr_scheduler.value,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        logging_steps=logging_steps,
        report_to=tuple(report_to or ()),
    )
    return _train(
        "train",
        train or ["ru"],
        groups,
        settings,
        name=model,
        data=data,
        eval_data=eval_data,
        reading=reading,
        encoding=(split, limit, max_length),
        loading=(dtype, device, trust_remote_code),
        out=out,
        merge=merge,
        keep_checkpoints=keep_checkpoints,
        dry_run=dry_run,
    )


def register(app: typer.Typer) -> None:
    """Add both commands to ``app``."""
    app.command("finetune")(finetune)
    app.command("align")(align)


def _train(
    mode: str,
    selection: list[str],
    groups: Path | None,
    settings: Settings,
    *,
    name: str,
    data: str,
    eval_data: str | None,
    reading: Reading,
    encoding: tuple[str | None, int | None, int],
    loading: tuple[Dtype, str, bool],
    out: Path | None,
    merge: bool,
    keep_checkpoints: bool,
    dry_run: bool,
) -> Result:
    """What both commands do; ``mode`` is "freeze" or "train", the option that selects units."""
    from ssah.data import Counts, DataError, encode, rows_read, warn_of_shared
    from ssah.groups import UnitGroups
    from ssah.storage import check_free
    from ssah.training import freeze, train_only
    from ssah.training.finetune import fine_tune, select_units
    from ssah.training.finetune.folder import check_folder
    from ssah.training.finetune.memory import preview
    from ssah.units import UnitSet, find_modules

    split, limit, max_length = encoding
    # Everything that needs no model is refused before one is loaded.
    if out is None and not dry_run:
        raise ValueError("out is missing: give --out DIR, or --dry-run")
    if out is not None and not dry_run:
        check_folder(out)
        check_free(out)
    nothing = _check_selection(mode, selection, groups)
    counts, eval_counts = Counts(), Counts()
    rows = reading.rows(data, split, limit, counts)
    eval_rows = None if eval_data is None else reading.rows(eval_data, counts=eval_counts)
    if eval_data is not None and isinstance(rows, list) and isinstance(eval_rows, list):
        prompts, own = ([row["prompt"] for row in each] for each in (eval_rows, rows))
        warn_of_shared(f"--eval-data {eval_data}", prompts, f"--data {data}", own)
    model, tokenizer = load(name, *loading)
    reading.tokenizer(tokenizer)
    if nothing or groups is None:
        units = UnitSet({}, {b: module.n_units for b, module in find_modules(model).items()})
    else:
        units = select_units(selection, UnitGroups.load(groups, model))

    def encoded(source: Any, what: str, counts: Counts) -> list[Any]:
        examples = list(
            encode(
                source,
                tokenizer,
                max_length=max_length,
                overlong=reading.overlong,
                counts=counts,
            )
        )
        if not examples:
            raise DataError(f"{what}: every prompt is overlong, so that no row is left")
        return examples

    examples = encoded(rows, data, counts)
    eval_examples = None
    if eval_rows is not None:
        eval_examples = encoded(eval_rows, str(eval_data), eval_counts)
    plan = freeze(model, units) if mode == "freeze" else train_only(model, units)
    result: dict[str, Any] = {
        "model": plan.base_name,
        "data": data,
        "groups": None if groups is None else str(groups),
        mode: selection,
        "units": len(units),
        "unit_fraction": units.fraction,
        "rows": len(examples),
        "rows_read": rows_read(tokenizer, counts),
        "dry_run": dry_run,
    }
    if dry_run:
        length = max(len(example["input_ids"]) for example in examples)
        result |= {"longest_row": length, **preview(plan, settings, length)}
        return Result(result, (_preview_table(result, settings),))
    assert out is not None
    result |= fine_tune(
        plan,
        examples,
        out,
        settings,
        tokenizer=tokenizer,
        eval_examples=eval_examples,
        merge=merge,
        keep_checkpoints=keep_checkpoints,
    )
    result |= {"frozen_verified": True, "out": str(out)}
    return Result(result, (_result_table(result),))


def _check_selection(mode: str, selection: list[str], groups: Path | None) -> bool:
    """Refuse a selection that cannot be; returns whether it is "none"."""
    from ssah.groups import UnitGroups
    from ssah.training.finetune import select_units

    if mode == "freeze" and _NOTHING in selection:
        if len(selection) > 1 or groups is not None:
            raise ValueError("freeze is none: it must stand alone, and without --groups")
        return True
    if groups is None:
        raise ValueError("groups is missing: give --groups DIR, or --freeze none")
    select_units(selection, UnitGroups.load(groups))
    return False


def _preview_table(result: dict[str, Any], settings: Settings) -> Table:
    from rich.text import Text

    from ssah.report.terminal.tables import facts_table

    memory = result["memory"]
    facts = {
        "model": result["model"],
        "trained parameters": _parameters(result["parameters"]),
        "weights": _size(memory["weights"]),
        "gradients": _size(memory["gradients"]),
        "optimiser state": _size(memory["optimizer_state"]),
        "activations": f"{_size(memory['activations'])} (at most {settings.batch_size} rows of "
        f"{result['longest_row']} tokens)",
        "estimated peak": Text(_size(memory["peak"]), style="bold"),
    }
    return facts_table("Dry run: nothing was trained or written", facts)


def _result_table(result: dict[str, Any]) -> Table:
    from ssah.report.terminal.tables import facts_table

    facts: dict[str, object] = {
        "model": result["model"],
        "trained parameters": _parameters(result["parameters"]),
        "updates": f"{result['steps']:,}"
        + (f", resumed after {result['resumed_from']:,}" if result["resumed_from"] else ""),
        "loss": f"{result['loss_first']:.4f} -> {result['loss_last']:.4f}",
    }
    if result["eval_loss"] is not None:
        facts["eval loss"] = f"{result['eval_loss_before']:.4f} -> {result['eval_loss']:.4f}"
    facts["frozen units"] = "verified: not a bit changed"
    facts["time"] = f"{result['seconds']:.1f} s"
    facts["update saved to"] = result["out"]
    if result["merged"]:
        facts["model saved to"] = result["merged"]
    title = "Finished earlier; not trained again" if result["already_finished"] else "Trained"
    return facts_table(title, facts)


def _parameters(parameters: dict[str, Any]) -> str:
    return f"{parameters['trained']:,} of {parameters['all']:,} ({parameters['share']:.2%})"


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
