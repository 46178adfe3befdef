"""attribute() on a Llama of random parameters, beside its backbone's own forward.

Wall time is the median ratio of interleaved pairs; peak memory is that of a process of its own.
Baselines are the scoring rules of FLAP (arXiv 2312.11983, running fluctuation) and Wanda
(arXiv 2306.11695, running row norm), written afresh as eager hooks on the same backbone forward.

    python benchmarks/bench_attribute.py --out bench_out/attribute.json
    python benchmarks/bench_attribute.py --dtype float32 --layers 4    # no bfloat16 arithmetic here
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ssah.attribution import METRICS, attribute
from ssah.units import find_modules

ROWS, LENGTH, VOCABULARY = 8, 256, 32_000
LIMITS = {"variance": 1.0, "norm": 1.0, "taylor": 2.5, "fisher": 2.5}
MEMORY_LIMIT = 1.1
KINDS = ("full", "ragged")
Batch = dict[str, Tensor]
Call = Callable[[int], Any]


def build_model(dtype: str, layers: int) -> PreTrainedModel:
    """A Llama with 16 heads of 64 and 8 key/value heads; 20 layers are 0.3 B parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def build_batches(n: int, ragged: bool) -> list[Batch]:
    """Right-padded batches; ``ragged`` rows are 50 to 100 % of the length."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        lengths = torch.full((ROWS,), LENGTH)
        if ragged:
            lengths[1:] = torch.randint(LENGTH // 2, LENGTH, (ROWS - 1,), generator=generator)
        mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def backbone(model: PreTrainedModel, batch: Batch) -> None:
    """The backbone's own forward: no vocabulary projection, no cache."""
    with torch.inference_mode():
        model.base_model(**batch, use_cache=False)


class Flap:
    """FLAP's running mean and fluctuation of one layer's input, in eager operations."""

    def __init__(self, columns: int) -> None:
        self.n = 0
        self.mean = torch.zeros(columns)
        self.fluctuation = torch.zeros(columns)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).t()  # [columns, tokens]
        rows = args[0].shape[0]
        before = self.mean.clone()
        self.mean *= self.n / (self.n + rows)
        self.mean += x.mean(dim=1) * rows / (self.n + rows)
        x = x.float()
        if self.n:
            self.fluctuation *= (self.n - 1) / (self.n + rows - 1)
        spread = (x - self.mean[:, None]) * (x - before[:, None])
        self.fluctuation += spread.sum(dim=1) / (self.n + rows)
        self.n += rows

    def score(self, weight: Tensor) -> Tensor:
        return self.fluctuation * weight.float().square().sum(dim=0)


class Wanda:
    """Wanda's running row norm of one layer's input, in eager operations."""

    def __init__(self, columns: int) -> None:
        self.n = 0
        self.row = torch.zeros(columns)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).t().float()  # [columns, tokens]
        rows = args[0].shape[0]
        self.row *= self.n / (self.n + rows)
        self.row += torch.linalg.vector_norm(x, dim=1) ** 2 / (self.n + rows)
        self.n += rows

    def score(self, weight: Tensor) -> Tensor:
        return (weight.float().abs() * self.row.sqrt()).sum(dim=0)


def eager(model: PreTrainedModel, batch: Batch, rule: type[Flap] | type[Wanda]) -> None:
    """Score every unit by ``rule``, with hooks on the same backbone forward."""
    found = find_modules(model)
    states = {name: rule(module.n_units) for name, module in found.items()}
    hooks = [module.down.register_forward_pre_hook(states[name]) for name, module in found.items()]
    backbone(model, batch)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        for name, module in found.items():
            weight = module.down.weight
            assert isinstance(weight, Tensor)
            states[name].score(weight)


def calls(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Call]:
    """What is compared, each on batch ``i``."""

    def turn(i: int) -> Batch:
        return batches[i % len(batches)]

    ours: dict[str, Call] = {
        metric: (lambda i, metric=metric: attribute(model, [turn(i)], metric=metric))
        for metric in METRICS
    }
    return {
        "backbone": lambda i: backbone(model, turn(i)),
        **ours,
        "flap": lambda i: eager(model, turn(i), Flap),
        "wanda": lambda i: eager(model, turn(i), Wanda),
    }


def kibibytes(field: str) -> int:
    """A memory figure of this process, e.g. ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(options: argparse.Namespace) -> None:
    """Print the resident memory before a call and its peak during it, in KiB, as JSON."""
    torch.set_num_threads(options.threads)
    model = build_model(options.dtype, options.layers)
    call = calls(model, build_batches(1, options.batches == "ragged"))[options.memory]
    call(0)
    before = kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call(0)
    print(json.dumps({"before": before, "peak": kibibytes("VmHWM")}))


def peak_memory(name: str, options: argparse.Namespace, ragged: bool) -> dict[str, int]:
    """:func:`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, "--threads", str(options.threads)]
    command += ["--dtype", options.dtype, "--layers", str(options.layers)]
    command += ["--batches", "ragged" if ragged else "full"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(options: argparse.Namespace, ragged: bool) -> list[dict[str, Any]]:
    """One row per call: wall-time ratio to the backbone's forward, and peak memory.

    Every call is timed in pairs with the backbone, with nothing else between them: what a third
    call leaves behind in the allocator would favour one of the two.
    """
    model = build_model(options.dtype, options.layers)
    n_parameters = sum(p.numel() for p in model.parameters())
    compared = calls(model, build_batches(3, ragged))
    memory = {name: peak_memory(name, options, ragged) for name in ("backbone", *options.only)}
    rows = []
    for name in options.only:
        pair = {each: compared[each] for each in ("backbone", name)}
        times = common.interleave(pair, repeats=options.repeats, warmup=1)
        rows.append(
            {
                "call": name,
                "ragged": ragged,
                "dtype": options.dtype,
                "parameters": n_parameters,
                "seconds": common.percentiles(times[name]),
                "backbone_seconds": common.percentiles(times["backbone"]),
                "wall_ratio": common.ratio(times, name, "backbone"),
                "wall_limit": LIMITS.get(name),
                "peak_kib": memory[name]["peak"],
                "backbone_peak_kib": memory["backbone"]["peak"],
                "memory_ratio": memory[name]["peak"] / memory["backbone"]["peak"],
                "memory_limit": MEMORY_LIMIT if LIMITS.get(name) == 1.0 else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"Scoring {ROWS} x {LENGTH} tokens, relative to the backbone's forward")
    for column in ("batch", "call", "wall", "limit", "p20-p80 s", "peak memory", "limit"):
        table.add_column(column, justify="left" if column in ("batch", "call") else "right")
    for row in rows:
        spread = row["seconds"]
        table.add_row(
            "ragged" if row["ragged"] else "full",
            row["call"],
            f"{row['wall_ratio']:.3f}x",
            "" if row["wall_limit"] is None else f"{row['wall_limit']:.1f}x",
            f"{spread['p20']:.2f}-{spread['p80']:.2f}",
            f"{row['memory_ratio']:.3f}x ({math.ceil(row['peak_kib'] / 1024)} MiB)",
            "" if row["memory_limit"] is None else f"{row['memory_limit']:.1f}x",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("bench_out/attribute.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[*METRICS, "flap", "wanda"])
    parser.add_argument("--batches", choices=[*KINDS, "both"], default="both")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options)
        return
    torch.set_num_threads(options.threads)
    kinds = KINDS if options.batches == "both" else (options.batches,)
    rows = [row for kind in kinds for row in measure(options, kind == "ragged")]
    common.write(options.out, "attribute", rows)
    show(rows)


if __name__ == "__main__":
    main()
