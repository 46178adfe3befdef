"""The card of an exported adapter: what it is, which ranks it has, and how exact it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ssah.version import __version__

# What vLLM takes as --max-lora-rank.
SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        base_model: name of the base model; of a folder its last part.
        ranks: module -> the rank of its adapter.
        biases: modules whose bias changed.
        changed: how many elements of weights and biases changed.
        inexact: of how many, base and change added and rounded to the weight's dtype are not the
            tuned value bit for bit.
        error: the largest difference among these.
        dtype: of the weights, e.g. ``"bfloat16"``.
    """

    base_model: str
    ranks: dict[str, int]
    biases: tuple[str, ...]
    changed: int
    inexact: int
    error: float
    dtype: str

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values())

    @property
    def served_rank(self) -> int | None:
        """The least ``--max-lora-rank`` with which vLLM serves it; None where it does not."""
        return next((rank for rank in SERVED if rank >= self.rank), None)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, with ``rank``."""
        return {**asdict(self), "biases": list(self.biases), "rank": self.rank}


def card(made: LoraExport) -> str:
    """``README.md``, as the Hugging Face Hub shows it. It names no path of this machine."""
    rows = "\n".join(
        f"| `{name}` | {len(ranks)} | {min(ranks)} to {max(ranks)} |"
        for name, ranks in sorted(_by_kind(made).items())
    )
    return f"""---
base_model: {made.base_model}
library_name: peft
tags:
- lora
- ssah
---

# Adapter of {made.base_model}

This LoRA adapter was written by ssah {__version__}. It changes
{made.changed:,} elements of {len(made.ranks)} projections, and nothing else. One of its two
matrices is one-hot and the other one is the change itself, so that it is no approximation.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this folder")  # model: {made.base_model}, {made.dtype}
```

{_exactness(made)}

{_serving(made)}

| projection | how many | rank |
|---|---|---|
{rows}

`rank_pattern` in `adapter_config.json` has the rank of each.
"""


def _by_kind(made: LoraExport) -> dict[str, list[int]]:
    """Name with stars for the numbers of layers -> ranks."""
    # A line for each of 30 layers would hide what there is to see.
    kinds: dict[str, list[int]] = {}
    for name, rank in made.ranks.items():
        parts = ("*" if part.isdigit() else part for part in name.split("."))
        kinds.setdefault(".".join(parts), []).append(rank)
    return kinds


def _exactness(made: LoraExport) -> str:
    if not made.inexact:
        what = "every changed element is the tuned one, bit for bit."
    else:
        what = (
            f"{made.inexact:,} of {made.changed:,} changed elements are not the tuned ones bit for "
            f"bit. The largest difference is {made.error:.1e}."
        )
    return (
        f"Merged into the base model in {made.dtype}, {what} Unmerged, sums are made in another "
        "order."
    )


def _serving(made: LoraExport) -> str:
    text = (
        f"The largest rank is {made.rank}. vLLM serves ranks up to 512: start it with "
        f"`--enable-lora --max-lora-rank {made.served_rank}`."
        if made.served_rank is not None
        else f"The largest rank is {made.rank}, and vLLM serves ranks up to 512 alone: merge first."
    )
    if made.biases:
        text += (
            f" {len(made.biases)} biases changed too (`lora_bias`), which vLLM does not take, and "
            "which PEFT merges only where every adapted projection has a bias."
        )
    return text
