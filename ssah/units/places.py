"""Where in a model a module stands, by its name: of which layer it is, and of which kind.

Example: ``"model.layers.3.mlp.down_proj"`` is of layer 3 and kind ``"mlp"``, as the B of an FFN in
the entries of :mod:`ssah.units.families` says. So what has names alone, such as a set of units that
was read from a file, needs no model for it.
"""

from __future__ import annotations

import re

from ssah.units.experts import DOWN
from ssah.units.families import FAMILIES

_IN_LAYER = re.compile(r"(?:^|\.)(?P<layer>\d+)(?:\.(?P<path>.*))?$")
_EXPERT = re.compile(r"\[\d+\]$")


def layer_of(name: str) -> int | None:
    """The layer of a module: the first number in its name, or None where there is none."""
    # The first one: the pattern is anchored at the end, and a search begins at the left.
    found = _IN_LAYER.search(name)
    return int(found["layer"]) if found else None


def kind_of(name: str) -> str | None:
    """``"mlp"`` or ``"attention"``, of which B has this name; None where no architecture has it."""
    found = _IN_LAYER.search(name)
    path = _EXPERT.sub("", found["path"] or "") if found else ""
    for family in FAMILIES.values():
        if family.attention is not None and path == family.attention.down:
            return "attention"
        downs = [] if family.ffn is None else [family.ffn.down]
        if family.experts is not None:
            shared = family.experts.shared
            downs += [f"{family.experts.module}.{DOWN}", *([shared.down] if shared else [])]
        if path in downs:
            return "mlp"
    return None


def is_expert(name: str) -> bool:
    """Whether a module is one of a mixture's routed experts, ``"...experts.down_proj[3]"``."""
    return _EXPERT.search(name) is not None
