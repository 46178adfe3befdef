"""Arithmetic on what training changed, of models that are read tensor by tensor.

Writes three random Llama-shaped checkpoints (the default has two layers of Llama-2-7B's size, with
its embedding and head: 1.3 GB each in bfloat16) and computes a fourth from them in each way, each
in a process of its own from a cold page cache: peak resident memory, wall and processor time. For
32 layers the time is projected by the bytes of the checkpoint, and the memory by what is kept for
each tensor beside the largest one: 256 KiB where magnitudes are ranked over the whole model.

    python benchmarks/bench_delta.py --folder /scratch/deltas --out bench_out/delta.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.bench_stream import configuration, forget, write_checkpoint
from ssah import deltas
from ssah.units import UnitSet

MEMORY_LIMIT = 3 * 10**9
_LAYERS = 32
_RANKED_KIB = 256  # of a tensor whose magnitudes are counted
_NAMES = ("base", "first", "second")


def units_of(layers: int, hidden_size: int) -> UnitSet:
    """A tenth of the units of every FFN."""
    n = configuration(layers, hidden_size).intermediate_size
    sizes = {f"model.layers.{i}.mlp.down_proj": n for i in range(layers)}
    return UnitSet.random(n * layers // 10, sizes)


def run(way: str, folder: Path, layers: int, hidden_size: int) -> dict[str, Any]:
    """Compute one model in this process; what it took."""
    base, first, second = (str(folder / name) for name in _NAMES)
    out = folder / "out"
    before, wall, processor = common.kibibytes("VmHWM"), time.perf_counter(), time.process_time()
    if way == "interpolate":
        deltas.interpolate(base, first, 0.5, out=out)
    elif way == "rewind":
        deltas.rewind(base, first, units_of(layers, hidden_size), out=out)
    elif way == "dare":
        deltas.keep(base, first, 0.1, by="random", rescale=True, out=out)
    elif way == "ties":
        deltas.merge(base, [first, second], how="ties", share=0.2, out=out)
    else:
        deltas.measure(base, first, {"some": units_of(layers, hidden_size)})
    return {
        "before_kib": before,
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "peak_kib": common.kibibytes("VmHWM"),
    }


WAYS = ("interpolate", "rewind", "dare", "ties", "measure")


def measure(folder: Path, layers: int, hidden_size: int, threads: int) -> list[dict[str, Any]]:
    """One row per way."""
    sizes = [configuration(n, hidden_size) for n in (layers, _LAYERS)]
    for seed, name in enumerate(_NAMES):
        if not (folder / name / "model.safetensors.index.json").is_file():
            write_checkpoint(folder / name, sizes[0], seed)
    n_bytes = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    # A layer has four matrices of the width squared, three of width and FFN, and two norms.
    per_layer = 2 * (4 * hidden_size**2 + 3 * hidden_size * sizes[0].intermediate_size)
    growth = 1 + (_LAYERS - layers) * per_layer / n_bytes
    rows = []
    for way in WAYS:
        shutil.rmtree(folder / "out", ignore_errors=True)
        for name in _NAMES:
            forget(folder / name)
        given = ("--layers", layers, "--hidden-size", hidden_size, "--threads", threads)
        found = common.in_child(__file__, "--folder", folder, "--way", way, *given)
        ranked = 9 * (_LAYERS - layers) * _RANKED_KIB if way == "ties" else 0
        rows.append(
            {
                "way": way,
                "layers": layers,
                "hidden_size": hidden_size,
                "checkpoint_bytes": n_bytes,
                **found,
                "projected_layers": _LAYERS,
                "projected_processor_seconds": found["processor_seconds"] * growth,
                "projected_peak_kib": found["peak_kib"] + ranked,
            }
        )
    shutil.rmtree(folder / "out", ignore_errors=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    size = rows[0]["checkpoint_bytes"] / 1e9
    table = Table(title=f"{rows[0]['layers']} layers, {size:.2f} GB a checkpoint; {_LAYERS} layers")
    for column in ("way", "peak memory", "wall", "processor", "projected memory", "processor"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['peak_kib'] * 1024 / 1e9:.2f} GB",
            f"{row['seconds']:.0f} s",
            f"{row['processor_seconds']:.0f} s",
            f"{row['projected_peak_kib'] * 1024 / 1e9:.2f} GB",
            f"{row['projected_processor_seconds']:.0f} s",
        )
    Console().print(table)
    Console().print(f"limit: {MEMORY_LIMIT / 1e9:.0f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints: 5.3 GB")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--out", type=Path, default=Path("bench_out/delta.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        found = run(options.way, options.folder, options.layers, options.hidden_size)
        print(json.dumps(found))
        return
    rows = measure(options.folder, options.layers, options.hidden_size, options.threads)
    common.write(options.out, "delta", rows)
    show(rows)


if __name__ == "__main__":
    main()
