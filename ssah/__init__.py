"""Safety-critical neurons of language models: find them, switch them off, keep them, transfer them.

Follows the Superficial Safety Alignment Hypothesis (Li & Kim, arXiv 2410.10862). Public names are
imported when they are first used, and so is every submodule, so that `import ssah` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ssah.compat.notes import leave_out_notes
from ssah.lazy import submodules_of
from ssah.moved import accept
from ssah.version import __version__ as __version__

if find_spec("ssah_kernels") is None:
    raise ImportError(
        f"ssah needs the operators of its release: pip install ssah-kernels=={__version__}"
    )
leave_out_notes()  # before anything imports transformers
accept()

if TYPE_CHECKING:
    from ssah import data, deltas
    from ssah.attribution import (
        Attribution,
        WeightAttribution,
        attribute,
        attribute_weights,
        stream,
    )
    from ssah.evaluation import Probe, probe
    from ssah.groups import Transfer, UnitGroups, classify, transfer
    from ssah.interventions import ablate, arms, intervene, prune
    from ssah.selections import Selection, select
    from ssah.training import (
        UpdatePlan,
        attach,
        export_lora,
        freeze,
        load_update,
        protect_adapter,
        train_only,
        verify,
    )
    from ssah.units import (
        FFN,
        Attention,
        Experts,
        Family,
        NotCovered,
        UnitSet,
        find_modules,
        register_family,
    )

__all__ = [
    "FFN",
    "Attention",
    "Attribution",
    "Experts",
    "Family",
    "NotCovered",
    "Probe",
    "Selection",
    "Transfer",
    "UnitGroups",
    "UnitSet",
    "UpdatePlan",
    "WeightAttribution",
    "ablate",
    "arms",
    "attach",
    "attribute",
    "attribute_weights",
    "classify",
    "data",
    "deltas",
    "export_lora",
    "find_modules",
    "freeze",
    "intervene",
    "load_update",
    "probe",
    "protect_adapter",
    "prune",
    "register_family",
    "select",
    "stream",
    "train_only",
    "transfer",
    "verify",
]

# Room -> the public names that it defines.
_ROOMS = {
    "attribution": (
        "Attribution",
        "WeightAttribution",
        "attribute",
        "attribute_weights",
        "stream",
    ),
    "evaluation": ("Probe", "probe"),
    "groups": ("Transfer", "UnitGroups", "classify", "transfer"),
    "interventions": ("ablate", "arms", "intervene", "prune"),
    "selections": ("Selection", "select"),
    "training": (
        "UpdatePlan",
        "attach",
        "export_lora",
        "freeze",
        "load_update",
        "protect_adapter",
        "train_only",
        "verify",
    ),
    "units": (
        "FFN",
        "Attention",
        "Experts",
        "Family",
        "NotCovered",
        "UnitSet",
        "find_modules",
        "register_family",
    ),
}
_HOME = {name: f"ssah.{room}" for room, names in _ROOMS.items() for name in names}


_submodule = submodules_of(__name__)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        # Python asks this function only for what is missing: once a name.
        globals()[name] = value
        return value
    return _submodule(name)


def __dir__() -> list[str]:
    # Names of files: nothing is imported to list them.
    submodules = (module.name for module in iter_modules(__path__))
    return sorted({*globals(), *__all__, *(name for name in submodules if name[0] != "_")})
