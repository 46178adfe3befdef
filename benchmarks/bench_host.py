"""What the host does for small calls, where a GPU would have nothing to do: a step, an operator.

A GPU updates a million elements in less than 10 microseconds, so that the step of an adapter, or of
a few units, takes as long as the host takes to ask for it. Here the tensors are so small that the
CPU, too, has next to nothing to compute. Only Python's side and the CPU's own can be measured so:
on a GPU there is the launch instead of the CPU's kernel.

* a step of 450 tensors [8, 16], of each of which 4 rows train, beside a step of
  ``torch.optim.AdamW(fused=True)`` of the same tensors; new gradients come in every step
* the same step for an optimiser that sees its tensors for the first time: all checks are made
* ``channel_moments_`` of [16, 64], and the kernel alone without checks

    python benchmarks/bench_host.py --out bench_out/host.json
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
from ssah_kernels import backends, ops
from ssah_kernels.optim import MaskedAdamW

TENSORS, CALLS = 450, 100  # parameters of a step; calls of an operator that are timed together
STEP_LIMIT, CALL_LIMIT = 1.0, 4e-6  # of torch's fused step; seconds
FUSED, STEP, FIRST = "torch fused", "MaskedAdamW", "MaskedAdamW, first step"
MOMENTS, KERNEL = "channel_moments_", "channel_moments_, the kernel alone"


class Step:
    """A step of many small parameters; every step has gradients of its own."""

    def __init__(self, masked: bool) -> None:
        self.params = [torch.nn.Parameter(torch.randn(8, 16)) for _ in range(TENSORS)]
        self.masked = masked
        self.optimizer = self.make()
        self(0)

    def make(self) -> torch.optim.Optimizer:
        if not self.masked:
            return torch.optim.AdamW(self.params, lr=1e-5, fused=True)
        indices = [torch.arange(0, 8, 2) for _ in self.params]
        return MaskedAdamW([{"params": self.params, "indices": indices}], lr=1e-5)

    def backward(self) -> None:
        for p in self.params:
            p.grad = torch.ones_like(p)

    def __call__(self, _: int) -> None:
        self.optimizer.step()


class FirstStep(Step):
    """The same of an optimiser that was just made."""

    def backward(self) -> None:
        super().backward()
        self.optimizer = self.make()


def measure(repeats: int) -> list[dict[str, Any]]:
    """One row a call; what is prepared before a call is not timed."""
    steps = {FUSED: Step(False), STEP: Step(True), FIRST: FirstStep(True)}
    x = torch.randn(16, 64)
    state = ops.new_moments(x)
    kernel = backends.kernel("cpu", "channel_moments_")

    def many(call: Any, *arguments: Tensor | None) -> Any:
        def run(_: int) -> None:
            for _ in range(CALLS):
                call(*arguments)

        return run

    calls = {**steps, MOMENTS: many(ops.channel_moments_, x, *state)}
    calls[KERNEL] = many(kernel, x, *state, None)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for step in steps.values():
            step.backward()
        for name, values in common.interleave(calls, repeats=1, warmup=0).items():
            times[name] += values
    rows = []
    for name, values in times.items():
        each = [value / (1 if name in steps else CALLS) for value in values]
        row: dict[str, Any] = {"call": name, "seconds": common.percentiles(each)}
        if name in steps:
            row["ratio"] = common.ratio(times, name, FUSED)
        row["limit"] = {STEP: STEP_LIMIT, MOMENTS: CALL_LIMIT}.get(name)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Time of the host, in microseconds (1 thread)")
    for column in ("call", "p20-p80", "of torch fused", "limit"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for row in rows:
        spread, limit = row["seconds"], row["limit"]
        of_fused = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        shown = "" if limit is None else f"{limit:.2f}x" if "ratio" in row else f"{limit * 1e6:.0f}"
        times = f"{spread['p20'] * 1e6:.1f}-{spread['p80'] * 1e6:.1f}"
        table.add_row(row["call"], times, of_fused, shown)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_out/host.json"))
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.repeats)
    common.write(options.out, "host", rows)
    show(rows)


if __name__ == "__main__":
    main()
