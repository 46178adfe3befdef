"""attribute_weights() on a Llama of random parameters, beside its backbone's own forward.

Processor time of a call and of the forward passes of the same batches, in turns: the median of the
ratios. A call ends by writing as many scores as there are weights, whatever the number of batches,
so that it is given several. ``short`` has as many tokens in rows of 64.

    python benchmarks/bench_weights.py --out bench_out/weights.json
    python benchmarks/bench_weights.py --dtype float32 --layers 4    # no bfloat16 arithmetic here
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.models import LENGTH, ROWS, Batch, build_batches, build_model
from ssah.attribution import attribute, attribute_weights

SHORT = 64
# Of a whole call to the forward pass alone. The exact gradient of each example takes one product
# more than a pass there and back, and each is as long as the forward's: 3 is the least for those.
LIMITS = {"wanda": 1.0, "snip": 2.5, "fisher": 2.5}
METRICS = ("magnitude", "wanda", "snip", "fisher")


def batches_of(kind: str, n: int) -> list[Batch]:
    """Full batches of rows of LENGTH, the same tokens in rows of SHORT, or ragged ones."""
    found = build_batches(n, kind == "ragged")
    if kind == "short":
        return [{key: value.view(-1, SHORT) for key, value in batch.items()} for batch in found]
    return found


def backbone(model: PreTrainedModel, batches: list[Batch]) -> None:
    """The backbone's own forward: no vocabulary projection, no cache."""
    with torch.inference_mode():
        for batch in batches:
            model.base_model(**batch, use_cache=False)


def seconds(call: Callable[[], Any]) -> float:
    """Processor time: other processes on the machine take none of it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(options: argparse.Namespace, model: PreTrainedModel, kind: str) -> list[dict[str, Any]]:
    """One row per metric; ``taylor``, of units, is what a pass there and back takes without it."""
    batches = batches_of(kind, options.n_batches)
    calls: dict[str, Callable[[], Any]] = {
        "taylor": lambda: attribute(model, batches, metric="taylor")
    }
    for metric in METRICS:
        loader = None if metric == "magnitude" else batches
        calls[metric] = lambda m=metric, data=loader: attribute_weights(model, data, metric=m)
    attribute_weights(model, metric="magnitude")  # the hash of the weights, which is made once
    rows = []
    for name in options.only:
        pairs = []
        for _ in range(options.repeats):
            pairs.append((seconds(calls[name]), seconds(lambda: backbone(model, batches))))
        ratios = sorted(own / forward for own, forward in pairs)
        rows.append(
            {
                "metric": name,
                "batches": kind,
                "n_batches": options.n_batches,
                "dtype": options.dtype,
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": statistics.median(own for own, _ in pairs),
                "backbone_seconds": statistics.median(forward for _, forward in pairs),
                "ratio": statistics.median(ratios),
                "beyond_forward": statistics.median(ratios) - 1,
                "ratios": ratios,
                "limit": LIMITS.get(name),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    title = f"Scoring weights on batches of {ROWS} x {LENGTH} tokens, to the backbone's forward"
    table = Table(title=title)
    for column in ("batches", "metric", "ratio", "limit", "beyond", "seconds"):
        table.add_column(column, justify="left" if column in ("batches", "metric") else "right")
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.1f}x"
        beyond = f"{row['beyond_forward']:.3f}x"
        figures = (f"{row['ratio']:.3f}x", limit, beyond, f"{row['seconds']:.2f}")
        table.add_row(row["batches"], row["metric"], *figures)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("bench_out/weights.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-batches", type=int, default=4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=["taylor", *METRICS])
    parser.add_argument("--batches", nargs="*", default=["full", "ragged", "short"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.dtype, options.layers)
    rows = [row for kind in options.batches for row in measure(options, model, kind)]
    common.write(options.out, "weights", rows)
    show(rows)


if __name__ == "__main__":
    main()
