"""``ssah demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssah.cli.running import Result, quiet_threads
from ssah.cli.shared import Weights

ORDER = 140


def demo(
    *,
    model: Annotated[str, typer.Option("--model", help="Folder, .gguf or hub id.")] = "smollm2",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="For results.")] = Path(
        "demo_out"
    ),
    seconds: Annotated[float, typer.Option(min=0.0, help="The most that aligning takes.")] = 90.0,
    scu: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of SCU.")] = 0.01,
    ucu: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of UCU.")] = 0.01,
    ru: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of RU.")] = 0.15,
    full: Annotated[
        bool,
        typer.Option("--full", help="Then probe, fine-tune, compare and report."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Align anew, even if DIR has an aligned model.")
    ] = False,
    weights: Weights,
) -> Result:
    """Align a small model, score and group its units, ablate each group: all in minutes.

    With `--full` also: hidden states of the aligned model beside the other one, a benign fine-tune
    with and without freezing, which units changed their group, and DIR/report.html with all of it.
    Given again, the command goes on where it was interrupted.

    Example: `ssah demo --out demo_out`
    """
    quiet_threads()  # before torch is imported, by whatever comes below
    from ssah.storage import one_run
    from ssah.studies import Loading
    from ssah.studies.demo import run_demo, run_full_demo

    with one_run(out):  # a second demonstration would train the same model at the same time
        found = (run_full_demo if full else run_demo)(
            Loading(
                model,
                weights.dtype,
                weights.device,
                weights.trust_remote_code,
                base=weights.base,
                device_map=weights.places,
                offload_folder=weights.offload_folder,
            ),
            out,
            seconds=seconds,
            shares={"scu": scu, "ucu": ucu, "ru": ru},
            fresh=fresh,
        )
    return Result(found)
