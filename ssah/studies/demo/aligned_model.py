"""The model that the demonstration scores: aligned now, aligned by an earlier call, or as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.text import Text

from ssah.data import load_rows, make_loader
from ssah.evaluation import Measurement, Measures
from ssah.models import faster_dtype, move, quiet
from ssah.report.terminal import as_data, new_table
from ssah.studies.demo.alignment import align
from ssah.studies.demo.screen import bar, heading
from ssah.studies.loading import Loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA = {"safety": "builtin:safety", "utility": "builtin:utility"}  # aligned and scored on
BATCH = 8
_RECORD = "alignment.json"
_REQUESTS, _ANSWERS = "builtin:safety_eval", "builtin:utility_eval"  # measured on
_N_ANSWERS = 20  # a multiple of the ten categories of the answers


def aligned(
    console: Console, loading: Loading, out: Path, seconds: float, *, fresh: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any] | None]:
    """The model that is scored, its tokenizer, and the record of its alignment, if there is one.

    Args:
        console: what is said on the way is printed there.
        loading, out, seconds, fresh: as :func:`ssah.studies.demo.run_demo` takes them.
    """

    def loaded(dtype: str, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with console.status(f"loading {as_data(path)}"):
            return loading(dtype, path)

    name, dtype, folder = loading.name, loading.dtype, out / "aligned"
    if seconds == 0:  # the user's own model, which is aligned already
        heading(console, "1/5", f"Load {name} as it is")
        model, tokenizer = loaded(dtype, name)
        return move(model, working_dtype(model, dtype)), tokenizer, None
    record = _earlier(folder, name)
    if record is not None and not fresh:
        heading(console, "1/5", f"{name}, aligned earlier")
        console.print(f"The aligned model of an earlier call is used: {folder} (--fresh: anew)")
        model, tokenizer = loaded(dtype, str(folder))
        _show(console, record)
        return move(model, working_dtype(model, dtype)), tokenizer, {**record, "reused": True}
    heading(console, "1/5", f"Align {name} on refusals for at most {seconds:.0f} s")
    model, tokenizer = loaded("float32", name)
    working = working_dtype(model, dtype)
    record = {"model": name, "data": list(DATA.values())}
    record |= _align(console, model, tokenizer, folder, seconds, working)
    # Written last: a folder without it was left half done, and is not used.
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _show(console, record)
    return model, tokenizer, {**record, "reused": False}


def _align(
    console: Console,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seconds: float,
    working: torch.dtype,
) -> dict[str, Any]:
    """Align a model in place, and keep it in ``folder``; it is measured before and after.

    Args:
        model: in float32; it ends in ``working``, the dtype that it is measured in.
    """

    def measured(when: str) -> dict[str, Any]:
        move(model, working)
        with console.status(f"measuring loss and margin {when} the alignment"):
            return measures(model, tokenizer)().to_dict()

    before = measured("before")
    move(model, torch.float32)
    refusals, answers = (list(load_rows(source)) for source in DATA.values())
    with bar(console, "aligning", seconds) as advance:
        done = align(
            model,
            tokenizer,
            refusals,
            answers,
            seconds=seconds,
            scratch=folder.parent,
            mixed_precision=working == torch.bfloat16,
            advance=advance,
        )
    # Kept in bfloat16, so that a later call sees the same weights.
    move(model, torch.bfloat16)
    shutil.rmtree(folder, ignore_errors=True)  # what a call that was killed left there
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model.config.name_or_path = str(folder)  # scores and groups say which model they are of
    return {**done, "before": before, "after": measured("after")}


def _earlier(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of an alignment of this model on this data, if there is one."""
    path = folder / _RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    same = record["model"] == name and record["data"] == list(DATA.values())
    return record if same else None


def working_dtype(model: PreTrainedModel, dtype: str) -> torch.dtype:
    """What ``dtype`` means for a model: ``"auto"`` is what multiplies faster on its device."""
    found: torch.dtype = faster_dtype(model.device) if dtype == "auto" else getattr(torch, dtype)
    return found


def measures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measures:
    """Utility loss and refusal margin, on rows that nothing was aligned or scored on."""
    answers = list(load_rows(_ANSWERS))
    # They stand in order of category: evenly spaced ones have as many of each.
    chosen = answers[:: max(1, len(answers) // _N_ANSWERS)]
    loader = make_loader(chosen, tokenizer, batch_size=BATCH)
    requests = list(load_rows(_REQUESTS))
    return Measures(model, tokenizer, loader=loader, requests=requests, batch_size=2 * BATCH)


def _show(console: Console, record: Mapping[str, Any]) -> None:
    table = new_table(
        f"Aligned in {record['seconds']:.0f} s: {record['steps']} steps, "
        f"{record['tokens']:,} tokens",
        ("",),
        ("utility loss", "refusal margin", "refuses"),
    )
    for when in ("before", "after"):
        row = Measurement(**record[when])
        table.add_row(
            when, f"{row.utility_loss:.2f}", f"{row.refusal_margin:+.2f}", f"{row.refuses:.0%}"
        )
    console.print(table)
    console.print(
        Text(
            "loss: nats per token of ordinary answers; margin: nats per token, log-probability of "
            "a refusal minus that of compliance; refuses: share of requests with a margin above 0",
            style="dim",
        )
    )
