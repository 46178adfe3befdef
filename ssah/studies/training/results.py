"""What the arms of a study found, as tensors that can be paired and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssah.evaluation import bootstrap, wilson
from ssah.studies.claims import Expected, claim
from ssah.studies.measured_values import losses, succeeded, summary
from ssah.studies.paired_measures import UTILITY

# Arm -> seed -> what `Comparison.compare` returns.
Arms: TypeAlias = "Mapping[str, Mapping[int, Mapping[str, Any]]]"

BEFORE = "before"  # the model that every arm starts from


def rates(arms: Arms, name: str) -> Tensor:
    """Float64 ``[requests, seeds]`` of an arm: 1 where the attack succeeded."""
    by_seed = [succeeded(found["attack"]) for found in arms[name].values()]  # each [requests]
    return torch.stack(by_seed, 1)


def row_losses(arms: Arms, name: str, rows: str = UTILITY) -> Tensor:
    """Float64 ``[rows, seeds]`` of an arm, see :func:`ssah.studies.measured_values.losses`."""
    by_seed = [losses(found["measured"], rows) for found in arms[name].values()]  # each [rows]
    return torch.stack(by_seed, 1)


def asr_claim(
    text: str, arms: Arms, first: str, second: str, expected: Expected, **more: Any
) -> dict[str, Any]:
    """A :func:`claim` that the ASR of one arm is so beside that of another one."""
    return claim(text, rates(arms, first), rates(arms, second), expected, "points", **more)


def loss_claim(
    text: str,
    arms: Arms,
    first: str,
    second: str,
    expected: Expected,
    rows: str = UTILITY,
    **more: Any,
) -> dict[str, Any]:
    """A :func:`claim` on the losses of two arms on a set of rows."""
    pair = row_losses(arms, first, rows), row_losses(arms, second, rows)
    return claim(text, *pair, expected, "nats", among="rows", **more)


def missed(arms: Arms, *names: str) -> list[tuple[str, int]]:
    """Arm and seed of each training that ended above its target; arms without one have none."""
    return [
        (name, seed)
        for name in names
        for seed, found in arms[name].items()
        if found["training"].get("reached") is False
    ]


def arms_summary(arms: Arms) -> dict[str, dict[str, Any]]:
    """Every arm for the result: ``mean`` over seeds of what is a number, and ``seeds``."""
    result = {}
    for name, by_seed in arms.items():
        seeds = {
            str(seed): {
                **summary(found["measured"], found["attack"]),
                "training_loss": found["training"]["loss"],
                "training": found["training"],
            }
            for seed, found in by_seed.items()
        }
        result[name] = over_seeds(seeds, asr=rates(arms, name))
    return result


def over_seeds(seeds: Mapping[str, Mapping[str, Any]], **intervals: Tensor) -> dict[str, Any]:
    """Summaries of each seed with their ``mean``: of every number that all of them have.

    Args:
        seeds: seed -> its summary.
        intervals: name of a rate -> ``[requests, seeds]``, of which the mean has an interval too:
            intervals of single seeds have no mean.
    """
    first = next(iter(seeds.values()))
    numbers = [key for key, value in first.items() if isinstance(value, float | int)]
    mean: dict[str, Any] = {
        key: sum(own[key] for own in seeds.values()) / len(seeds) for key in numbers
    }
    mean |= {f"{name}_interval": _interval(found) for name, found in intervals.items()}
    return {"mean": mean, "seeds": dict(seeds)}


def _interval(found: Tensor) -> list[float]:
    """Of a rate ``[requests, seeds]``: requests are drawn, each with all its seeds.

    Wilson's where all requests have one rate, of which a bootstrap has no width, whatever their
    number; and where all seeds agree, so that there is one answer a request.
    """
    same = bool((found == found[:, :1]).all())
    if len(set(found.mean(1).tolist())) > 1 and not same:
        return list(bootstrap(found))
    return list(wilson(int(found[:, 0].sum()), len(found)))
