"""Which entries of which parameters train when some units do.

An *entry* is what one unit owns of one parameter: a row of gate, up or V (and its bias), a column
of down or O. Counted along the dimension that units run along, entry e of a weight ``[out, in]`` is
``weight[e]`` in A and ``weight[:, e]`` in B.

With shared key/value heads several units own one row of V. It trains only if all of them do, since
each of them reads it. Example, four query heads of one channel over two key/value heads:

    unit (column of O)   0  1  2  3      units 0, 1 and 2 train
    row of V             0  0  1  1      row 0 trains; row 1 does not: unit 3 must stay

So count for every row the units that it feeds (2, 2) and those of them that train (2, 1); a row
trains where the two counts are equal.

Where single weights are chosen, every element of the parameter is an entry of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ssah.units import DepthTwoModule
from ssah_kernels.sharded import Dim


@dataclass(frozen=True, eq=False)
class Entries:
    """Which entries of a parameter train.

    Attributes:
        dim: dimension that runs over entries.
        trains: bool ``[entries]`` on the CPU; of experts ``[experts * entries]``, those of the
            first expert before those of the second.
        experts: whether the first dimension runs over experts.
        single: whether entries are the elements of the parameter, in row-major order; ``dim`` is
            its last dimension then.
    """

    dim: int
    trains: Tensor
    experts: bool = False
    single: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        """All dimensions that ``trains`` runs over."""
        if self.single:
            return tuple(range(self.dim + 1))
        return (0, self.dim) if self.experts else (self.dim,)

    def elements(self, shape: torch.Size) -> Tensor:
        """Which elements of the parameter train: bool ``[*shape]``, a view where it can be."""
        sizes = [size if d in self.dims else 1 for d, size in enumerate(shape)]
        return self.trains.view(sizes).expand(shape)

    @property
    def along(self) -> Dim:
        """``dims`` as :mod:`ssah_kernels.sharded` takes them."""
        return (0, self.dim) if self.experts else self.dim

    @property
    def index(self) -> Tensor:
        """The entries that train, int64 ``[trained]``, ascending."""
        return self.trains.nonzero()[:, 0]

    @property
    def some(self) -> bool:
        """Whether any entry trains."""
        return bool(self.trains.any())

    @property
    def whole(self) -> bool:
        """Whether every entry trains."""
        return bool(self.trains.all())

    @property
    def partial(self) -> bool:
        """Whether some entries train and some do not."""
        return self.some and not self.whole


@dataclass(frozen=True, eq=False)
class TrainedSlice:
    """A parameter that trains, and where it stands in the model as it was.

    Attributes:
        name: of the original parameter.
        parameter: what trains now. Where the original is split, the trained entries alone,
            unit-major: ``[len(index), ...]``. Else the original itself.
        index: int64 ``[trained]`` on the CPU, the entries of the original that the rows of
            ``parameter`` are; of a parameter that is not split, those that train.
        entries: of the original parameter.
        split: whether the original is split.
    """

    name: str
    parameter: nn.Parameter
    index: Tensor
    entries: Entries
    split: bool


def select_entries(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    trained: Mapping[str, Tensor],
    *,
    rest: bool,
    extra: Collection[str] = (),
    kept: Collection[str] = (),
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, Entries]:
    """Every parameter's entries that train, by canonical name.

    Args:
        model: the model.
        modules: all its depth-2 modules.
        trained: B's name -> bool ``[n_units]``, the units that train. Entries of modules that are
            not in it follow ``rest``.
        rest: whether what no unit of ``trained`` owns trains.
        extra: names of parameters that train whole.
        kept: names of parameters that stay whole.
        rows: of parameters that no unit owns: name -> int64 ``[rows]``, those that do not follow
            ``rest``.
    """
    # What no unit owns (norms, embeddings, Q and K) has rows for entries, all of them alike.
    result = {
        name: Entries(0, torch.full((len(p) if p.dim() else 1,), rest))
        for name, p in model.named_parameters()
    }
    for name, module in modules.items():
        mask = trained.get(name, torch.full((module.n_units,), rest))  # [units]
        for owned in (*module.inputs, module.output):
            shape = model.get_parameter(owned.param).shape
            experts = owned.expert is not None
            dim = owned.dim + experts
            size = shape[dim]
            total = shape[0] * size if experts else size
            before = result[owned.param]
            # The first module that owns entries here says how they are counted. Gate and up in one
            # weight, and the experts of a layer, are further ones that add theirs.
            if (before.dim, before.experts, len(before.trains)) != (dim, experts, total):
                before = Entries(dim, torch.full((total,), rest), experts)
                result[owned.param] = before
            feeds = torch.bincount(owned.index, minlength=size)  # [entries]: units of each entry
            all_train = torch.bincount(owned.index[mask], minlength=size) == feeds  # [entries]
            own = before.trains[owned.offset : owned.offset + size]  # a view: of this expert
            own[feeds > 0] = all_train[feeds > 0]
    for name, index in (rows or {}).items():
        result[name].trains[index] = not rest
    for names, train in ((extra, True), (kept, False)):
        for name in names:
            trains = torch.full_like(result[name].trains, train)
            result[name] = replace(result[name], trains=trains)
    _check_experts(modules, trained, result, extra)
    return result


def choose_weights(
    entries: dict[str, Entries], weights: Mapping[str, Tensor], *, train: bool
) -> None:
    """Let single weights train, or stay, beside what ``entries`` says of their parameters.

    Args:
        entries: parameter -> which of its entries train; changed.
        weights: parameter -> bool ``[*shape]``, the weights that are meant.
        train: whether they train.
    """
    for name, mask in weights.items():
        before = entries[name]
        elements = before.elements(mask.shape)
        trains = (elements | mask if train else elements & ~mask).flatten()
        if trains.all() or not trains.any():  # nothing to tell apart
            entries[name] = replace(before, trains=torch.full_like(before.trains, bool(trains[0])))
        else:
            entries[name] = Entries(mask.dim() - 1, trains, single=True)


def _check_experts(
    modules: Mapping[str, DepthTwoModule],
    trained: Mapping[str, Tensor],
    entries: Mapping[str, Entries],
    extra: Collection[str],
) -> None:
    """Refuse a part of a layer's experts that is to train or stay whole while the rest is split."""
    layers = {modules[name].output.param: modules[name] for name in trained}
    for module in layers.values():
        params = {owned.param for owned in (*module.inputs, module.output)}
        if module.expert is not None and len({entries[param].partial for param in params}) > 1:
            whole = sorted(param for param in params if not entries[param].partial)
            what = (
                "extra_parameters" if set(whole) <= set(extra) else "keep (or requires_grad=False)"
            )
            raise ValueError(
                f"{what} has {whole}, must have all of {sorted(params)} or none of them: some "
                "units of these experts train and some do not"
            )


def fingerprint(config: str, entries: Mapping[str, Entries]) -> str:
    """SHA-256 (hex) of a configuration's hash and of which entries train."""
    state = hashlib.sha256(config.encode())
    for name, each in sorted(entries.items()):
        if each.some:
            state.update(json.dumps([name, each.dim, len(each.trains)]).encode())
            state.update(each.trains.numpy().tobytes())
    return state.hexdigest()
