"""Moments of every row by itself, so that scores of any set of rows need no further pass.

Rows i have n_i tokens, a mean mu_i and a sum of squared deviations M_i at each unit. Of all rows of
a set, N = sum n_i, mu = sum n_i mu_i / N and, by Chan's formula for all of them at once,

    variance = (sum M_i + sum n_i (mu_i - mu)^2) / (N - 1)

For example, the activations 1, 3 of one row and 5, 7, 9 of another: n = 2, 3, mu_i = 2, 7 and
M_i = 2, 8. Then mu = 5, and (2 + 8 + 2 * 9 + 3 * 4) / 4 = 10, the variance of 1, 3, 5, 7, 9.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssah.attribution import BatchReader, column_sq_norms, new_sums, watching
from ssah.data import Collator, Encoded
from ssah.models import as_it_was
from ssah.storage import load_tensors, save_tensors
from ssah.units import find_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KINDS = ("count", "mean", "m2", "norms")


@dataclass(frozen=True, eq=False)
class RowMoments:
    """What enters every B, row by row. All tensors are float64 on the CPU, B's name -> tensor.

    Attributes:
        count: ``[rows]``, tokens counted.
        mean, m2: ``[rows, n_units]``, mean of the activation over these tokens, and sum of squared
            deviations from it.
        norms: ``[n_units]``, squared norms of B's columns.
    """

    count: dict[str, Tensor]
    mean: dict[str, Tensor]
    m2: dict[str, Tensor]
    norms: dict[str, Tensor]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.count.values())))

    def scores(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Importance of every unit (the metric ``"variance"``) over the tokens of some rows.

        Equal to one pass over these rows but for rounding in float64.

        Args:
            rows: int64 ``[n]``, their indices; None: all.

        Returns:
            B's name -> float64 ``[n_units]``.
        """
        found = {}
        for name, counts in self.count.items():
            chosen = slice(None) if rows is None else rows
            n, mean = counts[chosen], self.mean[name][chosen]  # [rows], [rows, n_units]
            total = n.sum()
            if total < 2:  # an expert that these rows hardly reached
                found[name] = torch.zeros_like(self.norms[name])
                continue
            deviation = mean - (n @ mean) / total  # [rows, n_units] less [n_units]
            m2 = self.m2[name][chosen].sum(0) + n @ deviation.square_()  # [n_units]
            found[name] = m2 / (total - 1) * self.norms[name]
        return found

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write to ``directory``: whole, or not at all."""
        tensors = {f"{kind}/{n}": t for kind in _KINDS for n, t in getattr(self, kind).items()}
        save_tensors(directory, tensors, {"content": "row moments", "modules": list(self.count)})

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> RowMoments:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(directory)
        return cls(*({n: tensors[f"{kind}/{n}"] for n in meta["modules"]} for kind in _KINDS))


def row_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Encoded],
    *,
    tokens: str = "labels",
    advance: Callable[[int], None] = lambda done: None,
) -> RowMoments:
    """One pass over encoded rows, each a batch by itself. Memory: 16 bytes a unit and row.

    Args:
        model: of a known family; it is left as it was.
        tokenizer: the model's.
        examples: the rows.
        tokens: which positions count, ``"labels"`` or ``"all"``, as in :func:`ssah.attribute`.
        advance: called with the number of rows done.

    Raises:
        FloatingPointError: an activation is NaN or infinite; the row is named.
    """
    modules = find_modules(model)
    shape = {name: (len(examples), module.n_units) for name, module in modules.items()}
    found = RowMoments(
        {name: torch.zeros(len(examples), dtype=torch.float64) for name in modules},
        {name: torch.zeros(shape[name], dtype=torch.float64) for name in modules},
        {name: torch.zeros(shape[name], dtype=torch.float64) for name in modules},
        {name: column_sq_norms(module) for name, module in modules.items()},
    )
    sums = new_sums(modules)
    collator = Collator(tokenizer)
    reader = BatchReader(model, tokens=tokens)
    with (
        as_it_was(model),
        watching(modules, sums, gradient=False) as watch,
    ):
        for row, example in enumerate(examples):
            batch = reader.read(collator([example]), row)
            watch.read(batch)
            with torch.inference_mode():  # the backbone alone: no score needs the vocabulary
                model.base_model(**batch.inputs, use_cache=False)
            for name, state in sums.items():
                # State of this row alone, because it was zeroed after the row before.
                found.count[name][row] = state.count.cpu()
                found.mean[name][row] = state.mean.cpu()
                found.m2[name][row] = state.m2.cpu()
                if not bool(found.m2[name][row].isfinite().all()):
                    raise FloatingPointError(
                        f"activations that enter {name!r} are NaN or infinite in row {row}"
                    )
                for tensor in (state.count, state.mean, state.m2):
                    tensor.zero_()
            advance(row + 1)
    return found
