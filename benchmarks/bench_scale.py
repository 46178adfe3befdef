"""How long Python takes over many modules: 12,000 experts, 18 million units.

    python benchmarks/bench_scale.py --out scale.json

Scores are random numbers of as many modules and units as Qwen3-235B-A22B has (94 layers of 128
experts of 1,536 units). Ablating and freezing run on a mixture with as many experts, each of which
is tiny: what takes time there is the work per module, not the weights. Every row is the median of
three calls.
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
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ssah
from benchmarks import common

LAYERS, EXPERTS, UNITS = 94, 128, 1536
SHARES = {"scu": 0.008, "ucu": 0.008, "ru": 0.15}


def timed(call: Callable[[], Any], times: int = 3) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def scores(seed: int) -> dict[str, torch.Tensor]:
    """Random scores of each expert, float64 [UNITS]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.down_proj": torch.rand(
            UNITS, generator=generator, dtype=torch.float64
        )
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }


def on_scores() -> dict[str, float]:
    """Seconds of grouping and of the algebra of sets, on 18.5 million units."""
    safety, utility = scores(1), scores(2)
    found = {"classify": timed(lambda: ssah.classify(safety, utility, **SHARES))}
    groups = ssah.classify(safety, utility, **SHARES)
    found["groups.top"] = timed(lambda: groups.top("cu", 0.06))
    scu, cu = groups["scu"], groups["cu"]
    found["scu | cu"] = timed(lambda: scu | cu)
    found["scu & cu"] = timed(lambda: scu & cu)
    found["cu - scu"] = timed(lambda: cu - scu)
    found["complement"] = timed(scu.complement)
    found["UnitSet.random"] = timed(lambda: ssah.UnitSet.random(scu))
    found["transfer"] = timed(lambda: ssah.transfer(groups, groups))
    return found


def tiny() -> Qwen3MoeForCausalLM:
    """A mixture with 12,032 experts of 32 units."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return Qwen3MoeForCausalLM(config).eval()


def on_a_model() -> dict[str, float]:
    """Seconds of what changes a model with as many experts."""
    model = tiny()
    found = {"find_modules": timed(lambda: ssah.find_modules(model))}
    sizes = {name: module.n_units for name, module in ssah.find_modules(model).items()}
    units = ssah.UnitSet.random(sum(sizes.values()) // 100, sizes)
    # Entering and leaving change the model back and forth: each is timed by itself.
    entering, leaving = [], []
    for _ in range(3):
        start = time.perf_counter()
        block = ssah.ablate(model, units)
        block.__enter__()
        entering.append(time.perf_counter() - start)
        start = time.perf_counter()
        block.__exit__(None, None, None)
        leaving.append(time.perf_counter() - start)
    found["ablate, entering"] = statistics.median(entering)
    found["ablate, leaving"] = statistics.median(leaving)
    start = time.perf_counter()
    plan = ssah.freeze(model, units)
    found["freeze"] = time.perf_counter() - start
    found["plan.verify"] = timed(plan.verify, 1)
    found["plan.close"] = timed(plan.close, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    arguments = parser.parse_args()
    seconds = on_scores() | on_a_model()
    for name, value in seconds.items():
        print(f"{name:20} {value:8.3f} s")
    if arguments.out is not None:
        modules = LAYERS * EXPERTS
        row = {"modules": modules, "units": modules * UNITS, "seconds": seconds}
        common.write(arguments.out, "scale", [row])


if __name__ == "__main__":
    main()
