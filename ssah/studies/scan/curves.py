"""Curves of a scan: each group ablated at several shares, and the share to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ssah.groups import UnitGroups
from ssah.studies.measured_values import attack_line, measured_line, succeeded, summary
from ssah.studies.paired_measures import UTILITY, Evaluation, intact_coherence
from ssah.studies.study import Study, grouped
from ssah.units import UnitSet

if TYPE_CHECKING:
    from ssah.attribution import Attribution
    from ssah.evaluation import Coherence
    from ssah.studies.scan.settings import ScanSettings

ORDER = ("ru", "scu", "ucu")  # of choosing: that of `classify`
_SLACK = 1e-9  # the fall of a share such as 0.95 to 0.9 is not exact in binary


@dataclass(frozen=True)
class Point:
    """A model with some units ablated.

    Attributes:
        share: of all units, as asked for; 0: the intact model.
        units: how many these are.
        measured, attack: what :class:`~ssah.studies.paired_measures.Evaluation` found.
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
        study: under way: its model is intact.
        evaluation: what is measured.
        settings: of the scan.
        scores: on the ``"safety"`` and on the ``"utility"`` rows.
    """

    def __init__(
        self,
        study: Study,
        evaluation: Evaluation,
        settings: ScanSettings,
        scores: Mapping[str, Attribution],
    ) -> None:
        self.study, self.evaluation = study, evaluation
        self.settings, self.scores = settings, scores
        self.shares: dict[str, float] = {}  # group -> the share chosen
        self.points: dict[str, dict[float, Point]] = {group: {} for group in ORDER}
        self.random: dict[float, list[Point]] = {}
        (self.intact,) = self.measured({"intact": (0.0, None)})

    @cached_property  # a step of its own, which a scan without answers does not take
    def coherent(self) -> Coherence:
        """Says what is incoherent: the intact model does."""
        return intact_coherence(self.study, self.study.model, self.study.tokenizer)

    def groups(self, **shares: float) -> UnitGroups:
        """The groups with the shares chosen so far, or others in their place; 0 where none is."""
        return grouped(self.settings, self.scores, **{**self.shares, **shares})

    def measure(self, group: str, *shares: float) -> None:
        """A group ablated at each of these shares."""
        new = [share for share in dict.fromkeys(shares) if share not in self.points[group]]
        units = {
            f"{group}-{share:g}": (share, self.groups(**{group: share})[group]) for share in new
        }
        self.points[group] |= zip(new, self.measured(units), strict=True)

    def measure_random(self, group: str, *shares: float) -> None:
        """Random units, as many in every module as a group has there at each of these shares."""
        # One control for SCU, UCU and RU of the same share.
        new = [share for share in dict.fromkeys(shares) if share not in self.random]
        seeds = range(self.settings.seed, self.settings.seed + self.settings.draws)
        units = {
            f"random-{share:g}-{seed}": (share, UnitSet.random(like, seed=seed))
            for share in new
            for like in [self.groups(**{group: share})[group]]
            for seed in seeds
        }
        points = iter(self.measured(units))
        self.random |= {share: [next(points) for _ in seeds] for share in new}

    def measured(self, units: Mapping[str, tuple[float, UnitSet | None]]) -> list[Point]:
        """What is measured with units ablated, or of the intact model: a step of each name.

        Args:
            units: name of the step -> the share, and its units; None: the intact model.

        Raises:
            ValueError: a share has no units: it is too small.
        """
        for share, own in units.values():
            if own is not None and not len(own):
                raise ValueError(
                    f"the share {share:g} has no unit in this model; it must be larger"
                )
        steps, model = self.study.steps, self.study.model
        found = [
            steps(name, partial(self.evaluation.measure, model, own), measured_line)
            for name, (_, own) in units.items()
        ]
        attacks: Sequence[dict[str, Any] | None] = [None] * len(units)
        if self.evaluation.asked:
            names = [f"{name}-attack" for name in units]
            selections = [own for _, own in units.values()]
            attacks = steps.together(
                names,
                lambda left: self.evaluation.attacks(
                    [names[i] for i in left],
                    model,
                    self.coherent,
                    [selections[i] for i in left],
                ),
                attack_line,
            )
        return [
            Point(share, 0 if own is None else len(own), measured, attack)
            for (share, own), measured, attack in zip(units.values(), found, attacks, strict=True)
        ]

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
        # A margin that is still positive does not show that the answer still refuses.
        rise = float(succeeded(point.attack).mean() - succeeded(self.intact.attack).mean())
        return bool(fall <= most and rise <= most)

    def choose(self, group: str) -> dict[str, Any] | None:
        """The largest share at which what the group should not carry is kept, if there is one."""
        for share in sorted(self.points[group], reverse=True):
            point = self.points[group][share]
            # UCU are meant to carry utility and SCU safety: each may lose that, RU neither.
            utility = group == "ucu" or self.utility_kept(point)
            safety = group == "scu" or self.safety_kept(point)
            if utility and safety:  # the first from above is the largest
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
