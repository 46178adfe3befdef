"""Scoring a model that is read layer by layer, beside accelerate's disk offload.

Writes a random Llama-shaped checkpoint (the default has the shape of Llama-2-7B: 13.5 GB in
bfloat16), and scores 16 x 128 tokens from a cold page cache, each way in a process of its own: peak
resident memory (mapped pages count), bytes of weights read, wall time. Beside them what they could
be at best: the bytes at the measured bandwidth of the disk, and the computing of one layer times
the number of layers.

    python benchmarks/bench_stream.py --checkpoint /scratch/llama-7b --out bench_out/stream.json
    python benchmarks/bench_stream.py --checkpoint /scratch/small --layers 4 --hidden-size 512

A processor without bfloat16 arithmetic computes far faster with --dtype float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ssah.attribution import attribute, stream
from ssah.models import quiet

ROWS, LENGTH, BATCH_SIZE = 16, 128, 8
WAYS = ("stream", "disk offload")
MEMORY_LIMIT, WALL_LIMIT = 3 * 10**9, 1.3
_BANDWIDTH_BYTES = 2 * 2**30  # read at most, to measure the disk
_INDEX = "model.safetensors.index.json"
Batch = dict[str, Tensor]


def configuration(layers: int, hidden_size: int) -> LlamaConfig:
    """Llama-2-7B's, or one narrower: heads of 128, an FFN of 2.6875 times the width."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=hidden_size // 128,
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, config: LlamaConfig, seed: int = 0) -> None:
    """Random weights, a shard for each layer and one for the rest; the index is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, weight in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shard = f"model-{layer}-of-{config.num_hidden_layers}.safetensors"
        shards.setdefault(shard, {})[name] = weight
    generator = torch.Generator().manual_seed(seed)
    for shard, weights in shards.items():
        tensors = {
            name: torch.ones(weight.shape, dtype=weight.dtype)
            if weight.dim() == 1
            else torch.empty(weight.shape, dtype=weight.dtype).normal_(
                std=0.02, generator=generator
            )
            for name, weight in weights.items()
        }
        save_file(tensors, folder / shard, {"format": "pt"})
    places = {name: shard for shard, weights in shards.items() for name in weights}
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def build_batches() -> list[Batch]:
    """16 x 128 random tokens, 8 rows at a time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32_000, (ROWS, LENGTH), generator=generator)
    return [{"input_ids": part} for part in ids.split(BATCH_SIZE)]


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of the weights in memory."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not written yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bandwidth(folder: Path) -> float:
    """Bytes per second of plain reads of the weights, cold."""
    forget(folder)
    buffer = bytearray(16 << 20)  # one for all: new memory would have to be mapped
    n_bytes, start = 0, time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with FileIO(file) as handle:
            while n_bytes < _BANDWIDTH_BYTES and (n := handle.readinto(buffer)):
                n_bytes += n
    return n_bytes / (time.perf_counter() - start)


def layer_seconds(hidden_size: int, dtype: str) -> float:
    """Computing of one layer on all batches: two layers in memory less one."""
    times = {}
    for layers in (1, 2):
        config = configuration(layers, hidden_size)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        attribute(model, build_batches())
        start = time.perf_counter()
        attribute(model, build_batches())
        times[layers] = time.perf_counter() - start
    return times[2] - times[1]


def score(way: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Score the checkpoint in this process; what it took."""
    found: dict[str, Any] = {"before_kib": common.kibibytes("VmHWM")}
    start = time.perf_counter()
    if way == "stream":
        _, traffic = stream(str(folder), build_batches(), dtype=dtype, device="cpu")
        found |= {"weight_bytes": traffic.bytes_read, "wait_seconds": traffic.wait_seconds}
    else:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        places |= {"model.layers": "disk", "lm_head": "disk"}
        with TemporaryDirectory(dir=folder.parent) as scratch:
            with quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, device_map=places, offload_folder=scratch
                )
            attribute(model.eval(), build_batches())
    found["seconds"] = time.perf_counter() - start
    found["peak_kib"] = common.kibibytes("VmHWM")
    about = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {**found, "disk_bytes": int(about["read_bytes"])}


def cold(way: str, folder: Path, dtype: str, threads: int) -> dict[str, Any]:
    """:func:`score` from a cold cache, in a process of its own."""
    forget(folder)
    arguments = ("--way", way, "--checkpoint", folder, "--dtype", dtype, "--threads", threads)
    return common.in_child(__file__, *arguments)


def measure(
    folder: Path, config: LlamaConfig, dtype: str, threads: int, repeats: int
) -> list[dict[str, Any]]:
    """One row per way, of the median run by time."""
    layers = config.num_hidden_layers
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    compute = layers * layer_seconds(config.hidden_size, dtype)
    rows = []
    for way in WAYS:
        runs = []
        for _ in range(repeats):
            rate = bandwidth(folder)
            runs.append({"disk_rate": rate, **cold(way, folder, dtype, threads)})
        run = sorted(runs, key=lambda each: each["seconds"])[len(runs) // 2]
        best = run.get("weight_bytes", size) / run["disk_rate"] + compute
        rows.append(
            {
                "way": way,
                "layers": layers,
                "hidden_size": config.hidden_size,
                "dtype": dtype,
                "checkpoint_bytes": size,
                **run,
                "layers_seconds": compute,
                "wall_ratio": run["seconds"] / best,
                "seconds_of_runs": [each["seconds"] for each in runs],
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    size = rows[0]["checkpoint_bytes"] / 1e9
    table = Table(title=f"Scoring {ROWS} x {LENGTH} tokens with a checkpoint of {size:.2f} GB")
    columns = ("way", "peak memory", "read from disk", "disk", "compute", "wall", "of the best")
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['peak_kib'] * 1024 / 1e9:.2f} GB",
            f"{row['disk_bytes'] / 1e9:.2f} GB",
            f"{row['disk_rate'] / 1e9:.2f} GB/s",
            f"{row['layers_seconds']:.1f} s",
            f"{row['seconds']:.1f} s",
            f"{row['wall_ratio']:.2f}x",
        )
    Console().print(table)
    Console().print(
        f"limits: {MEMORY_LIMIT / 1e9:.0f} GB, {WALL_LIMIT}x (of the 7B shape, streamed)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="written if it is not there")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("bench_out/stream.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(score(options.way, options.checkpoint, options.dtype)))
        return
    if not (options.checkpoint / _INDEX).is_file():
        write_checkpoint(options.checkpoint, configuration(options.layers, options.hidden_size))
    config = LlamaConfig.from_pretrained(options.checkpoint)
    rows = measure(options.checkpoint, config, options.dtype, options.threads, options.repeats)
    common.write(options.out, "stream", rows)
    show(rows)


if __name__ == "__main__":
    main()
