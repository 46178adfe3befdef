"""``ssah demo``: align a small model, score its units, group them, and take each group out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import ssah
from ssah.attribution import Attribution, attribute
from ssah.data import Row, load_rows, make_loader
from ssah.evaluation import Measurement, Measures, ablations
from ssah.groups import GROUPS, UnitGroups, classify
from ssah.models import faster_dtype, load_model, move, quiet
from ssah.report.pictures import plot_ablations, plot_scores
from ssah.report.terminal.tables import (
    ablation_table,
    as_data,
    facts_table,
    groups_table,
    layers,
    new_table,
)
from ssah.studies.demo.alignment import align
from ssah_kernels import timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["run"]

_RECORD = "alignment.json"
_DATA = ("builtin:safety", "builtin:utility")  # aligned and scored on
_EVALUATION = ("builtin:safety_eval", "builtin:utility_eval")  # measured on
_ANSWERS = 20  # of the utility_eval rows: a multiple of its ten categories
_BATCH = 8
_ROUNDS = 4


def run(
    name: str,
    out: Path,
    *,
    seconds: float,
    shares: Mapping[str, float],
    fresh: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run the demonstration, print it as it goes, and leave everything in ``out``.

    Args:
        name: the model, as ``ssah.models.load_model`` takes it.
        out: folder for the aligned model, scores, groups, pictures and ``demo.json``.
        seconds: the most that the alignment takes; 0 leaves it out.
        shares: of ``scu``, ``ucu`` and ``ru``, fractions of all units.
        fresh: align anew, although ``out`` has an aligned model.
        dtype: of everything after the alignment; ``"auto"``: what is faster here.
        device: as ``load_model`` takes it.
        trust_remote_code: as ``load_model`` takes it.

    Returns:
        What ``demo.json`` holds, as plain data.
    """
    _check_shares(shares)
    console = Console(highlight=False)
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    options = {"device": device, "trust_remote_code": trust_remote_code}
    model, tokenizer, alignment = _aligned(
        console, name, out, seconds, fresh=fresh, dtype=dtype, options=options
    )
    _heading(console, 2, "Score every unit: importance on refusals and on ordinary answers")
    loaders = [make_loader(source, tokenizer, batch_size=_BATCH) for source in _DATA]
    scores = []
    for loader, kind in zip(loaders, ("safety", "utility"), strict=True):
        console.print(f"{kind}: builtin:{kind}, the tokens of the responses")
        attribution = attribute(model, loader, progress=True)
        attribution.save(out / kind)
        scores.append(attribution)

    _heading(console, 3, "Sort them into four groups")
    groups = _classified(scores[0], scores[1], shares)
    groups.save(out / "groups")
    console.print("all units ranked together, by z-scores per module")
    console.print(groups_table(groups))

    _heading(console, 4, "Take each group out, and as many random units")
    measures = _measures(model, tokenizer)
    rows = []
    with _bar(console, "ablating", 1 + 2 * len(GROUPS)) as advance:
        for row in ablations(measures, groups, GROUPS, random=True):
            rows.append(row)
            advance(len(rows))
    console.print(ablation_table(rows))

    _heading(console, 5, "Speed beside the model's own forward pass")
    throughput = _throughput(console, model, make_loader(_DATA[1], tokenizer, batch_size=_BATCH))
    pictures = {
        "scores": str(plot_scores(groups, out / "scores.png", f"{name}: units by importance")),
        "ablation": str(plot_ablations(rows, out / "ablation.png", f"{name}: each group ablated")),
    }
    result = {
        "model": name,
        "ssah": ssah.__version__,
        **timing.facts(),
        "device": str(next(model.parameters()).device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "alignment": alignment,
        "scores": {s: _summary(a) for s, a in zip(("safety", "utility"), scores, strict=True)},
        "groups": {
            "shares": groups.shares,
            "scope": groups.scope,
            "normalize": groups.normalize,
            **groups.summary(),
            "layers": layers(groups),
        },
        "ablation": rows,
        "throughput": throughput,
        "pictures": pictures,
        "seconds": time.perf_counter() - start,
    }
    (out / "demo.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    files = {
        "pictures": ", ".join(pictures.values()),
        "all figures": out / "demo.json",
        "scores, groups": f"{out / 'safety'}, {out / 'utility'}, {out / 'groups'}",
        "aligned model": out / "aligned" if alignment else "none: --seconds 0",
        "time": f"{result['seconds']:.0f} s",
    }
    console.print(facts_table("Written", files))
    return result


def _check_shares(shares: Mapping[str, float]) -> None:
    """Refuse shares that no classification takes, before minutes are spent."""
    one = {"module": torch.zeros(1, dtype=torch.float64)}
    _classified(one, one, shares)


def _classified(
    safety: Attribution | Mapping[str, torch.Tensor],
    utility: Attribution | Mapping[str, torch.Tensor],
    shares: Mapping[str, float],
) -> UnitGroups:
    # All units are ranked together, z-scores per module: on SmolLM2-135M the groups separate
    # safety from utility best so, and layers may differ in how many units they give.
    return classify(
        safety,
        utility,
        scu=shares["scu"],
        ucu=shares["ucu"],
        ru=shares["ru"],
    )


# ------------------------------------------------------------------------------------- aligning


def _aligned(
    console: Console,
    name: str,
    out: Path,
    seconds: float,
    *,
    fresh: bool,
    dtype: str,
    options: dict[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any] | None]:
    """The model that is scored, its tokenizer, and the record of its alignment."""
    folder = out / "aligned"
    if seconds == 0:
        _heading(console, 1, f"Load {name} as it is")
        model, tokenizer = _load(console, name, dtype, options)
        return _in_dtype(model, dtype), tokenizer, None
    record = _earlier(folder, name)
    if record is not None and not fresh:
        _heading(console, 1, f"{name}, aligned earlier")
        console.print(f"The aligned model of an earlier call is used: {folder} (--fresh: anew)")
        model, tokenizer = _load(console, str(folder), dtype, options)
        _show_alignment(console, record)
        return _in_dtype(model, dtype), tokenizer, {**record, "reused": True}

    _heading(console, 1, f"Align {name} on refusals for at most {seconds:.0f} s")
    model, tokenizer = _load(console, name, "float32", options)
    working = working_dtype(model, dtype)
    move(model, working)
    before = _measure(console, model, tokenizer, "before")
    move(model, torch.float32)
    refusals, answers = _rows(_DATA[0]), _rows(_DATA[1])
    with _bar(console, "aligning", seconds) as advance:
        done = align(
            model,
            tokenizer,
            refusals,
            answers,
            seconds=seconds,
            scratch=out,
            mixed_precision=working == torch.bfloat16,
            advance=advance,
        )
    # Kept in bfloat16, so that a later call sees the same weights.
    move(model, torch.bfloat16)
    shutil.rmtree(folder, ignore_errors=True)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model.config.name_or_path = str(folder)
    move(model, working)
    after = _measure(console, model, tokenizer, "after")
    record = {
        "model": name,
        "data": list(_DATA),
        **done,
        "before": before.to_dict(),
        "after": after.to_dict(),
    }
    # Written last: a folder without it was left half done, and is not used.
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _show_alignment(console, record)
    return model, tokenizer, {**record, "reused": False}


def _earlier(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of an alignment of this model on this data, if there is one."""
    path = folder / _RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    same = record["model"] == name and record["data"] == list(_DATA)
    return record if same else None


def _load(
    console: Console, name: str, dtype: str, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with console.status(f"loading {as_data(name)}"), quiet():
        return load_model(name, dtype=dtype, **options)


def working_dtype(model: PreTrainedModel, dtype: str) -> torch.dtype:
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    return faster_dtype(model.device)


def _in_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    return move(model, working_dtype(model, dtype))


def _show_alignment(console: Console, record: Mapping[str, Any]) -> None:
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


# ------------------------------------------------------------------------------------ measuring


def _rows(source: str) -> list[Row]:
    return list(load_rows(source))


def _measures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measures:
    requests, answers = _rows(_EVALUATION[0]), _rows(_EVALUATION[1])
    chosen = answers[:: max(1, len(answers) // _ANSWERS)]
    loader = make_loader(chosen, tokenizer, batch_size=_BATCH)
    return Measures(model, tokenizer, loader=loader, requests=requests, batch_size=2 * _BATCH)


def _measure(
    console: Console, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str
) -> Measurement:
    with console.status(f"measuring loss and margin {when} the alignment"):
        return _measures(model, tokenizer)()


def _throughput(console: Console, model: PreTrainedModel, loader: Any) -> dict[str, Any]:
    """Tokens per second of ``attribute``, the backbone's forward and the whole model's."""
    batches = [batch for batch, _ in zip(loader, range(_ROUNDS + 1), strict=False)]
    inputs = [
        {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        for batch in batches
    ]
    n_tokens = [int(batch["attention_mask"].sum()) for batch in batches]

    def timed(call: Callable[[int], Any]) -> Callable[[int], None]:
        def run(i: int) -> None:
            call(i % len(batches))
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            advance(i + 1)

        return run

    calls = {
        "attribute": timed(lambda i: attribute(model, [batches[i]])),
        "backbone": timed(lambda i: model.base_model(**inputs[i], use_cache=False)),
        "model": timed(lambda i: model(**inputs[i], use_cache=False)),
    }
    with _bar(console, "timing", _ROUNDS + 1) as advance, torch.inference_mode():
        times = timing.interleave(calls, repeats=_ROUNDS, warmup=1)
    measured = [n_tokens[i % len(batches)] for i in range(1, _ROUNDS + 1)]
    names = {
        "attribute": "ssah.attribute",
        "backbone": "forward, backbone alone",
        "model": "forward, with the vocabulary projection",
    }
    table = new_table("Interleaved on the same batches", ("",), ("tokens/s", "time of attribute"))
    result: dict[str, Any] = {"rounds": _ROUNDS, "tokens": measured, "calls": {}}
    for name, label in names.items():
        rate = sum(measured) / sum(times[name])
        share = timing.ratio(times, "attribute", name)
        result["calls"][name] = {"tokens_per_second": rate, "attribute_time_ratio": share}
        table.add_row(label, f"{rate:,.0f}", "" if name == "attribute" else f"{share:.2f}x")
    console.print(table)
    return result


def _summary(attribution: Attribution) -> dict[str, Any]:
    return {
        "metric": attribution.metric,
        "tokens": attribution.tokens,
        "tokens_counted": max(attribution.count.values()),
        "units": sum(len(score) for score in attribution.scores.values()),
        "data_fingerprint": attribution.data_fingerprint,
    }


# --------------------------------------------------------------------------------------- output


def _heading(console: Console, number: int, title: str) -> None:
    console.print()
    console.print(Text.assemble((f"{number}/5 ", "bold cyan"), (title, "bold")))


@contextmanager
def _bar(console: Console, what: str, total: float) -> Iterator[Any]:
    """A bar; yields a function that sets how far it is."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda completed: bar.update(task, completed=min(completed, total))
        bar.update(task, completed=total)
