"""The tables of ``ssah info``: what is installed here, and what of a model would be scored."""

from __future__ import annotations

from typing import Any

import torch
from rich.text import Text

from ssah.report.terminal.tables import facts_table, new_table
from ssah.training import runs


def installation_tables(facts: dict[str, Any]) -> list[Any]:
    """Versions, and the backends of every operator, from ``ssah.info.describe``."""
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
    # One reason a backend: it is of the machine, and the same for every operator.
    reasons = {b: why for found in facts["backends"].values() for b, why in found.items() if why}
    if reasons:
        parts.append(facts_table("Not available here", reasons))
    return parts


def model_tables(model: dict[str, Any]) -> list[Any]:
    """What units a model has, from ``ssah.info.describe_model``."""
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
        # Both may be longer than a line; `new_table` would cut them off.
        left.add_column("layers", overflow="fold")
        left.add_column("why", overflow="fold")
        for part in model["not_covered"]:
            stretches = runs(torch.tensor(part["layers"]))
            layers = (f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in stretches)
            left.add_row(part["part"], part["instead_of"] or "", ", ".join(layers), part["reason"])
        parts.append(left)
    return parts
