"""What the arms of a study found, as tensors that can be paired and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ssah.evaluation import bootstrap, wilson
from ssah.studies.measuring import UTILITY, losses, succeeded, summary

__all__ = ["BEFORE", "Arms", "arms_summary", "rates", "row_losses"]

# Arm -> seed -> what `Study.compare` returns.
Arms: TypeAlias = "Mapping[str, Mapping[int, Mapping[str, Any]]]"

BEFORE = "before"  # the model that every arm starts from


def rates(arms: Arms, name: str) -> Tensor:
    """Float64 ``[requests, seeds]`` of an arm: 1 where the attack succeeded."""
    return torch.stack([succeeded(found["attack"]) for found in arms[name].values()], 1)


def row_losses(arms: Arms, name: str, rows: str = UTILITY) -> Tensor:
    """Float64 ``[rows, seeds]`` of an arm, see :func:`ssah.studies.measuring.losses`."""
    return torch.stack([losses(found["measured"], rows) for found in arms[name].values()], 1)


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
        first = next(iter(seeds.values()))
        numbers = [key for key, value in first.items() if isinstance(value, float | int)]
        mean = {key: sum(own[key] for own in seeds.values()) / len(seeds) for key in numbers}
        result[name] = {"mean": {**mean, "asr_interval": _interval(arms, name)}, "seeds": seeds}
    return result


def _interval(arms: Arms, name: str) -> list[float]:
    """Of an arm's ASR: requests are drawn, each with all its seeds; Wilson's where they agree."""
    found = rates(arms, name)
    if len(set(found.mean(1).tolist())) > 1 and found.shape[1] > 1 and name != BEFORE:
        return list(bootstrap(found))
    return list(wilson(int(found[:, 0].sum()), len(found)))
