"""Splitting a model: every projection of which some units train and some do not, in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile

import torch
from torch import Tensor, nn

from ssah.compat.modules import has_hooks
from ssah.models import runs_own_forward
from ssah.training.entries import Entries
from ssah.training.splitting.masked_experts import split_experts
from ssah.training.splitting.projection import MaskedProjection
from ssah.training.splitting.split_tensor import SplitTensor, restored
from ssah.training.splitting.storage_order import trained_first
from ssah.units import DepthTwoModule


def split_model(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    trained: Mapping[str, Tensor],
    entries: Mapping[str, Entries],
    masked: dict[str, MaskedProjection],
) -> None:
    """Split every projection of which some entries train and some do not, in place.

    Between A and B of an FFN the channels take the order of the storage, unless hooks hang among
    them. Those of a head keep theirs. Experts of a layer are split together. What is in ``masked``
    is left alone.

    Args:
        model: the model.
        modules: its depth-2 modules by B's name.
        trained: B's name -> bool ``[n_units]``, the units that train.
        entries: parameter -> which of its entries train.
        masked: name -> the module, now masked; added to as they are made, so that the caller can
            undo what was done when an error is raised.
    """
    for name, mask in trained.items():
        module = modules[name]
        owner = _owner(module.output.param)
        owned = dict.fromkeys(s.param for s in (*module.inputs, module.output))
        done = {param for param in owned if _owner(param) in masked}
        touched = [param for param in owned if param not in done and entries[param].partial]
        if not touched:  # an expert, for one, whose layer is done
            continue
        if module.expert is not None:
            leaves = {param.rpartition(".")[2]: entries[param] for param in touched}
            masked[owner] = split_experts(model.get_submodule(owner), leaves)
            continue
        # A projection of which single weights train is split already, and in the model's order.
        orders = None if done else _packing(model, module, mask, entries)
        # A tensor that trains whole is put into the new order too: its channels move.
        chosen = touched if orders is None else list(orders)
        for owner in sorted({_owner(param) for param in chosen}):
            masked[owner] = _split_projection(model, module, owner, entries, orders)


def _owner(param: str) -> str:
    """The name of the module that has the parameter."""
    return param.rpartition(".")[0]


def _packing(
    model: nn.Module, module: DepthTwoModule, mask: Tensor, entries: Mapping[str, Entries]
) -> dict[str, Tensor] | None:
    """The order in which the channels between A and B are to lie; None: in that of the model.

    Args:
        mask: bool ``[n_units]``, the units that train.

    Returns:
        parameter -> int64 ``[entries]``. Where gate and up are one weight ``[2 * units, in]``, the
        order of gate's rows, then that of up's: two stretches train.
    """
    if module.kind != "mlp":
        return None  # the channels of a head must stay together
    packing = trained_first(mask)  # [units]
    orders: dict[str, Tensor] = {}
    for owned in (*module.inputs, module.output):
        before = orders.get(owned.param, packing.new_empty(0))
        orders[owned.param] = torch.cat([before, owned.index[packing]])
    # Where units train in part, what trains would not lie side by side.
    slices = (*module.inputs, module.output)
    mixed = (entries[owned.param].trains[owned.index] for owned in slices)
    if not all(bool(each.all() or not each.any()) or torch.equal(each, mask) for each in mixed):
        return None
    # A hook among the channels must find them where they were.
    if has_hooks_inside(model, orders):
        return None
    # Rows that no unit owns, or that several do, have no place of their own in the order.
    once = all(
        torch.equal(order.sort().values, torch.arange(len(entries[param].trains)))
        for param, order in orders.items()
    )
    return orders if once else None


def _split_projection(
    model: nn.Module,
    module: DepthTwoModule,
    owner: str,
    entries: Mapping[str, Entries],
    orders: Mapping[str, Tensor] | None,
) -> MaskedProjection:
    """Split the weight and the bias of one ``Linear`` or ``Conv1D`` as far as units own them."""
    owned = {s.param for s in (*module.inputs, module.output)}
    tensors: dict[str, SplitTensor] = {}
    with restored(tensors):
        for leaf in ("weight", "bias"):
            param = f"{owner}.{leaf}"
            if param in owned:  # B's bias belongs to no unit
                each, original = entries[param], model.get_parameter(param)
                order = orders[param] if orders is not None else None
                if orders is None and leaf == "weight":  # a bias is small, and may stay as it is
                    order = trained_first(each.trains)
                tensors[leaf] = SplitTensor.of(leaf, original, each.dims, order, each.trains)
    return MaskedProjection.install(
        model.get_submodule(owner),
        tensors,
        is_output=owner == _owner(module.output.param),
        moves_channels=orders is not None,
    )


def has_hooks_inside(model: nn.Module, params: Collection[str]) -> bool:
    """Whether hooks hang on something inside the module that holds all of ``params``.

    An activation whose forward was replaced counts as one with a hook.
    """
    holders = [param.split(".")[:-2] for param in params]
    alike = takewhile(lambda steps: len(set(steps)) == 1, zip(*holders, strict=False))
    common = [steps[0] for steps in alike]
    inside = list(model.get_submodule(".".join(common)).modules())[1:]
    return any(has_hooks(part) or not runs_own_forward(part) for part in inside)
