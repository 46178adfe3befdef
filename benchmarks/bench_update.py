"""The masked AdamW step, beside torch's fused AdamW on Llama-shaped parameters of 129 M.

Units are drawn at random over all layers. As a plan holds them, every tensor is unit-major (down
and o are stored transposed). An FFN's units are packed side by side once, which takes the packing
time reported beside; attention gathers its rows at every step. Queries and keys, which belong to no
unit, are left out on both sides.

* torch fused: ``torch.optim.AdamW(fused=True)`` on everything, no mask.
* mask, fused, restore: gradients multiplied by masks, the same optimiser, frozen entries put back.
* ours: one call of ``masked_adamw_``; "+ importance" accumulates every unit's in the same pass.
* through the index: weights and gradients are whole, as a stack without plans has them, and units
  are rows of gate, up and V and columns of down and O. The gradient is read at the index; "gather,
  then update" copies what trains out of it first.

Take it on a machine that does nothing else: torch's optimiser waits for all its threads once a
tensor, and suffers from company far more than one call that does so once.

The limit of a row is its bytes moved at the bandwidth that torch's ``add_`` reaches in this run:

    float32 weights        float32 state 28    bfloat16 state 20    8-bit state 16.1
    bfloat16 weights       float32 state 22    bfloat16 state 14    8-bit state 10.1
    with the other half of a float32 weight (``rounding="remainder"``) 4 more

State in 8 bits is bound by arithmetic and not by memory: a code is looked up, and a quotient taken,
twice an element.

    python benchmarks/bench_update.py --out bench_out/update.json
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.updates import (
    Call,
    Ours,
    build_dense,
    build_indexed,
    build_ours,
    copy_bandwidth,
    masked_step,
)
from ssah_kernels.dynamic_map import BLOCK

F32, BF16, CODES = torch.float32, torch.bfloat16, torch.uint8


@dataclass(frozen=True)
class Variant:
    name: str
    fraction: float
    state: torch.dtype
    seed: bool = False
    remainder: bool = False
    importance: bool = False
    limit: float | None = None  # of the time over torch's fused AdamW
    masked_limit: float | None = None  # of the time over mask, fused, restore


SUITES: dict[torch.dtype, tuple[Variant, ...]] = {
    F32: (
        Variant("92.5 %", 0.925, F32, limit=1.0),
        Variant("92.5 % + importance", 0.925, F32, importance=True),
        Variant("92.5 %, 8-bit state", 0.925, CODES, limit=5.0),
        Variant("20 %", 0.2, F32, limit=0.25, masked_limit=0.2),
        Variant("20 % + importance", 0.2, F32, importance=True),
    ),
    BF16: (
        Variant("92.5 %, bf16 state, stochastic", 0.925, BF16, seed=True, limit=0.6),
        Variant("92.5 %, bf16 state, stochastic + importance", 0.925, BF16, True, importance=True),
        Variant("92.5 %, f32 state, stochastic", 0.925, F32, seed=True),
        Variant("92.5 %, f32 state, remainder", 0.925, F32, remainder=True),
        Variant("92.5 %, 8-bit state, stochastic", 0.925, CODES, seed=True, limit=4.0),
        Variant("92.5 %, 8-bit state, remainder", 0.925, CODES, remainder=True),
        Variant("20 %, bf16 state, stochastic", 0.2, BF16, seed=True),
    ),
}


def read_through_index(dtype: torch.dtype, layers: int) -> dict[str, tuple[Ours, Call]]:
    """Pairs of calls, by their names: gradients read at the index, and gathered first."""
    found = {}
    for grads in (dtype,) if dtype == F32 else (dtype, F32):
        ours = build_indexed(layers, 0.2, dtype, grads)
        name = "20 %, through the index" + (", float32 gradients" if grads != dtype else "")
        for gathers in (False, True):
            options = {"importance": False, "seed": dtype == BF16, "remainder": False}
            own = f"{name}: gather, then update" if gathers else name
            found[own] = (ours, ours.call(gathers=gathers, **options))
    return found


def bytes_per_element(dtype: torch.dtype, variant: Variant) -> float:
    scales = 4 * F32.itemsize / BLOCK if variant.state == CODES else 0
    moved = 3 * dtype.itemsize + 4 * variant.state.itemsize + scales
    return moved + 2 * variant.remainder * dtype.itemsize


def measure(dtype: torch.dtype, layers: int, repeats: int) -> list[dict[str, Any]]:
    """One row per variant. Variants of one precision share their tensors where they can."""
    parameters, optimizer = build_dense(layers, dtype)
    total = sum(p.numel() for p in parameters)
    calls: dict[str, Call] = {
        "torch fused": lambda _: optimizer.step(),
        "add_": copy_bandwidth(),
    }
    if dtype == F32:
        calls["mask, fused, restore"] = masked_step(layers, 0.2, parameters, optimizer)
    built: dict[tuple[float, torch.dtype, bool], Ours] = {}
    for v in SUITES[dtype]:
        key = (v.fraction, v.state, v.remainder)
        if key not in built:
            built[key] = build_ours(layers, v.fraction, dtype, v.state, v.remainder)
        calls[v.name] = built[key].call(importance=v.importance, seed=v.seed, remainder=v.remainder)
    through = read_through_index(dtype, layers)
    calls |= {name: call for name, (_, call) in through.items()}
    times = common.interleave(calls, repeats=repeats, warmup=1)
    seconds = {name: common.percentiles(values) for name, values in times.items()}
    bandwidth = 2 * (512 << 20) / seconds["add_"]["p50"]  # each byte is read and written

    def row(name: str, elements: int, moved: float, **more: Any) -> dict[str, Any]:
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "call": name,
            "elements": elements,
            "bytes_per_element": moved,
            "seconds": seconds[name],
            "of_limit": elements * moved / bandwidth / seconds[name]["p50"],
            "ratio": common.ratio(times, name, "torch fused"),
            **more,
        }

    rows = [row("torch fused", total, 7 * dtype.itemsize)]
    if dtype == F32:
        rows.append(row("mask, fused, restore", total, 7 * dtype.itemsize))
    for v in SUITES[dtype]:
        ours = built[v.fraction, v.state, v.remainder]
        more: dict[str, Any] = {"limit": v.limit, "packing_seconds": ours.packing_seconds}
        if v.masked_limit is not None:
            more["masked_ratio"] = common.ratio(times, v.name, "mask, fused, restore")
            more["masked_limit"] = v.masked_limit
        if v.importance:
            plain = v.name.removesuffix(" + importance")
            more["importance_ratio"] = common.ratio(times, v.name, plain)
        rows.append(row(v.name, ours.elements(), bytes_per_element(dtype, v), **more))
    for name, (ours, _) in through.items():
        moved = 6 * dtype.itemsize + ours.grads[0].itemsize
        more = {}
        if f"{name}: gather, then update" in through:
            more["gather_ratio"] = common.ratio(times, name, f"{name}: gather, then update")
            more["gather_limit"] = 1.0
        rows.append(row(name, ours.elements(), moved, **more))
    return rows


def show(rows: list[dict[str, Any]], threads: int) -> None:
    """Print the table."""
    table = Table(title=f"One AdamW step, relative to torch's fused AdamW ({threads} threads)")
    for column in ("dtype", "call", "time", "limit", "of mask+restore", "importance", "of gather"):
        table.add_column(column, justify="left" if column in ("dtype", "call") else "right")
    for column in ("ms p20-p80", "B/element", "of bandwidth", "packing ms"):
        table.add_column(column, justify="right")

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}x"

    for r in rows:
        spread = r["seconds"]
        packing = r.get("packing_seconds")
        table.add_row(
            r["dtype"],
            r["call"],
            times(r["ratio"]),
            times(r.get("limit")),
            times(r.get("masked_ratio")),
            times(r.get("importance_ratio")),
            times(r.get("gather_ratio")),
            f"{spread['p20'] * 1e3:.1f}-{spread['p80'] * 1e3:.1f}",
            f"{r['bytes_per_element']:.3g}",
            f"{r['of_limit']:.0%}",
            "" if packing is None else f"{packing * 1e3:.0f}",
        )
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_out/update.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for dtype in SUITES
        if options.dtype in ("both", str(dtype).removeprefix("torch."))
        for row in measure(dtype, options.layers, options.repeats)
    ]
    common.write(options.out, "update", rows)
    show(rows, options.threads)


if __name__ == "__main__":
    main()
