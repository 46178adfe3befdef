"""What a training step takes where nearly everything trains: `freeze` of 7.5 % of the units.

Forward, backward and update of a Llama with random bfloat16 weights, 0.3 B by default. Each arm
runs in a process of its own, one after the other: its peak memory is that of its tensors, without
what the imports take. Time is processor time, since the machine may have other work.

* torch: everything trains, torch's fused AdamW. Moments have the dtype of the weights.
* bitsandbytes, torchao: everything trains, moments of 8 bits, where the package is installed.
* plan: `ssah.freeze` and its optimiser, moments in bfloat16.
* in backward: the same, updated inside the backward pass.

Bytes a trained element, without activations: torch 2 + 2 + 4 (weight, gradient, moments), 8 bits
2 + 2 + 2, plan in the backward pass 2 + 0 + 4.

    python benchmarks/bench_memory.py --out bench_out/memory.json
    python benchmarks/bench_memory.py --layers 2 --hidden 256 --arms torch "in backward"
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ssah.training import freeze
from ssah.units import UnitSet, find_modules

FROZEN, LR, VOCABULARY = 0.075, 1e-5, 32_000
# Blocks of 64 KiB and more go straight back to the system: memory is what is live.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
Optimizer = torch.optim.Optimizer


def planned(**options: Any) -> Callable[[PreTrainedModel], Optimizer]:
    """A plan's own optimiser with these options, over 92.5 % of the units."""

    def make(model: PreTrainedModel) -> Optimizer:
        sizes = {name: module.n_units for name, module in find_modules(model).items()}
        units = UnitSet.random(round(FROZEN * sum(sizes.values())), sizes, seed=0)
        return freeze(model, units).optimizer(LR, **options)

    return make


def of_package(name: str) -> Callable[[PreTrainedModel], Optimizer]:
    """``AdamW8bit`` of another package's ``optim``."""

    def make(model: PreTrainedModel) -> Optimizer:
        optimizer: Optimizer = importlib.import_module(f"{name}.optim").AdamW8bit(
            model.parameters(), lr=LR
        )
        return optimizer

    return make


@dataclass(frozen=True)
class Arm:
    """A way of training, and the most that it may take of what torch takes.

    Attributes:
        make: the optimiser of a model.
        package: that must be installed.
        memory, time: limits of the ratios; None: another library's.
    """

    make: Callable[[PreTrainedModel], Optimizer]
    package: str = "torch"
    memory: float | None = None
    time: float | None = None


BF16 = torch.bfloat16
ARMS = {
    "torch": Arm(lambda model: torch.optim.AdamW(model.parameters(), lr=LR, fused=True)),
    "bitsandbytes": Arm(of_package("bitsandbytes"), "bitsandbytes"),
    "torchao": Arm(of_package("torchao"), "torchao"),
    "plan": Arm(planned(state_dtype=BF16), memory=1.0, time=1.0),
    "in backward": Arm(planned(state_dtype=BF16, in_backward=True), memory=0.85, time=1.0),
    "8 bit": Arm(planned(state_dtype="8bit"), memory=0.8, time=1.0),
    "8 bit in backward": Arm(planned(state_dtype="8bit", in_backward=True), memory=0.55, time=1.0),
}


def build(layers: int, hidden: int) -> PreTrainedModel:
    """A Llama of the shape of `benchmarks.models`: FFN 2.75 times as wide, 2 heads a key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        use_cache=False,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(previous)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Worker: steps of one arm; bytes at the peak and at rest, and processor seconds a step."""
    torch.set_num_threads(options.threads)
    arm = ARMS[options.serve]
    importlib.import_module(arm.package)
    imported = common.kibibytes("VmRSS")
    model = build(options.layers, options.hidden)
    optimizer = arm.make(model)
    generator = torch.Generator().manual_seed(1)
    seconds, gradients = [], 0
    for _ in range(options.steps):
        ids = torch.randint(0, VOCABULARY, (1, options.tokens), generator=generator)
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        seconds.append(time.process_time() - start)
    return {
        "peak": 1024 * (common.kibibytes("VmHWM") - imported),
        "gradients": gradients,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        # The first step makes the moments.
        "seconds": common.percentiles(seconds[1:]),
    }


def show(rows: dict[str, dict[str, Any]], title: str) -> None:
    """Print the table, with the limits beside what has one."""
    table = Table(title=title)
    for column in (
        "arm",
        "peak memory",
        "ratio (limit)",
        "gradients kept",
        "CPU s",
        "ratio (limit)",
    ):
        table.add_column(column)
    for name, row in rows.items():
        ratios = (
            f"{row[f'{what}_ratio']:.3f}" + ("" if limit is None else f" ({limit})")
            for what, limit in (("memory", ARMS[name].memory), ("time", ARMS[name].time))
        )
        memory, seconds = ratios
        table.add_row(
            name,
            f"{row['peak'] / 2**20:.0f} MiB",
            memory,
            f"{row['gradients'] / 2**20:.0f} MiB",
            f"{row['seconds']['p50']:.2f}",
            seconds,
        )
    Console(width=120).print(table)


def main() -> None:
    """Run the arms, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    installed = [name for name, arm in ARMS.items() if importlib.util.find_spec(arm.package)]
    parser.add_argument("--arms", nargs="+", choices=installed, default=installed)
    parser.add_argument("--serve", choices=installed, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        print(json.dumps(measure(args)))
        return
    os.environ.update(ALLOCATOR)
    shape = [f"--{key}={getattr(args, key)}" for key in ("layers", "hidden", "tokens", "steps")]
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(["torch", *args.arms]):  # every ratio is to torch
        rows[name] = row = common.in_child(
            __file__, "--serve", name, *shape, f"--threads={args.threads}"
        )
        row["memory_ratio"] = row["peak"] / rows["torch"]["peak"]
        row["time_ratio"] = row["seconds"]["p50"] / rows["torch"]["seconds"]["p50"]
    title = (
        f"{args.layers} layers of {args.hidden}, {args.tokens} tokens, bfloat16; ratios to torch"
    )
    show(rows, title)
    if args.out:
        limits = {name: {"memory": ARMS[name].memory, "time": ARMS[name].time} for name in rows}
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "serve")}
        written = [{"arm": name, **row, "limits": limits[name]} for name, row in rows.items()]
        common.write(args.out, "memory", [{"settings": settings}, *written])


if __name__ == "__main__":
    main()
