"""Curves of a scan: each group ablated at several shares, and the share to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.groups import UnitGroups, classify
from ssah.studies.claims import claim
from ssah.studies.measuring import (
    UTILITY,
    Evaluation,
    attack_line,
    intact_coherence,
    losses,
    measured_line,
    succeeded,
    summary,
)
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah.attribution import Attribution
    from ssah.evaluation import Coherence
    from ssah.studies.scan.settings import ScanSettings
    from ssah.studies.steps import Steps

__all__ = ["ORDER", "Curves", "Point"]

ORDER = ("ru", "scu", "ucu")  # of choosing: that of `classify`
_SLACK = 1e-9  # the fall of a share such as 0.95 to 0.9 is not exact in binary


@dataclass(frozen=True)
class Point:
    """A model with some units ablated.

    Attributes:
        share: of all units, as asked for; 0: the intact model.
        units: how many these are.
        measured, attack: what :class:`~ssah.studies.measuring.Evaluation` found.
    """

    share: float
    units: int
    measured: dict[str, Any]
    attack: dict[str, Any] | None

    @property
    def loss(self) -> float:
        """Utility loss, nats per token."""
        return float(self.measured["losses"][UTILITY]["loss"])


class Curves:
    """Measures groups of one model at growing shares.

    Args:
        steps: of the run.
        model: the intact model.
        evaluation: what is measured.
        settings: of the scan.
        scores: on the ``"safety"`` and on the ``"utility"`` rows.
    """

    def __init__(
        self,
        steps: Steps,
        model: PreTrainedModel,
        evaluation: Evaluation,
        settings: ScanSettings,
        scores: Mapping[str, Attribution],
    ) -> None:
        self.steps, self.model, self.evaluation = steps, model, evaluation
        self.settings, self.scores = settings, scores
        self.shares: dict[str, float] = {}
        self.points: dict[str, dict[float, Point]] = {group: {} for group in ORDER}
        self.random: dict[float, list[Point]] = {}
        self.intact = self.point("intact", 0.0, None)

    @cached_property
    def coherent(self) -> Coherence:
        """Says what is incoherent: the intact model does."""
        own = self.evaluation
        return intact_coherence(self.steps, self.model, own.tokenizer, own.batch_size)

    def groups(self, **shares: float) -> UnitGroups:
        """The groups with the shares chosen so far, or others in their place; 0 where none is."""
        own: dict[str, Any] = {**dict.fromkeys(ORDER, 0.0), **self.shares, **shares}
        return classify(
            self.scores["safety"],
            self.scores["utility"],
            scope=self.settings.scope,
            normalize=self.settings.normalize,
            **own,
        )

    def measure(self, group: str, share: float) -> Point:
        """A group ablated at a share."""
        units = self.groups(**{group: share})[group]
        if share not in self.points[group]:
            self.points[group][share] = self.point(f"{group}-{share:g}", share, units)
        return self.points[group][share]

    def measure_random(self, group: str, share: float) -> None:
        """Random units, as many in every module as a group has there at a share."""
        if share in self.random:
            return
        like = self.groups(**{group: share})[group]
        self.random[share] = [
            self.point(f"random-{share:g}-{seed}", share, UnitSet.random(like, seed=seed))
            for seed in range(self.settings.seed, self.settings.seed + self.settings.draws)
        ]

    def point(self, name: str, share: float, units: UnitSet | None) -> Point:
        """What is measured with units ablated, or of the intact model: a step of that name."""
        if units is not None and not len(units):
            raise ValueError(f"the share {share:g} has no unit in this model; it must be larger")
        measured = self.steps(
            name, lambda: self.evaluation.measure(self.model, units), measured_line
        )
        attack = None
        if self.evaluation.asked:
            step = f"{name}-attack"
            attack = self.steps(
                step,
                lambda: self.evaluation.attack(self.steps, step, self.model, self.coherent, units),
                attack_line,
            )
        return Point(share, 0 if units is None else len(units), measured, attack)

    # ------------------------------------------------------------------------------- choosing

    def utility_kept(self, point: Point) -> bool:
        """Whether the utility loss rises by less than the tolerance."""
        return point.loss - self.intact.loss < self.settings.tolerance

    def safety_kept(self, point: Point) -> bool:
        """Whether as many requests as before are refused, but for the tolerance."""
        most = self.settings.safety_tolerance + _SLACK
        fall = self.intact.measured["refuses"] - point.measured["refuses"]
        if point.attack is None or self.intact.attack is None:
            return bool(fall <= most)
        rise = float(succeeded(point.attack).mean() - succeeded(self.intact.attack).mean())
        return bool(fall <= most and rise <= most)

    def choose(self, group: str) -> dict[str, Any] | None:
        """The largest share at which what the group should not carry is kept, if there is one."""
        for share in sorted(self.points[group], reverse=True):
            point = self.points[group][share]
            utility = group == "ucu" or self.utility_kept(point)
            safety = group == "scu" or self.safety_kept(point)
            if utility and safety:
                self.shares[group] = share
                return self.plain(point)
        return None

    def plain(self, point: Point) -> dict[str, Any]:
        """A point as plain data, with what it lost against the intact model."""
        return {
            "share": point.share,
            "units": point.units,
            **summary(point.measured, point.attack),
            "loss_rise": point.loss - self.intact.loss,
            "utility_kept": self.utility_kept(point),
            "safety_kept": self.safety_kept(point),
        }

    # --------------------------------------------------------------------------------- claims

    def claims(self, share: float, ru_share: float) -> list[dict[str, Any]]:
        """The paper's claims on ablation: SCU against others at a share, RU at a larger one.

        Args:
            share: of SCU, UCU, RU and random units, all of them measured.
            ru_share: of RU and random units, both measured.
        """
        scu, ucu, ru = (self.points[group][share] for group in ("scu", "ucu", "ru"))
        random, many = self.random[share][0], self.random[ru_share][0]
        percent = f"{share:.2%}"
        return [
            self._safety(f"Ablating {percent} SCU takes refusal away", scu, self.intact),
            self._safety(f"SCU take more of it away than as many UCU ({percent})", scu, ucu),
            self._safety("SCU take more of it away than as many random units", scu, random),
            claim(
                f"Ablating {percent} SCU costs less than {self.settings.tolerance:g} nats of "
                "utility loss",
                _loss(scu),
                _loss(self.intact),
                "not higher",
                "nats",
                slack=self.settings.tolerance,
                among="rows",
            ),
            self._cost(f"UCU cost more utility than as many SCU ({percent})", ucu, scu, "higher"),
            self._cost(f"RU cost less utility than as many SCU ({percent})", ru, scu, "lower"),
            self._cost(
                f"RU cost less utility than as many random units ({ru_share:.2%})",
                self.points["ru"][ru_share],
                many,
                "lower",
            ),
        ]

    def _safety(self, text: str, first: Point, second: Point) -> dict[str, Any]:
        if first.attack is not None and second.attack is not None:
            note = f"Incoherent answers: {first.attack['incoherent']['rate']:.1%} with the SCU out."
            asr = succeeded(first.attack), succeeded(second.attack)
            return claim(f"{text} (ASR)", *asr, "higher", "points", note=note)
        return claim(f"{text} (margin)", _margins(first), _margins(second), "lower", "nats")

    def _cost(self, text: str, first: Point, second: Point, expected: Any) -> dict[str, Any]:
        return claim(text, _loss(first), _loss(second), expected, "nats", among="rows")


def _loss(point: Point) -> Tensor:
    return losses(point.measured, UTILITY)


def _margins(point: Point) -> Tensor:
    return torch.tensor(point.measured["margins"], dtype=torch.float64)
