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
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ssah.selections import Selection
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
    modules: Mapping[str, DepthTwoModule],
    trained: Selection,
    argument: str = "units",
    *,
    single: bool = False,
) -> dict[str, Entries]:
    """Every parameter's entries that train: what a plan or an adapter takes of a selection.

    Args:
        modules: all depth-2 modules of the model.
        trained: what trains.
        argument: what the caller calls the selection, for messages.
        single: whether a parameter may train in other parts than whole entries: the elements are
            its entries then.

    Raises:
        ValueError: without ``single``, of a parameter single weights train, or entries that run
            along another dimension than its units do (rows of B, say); or a part of a layer's
            experts trains, and the rest of the same units does not.
    """
    # What no unit owns (norms, embeddings, Q and K) has rows for entries.
    owned = _layouts(modules)
    layouts = dict.fromkeys(trained.shapes, (0,)) | owned
    result = {}
    for name, shape in trained.shapes.items():
        mask, dims = trained.mask(name), layouts[name]
        sizes = tuple(size if dim in dims else 1 for dim, size in enumerate(shape))
        if torch.broadcast_shapes(mask.shape, sizes) != sizes:
            if single:
                trains = mask.expand(shape).reshape(-1)
                result[name] = Entries(len(shape) - 1, trains, single=True)
                continue
            raise ValueError(
                f"{argument} has entries of {name!r} that are no whole entries along dimension "
                f"{dims[-1]}: {_described(mask)}; it must have units, heads, layers, whole "
                "parameters or rows, to train or to stay"
            )
        trains = mask.expand(sizes).reshape(-1)
        result[name] = Entries(dims[-1], trains, experts=len(dims) > 1)
    if single:
        for name, each in result.items():
            if len(trained.shapes[name]) == 1 and each.partial and name not in owned:
                result[name] = replace(each, single=not _goes_with_rows(name, result))
    _check_experts(modules, result, argument)
    return result


def _goes_with_rows(name: str, entries: Mapping[str, Entries]) -> bool:
    """Whether a vector is the bias of a matrix of which the same rows train, as of heads of Q.

    Else its elements train one by one: those of a norm, or of B's bias.
    """
    owner, _, leaf = name.rpartition(".")
    weight = entries.get(f"{owner}.weight") if leaf == "bias" else None
    if weight is None or weight.dims != (0,) or weight.single:
        return False
    return torch.equal(weight.trains, entries[name].trains)


def _layouts(modules: Mapping[str, DepthTwoModule]) -> dict[str, tuple[int, ...]]:
    """Parameter that units own entries of -> its dimensions that run over these."""
    return {
        owned.param: (owned.dim,) if owned.expert is None else (0, owned.dim + 1)
        for module in modules.values()
        for owned in (*module.inputs, module.output)
    }


def _described(mask: Tensor) -> str:
    """What a mask ``[...]`` that broadcasts over a parameter chooses."""
    along = [dim for dim, size in enumerate(mask.shape) if size > 1]
    if len(along) == mask.dim() > 1:
        return "single weights"
    return f"some along dimension {', '.join(map(str, along))}"


def _check_experts(
    modules: Mapping[str, DepthTwoModule], entries: Mapping[str, Entries], argument: str
) -> None:
    """Refuse a part of a layer's experts that is to train or stay while the rest does not."""
    for module in modules.values():
        partial = [param for param in module.params if entries[param].partial]
        # Of single weights all of a module is split, whose own forward goes on.
        if module.expert is None or not partial or any(entries[p].single for p in module.params):
            continue
        if len(partial) < len(module.params):
            whole = sorted(param for param in module.params if param not in partial)
            trains = all(entries[param].whole for param in whole)
            what = "extra_parameters" if trains else "keep (or requires_grad=False)"
            raise ValueError(
                f"{what} has {whole}, must have all of {sorted(module.params)} or none of them: "
                "some units of these experts train and some do not"
            )
        slices = (*module.inputs, module.output)
        each = [entries[owned.param].trains[owned.entries] for owned in slices]  # [units] each
        if not all(torch.equal(each[0], other) for other in each):
            raise ValueError(
                f"{argument} has a part of some units of {module.name!r}; of experts it must have "
                "whole units: rows of gate and up, and columns of down"
            )


def fingerprint(config: str, entries: Mapping[str, Entries]) -> str:
    """SHA-256 (hex) of a configuration's hash and of which entries train."""
    state = hashlib.sha256(config.encode())
    for name, each in sorted(entries.items()):
        if each.some:
            state.update(json.dumps([name, each.dim, len(each.trains)]).encode())
            state.update(each.trains.numpy().tobytes())
    return state.hexdigest()
