"""How large what training changed is: by part of the model, by layer, and by group of units.

With d = tuned - base the size of a part P is ||d_P||, beside ||base_P||. The share of a group of
units is ||d_G||^2 / ||d||^2 over what its units own. Example: two units own 3 parameters each, of
which training changed one by 2 in the first unit and one by 1 in the second: ||d||^2 is 5, and the
first unit has 80 % of it with 50 % of the parameters. Where units share a row of V, each has an
equal part of it.

**The control** is as many units of each module, drawn at random. Nothing is drawn: of n of the N
units of a module, with energies e, the sum has the mean n mean(e) and, without replacement, the
variance n var(e) (N - n) / (N - 1). Modules are independent, so that both add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssah.deltas.arithmetic import CHUNK, blocks, delta_of
from ssah.deltas.matching import Deltas
from ssah.deltas.model_parts import PARTS, parts_of
from ssah.deltas.owners import Place, places
from ssah.deltas.weights import Weights, WeightsOf
from ssah.training import Entries, frozen_entries
from ssah.units import DepthTwoModule, UnitSet, check_units, find_modules


@dataclass
class Size:
    """How large a delta is over some parameters.

    Attributes:
        parameters: how many.
        changed: how many of them training changed.
        delta_sq: sum of squares of what it changed them by.
        base_sq: sum of squares of the base.
    """

    parameters: int = 0
    changed: int = 0
    delta_sq: float = 0.0
    base_sq: float = 0.0

    @property
    def norm(self) -> float:
        """||delta||."""
        return math.sqrt(self.delta_sq)

    @property
    def relative(self) -> float:
        """||delta|| / ||base||, 0 where both are."""
        return math.sqrt(self.delta_sq / self.base_sq) if self.base_sq else 0.0

    def _add(self, other: Size) -> None:
        """Count the parameters of ``other`` too."""
        self.parameters += other.parameters
        self.changed += other.changed
        self.delta_sq += other.delta_sq
        self.base_sq += other.base_sq


@dataclass(frozen=True)
class GroupSize:
    """What a group of units has of a delta.

    Attributes:
        units: how many.
        parameters: what they own, as a fraction of the model's parameters.
        share: their fraction of ||delta||^2.
        random: what as many random units of each module have of it on average.
        random_sd: the standard deviation of that over draws.
    """

    units: int
    parameters: float
    share: float
    random: float
    random_sd: float


@dataclass
class DeltaSizes:
    """What `measure` found.

    Attributes:
        total: of all parameters.
        parts: part of the model -> its size.
        layers: number of a layer -> part of it -> its size.
        groups: name of a group -> what it has; and what no unit owns, as ``"no unit"``.
    """

    total: Size = field(default_factory=Size)
    parts: dict[str, Size] = field(default_factory=dict)
    layers: dict[int, dict[str, Size]] = field(default_factory=dict)
    groups: dict[str, GroupSize] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "total": _plain(self.total),
            "parts": {name: _plain(size) for name, size in self.parts.items()},
            "layers": [
                {"layer": layer, **{name: _plain(size) for name, size in parts.items()}}
                for layer, parts in self.layers.items()
            ],
            "groups": {name: asdict(size) for name, size in self.groups.items()},
        }


def measure(
    base: WeightsOf, tuned: WeightsOf, groups: Mapping[str, UnitSet] | None = None
) -> DeltaSizes:
    """How large the change from ``base`` to ``tuned`` is, and where it lies. Computed in float64.

    Args:
        base, tuned: as of `ssah.deltas.interpolate`; not state dicts, which have no parts.
        groups: name -> units, for instance `UnitGroups`.

    Raises:
        ValueError: the models differ; their architecture is unknown; units of another model.
        TypeError: a state dict.
        FloatingPointError: a weight is NaN or infinite.
        ModelError: a model cannot be found or read, or is quantised.
    """
    deltas = Deltas(base, [tuned])
    weights = deltas.tuned[0]
    # Before the weights are read, which takes minutes.
    for units in (groups or {}).values():
        check_units(weights.model, units)
    parts, found = parts_of(weights.model), DeltaSizes()
    owners = _Owners(weights) if groups else None
    for name in deltas.names:
        # What is no parameter, as a buffer, is of no part that has a name.
        part, layer = parts.get(weights.param(name), ("other", None))
        size = _size(deltas, name, owners)
        found.total._add(size)
        found.parts.setdefault(part, Size())._add(size)
        if layer is not None:
            found.layers.setdefault(layer, {}).setdefault(part, Size())._add(size)
    # In the order of the model, not in that of the files.
    found.parts = _ordered(found.parts)
    found.layers = {layer: _ordered(own) for layer, own in sorted(found.layers.items())}
    if groups and owners:
        found.groups = owners.shares(groups, found.total)
    return found


def _size(deltas: Deltas, name: str, owners: _Owners | None) -> Size:
    size = Size()
    if not deltas.in_float(name):
        return size
    before, (after,) = deltas.read(name)
    # A single number has no rows.
    before, after = (each if each.dim() else each[None] for each in (before, after))
    for rows in blocks(before, CHUNK):
        b, t = before[rows], after[rows]
        squares = delta_of(name, b, t).square_()
        size._add(
            Size(
                b.numel(),
                int((b != t).sum()),
                float(squares.sum()),
                float(b.double().square_().sum()),
            )
        )
        if owners is not None:
            owners.add(name, squares, rows)
    return size


class _Owners:
    """Sums over the entries that units own, and what each unit has of them."""

    def __init__(self, weights: Weights) -> None:
        model = weights.model
        self._modules: dict[str, DepthTwoModule] = find_modules(model)
        # Of all units: what one owns does not depend on its group.
        everything = UnitSet({}, {n: m.n_units for n, m in self._modules.items()}).complement()
        entries = frozen_entries(model, everything)
        owned: dict[str, Entries] = {p: own for p, own in entries.items() if not own.whole}
        self._places: dict[str, Place] = {each.name: each for each in places(weights, owned)}
        self._sums = {p: torch.zeros(len(o.trains), dtype=torch.float64) for p, o in owned.items()}
        self._widths = {p: model.get_parameter(p).numel() / len(s) for p, s in self._sums.items()}

    def add(self, name: str, squares: Tensor, rows: slice) -> None:
        """Count some rows of a tensor, squared: float64 ``[rows, ...]``."""
        place = self._places.get(name)
        if place is not None:
            place.add_sums(self._sums[place.param], squares, rows)

    def shares(self, groups: Mapping[str, UnitSet], total: Size) -> dict[str, GroupSize]:
        """What each group has of a delta, and what is left for no unit."""
        energies = self._by_unit(self._sums)
        widths = {p: torch.full_like(s, self._widths[p]) for p, s in self._sums.items()}
        counts = self._by_unit(widths)
        whole = total.delta_sq or 1.0  # nothing changed: every share is 0
        found: dict[str, GroupSize] = {}
        for group, units in groups.items():
            share = own = mean = variance = 0.0
            for name, index in units.items():
                energy, n = energies[name], len(index)
                size = len(energy)
                share += float(energy[index].sum())
                own += float(counts[name][index].sum())
                # Modules are drawn from independently, so that means and variances add up.
                mean += n * float(energy.mean())
                variance += n * float(energy.var(correction=0)) * (size - n) / max(1, size - 1)
            found[group] = GroupSize(
                len(units),
                own / total.parameters,
                share / whole,
                mean / whole,
                math.sqrt(variance) / whole,
            )
        owned = sum(float(energy.sum()) for energy in energies.values())
        n_owned = sum(float(count.sum()) for count in counts.values())
        rest = max(0.0, total.delta_sq - owned) / whole  # sums in two orders differ by a rounding
        outside = 1 - n_owned / total.parameters
        found["no unit"] = GroupSize(0, outside, rest, rest, 0.0)
        return found

    def _by_unit(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """B's name -> float64 ``[n_units]``: what each unit has of sums over entries."""
        # How many units share an entry: each has an equal part of it.
        fed = {param: torch.zeros_like(own) for param, own in sums.items()}
        for module in self._modules.values():
            for owned in (*module.inputs, module.output):
                n = len(fed[owned.param])
                fed[owned.param] += torch.bincount(owned.entries, minlength=n)
        found: dict[str, Tensor] = {}
        for name, module in self._modules.items():
            slices = (*module.inputs, module.output)
            each = [sums[o.param][o.entries] / fed[o.param][o.entries] for o in slices]
            found[name] = torch.stack(each).sum(0)
        return found


def _ordered(parts: Mapping[str, Size]) -> dict[str, Size]:
    return {part: parts[part] for part in PARTS if part in parts}


def _plain(size: Size) -> dict[str, Any]:
    return {**asdict(size), "norm": size.norm, "relative": size.relative}
