"""Published methods that keep, find or remove a model's safety, each with its own control.

    found = method("sppft").find(Inputs(aligned=model, safety=requests, utility=instructions))
    plan = found.plan(model)               # fine-tune with the safety layers frozen
    plan = found.control(seed=1).plan(model)  # and with as many other layers frozen

A method is one file here and one line in `ssah.methods.registry`.
"""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.methods.drawing import shuffled
from ssah.methods.frame import Method
from ssah.methods.inputs import Inputs
from ssah.methods.low_rank_adapters import lora
from ssah.methods.outcomes import (
    Changed,
    Edited,
    Outcome,
    Procedure,
    Trained,
    TrainingSetup,
    planned,
)
from ssah.methods.registry import describe, method, names
from ssah.methods.typed import typed_method

__all__ = [
    "Changed",
    "Edited",
    "Inputs",
    "Method",
    "Outcome",
    "Procedure",
    "Trained",
    "TrainingSetup",
    "describe",
    "lora",
    "method",
    "names",
    "planned",
    "typed_method",
]

__getattr__ = submodules_of(__name__)
