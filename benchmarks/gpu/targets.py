"""What is asked of the GPU side, and where a record has what was reached.

The sizes are those of Llama-3-8B: 470 MB are an activation of 16,384 tokens, 90 MB one of 3,072.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """At least a share, or at most so many times.

    Attributes:
        what: for people.
        stage, piece, figure, entry: where it is in a record, with {backend} where names have it.
        bound: what is asked.
        at_least: or at most.
    """

    what: str
    stage: str
    piece: str
    figure: str
    entry: str
    bound: float
    at_least: bool = True

    @property
    def asked(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:.2f}"

    def reached(self, done: Mapping[str, Mapping[str, Any]], backend: str) -> float | None:
        """What a backend reached, of the stage's pieces; None if it was not measured."""
        figures = done.get(self.piece.format(backend=backend), {}).get(self.figure, {})
        found: float | None = figures.get(self.entry.format(backend=backend))
        return found

    def met(self, reached: float) -> bool:
        return reached >= self.bound if self.at_least else reached <= self.bound


def _operator(op: str, megabytes: int, tokens: int, bound: float) -> Target:
    what = f"`{op}`, {megabytes} MB: share of a copy's bandwidth"
    piece = f"{op}, Llama-3-8B, {tokens} tokens"
    return Target(what, "operators", piece, "of_copy", "{backend}", bound)


def _adamw(what: str, piece: str, figure: str, bound: float, at_least: bool) -> Target:
    return Target(
        f"`MaskedAdamW`{what}", "optimisers", piece, figure, "MaskedAdamW", bound, at_least
    )


def _scoring(size: str) -> Target:
    what = f"`attribute`, {size}: times the backbone's forward"
    piece, figure = f"{{backend}} {size}", "over_backbone"
    return Target(what, "attribute", piece, figure, "variance", 1.0, at_least=False)


TARGETS = (
    _operator("channel_moments_", 470, 16_384, 0.85),
    _operator("channel_moments_", 90, 3_072, 0.75),
    _operator("gated_moments", 470, 16_384, 0.88),
    _adamw(": share of a copy's bandwidth", "{backend} step", "of_copy", 0.85, True),
    _adamw(
        ", many small tensors: times torch's fused step",
        "{backend} many tensors",
        "over_fused",
        1.0,
        False,
    ),
    _scoring("1 B"),
    _scoring("8 B"),
)
