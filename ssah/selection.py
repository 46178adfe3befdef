"""Which entries of which parameters train when some units do, and splitting the model by that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah import masked_experts
from ssah.compat.modules import has_hooks
from ssah.finite import nonfinite
from ssah.masked_linear import MaskedConv1D, MaskedLinear, MaskedProjection
from ssah.offload import runs_own_forward
from ssah.projections import check_parameters
from ssah.quantised import check_plain
from ssah.slots import Slot, restored
from ssah.units import DepthTwoModule
from ssah_kernels.sharded import Dim, check_layout, is_sharded

__all__ = [
    "Entries",
    "canonical_names",
    "check_finite_weights",
    "check_projections",
    "check_trainable",
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


def check_trainable(model: PreTrainedModel) -> None:
    """Refuse models whose weights cannot be split.

    Raises:
        ValueError: a weight is quantised, not in memory, a tensor subclass, or sharded otherwise
            than ``fully_shard`` does, with its name.
    """
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    check_plain(model, "to be trained in part")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"model {type(model).__name__} is quantised, must hold floating-point weights "
            "(load it without quantization_config, or dequantise it)"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype} on {parameter.device}, must be a "
                "floating-point weight in memory (dequantise the model, and load it whole)"
            )
        if sharded:
            if not is_sharded(parameter):
                raise ValueError(
                    f"parameter {name!r} is not sharded, must be like the others: apply "
                    "fully_shard to the whole model"
                )
            check_layout(f"parameter {name!r}", parameter)
        elif type(parameter.data) is not Tensor or parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} is a {type(parameter.data).__name__} (inference tensor: "
                f"{parameter.is_inference()}), must be a plain tensor: load the model outside "
                "torch.inference_mode (of sharded ones, those of fully_shard are known)"
            )


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
            and not _has_hooks_inside(model, orders)
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


def _has_hooks_inside(model: nn.Module, params: Collection[str]) -> bool:
    """Whether hooks hang on something inside the module that holds all of ``params``.

    An activation whose forward was replaced counts as one with a hook.
    """
    holders = [param.split(".")[:-2] for param in params]
    alike = takewhile(lambda steps: len(set(steps)) == 1, zip(*holders, strict=False))
    common = [steps[0] for steps in alike]
    inside = list(model.get_submodule(".".join(common)).modules())[1:]
    return any(has_hooks(part) or not runs_own_forward(part) for part in inside)


def check_projections(
    model: nn.Module, modules: Mapping[str, DepthTwoModule], names: Collection[str]
) -> None:
    """Refuse projections that cannot be split: computed, shared or offloaded ones.

    Raises:
        ValueError: with the name of the module.
        RuntimeError: a hook hangs inside experts.
    """
    params = (param for module in modules.values() for param in module.params)
    check_parameters(model, params, "for units to train or to stay")
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for experts in dict.fromkeys(modules[name].down for name in names if modules[name].routed):
        masked_experts.check_no_hooks(type(experts).__name__, experts)
    for name in names:
        module = modules[name]
        for owned in (*module.inputs, module.output):
            owner = owned.param.rpartition(".")[0]
            projection = model.get_submodule(owner)
            if "forward" in vars(projection):
                raise ValueError(
                    f"module {owner!r} has its forward replaced (offloading?), must be a plain "
                    "layer: load the model whole onto one device"
                )
            if uses[id(model.get_parameter(owned.param))] > 1:
                raise ValueError(
                    f"parameter {owned.param!r} is tied to another one, so that its units cannot "
                    "train apart from it"
                )


def check_finite_weights(model: nn.Module, modules: Mapping[str, DepthTwoModule]) -> None:
    """Refuse units of weights that are NaN or infinite: kept or trained, they stay so.

    Raises:
        FloatingPointError: the parameter is named.
    """
    params = dict.fromkeys(param for module in modules.values() for param in module.params)
    name = nonfinite((param, model.get_parameter(param)) for param in params)
    if name is not None:
        raise FloatingPointError(
            f"parameter {name!r} is NaN or infinite, must be finite before a plan is made: the "
            "checkpoint is damaged, or was written by a run that diverged; load another one"
        )


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
