"""How much the stages measure: everything on a GPU, or a little of everything on the CPU.

Sizes are those of three models, because a kernel that is good at one width may be poor at another:
the activation that enters down of Llama-3-8B is [tokens, 14336], 470 MB in bfloat16 for 16,384
tokens and 88 MB for 3,072. This file needs Python alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.shapes import GEMMA_12B, LLAMA_1B, LLAMA_8B, QWEN_14B, Shape

# What is checked of an operator: samples of its OpCase in tests/cases.py, and what a GPU can do.
SAMPLES = ("samples", "far", "extreme_of_float32")
SIDE_STREAM, SECOND_DEVICE, CAPTURED = "side stream", "second device", "graph capture"

_TINY = Shape(64, 176, 1, heads=4, key_value_heads=2, head_dim=16, vocabulary=256)


@dataclass(frozen=True)
class Scope:
    """What is checked and timed.

    Attributes:
        device: where tensors are: "cuda", or "cpu" for a dry run.
        backends: those that may serve it, the preferred one first.
        checked: operators that are compared with the reference; None for all.
        dtypes: in which they are.
        wide: columns of the call that compute-sanitizer watches.
        shapes: models whose widths the operators are timed at.
        tokens: rows of an activation [tokens, units].
        burst: bytes that an operator moves between two looks at the clock.
        copied: bytes of the device copy that it is compared with; it reads and writes them.
        cache: bytes that a cache may hold; inputs rotate through twice that.
        rounds: in which every implementation has its turn.
        compiled: whether torch.compile is measured too.
        models: what is scored, by the number of their parameters; the first one is trained too.
        length: tokens of a row of their batches.
        layers: of the parameters that the optimisers update.
        small: tensors whose update is bound by Python.
    """

    device: str
    backends: tuple[str, ...]
    checked: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    wide: int
    shapes: Mapping[str, Shape]
    tokens: tuple[int, ...]
    burst: int
    copied: int
    cache: int
    rounds: int
    compiled: bool
    models: Mapping[str, Shape]
    length: int
    layers: int
    small: int


FULL = Scope(
    device="cuda",
    backends=("cuda", "triton"),
    checked=None,
    dtypes=("float64", "float32", "bfloat16", "float16"),
    wide=11_008,
    shapes={"Llama-3-8B": LLAMA_8B, "Qwen3-14B": QWEN_14B, "Gemma-3-12B": GEMMA_12B},
    tokens=(16_384, 3_072),
    burst=8 << 30,  # some 2 ms
    copied=1 << 30,
    cache=64 << 20,
    rounds=11,
    compiled=True,
    models={"1 B": LLAMA_1B, "8 B": LLAMA_8B},
    length=2048,
    layers=2,
    small=450,
)
DRY = Scope(
    device="cpu",
    backends=("cpu",),
    checked=("channel_moments_", "masked_grad_norm"),
    dtypes=("float32",),
    wide=192,
    shapes={"tiny": _TINY},
    tokens=(48, 16),
    burst=1,
    copied=1 << 16,
    cache=0,
    rounds=2,
    compiled=False,
    models={"tiny": _TINY},
    length=8,
    layers=1,
    small=3,
)
