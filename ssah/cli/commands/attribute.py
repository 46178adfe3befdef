"""``ssah attribute``."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssah.choices import Kind, Metric, Tokens
from ssah.cli.running import Result
from ssah.cli.shared import BatchSize, Data, Limit, MaxLength, Model, Out, PackedWeights, Rows

if TYPE_CHECKING:
    from ssah.attribution import Attribution

ORDER = 10

_UNFINISHED = "unfinished"  # folder in --out with what a run has done so far


def attribute(
    model: Model,
    data: Data,
    out: Out,
    *,
    metric: Annotated[Metric, typer.Option("--metric", help="Importance of a unit.")] = "variance",
    tokens: Annotated[
        Tokens,
        typer.Option("--tokens", help="That count; `auto`: the response; `after_first`: not BOS."),
    ] = "auto",
    modules: Annotated[
        list[Kind] | None, typer.Option("--modules", help="Repeat for several; default: both.")
    ] = None,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Count every token for every routed expert.")
    ] = False,
    split: Annotated[str | None, typer.Option("--split", help="Split of a hub data set.")] = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    streamed: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read the model layer by layer, for one that is larger than memory.",
        ),
    ] = False,
    save_every: Annotated[
        float | None,
        typer.Option(
            "--save-every",
            metavar="SECONDS",
            min=0.0,
            help="Keep what is done this often (60), so that the same command goes on; "
            "with --stream it is kept after each layer.",
        ),
    ] = None,
    weights: PackedWeights,
    rows: Rows,
) -> Result:
    """Score every unit of a model on a data set.

    Interrupted at any moment, the same command goes on from what DIR/unfinished keeps, to the same
    bits. Under `torchrun` or `accelerate launch` the batches are dealt to the processes; the first
    one writes the scores and prints.

    Example: `ssah attribute smollm2 --data builtin:safety --out runs/safety`
    """
    from ssah.attribution import CONTENT, discard, stream
    from ssah.attribution import attribute as score
    from ssah.data import Counts, rows_read
    from ssah.distributed import deal, launched
    from ssah.models import load_tokenizer
    from ssah.storage import check_kind, one_run
    from ssah.units import KINDS

    options: dict[str, Any] = {
        "metric": metric,
        "modules": tuple(modules or KINDS),
        "tokens": tokens,
        "progress": True,
        "resume_dir": out / _UNFINISHED,
    }
    in_memory_alone = {
        "--all-experts": all_experts,
        "--packed": weights.packed,
        "--save-every": save_every is not None,
    }
    # The folder is this command's until the scores are saved.
    with launched() as ranks, ExitStack() as stack:
        with ranks.agreeing():
            if streamed and ranks.size > 1:
                raise ValueError(
                    f"--stream reads the model for one process, this is one of {ranks.size}"
                )
            for option, given in in_memory_alone.items():
                if streamed and given:
                    raise ValueError(f"{option} is for a model in memory; leave --stream out")
            reading, counts = rows.reading(), Counts()
            found = reading.rows(data, split, limit, counts)
            if ranks.rank == 0:
                stack.enter_context(one_run(out))
                check_kind(out, CONTENT)
            if streamed:
                trusted = weights.trust_remote_code
                tokenizer = load_tokenizer(model, trust_remote_code=trusted)
            else:
                loaded, tokenizer = weights.load(model)
            sizes = {"batch_size": batch_size, "max_length": max_length}
            loader = reading.loader(found, tokenizer, counts, **sizes)
        start = time.perf_counter()
        more: dict[str, Any] = {"data": data, "processes": ranks.size}
        if streamed:
            how = asdict(weights)
            del how["packed"]
            attribution, traffic = stream(model, loader, **how, **options)
            more["traffic"] = asdict(traffic)
        else:
            if save_every is not None:
                options["save_every_seconds"] = save_every
            attribution = score(loaded, deal(loader), all_experts=all_experts, **options)
        more["seconds"] = time.perf_counter() - start
        attribution = replace(attribution, rows_read=rows_read(tokenizer, counts))
        with ranks.agreeing():
            if ranks.rank == 0:
                attribution.save(out)
                discard(out / _UNFINISHED)
    return _result({"out": str(out), **more}, attribution)


def _result(about: dict[str, Any], attribution: Attribution) -> Result:
    from ssah.report.terminal.tables import facts_table

    units = sum(len(score) for score in attribution.scores.values())
    counted = max(attribution.count.values())
    result = {
        **about,
        "model": attribution.model_name,
        "metric": attribution.metric,
        "tokens": attribution.tokens,
        "modules": len(attribution.scores),
        "units": units,
        "tokens_counted": counted,
        "scarce": attribution.scarce(),
        "units_hash": attribution.units_hash,
        "data_fingerprint": attribution.data_fingerprint,
        "rows_read": attribution.rows_read,
        "version": attribution.version,
    }
    facts = {
        "model": attribution.model_name,
        "data": about["data"],
        "units": f"{units:,} in {len(attribution.scores)} modules",
        "metric": f"{attribution.metric}, over {counted:,} tokens ({attribution.tokens})",
        "time": f"{about['seconds']:.1f} s",
        "saved to": about["out"],
    }
    return Result(result, (facts_table("Scores", facts),))
