"""Safety-critical neurons of language models: find them, switch them off, keep them, transfer them.

Follows the Superficial Safety Alignment Hypothesis (Li & Kim, arXiv 2410.10862). Public names are
imported when they are first used, and so is every submodule, so that `import ssah` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ssah.compat.torchao import leave_out_notes
from ssah.lazy import submodules_of
from ssah.transfer import Transfer, transfer

__version__ = "0.1.0"

leave_out_notes()  # before anything imports transformers

if TYPE_CHECKING:
    from ssah import data
    from ssah.ablation import ablate, prune
    from ssah.attribution import Attribution, attribute
    from ssah.families import FFN, Attention, Experts, Family, NotCovered, register_family
    from ssah.groups import UnitGroups, classify
    from ssah.probing import Probe, probe
    from ssah.streaming import stream
    from ssah.training import UpdatePlan, freeze, load_update, train_only
    from ssah.units import UnitSet, find_modules

__all__ = [
    "FFN",
    "Attention",
    "Attribution",
    "Experts",
    "Family",
    "NotCovered",
    "Probe",
    "Transfer",
    "UnitGroups",
    "UnitSet",
    "UpdatePlan",
    "ablate",
    "attribute",
    "classify",
    "data",
    "find_modules",
    "freeze",
    "load_update",
    "probe",
    "prune",
    "register_family",
    "stream",
    "train_only",
    "transfer",
]

# Public name -> the module that defines it.
_HOME = {
    "FFN": "ssah.families",
    "Attention": "ssah.families",
    "Attribution": "ssah.attribution",
    "Experts": "ssah.families",
    "Family": "ssah.families",
    "NotCovered": "ssah.families",
    "Probe": "ssah.probing",
    "UnitGroups": "ssah.groups",
    "UnitSet": "ssah.units",
    "UpdatePlan": "ssah.training",
    "ablate": "ssah.ablation",
    "attribute": "ssah.attribution",
    "classify": "ssah.groups",
    "find_modules": "ssah.units",
    "freeze": "ssah.training",
    "load_update": "ssah.training",
    "probe": "ssah.probing",
    "prune": "ssah.ablation",
    "register_family": "ssah.families",
    "stream": "ssah.streaming",
    "train_only": "ssah.training",
}


_submodule = submodules_of(__name__)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    return _submodule(name)


def __dir__() -> list[str]:
    submodules = (module.name for module in iter_modules(__path__))
    return sorted({*globals(), *__all__, *(name for name in submodules if name[0] != "_")})
