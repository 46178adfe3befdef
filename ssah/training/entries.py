"""Which entries of which parameters train when some units do, and splitting the model by that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.training import masked_experts
from ssah.training.checks import has_hooks_inside
from ssah.training.masked_linear import MaskedConv1D, MaskedLinear, MaskedProjection
from ssah.training.split_tensor import Slot, restored
from ssah.units import DepthTwoModule
from ssah_kernels.sharded import Dim

__all__ = [
    "Entries",
    "canonical_names",
    "fingerprint",
    "select_entries",
    "split",
]


@dataclass(frozen=True, eq=False)
class Entries:
    """Which entries of a parameter train.

    Attributes:
        dim: dimension that runs over entries.
        trains: bool ``[entries]`` on the CPU; of experts ``[experts * entries]``.
        experts: whether the first dimension runs over experts.
    """

    dim: int
    trains: Tensor
    experts: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        """All dimensions that ``trains`` runs over."""
        return (0, self.dim) if self.experts else (self.dim,)

    @property
    def along(self) -> Dim:
        """``dims`` as :mod:`ssah_kernels.sharded` takes them."""
        return (0, self.dim) if self.experts else self.dim

    @property
    def whole(self) -> bool:
        """Whether every entry trains."""
        return bool(self.trains.all())

    @property
    def partial(self) -> bool:
        """Whether some entries train and some do not."""
        return bool(self.trains.any()) and not self.whole


def select_entries(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    trained: Mapping[str, Tensor],
    *,
    rest: bool,
    also: Collection[str] = (),
) -> dict[str, Entries]:
    """Every parameter's entries that train, by canonical name.

    Args:
        model: the model.
        modules: all its depth-2 modules.
        trained: B's name -> bool ``[n_units]``, the units that train. Entries of modules that are
            not in it follow ``rest``.
        rest: whether what no unit of ``trained`` owns trains.
        also: names of parameters that train whole.
    """
    result = {
        name: Entries(0, torch.full((len(p) if p.dim() else 1,), rest))
        for name, p in model.named_parameters()
    }
    for name, module in modules.items():
        mask = trained.get(name, torch.full((module.n_units,), rest))
        for owned in (*module.inputs, module.output):
            shape = model.get_parameter(owned.param).shape
            experts = owned.expert is not None
            dim = owned.dim + experts
            size = shape[dim]
            total = shape[0] * size if experts else size
            before = result[owned.param]
            if (before.dim, before.experts, len(before.trains)) != (dim, experts, total):
                before = Entries(dim, torch.full((total,), rest), experts)
                result[owned.param] = before
            # An entry that several units share trains only if all of them do.
            feeds = torch.bincount(owned.index, minlength=size)
            all_train = torch.bincount(owned.index[mask], minlength=size) == feeds
            own = before.trains[owned.offset : owned.offset + size]
            own[feeds > 0] = all_train[feeds > 0]
    for name in also:
        result[name] = replace(result[name], trains=torch.ones_like(result[name].trains))
    _check_experts(modules, trained, result, also)
    return result


def _check_experts(
    modules: Mapping[str, DepthTwoModule],
    trained: Mapping[str, Tensor],
    entries: Mapping[str, Entries],
    also: Collection[str],
) -> None:
    """Refuse a part of a layer's experts that is to train whole while the rest does not."""
    layers = {modules[name].output.param: modules[name] for name in trained}
    for module in layers.values():
        params = {owned.param for owned in (*module.inputs, module.output)}
        if module.expert is not None and len({entries[param].partial for param in params}) > 1:
            raise ValueError(
                f"also has {sorted(params & set(also))}, must have all of {sorted(params)} or none "
                "of them: some units of these experts train and some do not"
            )


def split(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    trained: Mapping[str, Tensor],
    entries: Mapping[str, Entries],
    masked: dict[str, MaskedProjection],
) -> None:
    """Split every projection of which some entries train and some do not, in place.

    FFN channels are packed, so that what trains lies side by side, unless hooks hang among them;
    attention gathers. Experts of a layer are split together.

    Args:
        masked: name -> the module, now masked; added to as they are made, so that the caller can
            undo what was done when an error is raised.
    """
    for name in trained:
        module = modules[name]
        owner = module.output.param.rpartition(".")[0]
        if owner in masked:
            continue  # an expert: its layer is done
        touched = [s.param for s in (*module.inputs, module.output) if entries[s.param].partial]
        if not touched:
            continue
        if module.expert is not None:
            leaves = {param.rpartition(".")[2]: entries[param] for param in touched}
            masked[owner] = masked_experts.install(
                model.get_submodule(owner),
                {leaf: each.dims for leaf, each in leaves.items()},
                {leaf: each.trains for leaf, each in leaves.items()},
            )
            continue
        mask = trained[name]
        packing = torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])
        orders: dict[str, Tensor] = {}
        for owned in (*module.inputs, module.output):
            rows = owned.index[packing]
            orders[owned.param] = (
                torch.cat([orders[owned.param], rows]) if (owned.param in orders) else rows
            )
        # A hook among the channels must find them where they were.
        pack = (
            module.kind == "mlp"
            and not has_hooks_inside(model, orders)
            and all(
                torch.equal(order.sort().values, torch.arange(len(entries[param].trains)))
                for param, order in orders.items()
            )
        )
        owners = {param.rpartition(".")[0] for param in (orders if pack else touched)}
        for owner in sorted(owners):
            slots: dict[str, Slot] = {}
            with restored(slots):
                for leaf in ("weight", "bias"):
                    param = f"{owner}.{leaf}"
                    if param not in orders:
                        continue
                    order = orders[param] if pack else None
                    original = model.get_parameter(param)
                    slots[leaf] = Slot.of(
                        leaf, original, entries[param].dims, order, entries[param].trains
                    )
            target = model.get_submodule(owner)
            masked_class = MaskedConv1D if isinstance(target, Conv1D) else MaskedLinear
            MaskedProjection.install(target, slots, masked_class, is_output=owner == name)
            assert isinstance(target, MaskedProjection)
            masked[owner] = target


def fingerprint(config: str, entries: Mapping[str, Entries]) -> str:
    """SHA-256 (hex) of a configuration's hash and of which entries train."""
    state = hashlib.sha256(config.encode())
    for name, each in sorted(entries.items()):
        if each.trains.any():
            state.update(json.dumps([name, each.dim, len(each.trains)]).encode())
            state.update(each.trains.numpy().tobytes())
    return state.hexdigest()


def canonical_names(model: nn.Module, also: Collection[str]) -> set[str]:
    """Names as ``model.named_parameters()`` gives them: of tied parameters, the first."""
    if isinstance(also, str):
        raise TypeError(f"also is the string {also!r}, must be a collection of parameter names")
    if isinstance(also, Mapping):
        raise TypeError(
            "also is a mapping, must be a collection of parameter names: these train whole, not "
            "some of their rows"
        )
    every = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in also if name not in every]
    if unknown:
        raise ValueError(
            f"also has names that the model lacks: {', '.join(unknown)}; they must be from "
            "model.named_parameters()"
        )
    first = {id(p): name for name, p in model.named_parameters()}
    return {first[id(every[name])] for name in also}
