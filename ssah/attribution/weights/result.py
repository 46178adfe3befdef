"""``WeightAttribution``: scores of single weights, in memory or in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torch import Tensor, nn

from ssah.attribution.weights.choosing import choose
from ssah.attribution.weights.matrices import find_matrices
from ssah.choices import Per, WeightMetric, check_choice
from ssah.models import check_whole
from ssah.storage import FORMAT, META, TEXT, Fields, LazyTensors, check_fields, save_tensors
from ssah.units import BitMask, check_same_model
from ssah.version import __version__

WEIGHT_METRICS: tuple[str, ...] = get_args(WeightMetric)
WEIGHT_CONTENT = "weight_attribution"  # of a folder with scores of weights
_PER: tuple[str, ...] = get_args(Per)
_FIELDS: Fields = {
    "version": str,
    "metric": str,
    "tokens": TEXT,
    "count": int,
    "transposed": list,
    "model_name": str,
    "units_hash": str,
    "weights_hash": TEXT,
    "data_fingerprint": TEXT,
}


@dataclass(frozen=True, eq=False, repr=False)
class WeightAttribution:
    """Importance of every single weight of a model's matrices on one data set.

    Attributes:
        scores: name of a parameter -> float32 of its shape on the CPU, 0 or more, in the order of
            the model. Of a result in a folder each is read when it is asked for.
        metric: ``"snip"``, ``"wanda"``, ``"magnitude"`` or ``"fisher"``.
        tokens: which positions counted, as in `Attribution`; of a gradient, which ones were to be
            predicted, ``"labels"`` or ``"all"``; None for magnitudes.
        count: how many tokens (wanda) or examples (snip, fisher) there were; 0 for magnitudes.
        transposed: the parameters whose last two dimensions are ``[in, out]``, all others being
            ``[out, in]``.
        model_name: hub id, path or class of the model.
        units_hash: of its units, see `ssah.units.units_hash`.
        weights_hash: of the weights; None of models whose weights are elsewhere.
        data_fingerprint: of the loader, or of the tokens and labels seen; None for magnitudes.
        version: of this library.
    """

    scores: Mapping[str, Tensor]
    metric: str
    tokens: str | None
    count: int
    transposed: tuple[str, ...]
    model_name: str
    units_hash: str
    weights_hash: str | None
    data_fingerprint: str | None
    version: str = __version__

    def __repr__(self) -> str:
        # Without the tensors, which a result in a folder would have to read.
        data = None if self.data_fingerprint is None else self.data_fingerprint[:12]
        return (
            f"WeightAttribution({self.metric!r} of {len(self.scores)} parameters, "
            f"model={self.model_name!r}, data={data!r})"
        )

    def top(self, share: float, per: str = "matrix") -> dict[str, BitMask]:
        """The weights with the highest scores.

        Args:
            share: of the weights, from 0 to 1: floor(share * n + 0.5) of n.
            per: what they are ranked with: ``"row"``, the weights of one output; ``"matrix"``,
                those of one matrix, of experts each its own; ``"model"``, all that were scored.

        Returns:
            Name of a parameter -> its weights. Of equal scores the lower index is taken: that of
            the input in a row, else the place in the parameter, earlier parameters first.

        Raises:
            ValueError: ``share`` or ``per`` is none.
        """
        return self._choose(share, per, lowest=False)

    def bottom(self, share: float, per: str = "matrix") -> dict[str, BitMask]:
        """The weights with the lowest scores; arguments, result and errors as of :meth:`top`."""
        return self._choose(share, per, lowest=True)

    def _choose(self, share: float, per: str, *, lowest: bool) -> dict[str, BitMask]:
        check_choice("per", per, _PER)
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; it must be from 0 to 1, a share of the weights")
        return choose(self.scores, share, per, self.transposed, lowest=lowest)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write to ``directory`` as safetensors and JSON: whole, or not at all.

        Raises:
            ValueError: the folder holds a result of another kind.
            OSError: the disk is full, or the like.
        """
        about = {field: getattr(self, field) for field in _FIELDS}
        names = {"parameters": list(self.scores), "transposed": list(self.transposed)}
        meta = {"content": WEIGHT_CONTENT, "format": FORMAT, **about, **names}
        save_tensors(directory, self.scores.items(), meta)

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], model: nn.Module | None = None
    ) -> WeightAttribution:
        """Open what :meth:`save` wrote. Scores stay on the disk until they are asked for.

        Args:
            directory: the folder, which must stay as it is while the result is used.
            model: refuse the result unless it fits this model.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the folder holds something else, is damaged, or belongs to another model.
        """
        scores = LazyTensors(directory, order="parameters")
        path, meta = Path(directory) / META, scores.meta
        if meta.get("content") != WEIGHT_CONTENT:
            raise ValueError(
                f"directory {os.fspath(directory)!r} holds {meta.get('content')!r}; it must hold "
                f"{WEIGHT_CONTENT!r}"
            )
        check_fields(path, meta, _FIELDS)
        if meta["metric"] not in WEIGHT_METRICS:
            raise ValueError(f"file {str(path)!r} is damaged: the metric is {meta['metric']!r}")
        about = {field: meta[field] for field in _FIELDS}
        about["transposed"] = tuple(about["transposed"])
        result = cls(scores=scores, **about)
        if model is not None:
            result.check_model(model)
        return result

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError, with the reason, unless the scores belong to ``model``'s weights."""
        what = "weight attribution"
        check_same_model(model, self.units_hash, expected_name=self.model_name, what=what)
        found = find_matrices(check_whole(model))
        missing = [param for param in self.scores if param not in found]
        if missing:
            raise ValueError(
                f"weight attribution has scores of {missing[0]!r}, which the model "
                f"{type(model).__name__} has not as a matrix in its layers"
            )
