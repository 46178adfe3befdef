"""Gram matrices of projections that are asked for one after the other: as many as memory holds.

All Gram matrices of a model may take many times the memory of its weights. So they are made in
passes over the data, each for the next few projections in the order in which they will be asked
for. Example: of projections with 4, 4 and 8 inputs in float64 the matrices have 128, 128 and 512
bytes. Where 300 bytes are allowed, the first pass makes two of them, and the second one the third.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ssah.deltas.subspaces.gram_matrices import Gram, gram
from ssah.units import features

_AT_ONCE = 2**31  # bytes: all of a model with 100 M parameters, a layer of one with 7 billion


class GramPasses:
    """Gram matrices, in passes over the data."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Mapping[str, Any]],
        names: Iterable[str],
        *,
        tokens: str = "auto",
        at_once: int = _AT_ONCE,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model, loader, tokens: as of `gram`.
            names: of projections, in the order in which they will be asked for.
            at_once: bytes that matrices may take together; a larger one is alone.
        """
        self._model, self._loader, self._tokens = model, loader, tokens
        self._sets: list[list[str]] = []
        self._found: dict[str, Gram] = {}
        used = at_once
        for name in names:
            size = 8 * features(model.get_submodule(name))[0] ** 2  # float64
            if used + size > at_once:
                self._sets.append([])
                used = 0
            self._sets[-1].append(name)
            used += size

    def __getitem__(self, name: str) -> Gram:
        """The matrix of a projection. Errors as of `gram`.

        Raises:
            KeyError: it was not among the names.
        """
        if name not in self._found:
            own = [names for names in self._sets if name in names]
            if not own:
                raise KeyError(name)
            self._found = {}  # those of the last pass go before new ones are made
            self._found = gram(self._model, self._loader, own[0], tokens=self._tokens)
        return self._found[name]
