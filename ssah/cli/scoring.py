"""``ssah attribute``, ``ssah classify`` and ``ssah ablate``."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ssah.cli.reading import reading_rows
from ssah.cli.support import (
    BatchSize,
    Device,
    Dtype,
    DtypeOption,
    Group,
    Json,
    Limit,
    MaxLength,
    Metric,
    Model,
    Modules,
    Normalize,
    Out,
    Packed,
    RemoteCode,
    Result,
    Scope,
    Seed,
    Tokens,
    following,
    load,
    reporting,
)

_UNFINISHED = "unfinished"  # folder in --out with what a run has done so far

Share = Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of all units.")]


@reporting
@reading_rows
def attribute(
    model: Model,
    data: Annotated[
        str, typer.Option("--data", help="File, `builtin:safety` or the like, or hub id.")
    ],
    out: Out,
    reading: Any,
    metric: Annotated[Metric, typer.Option(help="Importance of a unit.")] = Metric.variance,
    tokens: Annotated[
        Tokens, typer.Option(help="That count; `auto`: the response; `after_first`: not BOS.")
    ] = Tokens.auto,
    modules: Annotated[
        list[Modules] | None, typer.Option(help="Repeat for several; default: both.")
    ] = None,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Count every token for every routed expert.")
    ] = False,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    packed: Packed = False,
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
    as_json: Json = False,
) -> Result:
    """Score every unit of a model on a data set.

    Interrupted at any moment, the same command goes on from what DIR/unfinished keeps, to the same
    bits. Under `torchrun` or `accelerate launch` the batches are dealt to the processes; the first
    one writes the scores and prints.

    Example: `ssah attribute smollm2 --data builtin:safety --out runs/safety`
    """
    from ssah.attribution import CONTENT, discard
    from ssah.attribution import attribute as score
    from ssah.data import Counts, rows_read
    from ssah.distributed import deal, launched
    from ssah.models import load_tokenizer
    from ssah.report.terminal.tables import facts_table
    from ssah.storage import check_kind, one_run
    from ssah.units import KINDS

    options: dict[str, Any] = {
        "metric": metric.value,
        "modules": tuple(kind.value for kind in modules or ()) or KINDS,
        "tokens": tokens.value,
        "progress": True,
        "resume_dir": out / _UNFINISHED,
    }
    # The folder is this command's until the scores are saved.
    with launched() as ranks, ExitStack() as stack:
        with ranks.agreeing():
            if streamed and ranks.size > 1:
                raise ValueError(
                    f"--stream reads the model for one process, this is one of {ranks.size}"
                )
            if streamed and all_experts:
                raise ValueError("--all-experts is for a model in memory; leave --stream out")
            if streamed and packed:
                raise ValueError("--packed is for a model in memory; leave --stream out")
            if streamed and save_every is not None:
                raise ValueError("--save-every is for a model in memory; leave --stream out")
            counts = Counts()
            rows = reading.rows(data, split, limit, counts)
            if ranks.rank == 0:
                stack.enter_context(one_run(out))
                check_kind(out, CONTENT)
            if streamed:
                tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
            else:
                loaded, tokenizer = load(model, dtype, device, trust_remote_code, packed=packed)
            sizes = {"batch_size": batch_size, "max_length": max_length}
            loader = reading.loader(rows, tokenizer, counts, **sizes)
        start = time.perf_counter()
        if streamed:
            from ssah.attribution import stream

            attribution, traffic = stream(
                model,
                loader,
                dtype=dtype.value,
                device=device,
                trust_remote_code=trust_remote_code,
                **options,
            )
        else:
            if save_every is not None:
                options["save_every_seconds"] = save_every
            attribution = score(loaded, deal(loader), all_experts=all_experts, **options)
        seconds = time.perf_counter() - start
        attribution = replace(attribution, rows_read=rows_read(tokenizer, counts))
        with ranks.agreeing():
            if ranks.rank == 0:
                attribution.save(out)
                discard(out / _UNFINISHED)
    units = sum(len(score) for score in attribution.scores.values())
    counted = max(attribution.count.values())
    result = {
        "out": str(out),
        "model": attribution.model_name,
        "data": data,
        "metric": attribution.metric,
        "tokens": attribution.tokens,
        "modules": len(attribution.scores),
        "units": units,
        "tokens_counted": counted,
        "scarce": attribution.scarce(),
        "processes": ranks.size,
        "seconds": seconds,
        "units_hash": attribution.units_hash,
        "data_fingerprint": attribution.data_fingerprint,
        "rows_read": attribution.rows_read,
        "version": attribution.version,
    }
    if streamed:
        result["traffic"] = asdict(traffic)
    facts = {
        "model": attribution.model_name,
        "data": data,
        "units": f"{units:,} in {len(attribution.scores)} modules",
        "metric": f"{attribution.metric}, over {counted:,} tokens ({attribution.tokens})",
        "time": f"{seconds:.1f} s",
        "saved to": out,
    }
    return Result(result, (facts_table("Scores", facts),))


@reporting
def classify(
    safety: Annotated[Path, typer.Argument(metavar="SAFETY_DIR", help="Scores on safety data.")],
    utility: Annotated[Path, typer.Argument(metavar="UTILITY_DIR", help="Scores on utility data.")],
    scu: Share,
    ucu: Share,
    ru: Share,
    out: Out,
    scope: Annotated[Scope, typer.Option(help="What is ranked together.")] = Scope.model,
    normalize: Annotated[
        Normalize, typer.Option(help="Scores of a module, before they are ranked.")
    ] = Normalize.zscore,
    as_json: Json = False,
) -> Result:
    """Sort units into safety-critical, utility-critical, redundant and complex ones.

    Example: `ssah classify runs/safety runs/utility --scu 0.008 --ucu 0.008 --ru 0.15
    --out runs/groups`
    """
    from ssah.attribution import Attribution
    from ssah.groups import classify as sort
    from ssah.report.terminal.tables import facts_table, groups_table, layers

    groups = sort(
        Attribution.load(safety),
        Attribution.load(utility),
        scu=scu,
        ucu=ucu,
        ru=ru,
        scope=scope.value,
        normalize=normalize.value,
    )
    groups.save(out)
    result = {
        "out": str(out),
        "model": groups.metadata["model_name"],
        "shares": groups.shares,
        "scope": groups.scope,
        "normalize": groups.normalize,
        **groups.summary(),
        "layers": layers(groups),
    }
    facts = {
        "model": groups.metadata["model_name"],
        "ranked": f"per {groups.scope}, normalisation: {groups.normalize}",
        "saved to": out,
    }
    return Result(result, (groups_table(groups), facts_table("Groups", facts)))


@reporting
@reading_rows
def ablate(
    model: Model,
    groups: Annotated[
        Path, typer.Option("--groups", metavar="DIR", help="What `ssah classify` saved.")
    ],
    group: Annotated[list[Group], typer.Option("--group", help="Repeat for several rows.")],
    reading: Any,
    random: Annotated[
        bool, typer.Option("--random", help="Also ablate as many random units of each module.")
    ] = False,
    seed: Seed = 0,
    utility: Annotated[
        str, typer.Option("--utility", help="Instructions with answers, for the loss.")
    ] = "builtin:utility_eval",
    requests: Annotated[
        str, typer.Option("--requests", help="Harmful requests, for the margin.")
    ] = "builtin:safety_eval",
    limit: Limit = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    packed: Packed = False,
    as_json: Json = False,
) -> Result:
    """Switch a group of units off, and measure utility loss and refusal margin before and after.

    Example: `ssah ablate smollm2 --groups runs/groups --group scu --random`
    """
    from ssah.data import Counts, rows_read
    from ssah.evaluation import OPENING, Measures, ablations, fitting, prompts
    from ssah.groups import UnitGroups
    from ssah.report.terminal.tables import ablation_table

    counts, asked_counts = Counts(), Counts()
    answers = reading.rows(utility, limit=limit, counts=counts)
    asked = reading.requests(requests, limit, asked_counts)
    UnitGroups.load(groups)  # a wrong folder is refused before the model is loaded
    loaded, tokenizer = load(model, dtype, device, trust_remote_code, packed=packed)
    found = UnitGroups.load(groups, loaded)
    sizes = {"batch_size": batch_size, "max_length": max_length}
    loader = reading.loader(answers, tokenizer, counts, **sizes)
    encoded = prompts(tokenizer, asked)
    asked = fitting(asked, encoded, max_length - OPENING, overlong=reading.overlong)
    measures = Measures(loaded, tokenizer, loader=loader, requests=asked, **sizes)
    names = list(dict.fromkeys(each.value for each in group))
    steps = ablations(measures, found, names, random=random, seed=seed)
    rows = list(following(steps, "measuring", 1 + len(names) * (2 if random else 1)))
    result = {
        "model": found.metadata["model_name"],
        "groups": str(groups),
        "utility": utility,
        "requests": requests,
        "seed": seed,
        "rows_read": rows_read(tokenizer, counts),
        "requests_read": asked_counts.to_dict(),
        "rows": rows,
    }
    return Result(result, (ablation_table(rows),))
