"""``ssah info``, ``ssah demo`` and ``ssah bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ssah.cli.support import Device, Dtype, DtypeOption, Json, RemoteCode, Result, reporting


@reporting
def info(
    model: Annotated[
        str | None,
        typer.Option("--model", help="What of this model would be scored; no weights are read."),
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Show versions, instruction sets, GPU architectures, and the backends of every operator.

    With `--model`: which modules of a model hold units, how many, and what is not covered and why,
    from its configuration alone.

    Example: `ssah info --model smollm2`
    """
    from ssah.info import describe, describe_model
    from ssah.models import empty_model, quiet

    facts = describe()
    if model is None:
        return Result(facts, tuple(_info_tables(facts)))
    with quiet():
        empty = empty_model(model, trust_remote_code=trust_remote_code)
    facts["model"] = describe_model(empty, model)
    return Result(facts, tuple(_model_tables(facts["model"])))


def _info_tables(facts: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    from ssah.report.terminal.tables import facts_table, new_table

    cuda = ", ".join(facts["cuda_archs"]) if facts["cuda_built"] else "not built"
    isa = f"{facts['isa']} (built: {', '.join(facts['isa_built'])})"
    installation = {
        "ssah": facts["ssah"],
        "python": facts["python"],
        "torch": f"{facts['torch']} ({facts['threads']} threads on {facts['cores']} cores)",
        "transformers": facts["transformers"],
        "CPU kernels": isa if facts["extension"] else "not built",
        "compiler": facts["compiler"] or "-",
        "built with torch": facts["torch_built_with"] or "-",
        "CUDA kernels": cuda,
        "GPU": facts["gpu"] or "none",
        "triton": facts["triton"] or "not installed",
    }
    backends = list(next(iter(facts["backends"].values())))
    table = new_table("Backends", ("operator", *backends), ())
    chosen = {backend: device for device, backend in facts["chosen"].items()}
    for op, found in facts["backends"].items():
        marks = [
            Text("-", style="dim")
            if why
            else Text(f"serves {chosen[name]}" if name in chosen else "yes", style="green")
            for name, why in found.items()
        ]
        table.add_row(op, *marks)
    parts: list[Any] = [facts_table("Installation", installation), Text(), table]
    reasons = {b: why for found in facts["backends"].values() for b, why in found.items() if why}
    if reasons:
        parts.append(facts_table("Not available here", reasons))
    return parts


def _model_tables(model: dict[str, Any]) -> list[Any]:
    import torch
    from rich.text import Text

    from ssah.report.terminal.tables import facts_table, new_table
    from ssah.training import runs

    share = model["owned"] / model["parameters"]
    about = {
        "name": model["name"],
        "class": f"{model['class']} ({model['model_type']})",
        "parameters": f"{model['parameters']:,} in {model['dtype']}",
        **({"quantised": model["quantised"]} if model["quantised"] else {}),
        "owned by units": f"{model['owned']:,} ({share:.1%})",
    }
    scored = new_table("Scored", ("kind",), ("modules", "units in each", "units"))
    for kind, found in model["kinds"].items():
        sizes = found["sizes"]
        each = [f"{units:,}" + f" ({n})" * (len(sizes) > 1) for units, n in sizes]
        scored.add_row(kind, f"{found['modules']:,}", ", ".join(each), f"{found['units']:,}")
    n_modules = sum(found["modules"] for found in model["kinds"].values())
    scored.add_row("all", f"{n_modules:,}", "", f"{model['units']:,}", style="bold")
    parts = [facts_table("Model", about), Text(), scored]
    if model["not_covered"]:
        left = new_table("Not covered", ("part of a layer", "in place of"), ())
        left.add_column("layers", overflow="fold")
        left.add_column("why", overflow="fold")
        for part in model["not_covered"]:
            stretches = runs(torch.tensor(part["layers"]))
            layers = (f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in stretches)
            left.add_row(part["part"], part["instead_of"] or "", ", ".join(layers), part["reason"])
        parts.append(left)
    return parts


@reporting
def demo(
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
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Align a small model, score and group its units, ablate each group: all in minutes.

    With `--full` also: hidden states of the aligned model beside the other one, a benign fine-tune
    with and without freezing, which units changed their group, and DIR/report.html with all of it.
    Given again, the command goes on where it was interrupted.

    Example: `ssah demo --out demo_out`
    """
    # Threads that wait leave their core to others: on a busy machine that is faster, and
    # it must be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ssah.storage import one_run
    from ssah.studies.demo import full as full_demo
    from ssah.studies.demo import short as demo

    with one_run(out):
        found = (full_demo if full else demo).run(
            model,
            out,
            seconds=seconds,
            shares={"scu": scu, "ucu": ucu, "ru": ru},
            fresh=fresh,
            dtype=dtype.value,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    return Result(found)


@reporting
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One small case, under a minute.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="For results.")] = Path(
        "bench_out"
    ),
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; default: all.")] = None,
    as_json: Json = False,
) -> Result:
    """Measure every operator and `attribute` here, beside eager PyTorch and torch.compile.

    Example: `ssah bench --quick`
    """
    from ssah.studies.bench import run_bench

    return Result(run_bench(out, quick=quick, threads=threads))
