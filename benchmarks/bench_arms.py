"""Greedy answers under n ablations: all in one batch, beside one ablation after the other.

Each number of arms has a process of its own, whose peak memory is then that of its largest batch.
In it the batch of all arms and one ablation alone take turns, n of which would do the same.
Weights are random, because none of the figures depends on them.

    python benchmarks/bench_arms.py --out bench_out/arms.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ssah
from benchmarks import common
from benchmarks.models import VOCABULARY, build_model
from ssah.units import UnitSet, find_modules

ARMS = (1, 2, 4, 8, 16)
SHARE = 0.01  # of all units, in each arm


def answer(model: PreTrainedModel, batch: dict[str, Tensor], new: int) -> Tensor:
    """Greedy tokens, ``[rows, width + new]``."""
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generator: Any = model  # the types of its generate are of no use
    with torch.inference_mode():
        tokens: Tensor = generator.generate(**batch, **options)
    return tokens


def together(model: PreTrainedModel, selections: Any, batch: Any, new: int) -> Tensor:
    """All arms in one batch, ``[arms, rows, tokens]``."""
    with ssah.arms(model, selections) as run:
        return run.split(answer(model, run.repeat(batch), new))


def alone(model: PreTrainedModel, units: UnitSet, batch: Any, new: int) -> Tensor:
    """One arm, ``[rows, tokens]``."""
    with ssah.ablate(model, units):
        return answer(model, batch, new)


def measure(n: int, options: argparse.Namespace) -> dict[str, Any]:
    """What ``n`` arms take, in this process."""
    model = build_model("float32", options.layers)
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    count = int(SHARE * sum(sizes.values()))
    selections = [UnitSet.random(count, sizes, seed) for seed in range(n)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (options.rows, options.width), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    held = common.kibibytes("VmRSS")
    times = common.interleave(
        {
            "together": lambda _: together(model, selections, batch, options.new),
            "alone": lambda _: alone(model, selections[0], batch, options.new),
        },
        repeats=options.repeats,
        warmup=1,
    )
    return {
        "arms": n,
        "rows": options.rows,
        "width": options.width,
        "new_tokens": options.new,
        "together": common.percentiles(times["together"]),
        "alone": common.percentiles(times["alone"]),
        "times_faster": n * common.ratio(times, "alone", "together"),
        "added_bytes": 1024 * (common.kibibytes("VmHWM") - held),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Greedy answers under n ablations")
    for column in ("arms", "one batch, s", "one arm alone, s", "times faster", "added"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["arms"]),
            f"{row['together']['p50']:.2f}",
            f"{row['alone']['p50']:.2f}",
            f"{row['times_faster']:.2f}",
            f"{row['added_bytes'] / 2**20:.0f} MiB",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("bench_out/arms.json"))
    parser.add_argument("--rows", type=int, default=1, help="Requests, each under every arm.")
    parser.add_argument("--width", type=int, default=32, help="Tokens of a request.")
    parser.add_argument("--new", type=int, default=32, help="Tokens of an answer.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", type=int, help="Measure this number in this process alone.")
    options = parser.parse_args()
    if options.arms is not None:
        print(json.dumps(measure(options.arms, options)))
        return
    passed = ("rows", "width", "new", "layers", "repeats")
    given = [word for name in passed for word in (f"--{name}", getattr(options, name))]
    rows = [common.in_child(__file__, *given, "--arms", n) for n in ARMS]
    common.write(options.out, "arms", rows)
    show(rows)


if __name__ == "__main__":
    main()
