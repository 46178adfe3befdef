"""A run of training, under ``ssah finetune`` and under ``ssah align``: one differs by its plan."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssah.cli.running import Result
from ssah.cli.shared import Rows, Weights
from ssah.settings import check_settings, setting
from ssah.studies.evaluate import EvaluateSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from ssah.choices import Overlong
    from ssah.data import Counts, Reading
    from ssah.training import UpdatePlan
    from ssah.training.finetune import Settings

# What `--freeze` and `--train` say of no units, and `--over-refusal` of no requests.
NOTHING = "none"


@dataclass(frozen=True)
class RunOptions:
    """The rows of a run, and what it leaves behind."""

    out: Path | None = setting(
        None, "Folder of the run; not for `--dry-run`.", option="--out -o", metavar="DIR"
    )
    eval_data: str | None = setting(
        None, "Rows whose loss is measured before and after.", panel="Data"
    )
    split: str | None = setting(None, "Of a hub data set.", panel="Data")
    limit: int | None = setting(None, "Rows read.", panel="Data", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", panel="Data", min=2)
    merge: bool = setting(False, "Also save the whole model.", panel="Run")
    keep_checkpoints: bool = setting(False, "Also when the run is finished.", panel="Run")
    dry_run: bool = setting(False, "Show what trains and the memory it takes.", panel="Run")

    @property
    def folder(self) -> Path:
        """Where the run is written to."""
        assert self.out is not None  # `check` refuses it
        return self.out

    def check(self) -> None:
        """Raise ValueError, before a model is loaded, where the run could not be written."""
        from ssah.storage import check_free
        from ssah.training.finetune import check_folder

        if self.dry_run:  # it writes nothing
            return
        if self.out is None:
            raise ValueError("out is missing: give --out DIR, or --dry-run")
        check_folder(self.out)  # a folder that has another run would be refused hours later
        check_free(self.out)


_safety = partial(setting, panel="Is it still safe?")


@dataclass(frozen=True)
class AskedSafety:
    """What a model is asked before and after it trains; the answers are judged and forgotten."""

    requests: tuple[str, ...] = _safety(
        (),
        "Harmful, and how many are refused is measured before and after: .txt, CSV, JSONL, "
        "`FILE[a:b]`, `builtin:safety_eval`; may be repeated.",
    )
    over_refusal: str = _safety("builtin:overrefusal", "Harmless but dangerous-looking, or `none`.")
    # What `ssah evaluate` does where nothing else is said, so that figures compare.
    judge: str = _safety(EvaluateSettings.judges[0], "As `ssah evaluate` takes it.")
    max_new_tokens: int = _safety(
        EvaluateSettings.max_new_tokens, "Of an answer; `wei2024` needs 20.", min=1
    )

    def __post_init__(self) -> None:
        check_settings(self)
        beside = (own for own in fields(self) if own.name != "requests")
        given = [own.name for own in beside if getattr(self, own.name) != own.default]
        if given and not self.requests:
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])!r} without requests, must be left out: "
                "nothing is measured without --requests"
            )

    def read(self, reading: Reading) -> dict[str, Any] | None:
        """Arguments of `ssah.evaluation.Refusals`; None where nothing is measured."""
        from ssah.evaluation import distinct_judges

        if not self.requests:
            return None
        harmless = [] if self.over_refusal == NOTHING else reading.requests(self.over_refusal)
        (judge,) = distinct_judges([self.judge], self.max_new_tokens)
        return {
            "requests": [each for name in self.requests for each in reading.requests(name)],
            "over_refusal": harmless,
            "judge": judge,
            "max_new_tokens": self.max_new_tokens,
            "overlong": reading.overlong,
            "progress": True,
        }


@dataclass(frozen=True)
class Selected:
    """What a command names.

    Attributes:
        mode: whether it is frozen, or it alone trains.
        names: groups and shares of groups, such as ``["scu", "cu:0.06"]``, or ``["none"]``.
        groups: folder that has the groups, or None.
        rows: of embeddings and heads, as `ssah.training.finetune.select_rows` takes them.
        keep: names or patterns of parameters that are frozen whole; not where the rest trains.
    """

    mode: Literal["freeze", "train"]
    names: list[str]
    groups: Path | None = None
    rows: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ValueError, before a model is loaded, for a selection that cannot be."""
        from ssah.groups import UnitGroups
        from ssah.training.finetune import select_rows, select_units

        select_rows(self.rows)
        if NOTHING in self.names:
            if len(self.names) > 1 or self.groups is not None:
                raise ValueError(f"{self.mode} is none: it must stand alone, and without --groups")
            if self.mode == "train" and not self.rows:
                raise ValueError("train is none: nothing would train; give --rows, or units")
        elif self.groups is None:
            raise ValueError(f"groups is missing: give --groups DIR, or --{self.mode} none")
        else:
            select_units(self.names, UnitGroups.load(self.groups))

    def plan(self, model: Any) -> UpdatePlan:
        """The plan for ``model``; without units for ``none``."""
        from ssah.groups import UnitGroups
        from ssah.training import freeze, train_only
        from ssah.training.finetune import select_rows, select_units
        from ssah.units import UnitSet, find_modules

        rows = select_rows(self.rows)
        if self.groups is None:  # check() lets that pass for "none" alone
            units = UnitSet({}, {b: module.n_units for b, module in find_modules(model).items()})
        else:
            units = select_units(self.names, UnitGroups.load(self.groups, model))
        if self.mode == "freeze":
            return freeze(model, units, keep=self.keep, rows=rows)
        return train_only(model, units, rows=rows)

    def record(self) -> dict[str, Any]:
        """For the JSON of the run."""
        from ssah.training.finetune import select_rows

        # What was not given is left out, so that the records of other runs stay as they were.
        beside = {"keep": list(self.keep), "parameter_rows": select_rows(self.rows)}
        given = {key: value for key, value in beside.items() if value}
        groups = None if self.groups is None else str(self.groups)
        return {"groups": groups, self.mode: self.names, **given}


def train(
    selected: Selected,
    model: str,
    data: str,
    settings: Settings,
    options: RunOptions,
    asked: AskedSafety,
    weights: Weights,
    rows: Rows,
) -> Result:
    """Train a model with units selected, or show what that would take."""
    from ssah.data import Counts, rows_read
    from ssah.evaluation import Refusals, refusals_change
    from ssah.report.terminal import trained_table
    from ssah.training.finetune import fine_tune

    # Everything that needs no model is refused before one is loaded.
    options.check()
    selected.check()
    reading, counts, eval_counts = rows.reading(), Counts(), Counts()
    source = reading.rows(data, options.split, options.limit, counts)
    held_out = options.eval_data and reading.rows(options.eval_data, counts=eval_counts)
    given = asked.read(reading)
    _warn_of_shared(source, f"--data {data}", held_out, f"--eval-data {options.eval_data}", given)
    loaded, tokenizer = weights.load(model)
    reading.tokenizer(tokenizer)  # the template is the tokenizer's, and saved with a merged model
    how = reading.overlong, options.max_length
    examples = _encoded(source, data, tokenizer, counts, *how)
    eval_examples = None
    if held_out:
        eval_examples = _encoded(held_out, str(options.eval_data), tokenizer, eval_counts, *how)
    safety = None
    if given is not None:  # requests that leave no room are refused before anything is changed
        safety = Refusals(loaded, tokenizer, **given, batch_size=settings.batch_size)
    plan = selected.plan(loaded)
    result: dict[str, Any] = {
        "model": plan.base_name,
        "data": data,
        **selected.record(),
        "units": len(plan.units),
        "unit_fraction": plan.units.fraction,
        "rows": len(examples),
        "rows_read": rows_read(tokenizer, counts),
        "dry_run": options.dry_run,
    }
    if options.dry_run:
        return _previewed(plan, settings, examples, result)
    result |= fine_tune(
        plan,
        examples,
        options.folder,
        settings,
        tokenizer=tokenizer,
        eval_examples=eval_examples,
        safety=safety,
        merge=options.merge,
        keep_checkpoints=options.keep_checkpoints,
    )
    result |= {"frozen_verified": True, "out": str(options.out)}
    if safety is not None:
        found = result["safety"]
        found["change"] = refusals_change(found["before"], found["after"])
    return Result(result, (trained_table(result),))


def _warn_of_shared(
    source: Any, name: str, held_out: Any, held_out_name: str, given: Mapping[str, Any] | None
) -> None:
    """Say where a prompt is trained on and measured; those of a stream are not known yet."""
    from ssah.data import warn_of_shared

    measured = {"--requests": [] if given is None else given["requests"]}
    if isinstance(held_out, list):
        measured[held_out_name] = [row["prompt"] for row in held_out]
    if isinstance(source, list):
        for other, prompts in measured.items():
            warn_of_shared(other, prompts, name, [row["prompt"] for row in source])


def _previewed(
    plan: UpdatePlan, settings: Settings, examples: Sequence[Any], result: Mapping[str, Any]
) -> Result:
    """What a run would train, and the memory that it would take."""
    from ssah.report.terminal import preview_table
    from ssah.training.finetune import preview

    # Activations take the most memory where a batch has nothing but the longest row.
    length = max(len(example["input_ids"]) for example in examples)
    found = {**result, "longest_row": length, **preview(plan, settings, length)}
    return Result(found, (preview_table(found, settings.batch_size),))


def _encoded(
    source: Iterable[Any],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counts,
    overlong: Overlong,
    max_length: int,
) -> list[Any]:
    """Rows as token ids and labels; refused where none is left."""
    from ssah.data import DataError, encode

    rows = encode(source, tokenizer, max_length=max_length, overlong=overlong, counts=counts)
    examples = list(rows)
    if not examples:
        raise DataError(f"{name}: every prompt is overlong, so that no row is left")
    return examples
