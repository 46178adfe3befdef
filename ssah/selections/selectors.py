"""Selections as text, for the command line and for Python.

"scu"                        a group of `ssah classify`
"cu:0.06"                    its top, as a fraction of all units
"layers:6-12,15"             whole layers
"heads:2.26,3.0-3"           query heads: number of the layer, number of the head
"kv_heads:2.1"               a key/value head with all query heads that share it
"parameters:model.norm*"     whole parameters, by name or pattern
"rows:lm_head.weight=5,7-9"  rows of a parameter
"weights:runs/chosen"        what `Selection.save` wrote
"weights:runs/snip:0.01"     the highest of what `ssah weights` wrote (`ssah.selections.scored`)
"layers:6-12 + scu - heads:7.0"    joined from left to right; signs have a space on both sides
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ssah.choices import Shared
from ssah.groups import GROUPS, UnitGroups, share_of
from ssah.selections import making
from ssah.selections.naming import numbers_of
from ssah.selections.scored import check_scored, has_share, scored_weights
from ssah.selections.selection import Selection
from ssah.units import BitMask, UnitSet

_SIGN = re.compile(r"\s+([+-])\s+")
_HEADS = re.compile(r"(\d+)\.(\d+(?:-\d+)?)", re.ASCII)

Maker = Callable[[nn.Module, Shared], Selection]


@dataclass(frozen=True)
class _Term:
    """One part of a text.

    Attributes:
        text: of it alone, ``"heads:2.26"``.
        away: whether it is taken away from what stands before it.
        make: what it is, of a model; or the units of groups.
    """

    text: str
    away: bool
    make: Maker | None

    def units(self, groups: UnitGroups) -> UnitSet:
        """The units of a group; ValueError where the group has not as many."""
        name, colon, share = self.text.partition(":")
        if not colon:
            return groups[name]
        return groups.top(name, share_of(f"the selection has {self.text!r}", share), by="group")


def select(
    model: nn.Module,
    what: UnitSet | Selection | Mapping[str, BitMask] | str | Sequence[str],
    *,
    groups: UnitGroups | None = None,
    shared: Shared = "all",
) -> Selection:
    """What a method touches, of one model: entries of its parameters.

    Example: ``ssah.select(model, "layers:6-12 - heads:7.0") | groups["scu"]``

    Args:
        model: a transformers model of a known family.
        what: units; single weights, as a name of a parameter -> its `ssah.units.BitMask`; another
            selection, of a copy of this model for instance; or text, such as ``"layers:6-12"``
            (`ssah.selections.selectors` has all forms). Of several texts it is the union.
        groups: where text takes ``"scu"`` and the like from.
        shared: with grouped-query attention, rows of K and V that several heads share are chosen
            where ``"all"`` of these heads are, or where ``"any"`` is. By ``"all"`` nobody else
            reads what is chosen: right for what trains. By ``"any"`` all that is read is chosen:
            right for what must stay.

    Returns:
        The selection. ``|``, ``&``, ``-``, ``~`` combine it with others and with a `UnitSet`.

    Raises:
        TypeError: ``what`` is none of these.
        ValueError: text of another form, something that the model lacks, or nothing is selected.
    """
    if isinstance(what, UnitSet):
        return making.units(model, what, shared=shared)
    if isinstance(what, Selection):
        return what.of(model)
    if isinstance(what, Mapping):
        return making.weights(model, what)
    found = named(model, [what] if isinstance(what, str) else what, groups, shared=shared)
    return making.units(model, found, shared=shared) if isinstance(found, UnitSet) else found


def named(
    model: nn.Module, texts: Sequence[str], groups: UnitGroups | None, *, shared: Shared
) -> UnitSet | Selection:
    """The union of what texts name: a `UnitSet` where they name groups alone.

    Args:
        model: as of `select`; not looked at for groups.
        texts: of the forms above.
        groups: where groups are taken from.
        shared: as of `select`.

    Raises:
        ValueError: as of `check_named`, something that the model lacks, or nothing is selected.
    """
    units = check_named(texts, groups)
    if units is not None:
        return units
    result: Selection | None = None
    for text in texts:
        own: Selection | None = None
        for term in _terms(text):
            if term.make is not None:
                part = term.make(model, shared)
            else:
                assert groups is not None
                part = making.units(model, term.units(groups), shared=shared)
            own = part if own is None else own - part if term.away else own | part
        assert own is not None
        result = own if result is None else result | own
    if not result:
        raise ValueError(f"the selection {', '.join(texts)!r} has no weight of the model")
    return result


def select_units(selection: Sequence[str], groups: UnitGroups) -> UnitSet:
    """The union of the units that texts name, by groups alone.

    Args:
        selection: group names such as ``"scu"``, or a group and a fraction of *all* units such as
            ``"cu:0.06"``: those of its units that are most like it (`UnitGroups.top` by
            ``"group"``; of CU, the highest for safety). Joined as all texts are.
        groups: where they are taken from.

    Raises:
        ValueError: a part is neither, the group has fewer units, or nothing is selected.
    """
    units = UnitSet({}, groups.sizes)
    for text in selection:
        own = UnitSet({}, groups.sizes)
        for term in _terms(text):
            if term.make is not None:
                raise ValueError(f"the selection has {term.text!r}; here it must be groups alone")
            part = term.units(groups)
            own = own - part if term.away else own | part
        units = units | own
    if not len(units):
        raise ValueError(f"the selection {' '.join(selection)!r} has no units in these groups")
    return units


def check_named(texts: Sequence[str], groups: UnitGroups | None) -> UnitSet | None:
    """Refuse texts that cannot be meant for any model, before one is loaded.

    Args:
        texts: of the forms above.
        groups: where groups are taken from; None where there are none.

    Returns:
        The units, where texts name groups alone; else None: then a model must say.

    Raises:
        TypeError: a text is none.
        ValueError: a part has another form, its group is not there or has fewer units; it is named.
    """
    if not texts:
        raise ValueError("the selection is empty; it must name something, such as 'layers:6-12'")
    every = [term for text in texts for term in _terms(text)]
    for term in every:
        if term.make is None:
            if groups is None:
                raise ValueError(
                    f"the selection has {term.text!r} and groups are not given; they must be, "
                    "from what `ssah classify` saved (--groups DIR)"
                )
            term.units(groups)
    if groups is None or any(term.make is not None for term in every):
        return None
    return select_units(texts, groups)


def is_selector(text: str) -> bool:
    """Whether ``text`` begins as one of the forms above, and is no name of a module or a path."""
    kind, colon, _ = text.partition(" ")[0].partition(":")
    return kind in GROUPS or (bool(colon) and kind in _MAKERS)


def names_groups(texts: Sequence[str]) -> bool:
    """Whether some text names a group, so that groups must be given; errors as of `check_named`."""
    return any(term.make is None for text in texts for term in _terms(text))


def _terms(text: str) -> list[_Term]:
    """The parts of a text, each with what makes it."""
    if not isinstance(text, str):
        raise TypeError(
            f"what has a {type(text).__name__}, must be a UnitSet, a Selection, a mapping of names "
            "to BitMasks, or text such as 'layers:6-12'"
        )
    pieces = _SIGN.split(text.strip())
    signs = ["+", *pieces[1::2]]
    return [
        _Term(piece, sign == "-", _maker(piece))
        for sign, piece in zip(signs, pieces[::2], strict=True)
    ]


def _maker(text: str) -> Maker | None:
    """What makes the selection that one part names; None of a group."""
    kind, _, rest = text.partition(":")
    if kind in GROUPS:
        return None
    if kind not in _MAKERS or not rest:
        raise _wrong(text)
    return _MAKERS[kind](text, rest)


def _layers(text: str, rest: str) -> Maker:
    numbers = _numbers(text, rest)
    return lambda model, _: making.layers(model, numbers)


def _heads(text: str, rest: str) -> Maker:
    found: dict[int, list[int]] = {}
    for part in rest.split(","):
        head = _HEADS.fullmatch(part.strip())
        if head is None:
            raise _wrong(text)
        found.setdefault(int(head[1]), []).extend(_numbers(text, head[2]))
    kv_heads = text.startswith("kv_heads")
    return lambda model, shared: making.heads(model, found, kv_heads=kv_heads, shared=shared)


def _parameters(text: str, rest: str) -> Maker:
    patterns = [each.strip() for each in rest.split(",")]
    return lambda model, _: making.parameters(model, patterns)


def _rows(text: str, rest: str) -> Maker:
    name, equals, numbers = rest.partition("=")
    if not equals:
        raise _wrong(text)
    found = {name.strip(): _numbers(text, numbers)}
    return lambda model, _: making.rows(model, found)


def _weights(text: str, rest: str) -> Maker:
    # Now, without a model: a wrong folder is refused before one is loaded.
    if not has_share(rest):
        Selection.load(rest)
        return lambda model, _: Selection.load(rest, model)
    check_scored(rest)
    return lambda model, _: scored_weights(rest, model)


_MAKERS: dict[str, Callable[[str, str], Maker]] = {
    "layers": _layers,
    "heads": _heads,
    "kv_heads": _heads,
    "parameters": _parameters,
    "rows": _rows,
    "weights": _weights,
}


def _numbers(text: str, numbers: str) -> list[int]:
    found = numbers_of(numbers, f"the selection {text!r}")
    if found is None:
        raise _wrong(text)
    return found


def _wrong(text: str) -> ValueError:
    return ValueError(
        f"the selection has {text!r}; it must be one of {', '.join(GROUPS)}, a group and a "
        "fraction of all units such as cu:0.06, or layers:6-12, heads:2.26,3.1, kv_heads:2.0, "
        "parameters:model.norm*, rows:lm_head.weight=5,7, weights:DIR or "
        "weights:DIR:0.01; joined by ' + ' and ' - '"
    )
