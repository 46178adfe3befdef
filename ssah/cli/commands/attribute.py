"""``ssah attribute``."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ssah.choices import Kind, Metric, Tokens
from ssah.cli.running import Result
from ssah.cli.shared import Data, Model, Out, PackedWeights, Rows
from ssah.settings import setting

if TYPE_CHECKING:
    from ssah.attribution import Attribution

ORDER = 10

_UNFINISHED = "unfinished"  # folder in --out with what a run has done so far


@dataclass(frozen=True)
class AttributeSettings:
    """What is scored, and how rows run through the model."""

    metric: Metric = setting("variance", "Importance of a unit.")
    tokens: Tokens = setting("auto", "That count; `auto`: the response; `after_first`: not BOS.")
    modules: tuple[Kind, ...] = setting(("mlp", "attention"), "Repeat for several; default: both.")
    all_experts: bool = setting(False, "Count every token for every routed expert.")
    split: str | None = setting(None, "Split of a hub data set.")
    limit: int | None = setting(None, "Rows read.", min=1)
    batch_size: int = setting(8, "Rows run at a time.", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", min=2)
    stream: bool = setting(
        False, "Read the model layer by layer, for one that is larger than memory."
    )
    save_every: float | None = setting(
        None,
        "Keep what is done this often (60), so that the same command goes on; with --stream it is "
        "kept after each layer.",
        metavar="SECONDS",
        min=0,
    )


def attribute(
    model: Model,
    data: Data,
    out: Out,
    settings: AttributeSettings,
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

    options: dict[str, Any] = {
        "metric": settings.metric,
        "modules": settings.modules,
        "tokens": settings.tokens,
        "progress": True,
        "resume_dir": out / _UNFINISHED,
    }
    # The folder is this command's until the scores are saved.
    with launched() as ranks, ExitStack() as stack:
        # What one process refuses, all refuse: else the others would wait for it forever.
        with ranks.agreeing():
            if settings.stream:
                _check_streamed(settings, weights, ranks.size)
            reading, counts = rows.reading(), Counts()
            source = reading.rows(data, settings.split, settings.limit, counts)
            if ranks.rank == 0:
                # Its first process holds the lock for all of a launch: they share the folder.
                stack.enter_context(one_run(out))
                check_kind(out, CONTENT)
            if settings.stream:  # the weights are read later, layer by layer
                trusted = weights.trust_remote_code
                tokenizer = load_tokenizer(model, trust_remote_code=trusted)
            else:
                loaded, tokenizer = weights.load(model)
            sizes = {"batch_size": settings.batch_size, "max_length": settings.max_length}
            loader = reading.loader(source, tokenizer, counts, **sizes)
        start = time.perf_counter()
        about: dict[str, Any] = {"out": str(out), "data": data, "processes": ranks.size}
        if settings.stream:
            how = asdict(weights)
            # `_check_streamed` refuses them.
            for refused in ("packed", "base", "device_map", "offload_folder"):
                del how[refused]
            attribution, traffic = stream(model, loader, **how, **options)
            about["traffic"] = asdict(traffic)
        else:
            if settings.save_every is not None:  # else as often as `attribute` does by itself
                options["save_every_seconds"] = settings.save_every
            options["all_experts"] = settings.all_experts
            attribution = score(loaded, deal(loader), **options)
        about["seconds"] = time.perf_counter() - start
        attribution = replace(attribution, rows_read=rows_read(tokenizer, counts))
        with ranks.agreeing():
            if ranks.rank == 0:
                attribution.save(out)
                # Only now: a run that is killed before has its unfinished part to go on from.
                discard(out / _UNFINISHED)
    return _result(about, attribution)


def _check_streamed(settings: AttributeSettings, weights: PackedWeights, processes: int) -> None:
    """Refuse what has no meaning where a model is read layer by layer."""
    if processes > 1:
        raise ValueError(f"--stream reads the model for one process, this is one of {processes}")
    for option, given in (
        ("--all-experts", settings.all_experts),
        ("--packed", weights.packed),
        ("--device-map", weights.device_map is not None),
        ("--base", weights.base is not None),
        ("--save-every", settings.save_every is not None),
    ):
        if given:
            raise ValueError(f"{option} is for a model in memory; leave --stream out")


def _result(about: dict[str, Any], attribution: Attribution) -> Result:
    from ssah.report.terminal import facts_table

    units = sum(len(score) for score in attribution.scores.values())
    # Experts see fewer tokens than other modules; what was read is what the others saw.
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
