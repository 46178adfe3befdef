"""Which models a plan can be made for: what is refused before anything of one is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.distributed import Ranks
from ssah.interventions import check_not_ablated
from ssah.models import check_idle, check_plain, nonfinite
from ssah.selections import Selection
from ssah.training.choice import split_modules
from ssah.training.installing import check_sharded
from ssah.training.optimising import check_unplanned
from ssah.units import DepthTwoModule, UnitSet, check_parameters, check_units, find_modules
from ssah_kernels.sharded import is_sharded


def check_planable(model: PreTrainedModel, units: UnitSet | Selection) -> dict[str, DepthTwoModule]:
    """The depth-2 modules of a model that a plan over ``units`` can be made for.

    Raises:
        TypeError: ``units`` is neither a `UnitSet` nor a `Selection`.
        ValueError, RuntimeError: it cannot; the module or parameter that is in the way is named.
        FloatingPointError: a weight of a unit is NaN or infinite; on every rank.
    """
    check_unplanned(model)
    modules = find_modules(model)
    if not isinstance(units, Selection):
        check_units(model, units)
    check_idle(model, "before a plan is made")
    check_not_ablated(model, "before a plan is made")
    _check_weights(model)
    _check_projections(model, modules, split_modules(modules, units))
    # Each rank sees its own rows: one that refuses alone would leave the others waiting.
    with (Ranks.over(model) or Ranks()).agreeing():
        _check_finite(model, modules)
    return modules


def _check_weights(model: PreTrainedModel) -> None:
    """Refuse models whose weights cannot be split.

    Raises:
        ValueError: a weight is quantised, not in memory, a tensor subclass, or sharded otherwise
            than ``fully_shard`` does, with its name.
    """
    # Sharded, nothing is split: other layouts are refused than where slices are cut out of weights.
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
            check_sharded(name, parameter)
        # A subclass computes something else with its data than a slice of it would.
        elif type(parameter.data) is not Tensor or parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} is a {type(parameter.data).__name__} (inference tensor: "
                f"{parameter.is_inference()}), must be a plain tensor: load the model outside "
                "torch.inference_mode (of sharded ones, those of fully_shard are known)"
            )


def _check_projections(
    model: nn.Module, modules: Mapping[str, DepthTwoModule], names: Collection[str]
) -> None:
    """Refuse projections that cannot be split: computed, shared or offloaded ones.

    Raises:
        ValueError: with the name of the module.
    """
    params = (param for module in modules.values() for param in module.params)
    check_parameters(model, params, "for units to train or to stay")
    uses: dict[int, int] = {}  # how many names each parameter has
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name in names:
        module = modules[name]
        for owned in (*module.inputs, module.output):
            owner = owned.param.rpartition(".")[0]
            projection = model.get_submodule(owner)
            # Its class is about to change; a forward of its own would hide that of the new class.
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


def _check_finite(model: nn.Module, modules: Mapping[str, DepthTwoModule]) -> None:
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
