"""``Attribution``: what scoring gives, and how it is kept in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from ssah.choices import Metric, Tokens
from ssah.storage import FORMAT, TEXT, Fields, Stored, check_fields, save_tensors
from ssah.units import check_same_model, find_modules, unit_frame
from ssah.version import __version__

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS: tuple[str, ...] = get_args(Metric)
GRADIENT_METRICS = ("taylor", "fisher")
TOKENS: tuple[str, ...] = get_args(Tokens)
CONTENT = "attribution"  # of a folder with scores
_FIELDS: Fields = {
    "version": str,
    "metric": str,
    "tokens": str,
    "model_name": str,
    "units_hash": TEXT,
    "weights_hash": TEXT,
    "data_fingerprint": str,
    "all_experts": bool,
    "count": dict,
    "rows_read": (dict, type(None)),
}
_OF_LATER = dict.fromkeys(("units_hash", "weights_hash", "rows_read"))  # None in older results


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Importance of every unit of a model on one data set. All tensors are float64 on the CPU.

    Attributes:
        scores: B's name -> ``[n_units]``, the importance under ``metric``.
        mean: B's name -> ``[n_units]``, mean over tokens of the activation entering B (0 where
            no token was counted).
        variance: B's name -> ``[n_units]``, its unbiased variance (NaN for a single token).
        count: B's name -> number of tokens counted; of an expert, those routed to it.
        metric: ``"variance"``, ``"norm"``, ``"taylor"`` or ``"fisher"``.
        tokens: ``"all"``, ``"after_first"`` or ``"labels"``: which positions counted.
        model_name: hub id, path or class of the model.
        units_hash: of its units, see `ssah.units.units_hash`; None in results of before.
        data_fingerprint: of the loader, or of the tokens and labels seen.
        all_experts: whether every token was counted for every expert, not the routed ones alone.
        weights_hash: of the weights (`ssah.models.weights`); None in older results, and of
            models that are sharded, offloaded or streamed.
        version: of this library.
        rows_read: what ``ssah attribute`` keeps of its rows: how many it left out and cut, and the
            chat template. None where no command made it.
        signed: B's name -> ``[n_units]``, the sum over tokens of a * dL/da: above 0 where the loss
            (in nats) falls, to first order, as the unit is removed. None unless the metric is
            ``"taylor"``, whose score is its absolute value, or ``"fisher"``.
    """

    scores: dict[str, Tensor]
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    count: dict[str, int]
    metric: str
    tokens: str
    model_name: str
    units_hash: str | None
    data_fingerprint: str
    all_experts: bool = False
    weights_hash: str | None = None
    version: str = __version__
    rows_read: dict[str, Any] | None = None
    signed: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        # Tensors left out: those of a large model would fill the terminal for minutes.
        units = sum(len(score) for score in self.scores.values())
        return (
            f"Attribution({self.metric!r} of {units} units in {len(self.scores)} modules, "
            f"{max(self.count.values(), default=0)} tokens ({self.tokens!r}), "
            f"model={self.model_name!r}, data={self.data_fingerprint[:12]!r})"
        )

    def scarce(self, least: int = 2) -> dict[str, int]:
        """Modules of which fewer than ``least`` tokens were counted, and how many were.

        With a mixture of experts these are the experts that the data hardly reached. Of none or
        one token there is no variance: the score is 0 then.
        """
        return {name: count for name, count in self.count.items() if count < least}

    def to_frame(self) -> DataFrame:
        """A table of pandas with a row for each unit.

        Its columns are ``module``, ``layer``, ``kind``, ``unit``, ``score``, ``mean``,
        ``variance``, ``tokens`` (how many were counted), and ``signed`` where the scores have it.
        """
        every = {name: torch.arange(len(score)) for name, score in self.scores.items()}
        tokens = {name: torch.full_like(every[name], n) for name, n in self.count.items()}
        values = {
            "score": self.scores,
            "mean": self.mean,
            "variance": self.variance,
            "tokens": tokens,
        }
        return unit_frame(every, values | ({} if self.signed is None else {"signed": self.signed}))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write to ``directory`` as safetensors and JSON: whole, or not at all."""
        tensors = {
            f"{kind}/{name}": tensor
            for kind in ("scores", "mean", "variance", "signed")
            for name, tensor in (getattr(self, kind) or {}).items()
        }
        meta = {field: getattr(self, field) for field in _FIELDS}
        save_tensors(directory, tensors, {"content": CONTENT, "format": FORMAT, **meta})

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> Attribution:
        """Read what :meth:`save` wrote.

        Args:
            directory: the folder.
            model: refuse the result unless it was made on a model of this configuration.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the folder holds something else, is damaged (the file and the field are
                named), or belongs to another model.
        """
        stored = Stored(directory, CONTENT, _FIELDS, _OF_LATER)
        stored.choice("metric", METRICS)
        stored.choice("tokens", TOKENS)
        count, names = stored.meta["count"], stored.names("count")
        check_fields(stored.path, count, dict.fromkeys(names, int))
        scores = {name: stored.tensor(f"scores/{name}") for name in names}
        shapes = {name: (len(score),) for name, score in scores.items()}

        def read(kind: str) -> dict[str, Tensor]:
            return {n: stored.tensor(f"{kind}/{n}", shape=shape) for n, shape in shapes.items()}

        # Of a single token there is no variance: it is NaN.
        variance = {
            name: stored.tensor(f"variance/{name}", shape=shape, finite=count[name] > 1)
            for name, shape in shapes.items()
        }
        # Not of every metric, nor in results of before.
        has_signed = any(key.startswith("signed/") for key in stored.tensors)
        attribution = cls(
            scores=scores,
            mean=read("mean"),
            variance=variance,
            signed=read("signed") if has_signed else None,
            **{field: stored.meta[field] for field in _FIELDS},
        )
        if model is not None:
            attribution.check_model(model)
        return attribution

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError, with the reason, unless the scores belong to ``model``'s units."""
        check_same_model(model, self.units_hash, expected_name=self.model_name, what="attribution")
        # A result of before has no hash of its units: names and sizes tell as much.
        found = find_modules(model)
        for name, score in self.scores.items():
            if name not in found or found[name].n_units != len(score):
                raise ValueError(
                    f"attribution has {len(score)} units in {name!r}, the model "
                    f"{type(model).__name__} has {found[name].n_units if name in found else 'none'}"
                )
