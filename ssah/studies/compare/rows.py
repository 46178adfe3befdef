"""What is done for the row of each method: find, choose a strength, train or edit, measure.

Of a method that edits the fine-tuned model, for example, with seeds 0 and 1 and strengths 0.25 and
0.5, these are the steps; ``control`` is of the same size and drawn by the seed:

    find-m
    calibrate-m-at-0.25  calibrate-m-at-0.25-control  calibrate-m-at-0.5  calibrate-m-at-0.5-control
    measure-m-0  measure-m-control-0  measure-m-1  measure-m-control-1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ssah.methods import Edited, Outcome, Procedure, Trained, TrainingSetup
from ssah.selections import Selection
from ssah.studies.compare.comparing import NONE, Comparing, apply, nothing_kept
from ssah.studies.compare.finding import Finding, taken_out
from ssah.studies.compare.lineup import Entrant
from ssah.units import UnitSet

# Seed -> what was measured of a model, and how it was trained.
BySeed = dict[int, dict[str, Any]]


@dataclass
class Ran:
    """What was found and measured of one method.

    Attributes:
        entrant: the method.
        settings: of the method, with the strength that was chosen.
        looked: what `Finding.look` returned.
        seeds, control: of the method, and of as much chosen at random; no control: empty.
        curve: one a strength, as a row has it.
    """

    entrant: Entrant
    settings: dict[str, Any]
    looked: dict[str, Any]
    seeds: BySeed = field(default_factory=dict)
    control: BySeed = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)


def run_row(study: Comparing, entrant: Entrant, targets: Mapping[int, float]) -> Ran:
    """Do everything for one method; each part is a step of the study.

    Args:
        study: inside its block.
        entrant: a method that lacks nothing.
        targets: seed -> the common training loss.
    """
    seeds = study.settings.seeds
    finding = Finding(entrant, study.inputs, lambda: study.aligned)
    # A model that was fine-tuned has a seed. Of the aligned one there is one, whatever is trained.
    first = seeds[0] if "tuned" in entrant.method.needs else None
    looked = study.steps(
        f"find-{entrant.name}",
        lambda: finding.look(first, seeds[0]),
        lambda found: found["refused"] or f"found in {found['seconds']:.0f} s",
    )
    ran = Ran(entrant, asdict(entrant.method), looked)
    if looked["refused"]:
        return ran
    if looked["taken_out"] and entrant.subject == "aligned":
        return _taken_out(study, ran, finding)
    if entrant.swept:
        chosen = _sweep(study, ran, finding)
        ran.settings[entrant.method.strength or ""] = chosen
    else:
        chosen = None
    for seed in seeds:
        of = seed if first is not None else None

        def own(of: int | None = of) -> Outcome:
            return finding.outcome(of, chosen)

        def drawn(of: int | None = of, seed: int = seed) -> Outcome:
            return finding.outcome(of, chosen).control(seed)

        name, target = entrant.name, targets[seed]
        ran.seeds[seed] = _one(study, entrant, name, seed, own, target)
        if not looked["no_control"]:
            ran.control[seed] = _one(study, entrant, f"{name}-control", seed, drawn, target)
    return ran


def _taken_out(study: Comparing, ran: Ran, finding: Finding) -> Ran:
    """The aligned model without a part, and without each control: they answer together."""
    name, seeds = ran.entrant.name, study.settings.seeds
    drawn = [] if ran.looked["no_control"] else seeds

    def parts() -> list[UnitSet | Selection | None]:
        found = finding.outcome(None)
        every = [taken_out(found), *(taken_out(found.control(seed)) for seed in drawn)]
        assert None not in every  # a control that takes nothing out would be the model as it is
        return every

    keys = [name, *(f"{name}-control-{seed}" for seed in drawn)]
    own, *controls = study.measure_without(keys, parts, study.as_it_is())
    ran.seeds = dict.fromkeys(seeds, own)
    ran.control = dict(zip(drawn, controls, strict=True))
    return ran


def _one(
    study: Comparing,
    entrant: Entrant,
    name: str,
    seed: int,
    found: Callable[[], Outcome],
    target: float,
) -> dict[str, Any]:
    """Make one model, of the method or of its control, and measure it."""
    if entrant.way == "train":
        return _train(study, name, seed, found, target)
    key = f"{name}-{seed}"
    make = study.edited if entrant.way == "edit" else study.running
    if entrant.subject == "tuned":
        return study.measure(key, make(found, study.tuned(seed)))
    # The aligned model has no seed: it is measured once, and stands beside every control.
    return study.measure(name if name == entrant.name else key, make(found, None))


def _train(
    study: Comparing, name: str, seed: int, found: Callable[[], Outcome], target: float
) -> dict[str, Any]:
    """A model that is fine-tuned in the method's way, or edited before it is."""
    told: dict[str, Any] = {}

    def prepare(model: PreTrainedModel, seed: int) -> TrainingSetup:
        outcome = found()
        if isinstance(outcome, Edited):
            told.update(apply(outcome, model))
            return nothing_kept(model, seed)
        assert isinstance(outcome, Trained | Procedure)
        return outcome.prepare(model, seed)

    return study.fine_tune(name, seed, prepare, target, told)


def _sweep(study: Comparing, ran: Ran, finding: Finding) -> float:
    """Try every strength on the calibration split, beside the first fine-tune; the one to take."""
    method, seed = ran.entrant.method, study.settings.seeds[0]
    folder = study.tuned(seed)
    none = study.calibrate(f"{NONE}-{seed}", study.as_it_is(folder))
    for strength in method.strengths:
        key = f"{method.name}-at-{strength:g}"

        def own(strength: float = strength) -> Outcome:
            return finding.outcome(seed, strength)

        def drawn(strength: float = strength) -> Outcome:
            return finding.outcome(seed, strength).control(seed)

        point: dict[str, Any] = {"strength": strength}
        point |= study.calibrate(key, study.edited(own, folder))
        point["control"] = None
        if not ran.looked["no_control"]:
            point["control"] = study.calibrate(f"{key}-control", study.edited(drawn, folder))
        ran.curve.append(point)
    chosen = choose(ran.curve, none["task_loss"] + study.settings.slack)
    for point in ran.curve:
        point["chosen"] = point["strength"] == chosen
    return chosen


def choose(curve: Sequence[Mapping[str, Any]], most: float) -> float:
    """The strength of the lowest ASR whose task loss is at most ``most`` nats.

    Of two with one ASR it is that of the lower task loss; where all lose more, that of the least.
    """
    fine = [point for point in curve if point["task_loss"] <= most]
    if fine:
        best = min(fine, key=lambda point: (point["asr"], point["task_loss"]))
    else:
        best = min(curve, key=lambda point: point["task_loss"])
    return float(best["strength"])
