"""Scoring beside the backbone's forward, and a training step with a fifth of the units.

Weights are random, because no time depends on them. Batches lie on the device already: what is
compared is the forward pass of the decoder and the same with every unit's scores.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.bench_attribute import backbone
from benchmarks.bench_training import build_step
from benchmarks.gpu.checks import serving
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.staged import Piece, Record
from benchmarks.models import ROWS, build_batches, build_model
from benchmarks.shapes import Shape
from ssah.attribution import attribute
from ssah_kernels import backends, timing

METRICS = ("variance", "norm")  # those of one forward pass
BATCHES = 2
VARIANTS = ("dense", "plan", "freeze")  # of bench_training: all, 20 % of the units, all but 7 %
BACKBONE, DTYPE = "backbone", "bfloat16"


def scoring(scope: Scope, _: Record) -> Iterator[Piece]:
    for name, shape in scope.models.items():
        for backend in serving(scope):
            yield f"{backend} {name}", partial(scored, scope, backend, shape)


def scored(scope: Scope, backend: str, shape: Shape) -> dict[str, Any]:
    """Seconds of scoring ``BATCHES`` batches under a metric, and times the backbone's forward."""
    short = lacks_memory(scope, shape)
    if short is not None:
        return {"skipped": short}
    model = model_on(scope, shape)
    batches = [
        {name: tensor.to(scope.device) for name, tensor in batch.items()}
        for batch in build_batches(BATCHES, False, scope.length, shape.vocabulary)
    ]

    def forward() -> None:
        for batch in batches:
            backbone(model, batch)

    functions = {BACKBONE: forward}
    functions |= {metric: partial(attribute, model, batches, metric=metric) for metric in METRICS}
    device = torch.device(scope.device)
    calls = {name: timing.repeated(function, [()], device) for name, function in functions.items()}
    with backends.use(backend):
        seconds = timing.interleave(calls, repeats=min(scope.rounds, 5), warmup=1)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": BATCHES * ROWS * scope.length,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "over_backbone": {name: timing.ratio(seconds, name, BACKBONE) for name in METRICS},
    }


def model_on(scope: Scope, shape: Shape) -> PreTrainedModel:
    """A model that is made where it is to be: 8 B random numbers take a CPU a minute."""
    with torch.device(scope.device):
        return build_model(DTYPE, shape.layers, shape)


def lacks_memory(scope: Scope, shape: Shape) -> str | None:
    """Why the model does not fit the GPU, with a half of its size for what it computes."""
    if scope.device == "cpu":
        return None
    give_back()
    with torch.device("meta"):
        weights = sum(p.nbytes for p in build_model(DTYPE, shape.layers, shape).parameters())
    free, needed = torch.cuda.mem_get_info()[0], 1.5 * weights + (4 << 30)
    if free >= needed:
        return None
    return f"it needs {needed / 2**30:.0f} GiB and {free / 2**30:.0f} are free"


def give_back() -> None:
    """Give the memory of models that are gone back to the GPU, and look for a new peak."""
    gc.collect()  # a model and its hooks refer to each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def training(scope: Scope, _: Record) -> Iterator[Piece]:
    shape = next(iter(scope.models.values()))
    for variant in VARIANTS:
        yield variant, partial(trained, scope, variant, shape)


def trained(scope: Scope, variant: str, shape: Shape) -> dict[str, Any]:
    """Seconds of a step, its peak memory on a GPU, and what it trains."""
    if scope.device == "cuda":
        give_back()
    step, facts = build_step(variant, model_on(scope, shape), scope.length)
    call = timing.repeated(step, [()], torch.device(scope.device))
    times = timing.interleave({variant: call}, repeats=min(scope.rounds, 5), warmup=2)
    found = {**facts, "seconds": median(times[variant])}
    if scope.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found
