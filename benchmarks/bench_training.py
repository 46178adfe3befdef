"""A whole training step of a Llama of which 20 % of the units train, beside dense training.

Forward, backward and update of 4 x 256 tokens in float32, units drawn at random. Every variant
runs in a process of its own, which gives its peak memory; the steps of all are interleaved, and
times are ratios to "dense masked" in the same round.

* dense masked: gradients of everything, multiplied by masks, torch's fused AdamW, frozen entries
  put back (weight decay and momentum would move them).
* mask only: the same without putting them back: cheaper, and wrong.
* whole tensors off: "dense masked" where tensors of which nothing trains take no gradient.
* plan: `ssah.train_only` and its optimiser.
* dense: everything trains, without a mask, torch's fused AdamW.
* freeze: `ssah.freeze` of 7 % of the units and its optimiser; beside "dense".
* lora: peft, rank 16 on every linear layer of the decoder, fused AdamW.
* protected lora: the same, with 3 % of the units kept by `ssah.protect_adapter`; beside "lora".

All run under one allocator setting, blocks of 1 MiB and more going straight back to the system, so
that peak memory is what is live and not what the allocator keeps.

    python benchmarks/bench_training.py --out bench_out/training.json
    python benchmarks/bench_training.py --variants dense freeze
    python benchmarks/bench_training.py --variants lora "protected lora"
    python benchmarks/bench_training.py --variants "whole tensors off" "mask only" plan
    python benchmarks/bench_training.py --layers 4    # quicker; the 20 of the default are 0.3 B
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.models import LENGTH, build_model
from ssah.selections import select
from ssah.training import freeze, protect_adapter, train_only
from ssah.training.entries import select_entries
from ssah.units import UnitSet, find_modules

ROWS = 4
FRACTION, FROZEN, PROTECTED = 0.2, 0.07, 0.03
LORA, PROTECTED_LORA = "lora", "protected lora"
VARIANTS = (
    "dense masked",
    "mask only",
    "whole tensors off",
    "plan",
    "dense",
    "freeze",
    LORA,
    PROTECTED_LORA,
)
DEFAULT = ("dense masked", "plan", LORA)  # more at once do not fit 16 GiB
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
# What the second variant may take of what the first takes: time and memory.
LIMITS = {
    ("dense masked", "plan"): (0.78, 0.5),
    ("dense", "freeze"): (1.0, 1.0),
    (LORA, PROTECTED_LORA): (1.03, 1.03),
}
WARMUP = 1
Step = Callable[[], None]


def draw_units(model: PreTrainedModel, share: float = FRACTION) -> UnitSet:
    """A share of all units, at random."""
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    return UnitSet.random(round(share * sum(sizes.values())), sizes, seed=0)


def build_masks(model: PreTrainedModel, *, whole_off: bool) -> dict[Tensor, Tensor]:
    """Parameter -> bool mask of its shape, True where it trains."""
    units = draw_units(model)
    entries = select_entries(find_modules(model), select(model, units))
    masks = {}
    for name, parameter in model.named_parameters():
        trains, dim = entries[name].trains, entries[name].dim
        if whole_off and not trains.any():
            parameter.requires_grad_(False)
            continue
        shape = [1] * parameter.dim()
        shape[dim] = len(trains)
        masks[parameter] = trains.view(shape).expand_as(parameter).contiguous()
    return masks


def build_step(
    variant: str, model: PreTrainedModel, length: int = LENGTH
) -> tuple[Step, dict[str, int | float]]:
    """One training step of a variant on [ROWS, length], and the sizes of what it trains."""
    model.train()
    model.config.use_cache = False  # training needs no cache, which would count as memory
    masks: dict[Tensor, Tensor] = {}
    frozen: dict[Tensor, Tensor] = {}
    facts: dict[str, int | float] = {}
    optimizer: torch.optim.Optimizer
    if variant in ("plan", "freeze"):
        units = draw_units(model, FROZEN if variant == "freeze" else FRACTION)
        start = time.perf_counter()
        plan = freeze(model, units) if variant == "freeze" else train_only(model, units)
        facts["plan_seconds"] = time.perf_counter() - start
        optimizer = plan.optimizer(lr=1e-5)
    else:
        if variant in (LORA, PROTECTED_LORA):
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            units = draw_units(model, PROTECTED)
            model = get_peft_model(model, config)
            if variant == PROTECTED_LORA:
                facts["protected_parts"] = protect_adapter(model, units).parts
        elif variant != "dense":
            masks = build_masks(model, whole_off=variant == "whole tensors off")
            if variant != "mask only":
                frozen = {p: p.detach().clone() for p, mask in masks.items() if not mask.all()}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    facts["trained"] = sum(p.numel() for p in parameters)
    generator = torch.Generator().manual_seed(1)
    vocabulary, device = model.config.vocab_size, model.device

    def step() -> None:
        ids = torch.randint(0, vocabulary, (ROWS, length), generator=generator).to(device)
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)  # type: ignore[union-attr]
        facts["gradient_bytes"] = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        optimizer.step()
        with torch.no_grad():
            for parameter, values in frozen.items():
                torch.where(masks[parameter], parameter, values, out=parameter)
        facts["state_bytes"] = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )

    return step, facts


def serve(options: argparse.Namespace) -> None:
    """Worker: one step per line read, one JSON line back."""
    torch.set_num_threads(options.threads)
    imported = 1024 * common.kibibytes("VmHWM")
    step, facts = build_step(options.serve, build_model("float32", options.layers))
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        facts["cpu_seconds"] = time.process_time() - start
        peak = 1024 * common.kibibytes("VmHWM")
        print(json.dumps({**facts, "peak": peak, "imported": imported}), flush=True)


class Worker:
    """A variant in a process of its own."""

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        self.facts: dict[str, Any] = {}
        self.cpu_seconds: list[float] = []
        command = [sys.executable, __file__, "--serve", variant]
        command += ["--threads", str(options.threads), "--layers", str(options.layers)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ALLOCATOR},
        )
        self._read()

    def _read(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with status {self.process.wait()}")
        self.facts = json.loads(line)

    def __call__(self, _: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._read()
        self.cpu_seconds.append(self.facts["cpu_seconds"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def record_of(
    workers: Mapping[str, Worker], times: dict[str, list[float]], base: str
) -> dict[str, dict[str, Any]]:
    """What is written of each variant: its sizes, and ratios to ``base``."""
    # Of the process alone: another measure of the same ratio where the machine is shared.
    cpu_times = {variant: worker.cpu_seconds[WARMUP:] for variant, worker in workers.items()}
    rows = {}
    for variant, worker in workers.items():
        facts = {name: value for name, value in worker.facts.items() if name != "cpu_seconds"}
        rows[variant] = {
            **facts,
            "time_ratio": common.ratio(times, variant, base),
            "cpu_time_ratio": common.ratio(cpu_times, variant, base),
            "memory_ratio": facts["peak"] / workers[base].facts["peak"],
            "seconds": common.percentiles(times[variant]),
        }
    return rows


def show(rows: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("variant", "time", "cpu time", "peak memory"):
        table.add_column(column)
    for column in ("trained", "gradients", "state", "seconds"):
        table.add_column(column)
    for variant, row in rows.items():
        table.add_row(
            variant,
            f"{row['time_ratio']:.3f}",
            f"{row['cpu_time_ratio']:.3f}",
            f"{row['memory_ratio']:.3f} ({row['peak'] / 2**30:.2f} GiB)",
            f"{row['trained'] / 1e6:.1f} M",
            f"{row['gradient_bytes'] / 2**20:.0f} MiB",
            f"{row['state_bytes'] / 2**20:.0f} MiB",
            f"{row['seconds']['p50']:.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Run the variants, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT)
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    workers = {variant: Worker(variant, args) for variant in args.variants}
    times = common.interleave(dict(workers), repeats=args.repeats, warmup=WARMUP)
    for worker in workers.values():
        worker.close()
    base = args.variants[0]
    rows = record_of(workers, times, base)
    record: dict[str, Any] = {"facts": common.facts(), "threads": args.threads}
    record |= {"layers": args.layers, "variants": rows}
    show(rows, f"training step, {args.layers} layers, {ROWS} x {LENGTH} tokens, ratios to {base}")
    for (first, variant), (seconds, memory) in LIMITS.items():
        if base == first and variant in rows:
            record["limits"] = {"time": seconds, "memory": memory}
            print(
                f"{variant}: time {rows[variant]['time_ratio']:.3f}, processor time "
                f"{rows[variant]['cpu_time_ratio']:.3f} (at most {seconds}), "
                f"memory {rows[variant]['memory_ratio']:.3f} (at most {memory})"
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
