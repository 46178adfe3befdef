"""The moment operators against eager PyTorch, torch.compile and the peers' formulas.

    python benchmarks/bench_ops.py [--threads 2] [--tokens 4096] [--channels 11008 4096 14336]
                                   [--dtypes bfloat16 float32] [--out FILE]

Every row is one shape and type in one run; times are medians over interleaved rounds with
rotating inputs, and a ratio is the median over rounds. The limit of an operator is its bytes per
element over the read bandwidth that the same run measures. Set SSAH_CPU_CAPABILITY=avx2 for the
narrower kernels.

Operators are called as in ``ssah bench``; FLAP and Wanda are those of ``peers.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleave, percentiles, ratio, read_bandwidth, rotating, write
from benchmarks.peers import Flap, Wanda
from ssah.studies.bench.cases import CASES, sums


def sums_accumulated(x: Tensor) -> tuple[Tensor, Tensor]:
    """``sums`` with a conversion inside each reduction: another form that may fuse better."""
    return x.sum(0, dtype=torch.float32), x.float().square().sum(0)


def measure(tokens: int, channels: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row: seconds per call and ratios for [tokens, channels]."""
    torch.manual_seed(0)
    n_bytes = tokens * channels * dtype.itemsize
    xs = rotating(lambda: torch.randn(tokens, channels).to(dtype), n_bytes)
    others = rotating(lambda: torch.randn(tokens, channels).to(dtype), n_bytes)
    n = len(xs)
    flap, wanda = Flap(channels), Wanda(channels)
    compiled = [torch.compile(f, dynamic=False) for f in (sums, sums_accumulated)]
    gate_up = torch.compile(lambda g, u: F.silu(g) * u, dynamic=False)
    product, cpu = CASES["gated_product"], torch.device("cpu")
    under_arms = product.make(tokens, channels, dtype, cpu)[2:]  # factors and the arm of each token
    calls: dict[str, Callable[[int], Any]] = {
        "read": read_bandwidth(n_bytes),
        "channel_moments_": lambda i: CASES["channel_moments_"].ours(xs[i % n]),
        "FLAP eager": lambda i: flap(xs[i % n]),
        "Wanda eager": lambda i: wanda(xs[i % n]),
        "torch.var_mean": lambda i: torch.var_mean(xs[i % n].float(), 0),
        "compiled sums": lambda i: compiled[0](xs[i % n]),
        "compiled sums, 2nd form": lambda i: compiled[1](xs[i % n]),
        "gated_moments": lambda i: CASES["gated_moments"].ours(xs[i % n], others[i % n]),
        "eager silu(gate) * up": lambda i: F.silu(xs[i % n]) * others[i % n],
        "compiled silu(gate) * up": lambda i: gate_up(xs[i % n], others[i % n]),
        "gated_product": lambda i: product.ours(xs[i % n], others[i % n], *under_arms),
        "eager gated_product": lambda i: product.plain(xs[i % n], others[i % n], *under_arms),
        "taylor_moments_": lambda i: CASES["taylor_moments_"].ours(xs[i % n], others[i % n]),
        "column_sq_norms": lambda i: CASES["column_sq_norms"].ours(xs[i % n]),
    }
    with torch.inference_mode():
        times = interleave(calls, repeats)
    # Against the better of two forms: torch.compile fuses one or the other, by its version.
    best = min(ratio(times, f"compiled sums{s}", "channel_moments_") for s in ("", ", 2nd form"))
    return {
        "tokens": tokens,
        "channels": channels,
        "dtype": str(dtype).removeprefix("torch."),
        "read_GB_per_s": n_bytes / percentiles(times["read"])["p50"] / 1e9,
        "seconds": {name: percentiles(values) for name, values in times.items()},
        "in_reads": {name: ratio(times, name, "read") for name in times},
        "channel_moments_of_bandwidth": ratio(times, "read", "channel_moments_"),
        "flap_over_channel_moments": ratio(times, "FLAP eager", "channel_moments_"),
        "best_compiled_over_channel_moments": best,
        "gated_moments_over_eager": ratio(times, "gated_moments", "eager silu(gate) * up"),
        "gated_product_over_eager": ratio(times, "gated_product", "eager gated_product"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, nargs="+", default=[11008, 4096, 14336])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in args.dtypes:
        for channels in args.channels:
            row = measure(args.tokens, channels, getattr(torch, dtype), args.repeats)
            rows.append(row)
            print(f"\n{dtype} [{args.tokens}, {channels}]  read {row['read_GB_per_s']:.1f} GB/s")
            for name, value in row["in_reads"].items():
                print(f"  {name:26} {value:7.2f} reads of the input")
            print(
                f"  channel_moments_: {row['channel_moments_of_bandwidth']:.2f} of the bandwidth, "
                f"{row['flap_over_channel_moments']:.1f}x FLAP, "
                f"{row['best_compiled_over_channel_moments']:.1f}x the best compiled; "
                f"gated_moments: {row['gated_moments_over_eager']:.2f} of eager, "
                f"gated_product: {row['gated_product_over_eager']:.2f} of eager"
            )
            sys.stdout.flush()
    if args.out:
        write(args.out, "ops", rows)


if __name__ == "__main__":
    main()
