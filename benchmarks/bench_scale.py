"""How long many modules take: 12,000 experts of 18 million units, and the experts of one layer.

    python benchmarks/bench_scale.py --out scale.json
    python benchmarks/bench_scale.py --routing --out routing.json

Scores are random numbers of as many modules and units as Qwen3-235B-A22B has (94 layers of 128
experts of 1,536 units). Ablating and freezing run on a mixture with as many experts, each of which
is tiny: what takes time there is the work per module, not the weights. Every row is the median of
three calls.

With ``--routing``, tokens run through layers of few and of many experts. Rows are ratios to a loop
over the experts, :func:`one_by_one`: of a pass of the model, and of a step that trains it all. Each
is the median of five, on one thread, and they are timed in turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ssah
from benchmarks import common
from ssah.attribution import new_sums, watching

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


# Experts, units of one, experts of a token: of hidden size 512, 256 tokens in 2 layers.
ROUTED = ((8, 768, 2), (64, 192, 8))


def routed(n_experts: int, units: int, top_k: int, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """A mixture of random weights."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=64,
        moe_intermediate_size=units,
        num_hidden_layers=2,
        num_experts=n_experts,
        num_experts_per_tok=top_k,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
    )
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def one_by_one(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The forward pass of ``experts``, with a product of each; all ``[tokens, ...]``."""
    out = torch.zeros_like(x)
    matrices = zip(experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True)
    for expert, (up, down) in enumerate(matrices):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        gate, product = F.linear(x[token], up).chunk(2, dim=-1)
        own = F.linear(F.silu(gate) * product, down) * weights[token, place, None]
        out.index_add_(0, token, own.to(out.dtype))
    return out


def in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median of each call's seconds over the first one's, called in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(6):  # the first warms up
        for name, call in calls.items():
            seconds[name].append(timed(call, 1))
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(own / loop for own, loop in zip(each[1:], first[1:], strict=True))
        for name, each in seconds.items()
    }


def on_routing(n_experts: int, units: int, top_k: int, dtype: torch.dtype) -> dict[str, float]:
    """Ratios to the loop over experts: a scored pass, and a step under a plan."""
    torch.manual_seed(0)
    model = routed(n_experts, units, top_k, dtype)
    ids = torch.randint(0, 256, (2, 128))
    modules = ssah.find_modules(model)
    modules = {name: module for name, module in modules.items() if module.expert is not None}

    looped = copy.deepcopy(model)
    for layer in looped.model.layers:
        layer.mlp.experts.forward = partial(one_by_one, layer.mlp.experts)

    def run(model: Qwen3MoeForCausalLM) -> None:
        with torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)

    def scored() -> None:
        with watching(modules, new_sums(modules), gradient=False):
            run(model)

    def step(model: Qwen3MoeForCausalLM) -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    passes = {"loop": lambda: run(looped), "transformers": lambda: run(model), "scored": scored}
    found = {f"pass, {name}": ratio for name, ratio in in_turns(passes).items()}
    for share in (0.2, 0.8):
        sizes = {name: module.n_units for name, module in modules.items()}
        chosen = ssah.UnitSet.random(int(share * sum(sizes.values())), sizes)
        with ssah.train_only(model, chosen):
            ratio = in_turns({"loop": lambda: step(looped), "plan": lambda: step(model)})["plan"]
        found[f"step, {share:.0%} of the units train"] = ratio
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--routing", action="store_true", help="the experts of one layer")
    arguments = parser.parse_args()
    if arguments.routing:
        torch.set_num_threads(1)
        rows = []
        for shape in ROUTED:
            for dtype in (torch.float32, torch.bfloat16):
                ratios = on_routing(*shape, dtype)
                print(f"{shape[0]} experts of {shape[1]} units, {dtype}")
                for name, value in ratios.items():
                    print(f"    {name:32} {value:6.2f}")
                rows.append({"experts": shape, "dtype": str(dtype), "ratios": ratios})
        if arguments.out is not None:
            common.write(arguments.out, "routing", rows)
        return
    seconds = on_scores() | on_a_model()
    for name, value in seconds.items():
        print(f"{name:20} {value:8.3f} s")
    if arguments.out is not None:
        modules = LAYERS * EXPERTS
        row = {"modules": modules, "units": modules * UNITS, "seconds": seconds}
        common.write(arguments.out, "scale", [row])


if __name__ == "__main__":
    main()
