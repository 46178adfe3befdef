"""What a command line names: units by group (``cu:0.06``), and rows of embeddings and heads.

``model.embed_tokens.weight:300-302,512`` are the rows 300, 301, 302 and 512 of that parameter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ssah.groups import GROUPS, UnitGroups, share_of
from ssah.units import UnitSet

_STRETCH = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_MOST = 10_000_000  # rows of one parameter: no vocabulary has as many, and a slip of the keys may


def select_units(selection: Sequence[str], groups: UnitGroups) -> UnitSet:
    """The units that a selection names: the union of its parts.

    Args:
        selection: group names such as ``"scu"``, or a group and a fraction of *all* units such as
            ``"cu:0.06"``: those of its units that are most like it (`UnitGroups.top` by
            ``"group"``; of CU, the highest for safety).
        groups: where they are taken from.

    Raises:
        ValueError: a part is neither, the group has fewer units, or nothing is selected.
    """
    units = UnitSet({}, groups.sizes)
    for part in selection:
        name, colon, text = part.partition(":")
        if name not in GROUPS:
            raise ValueError(
                f"the selection has {part!r}; it must be one of {', '.join(GROUPS)}, or a group "
                "and a fraction of all units such as cu:0.06"
            )
        own = groups[name]
        if colon:
            share = share_of(f"the selection has {part!r}", text)
            own = groups.top(name, share, by="group")
        units = units | own
    if not len(units):
        raise ValueError(f"the selection {' '.join(selection)!r} has no units in these groups")
    return units


def select_rows(selection: Sequence[str]) -> dict[str, list[int]]:
    """The rows of parameters that a selection names: name -> numbers, ascending, each once.

    Args:
        selection: parts such as ``"lm_head.weight:300-302,512"``, whose stretches have both ends in
            them, or files with one such part a line. Parts of one name are joined.

    Raises:
        ValueError: a part has another form; it is named, with the line of its file. Whether a model
            has such rows is for `ssah.freeze` and `ssah.train_only` to say.
    """
    found: dict[str, set[int]] = {}
    for where, part in _parts(selection):
        name, _, text = part.rpartition(":")
        stretches = [_STRETCH.fullmatch(each.strip()) for each in text.split(",")]
        if not name or not all(stretches):
            raise ValueError(
                f"{where} is {part!r}; it must be the name of a parameter and its rows, such as "
                "model.embed_tokens.weight:300-310,512, or a file of such lines"
            )
        for each in filter(None, stretches):
            first, last = int(each[1]), int(each[2] or each[1])
            if not first <= last < _MOST:
                raise ValueError(
                    f"{where} has the rows {each[0]!r} of {name}; the first must not be behind the "
                    f"last, and the last below {_MOST:,}"
                )
            found.setdefault(name, set()).update(range(first, last + 1))
    return {name: sorted(numbers) for name, numbers in found.items()}


def _parts(selection: Sequence[str]) -> list[tuple[str, str]]:
    """Each part, with what a message calls it."""
    parts: list[tuple[str, str]] = []
    for text in selection:
        if not Path(text).is_file():
            parts.append(("rows", text))
            continue
        lines = Path(text).read_text(encoding="utf-8").splitlines()
        own = [(f"{text}:{n}", line.strip()) for n, line in enumerate(lines, start=1)]
        if not any(line for _, line in own):
            raise ValueError(f"rows is the file {text!r}, which is empty; it must name some rows")
        parts += [(where, line) for where, line in own if line]
    return parts
