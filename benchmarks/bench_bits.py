"""The AdamW step of single weights, beside torch's fused AdamW on the same parameters.

Of Llama-shaped parameters (see ``updates.py``) a share of the single weights trains, drawn at
random, so that nearly every vector of the processor has some that train and some that do not.

* torch fused: ``torch.optim.AdamW(fused=True)`` on everything, no mask.
* mask, fused, restore: gradients multiplied by masks, the same optimiser, frozen weights put back.
* bits: one call of ``bit_masked_adamw_``. State of what trains alone.
* plan: what a plan does in a step. The gradient's trained entries are taken out, ``masked_adamw_``
  updates them side by side, and they are written into the weights.

Bytes moved per weight in float32: 28 without a mask, 12 and 16 times the share by bits. The limits
are for AVX-512, whose instructions put lanes together and apart in one step. With AVX2 it takes two
and a look-up in a table, and the update is bound by that, not by memory.

Take it on a machine that does nothing else: torch's optimiser waits for all its threads once a
tensor, so that company makes it look slower than it is.

    python benchmarks/bench_bits.py --out bench_out/bits.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.updates import DECAY, LR, Call, build_dense, copy_bandwidth, random
from ssah_kernels import ops
from ssah_kernels.bit_masks import block_offsets, pack_bits

LIMITS = {0.5: (0.85, 0.4)}  # of the time of torch's fused AdamW, and of mask, fused, restore


def draw(shape: torch.Size, share: float, number: int) -> Tensor:
    """Which weights train: bool of ``shape``."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(number)) < share


def by_bits(parameters: list[torch.nn.Parameter], share: float, dtype: torch.dtype) -> Call:
    """One call of the operator for all of them."""
    masks = [draw(p.shape, share, i) for i, p in enumerate(parameters)]
    trained = [int(mask.sum()) for mask in masks]
    bits = [pack_bits(mask) for mask in masks]
    offsets = [block_offsets(each) for each in bits]
    grads = [p.grad for p in parameters]
    weights = [p.detach().clone() for p in parameters]
    first = [random((n,), 1e-3, dtype) for n in trained]
    second = [random((n,), 1e-3, dtype).square_() for n in trained]
    rate = torch.tensor(LR, dtype=torch.float64)
    step = torch.tensor(100.0, dtype=torch.float64)

    def run(_: int) -> None:
        step.add_(1)
        ops.bit_masked_adamw_(
            weights, grads, first, second, bits, offsets, rate, step, weight_decay=DECAY
        )

    return run


def as_a_plan(parameters: list[torch.nn.Parameter], share: float) -> Call:
    """Take the gradient out, update, write: the trained weights lie side by side."""
    masks = [draw(p.shape, share, i) for i, p in enumerate(parameters)]
    places = [mask.flatten().nonzero()[:, 0] for mask in masks]  # [trained] each
    weights = [p.detach().flatten().clone() for p in parameters]
    own = [weight[place] for weight, place in zip(weights, places, strict=True)]
    first, second = ([torch.zeros_like(p) for p in own] for _ in "mv")
    none, dims = [None] * len(own), [0] * len(own)
    rate = torch.tensor(LR, dtype=torch.float64)
    step = torch.tensor(100.0, dtype=torch.float64)

    def run(_: int) -> None:
        step.add_(1)
        grads = [
            p.grad.view(-1).index_select(0, place)  # type: ignore[union-attr]
            for p, place in zip(parameters, places, strict=True)
        ]
        ops.masked_adamw_(own, grads, first, second, none, dims, rate, step, weight_decay=DECAY)
        for weight, place, values in zip(weights, places, own, strict=True):
            weight.index_copy_(0, place, values)

    return run


def undone(
    parameters: list[torch.nn.Parameter], share: float, optimizer: torch.optim.Optimizer
) -> Call:
    """Multiply by the mask, step, put the frozen weights back: each tensor on its own, in place."""
    masks = [draw(p.shape, share, i) for i, p in enumerate(parameters)]
    factors = [mask.to(p.dtype) for mask, p in zip(masks, parameters, strict=True)]
    frozen = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def run(_: int) -> None:
        for p, factor in zip(parameters, factors, strict=True):
            p.grad.mul_(factor)  # type: ignore[union-attr]
        optimizer.step()
        for p, trains, before in zip(parameters, masks, frozen, strict=True):
            torch.where(trains, p, before, out=p)

    return run


def measure(dtype: torch.dtype, layers: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each call."""
    parameters, optimizer = build_dense(layers, dtype)
    total = sum(p.numel() for p in parameters)
    names = {"torch fused": 1.0}
    calls: dict[str, Call] = {"torch fused": lambda _: optimizer.step(), "add_": copy_bandwidth()}
    for share in (0.5, 0.1, 0.01):
        name = f"bits, {share:.0%}"
        calls[name], names[name] = by_bits(parameters, share, dtype), share
    calls["plan, 50%"], names["plan, 50%"] = as_a_plan(parameters, 0.5), 0.5
    restore = "mask, fused, restore"
    calls[restore], names[restore] = undone(parameters, 0.5, optimizer), 1.0
    times = common.interleave(calls, repeats=repeats, warmup=1)
    seconds = {name: common.percentiles(values) for name, values in times.items()}
    bandwidth = 2 * (512 << 20) / seconds["add_"]["p50"]  # each byte is read and written
    rows = []
    for name, share in names.items():
        moved = (3 + 4 * share) * dtype.itemsize + (0 if share == 1 else 1 / 8)
        limit, masked_limit = LIMITS.get(share, (None, None)) if "bits" in name else (None, None)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "call": name,
                "seconds": seconds[name],
                "bytes_per_element": moved,
                "of_limit": total * moved / bandwidth / seconds[name]["p50"],
                "ratio": common.ratio(times, name, "torch fused"),
                "limit": limit if dtype == torch.float32 else None,
                "masked_ratio": common.ratio(times, name, restore),
                "masked_limit": masked_limit if dtype == torch.float32 else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], threads: int) -> None:
    """Print the table."""
    table = Table(title=f"One AdamW step of single weights ({threads} threads)")
    for column in ("dtype", "call", "of torch", "limit", "of mask+restore", "limit "):
        table.add_column(column, justify="left" if column in ("dtype", "call") else "right")
    for column in ("ms p20-p80", "B/weight", "of bandwidth"):
        table.add_column(column, justify="right")
    for r in rows:
        given = [r["ratio"], r["limit"], r["masked_ratio"], r["masked_limit"]]
        table.add_row(
            r["dtype"],
            r["call"],
            *("" if value is None else f"{value:.3f}x" for value in given),
            f"{r['seconds']['p20'] * 1e3:.1f}-{r['seconds']['p80'] * 1e3:.1f}",
            f"{r['bytes_per_element']:.3g}",
            f"{r['of_limit']:.0%}",
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_out/bits.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure(dtype, options.layers, options.repeats)
    ]
    common.write(options.out, "bits", rows)
    show(rows, options.threads)


if __name__ == "__main__":
    main()
