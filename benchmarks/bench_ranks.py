"""attribute() by n processes of one thread beside one process of n threads, on the same batches.

The processes take turns: in one round rank 0 scores every batch with all threads while the others
wait, in the next the batches are dealt. Beside it, the time to join states alone (gloo, over the
loopback device), for a growing number of units.

    python benchmarks/bench_ranks.py --ranks 2 --out bench_out/ranks.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.models import build_batches, build_model
from ssah.attribution import Sums, attribute
from ssah.attribution.sums import join
from ssah.distributed import Ranks, deal
from ssah.models import move

UNITS = (100_000, 500_000, 3_000_000)  # about a 0.3 B, a 7 B and a 70 B model's


def build_tiny() -> PreTrainedModel:
    """Two small layers, to try the script; every rank must have the same."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def alone(model: PreTrainedModel, batches: Any, ranks: Ranks, metric: str, _: int) -> None:
    """Rank 0 scores everything, with as many threads as there are ranks."""
    dist.barrier()
    if ranks.rank == 0:
        torch.set_num_threads(ranks.size)
        attribute(model, batches, metric=metric, process_group=None)
        torch.set_num_threads(1)


def together(model: PreTrainedModel, batches: Any, ranks: Ranks, metric: str, _: int) -> None:
    """Every rank scores its share, with one thread."""
    dist.barrier()
    attribute(model, deal(batches), metric=metric)


def build_state(ranks: Ranks, units: int) -> Sums:
    """The state of one module of many units, another on every rank."""
    generator = torch.Generator().manual_seed(ranks.rank)
    channels = (
        torch.rand(units, dtype=torch.float64, generator=generator) + ranks.rank for _ in range(4)
    )
    return Sums(torch.tensor(100.0, dtype=torch.float64), *channels)


def join_once(ranks: Ranks, state: Sums, i: int) -> None:
    """The states of all ranks are joined."""
    state.mean[0] = ranks.rank + i  # after a join they are the same, which is refused
    dist.barrier()
    join(ranks, {"module": state}, gradient=False)


def run(rank: int, folder: str, options: argparse.Namespace) -> None:
    """What every rank does; rank 0 writes the record."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks
    )
    ranks = Ranks.of()
    model = build_tiny() if options.tiny else build_model("bfloat16", layers=20)
    move(model, getattr(torch, options.dtype))
    batches = build_batches(options.batches * ranks.size, ragged=False)
    arguments = (model, batches, ranks, options.metric)
    one, many = f"1 process, {ranks.size} threads", f"{ranks.size} processes, 1 thread"
    times = common.interleave(
        {one: partial(alone, *arguments), many: partial(together, *arguments)},
        repeats=options.repeats,
        warmup=1,
    )
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    rows: list[dict[str, Any]] = [
        {
            "call": name,
            "dtype": options.dtype,
            "tokens": tokens,
            "seconds": common.percentiles(times[name]),
            "throughput_ratio": common.ratio(times, one, name),
        }
        for name in times
    ]
    states = {str(n): partial(join_once, ranks, build_state(ranks, n)) for n in UNITS}
    joins = common.interleave(states, repeats=5, warmup=1)
    rows += [
        {
            "call": "join",
            "units": int(n),
            "received_bytes": 16 * int(n) * (ranks.size - 1),
            "seconds": common.percentiles(joins[n]),
        }
        for n in joins
    ]
    dist.barrier()
    if rank == 0:
        common.write(options.out, "ranks", rows)
        show(rows)
    dist.destroy_process_group()


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables."""
    table = Table(title="Scoring the same batches")
    for column in ("", "p20-p80 s", "throughput"):
        table.add_column(column, justify="right" if column else "left")
    joins = Table(title="Joining states")
    for column in ("units", "received by a rank", "p20-p80 ms"):
        joins.add_column(column, justify="right")
    for row in rows:
        spread = row["seconds"]
        if row["call"] != "join":
            seconds = f"{spread['p20']:.2f}-{spread['p80']:.2f}"
            table.add_row(row["call"], seconds, f"{row['throughput_ratio']:.3f}x")
        else:
            milliseconds = f"{1e3 * spread['p20']:.0f}-{1e3 * spread['p80']:.0f}"
            joins.add_row(
                f"{row['units']:,}", f"{row['received_bytes'] / 2**20:.1f} MiB", milliseconds
            )
    Console().print(table, joins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("bench_out/ranks.json"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", type=int, default=2, help="A rank; 8 x 256 tokens each.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--metric", default="variance")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 where the processor has no bfloat16 arithmetic.",
    )
    parser.add_argument("--tiny", action="store_true", help="A model of two small layers.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(run, args=(folder, options), nprocs=options.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
