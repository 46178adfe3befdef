"""A run of training, under ``ssah finetune`` and under ``ssah align``: one differs by its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssah.cli.running import Result
from ssah.cli.selecting import counted
from ssah.cli.shared import Rows, Weights
from ssah.cli.training_options import AskedSafety, RunOptions, Selected

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedTokenizerBase

    from ssah.choices import Overlong
    from ssah.data import Counts
    from ssah.distributed import Ranks
    from ssah.training import UpdatePlan
    from ssah.training.finetune import Settings


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
    """Train a model with units selected, or show what that would take.

    Processes that a launcher started do so together; the first of them writes.
    """
    from ssah.distributed import launched
    from ssah.evaluation import refusals_change
    from ssah.report.terminal import trained_table
    from ssah.training.finetune import fine_tune

    with launched() as ranks:
        # What one process refuses, all refuse: else the others would wait for it forever.
        with ranks.agreeing():
            run = _prepared(selected, model, data, settings, options, asked, weights, rows, ranks)
        if options.dry_run:
            return _previewed(run, settings)
        result = run.about | fine_tune(
            run.plan,
            run.examples,
            options.folder,
            settings,
            tokenizer=run.tokenizer,
            eval_examples=run.eval_examples,
            safety=run.safety,
            merge=options.merge,
            keep_checkpoints=options.keep_checkpoints,
        )
    result |= {"frozen_verified": True, "out": str(options.out)}
    if run.safety is not None:
        found = result["safety"]
        found["change"] = refusals_change(found["before"], found["after"])
    return Result(result, (trained_table(result),))


@dataclass(frozen=True)
class _Prepared:
    """All that a run needs, and what is known of it: plain data."""

    plan: UpdatePlan
    examples: list[Any]
    eval_examples: list[Any] | None
    safety: Any
    tokenizer: PreTrainedTokenizerBase
    about: dict[str, Any]


def _prepared(
    selected: Selected,
    model: str,
    data: str,
    settings: Settings,
    options: RunOptions,
    asked: AskedSafety,
    weights: Weights,
    rows: Rows,
    ranks: Ranks,
) -> _Prepared:
    """Read, load and plan; everything that needs no model is refused before one is loaded."""
    from ssah.data import Counts, rows_read
    from ssah.evaluation import Refusals
    from ssah.models import check_on_one_device

    if ranks.rank == 0:  # one process writes, and looks whether it can
        options.check()
    selected.check()
    check_on_one_device(weights.places, "a model that trains")
    reading, counts, eval_counts = rows.reading(), Counts(), Counts()
    source = reading.rows(data, options.split, options.limit, counts)
    held_out = options.eval_data and reading.rows(options.eval_data, counts=eval_counts)
    given = asked.read(reading)
    if ranks.rank == 0:
        names = f"--data {data}", f"--eval-data {options.eval_data}"
        _warn_of_shared(source, names[0], held_out, names[1], given)
    loaded, tokenizer = weights.load(model)
    reading.tokenizer(tokenizer)  # the template is the tokenizer's, and saved with a merged model
    how = reading.overlong, options.max_length
    examples = _encoded(source, data, tokenizer, counts, *how)
    eval_examples = None
    if held_out:
        eval_examples = _encoded(held_out, str(options.eval_data), tokenizer, eval_counts, *how)
    safety = None
    if given is not None:  # requests that leave no room are refused before anything is changed
        given["progress"] = ranks.rank == 0
        safety = Refusals(loaded, tokenizer, **given, batch_size=settings.batch_size)
    plan = selected.plan(loaded)
    about: dict[str, Any] = {
        "model": plan.base_name,
        "data": data,
        **selected.record(),
        **_selected(plan),
        "rows": len(examples),
        "rows_read": rows_read(tokenizer, counts),
        "dry_run": options.dry_run,
    }
    if ranks.size > 1:
        about["processes"] = ranks.size
    return _Prepared(plan, examples, eval_examples, safety, tokenizer, about)


def _selected(plan: UpdatePlan) -> dict[str, Any]:
    """How many units are selected; of other things, how many weights too."""
    units = {"units": len(plan.units), "unit_fraction": plan.units.fraction}
    return units if plan.selection is None else units | counted(plan.selection)


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


def _previewed(run: _Prepared, settings: Settings) -> Result:
    """What a run would train, and the memory that it would take."""
    from ssah.report.terminal import preview_table
    from ssah.training.finetune import preview

    # Activations take the most memory where a batch has nothing but the longest row.
    length = max(len(example["input_ids"]) for example in run.examples)
    found = {**run.about, "longest_row": length, **preview(run.plan, settings, length)}
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
