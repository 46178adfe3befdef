"""``ssah info``, ``ssah demo`` and ``ssah bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ssah.cli.support import (
    Device,
    Dtype,
    DtypeOption,
    Json,
    RemoteCode,
    Result,
    load,
    reporting,
)


@reporting
def info(
    model: Annotated[
        str | None, typer.Option("--model", help="Also describe this model's units.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> Result:
    """Show versions, instruction sets, GPU architectures, and the backends of every operator.

    Example: `ssah info --model smollm2`
    """
    from ssah.info import describe, describe_model

    facts = describe()
    if model is not None:
        loaded, _ = load(model, Dtype.auto, "cpu", trust_remote_code)
        facts["model"] = describe_model(loaded, model)
    return Result(facts, tuple(_info_tables(facts)))


def _info_tables(facts: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    from ssah.report.tables import facts_table, new_table

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
    if "model" in facts:
        model = facts["model"]
        kinds = {
            kind: f"{found['units']:,} units in {found['modules']} modules"
            for kind, found in model["kinds"].items()
        }
        about = {
            "name": model["name"],
            "class": f"{model['class']} ({model['model_type']})",
            "parameters": f"{model['parameters']:,} in {model['dtype']}",
            **kinds,
        }
        parts += [Text(), facts_table("Model", about)]
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
    from ssah import demo, full_demo

    return Result(
        (full_demo if full else demo).run(
            model,
            out,
            seconds=seconds,
            shares={"scu": scu, "ucu": ucu, "ru": ru},
            fresh=fresh,
            dtype=dtype.value,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    )


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
    from ssah.bench import run

    return Result(run(out, quick=quick, threads=threads))
