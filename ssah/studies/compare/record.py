"""The record of a comparison: one row a method, what it costs, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssah.evaluation import Unit
from ssah.studies.claims import measured_difference
from ssah.studies.compare.lineup import Entrant
from ssah.studies.compare.measuring import TASK
from ssah.studies.compare.rows import BySeed, Ran
from ssah.studies.compare.verdicts import recommend, verdict
from ssah.studies.measured_values import summary
from ssah.studies.paired_measures import UTILITY
from ssah.studies.training.results import over_seeds, rates, row_losses


def result_of(
    intact: dict[str, Any], tuned: BySeed, ran: Sequence[Ran | Entrant]
) -> dict[str, Any]:
    """What the record says of all models.

    Args:
        intact: what was measured of the aligned model.
        tuned: of the models that were fine-tuned with nothing kept.
        ran: the methods in order; of one that lacks something, what it lacks.
    """
    rows = [_row(each, intact, tuned) if isinstance(each, Ran) else _absent(each) for each in ran]
    result = {"intact": summary_of(intact), "tuned": _all_seeds(tuned), "rows": rows}
    return {**result, "recommendation": recommend(result)}


def summary_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """One model: rates with their intervals, losses and KL in nats."""
    own = summary(found["measured"], found["attack"], found["refused"])
    return own | {"kl": found["kl"]}


def _all_seeds(found: BySeed) -> dict[str, Any]:
    seeds = {str(seed): summary_of(own) for seed, own in found.items()}
    for seed, own in found.items():
        # What trained says how long, and to which loss.
        if "training" in own:
            training = own["training"]
            seeds[str(seed)] |= {"training_loss": training["loss"], "training": training}
    return over_seeds(seeds, asr=rates({"": found}, ""), over_refusal=_refusals(found))


def _refusals(found: BySeed) -> Tensor:
    """Float64 ``[requests, seeds]``: 1 where a harmless request was refused."""
    by_seed = [torch.tensor(own["refused"], dtype=torch.float64) for own in found.values()]
    return torch.stack(by_seed, 1)


def _absent(entrant: Entrant, why: str | None = None) -> dict[str, Any]:
    return {**entrant.identity, "not_run": why or entrant.lacking}


def _row(ran: Ran, intact: dict[str, Any], tuned: BySeed) -> dict[str, Any]:
    entrant, looked = ran.entrant, ran.looked
    if looked["refused"]:
        return _absent(entrant, looked["refused"])
    made = [own["made"] for own in ran.seeds.values()]
    trained = [own["training"] for own in ran.seeds.values() if "training" in own]
    none = dict.fromkeys(ran.seeds, intact) if entrant.subject == "aligned" else tuned
    against = {"control": ran.control, "none": none}
    # An edit counts what it changed. A part that was chosen is known before anything is changed.
    shares = [each["share"] for each in (*made, *trained) if "share" in each]
    row = {
        **entrant.identity,
        "subject": entrant.subject,
        "settings": ran.settings,
        "chosen_on": "calibration" if ran.curve else "given" if entrant.given else "defaults",
        "facts": looked["facts"],
        "share": mean(shares) if shares else looked["share"],
        **_all_seeds(ran.seeds),
        "control": _control(ran) if ran.control else None,
        "no_control": looked["no_control"],
        "differences": {
            name: _differences(ran.seeds, other) for name, other in against.items() if other
        },
        "curve": ran.curve,
        "cost": _cost(looked, made, trained),
        "exact": _exact(entrant, trained),
        "reached": _reached(ran.seeds),
        "not_run": None,
    }
    return {**row, "verdict": verdict(row)}


def _control(ran: Ran) -> dict[str, Any]:
    against, reached = ran.entrant.method.against, _reached(ran.control)
    return {"against": against, "reached": reached, **_all_seeds(ran.control)}


def _reached(found: BySeed) -> bool | None:
    """Whether training came to the common loss with every seed; None: nothing was trained."""
    trained = [own["training"]["reached"] for own in found.values() if "training" in own]
    return all(trained) if trained else None


def _exact(entrant: Entrant, trained: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether what the method freezes was compared bit for bit: an edit freezes nothing."""
    frozen = entrant.about["gives"] != "Edited" and trained
    return "verified" if frozen and all(each["verified"] for each in trained) else None


def _cost(
    looked: Mapping[str, Any],
    made: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Means over seeds; None where a method has no such part."""
    peaks = [each["peak_memory_bytes"] for each in (looked, *trained)]
    known = [peak for peak in peaks if peak is not None]
    return {
        "find_seconds": looked["seconds"],
        "apply_seconds": _mean_of((*made, *trained), "apply_seconds"),
        "train_seconds": _mean_of(trained, "seconds"),
        "updates": _mean_of(trained, "steps"),
        "peak_memory_bytes": max(known) if known else None,
        "seconds_per_token_ratio": _mean_of(made, "seconds_per_token_ratio"),
    }


def _mean_of(found: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [each[key] for each in found if key in each]
    return mean(values) if values else None


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def _differences(first: BySeed, second: BySeed) -> dict[str, Any]:
    """First less second, paired over requests or rows, with all their seeds."""
    arms = {"first": first, "second": second}

    def less(values: Callable[[str], Tensor], unit: Unit) -> dict[str, Any]:
        return measured_difference(values("first"), values("second"), unit)

    return {
        "asr": less(lambda name: rates(arms, name), "points"),
        "over_refusal": less(lambda name: _refusals(arms[name]), "points"),
        "utility_loss": less(lambda name: row_losses(arms, name, UTILITY), "nats"),
        "task_loss": less(lambda name: row_losses(arms, name, TASK), "nats"),
    }
