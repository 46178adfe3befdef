"""A model that runs with something changed for a while, or with units taken out for good."""

from __future__ import annotations

from ssah.interventions.ablation import ablate
from ssah.interventions.arm_units import split_arms
from ssah.interventions.hidden import Add, HiddenChange, ProjectOut, ReplaceHidden, ScaleHidden
from ssah.interventions.intervention import (
    changes_some_positions,
    check_not_ablated,
    intervene,
)
from ssah.interventions.positions import Prompts
from ssah.interventions.prompt_ends import PromptEnds
from ssah.interventions.pruning import prune
from ssah.interventions.row_arms import Arms, arms
from ssah.interventions.weights import Replace, Scale, WeightChange, Zero
from ssah.lazy import submodules_of

__all__ = [
    "Add",
    "Arms",
    "ProjectOut",
    "PromptEnds",
    "Prompts",
    "Replace",
    "ReplaceHidden",
    "Scale",
    "ScaleHidden",
    "Zero",
    "ablate",
    "arms",
    "changes_some_positions",
    "check_not_ablated",
    "intervene",
    "prune",
]

__getattr__ = submodules_of(__name__)
