"""The card of an adapter that was written: what it is, which ranks it has, and how exact it is."""

from __future__ import annotations

from collections.abc import Mapping
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
        return _served(self.rank)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, with ``rank``."""
        return {**asdict(self), "biases": list(self.biases), "rank": self.rank}


def exported_card(made: LoraExport) -> str:
    """``README.md`` of what `ssah.export_lora` wrote."""
    what = (
        f"It changes {made.changed:,} elements of {len(made.ranks)} projections, and nothing "
        "else. One of its two matrices is one-hot and the other one is the change itself, so that "
        "it is no approximation."
    )
    if not made.inexact:
        exact = "every changed element is the tuned one, bit for bit."
    else:
        exact = (
            f"{made.inexact:,} of {made.changed:,} changed elements are not the tuned ones bit for "
            f"bit. The largest difference is {made.error:.1e}."
        )
    exact = (
        f"Merged into the base model in {made.dtype}, {exact} Unmerged, sums are made in another "
        "order."
    )
    ranks = made.ranks
    return adapter_card(made.base_model, made.dtype, ranks, what, exact, n_biases=len(made.biases))


def adapter_card(
    base_model: str,
    dtype: str,
    ranks: Mapping[str, int],
    what: str,
    exact: str,
    *,
    n_biases: int = 0,
) -> str:
    """``README.md`` of an adapter, as the Hugging Face Hub shows it.

    Args:
        base_model: what the base model is called, no path of this machine.
        dtype: of its weights, e.g. ``"bfloat16"``.
        ranks: module -> the rank of its adapter.
        what, exact: what the adapter changes, and how exactly: full sentences.
        n_biases: how many biases it changes.
    """
    rows = "\n".join(
        f"| `{name}` | {len(own)} | {min(own)} to {max(own)} |"
        for name, own in sorted(_by_kind(ranks).items())
    )
    return f"""---
base_model: {base_model}
library_name: peft
tags:
- lora
- ssah
---

# Adapter of {base_model}

This LoRA adapter was written by ssah {__version__}. {what}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this folder")  # model: {base_model}, {dtype}
```

{exact}

{_serving(max(ranks.values()), n_biases)}

| projection | how many | rank |
|---|---|---|
{rows}

`rank_pattern` in `adapter_config.json` has the rank of each.
"""


def _by_kind(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    """Name with stars for the numbers of layers -> ranks."""
    # A line for each of 30 layers would hide what there is to see.
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        parts = ("*" if part.isdigit() else part for part in name.split("."))
        kinds.setdefault(".".join(parts), []).append(rank)
    return kinds


def _served(rank: int) -> int | None:
    """The least ``--max-lora-rank`` of vLLM that takes ``rank``; None where none does."""
    return next((each for each in SERVED if each >= rank), None)


def _serving(rank: int, n_biases: int) -> str:
    served = _served(rank)
    text = (
        f"The largest rank is {rank}. vLLM serves ranks up to {SERVED[-1]}: start it with "
        f"`--enable-lora --max-lora-rank {served}`."
        if served is not None
        else f"The largest rank is {rank}, and vLLM serves ranks up to {SERVED[-1]} alone: merge "
        "first."
    )
    if n_biases:
        text += (
            f" {n_biases} biases changed too (`lora_bias`), which vLLM does not take, and "
            "which PEFT merges only where every adapted projection has a bias."
        )
    return text
