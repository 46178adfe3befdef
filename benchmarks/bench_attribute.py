"""attribute() on a Llama of random parameters, beside its backbone's own forward.

Wall time is the median ratio of interleaved pairs; peak memory is that of a process of its own.
``gram`` computes the Gram matrices of what enters all projections (``ssah.deltas.subspaces``).
Baselines are the scoring rules of FLAP and Wanda (``peers.py``), as eager hooks on that forward.

    python benchmarks/bench_attribute.py --out bench_out/attribute.json
    python benchmarks/bench_attribute.py --dtype float32 --layers 4    # no bfloat16 arithmetic here
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.models import LENGTH, ROWS, Batch, build_batches, build_model
from benchmarks.peers import Flap, Wanda
from ssah.attribution import METRICS, attribute
from ssah.deltas.subspaces import gram
from ssah.units import find_modules

LIMITS = {"variance": 1.0, "norm": 1.0, "taylor": 2.5, "fisher": 2.5, "gram": 2.0}
MEMORY_LIMIT = 1.1
KINDS = ("full", "ragged")
Call = Callable[[int], Any]


def backbone(model: PreTrainedModel, batch: Batch) -> None:
    """The backbone's own forward: no vocabulary projection, no cache."""
    with torch.inference_mode():
        model.base_model(**batch, use_cache=False)


def eager(model: PreTrainedModel, batch: Batch, rule: type[Flap] | type[Wanda]) -> None:
    """Score every unit by ``rule``, with hooks on the same backbone forward."""
    found = find_modules(model)
    states = {name: rule(module.n_units) for name, module in found.items()}
    hooks = [
        module.down.register_forward_pre_hook(lambda _, args, name=name: states[name](args[0]))
        for name, module in found.items()
    ]
    backbone(model, batch)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        for name, module in found.items():
            weight = module.down.weight
            assert isinstance(weight, Tensor)
            states[name].score(weight)


def calls(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Call]:
    """What is compared, each on batch ``i``."""

    def turn(i: int) -> Batch:
        return batches[i % len(batches)]

    ours: dict[str, Call] = {
        metric: (lambda i, metric=metric: attribute(model, [turn(i)], metric=metric))
        for metric in METRICS
    }
    return {
        "backbone": lambda i: backbone(model, turn(i)),
        **ours,
        "gram": lambda i: gram(model, [turn(i)]),
        "flap": lambda i: eager(model, turn(i), Flap),
        "wanda": lambda i: eager(model, turn(i), Wanda),
    }


def measure_memory(options: argparse.Namespace) -> None:
    """Print the resident memory before a call and its peak during it, in KiB, as JSON."""
    torch.set_num_threads(options.threads)
    model = build_model(options.dtype, options.layers)
    call = calls(model, build_batches(1, options.batches == "ragged"))[options.memory]
    call(0)  # what is made once must not count
    before = common.kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held
    call(0)
    print(json.dumps({"before": before, "peak": common.kibibytes("VmHWM")}))


def peak_memory(name: str, options: argparse.Namespace, ragged: bool) -> dict[str, int]:
    """:func:`measure_memory` in a process of its own."""
    kind = "ragged" if ragged else "full"
    arguments = ("--memory", name, "--threads", options.threads, "--batches", kind)
    more = ("--dtype", options.dtype, "--layers", options.layers)
    return common.in_child(__file__, *arguments, *more)


def measure(options: argparse.Namespace, ragged: bool) -> list[dict[str, Any]]:
    """One row per call: wall-time ratio to the backbone's forward, and peak memory.

    Every call is timed in pairs with the backbone, with nothing else between them: what a third
    call leaves behind in the allocator would favour one of the two.
    """
    model = build_model(options.dtype, options.layers)
    n_parameters = sum(p.numel() for p in model.parameters())
    compared = calls(model, build_batches(3, ragged))
    memory = {name: peak_memory(name, options, ragged) for name in ("backbone", *options.only)}
    rows = []
    for name in options.only:
        pair = {each: compared[each] for each in ("backbone", name)}
        times = common.interleave(pair, repeats=options.repeats, warmup=1)
        rows.append(
            {
                "call": name,
                "ragged": ragged,
                "dtype": options.dtype,
                "parameters": n_parameters,
                "seconds": common.percentiles(times[name]),
                "backbone_seconds": common.percentiles(times["backbone"]),
                "wall_ratio": common.ratio(times, name, "backbone"),
                "wall_limit": LIMITS.get(name),
                "peak_kib": memory[name]["peak"],
                "backbone_peak_kib": memory["backbone"]["peak"],
                "memory_ratio": memory[name]["peak"] / memory["backbone"]["peak"],
                "memory_limit": MEMORY_LIMIT if LIMITS.get(name) == 1.0 else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"Scoring {ROWS} x {LENGTH} tokens, relative to the backbone's forward")
    for column in ("batch", "call", "wall", "limit", "p20-p80 s", "peak memory", "limit"):
        table.add_column(column, justify="left" if column in ("batch", "call") else "right")
    for row in rows:
        spread = row["seconds"]
        table.add_row(
            "ragged" if row["ragged"] else "full",
            row["call"],
            f"{row['wall_ratio']:.3f}x",
            "" if row["wall_limit"] is None else f"{row['wall_limit']:.1f}x",
            f"{spread['p20']:.2f}-{spread['p80']:.2f}",
            f"{row['memory_ratio']:.3f}x ({math.ceil(row['peak_kib'] / 1024)} MiB)",
            "" if row["memory_limit"] is None else f"{row['memory_limit']:.1f}x",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("bench_out/attribute.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[*METRICS, "gram", "flap", "wanda"])
    parser.add_argument("--batches", choices=[*KINDS, "both"], default="both")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options)
        return
    torch.set_num_threads(options.threads)
    kinds = KINDS if options.batches == "both" else (options.batches,)
    rows = [row for kind in kinds for row in measure(options, kind == "ragged")]
    common.write(options.out, "attribute", rows)
    show(rows)


if __name__ == "__main__":
    main()
