"""The optimiser of a plan, and the parameter groups of what trains."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import nn

from ssah.training.entries import TrainedSlice
from ssah_kernels.optim import MaskedAdamW
from ssah_kernels.sharded import Dim


class PlanAdamW(MaskedAdamW):
    """:class:`~ssah_kernels.optim.MaskedAdamW` over the parameters of a plan.

    Its groups carry the plan's fingerprint, so that a checkpoint of another plan is refused.

    Attributes:
        in_backward: whether its updates happen in ``backward()``, see
            `ssah.training.optimising.in_backward`.
    """

    in_backward = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume. Refuses, with ValueError, the state of another plan."""
        own = {group.get("plan") for group in self.param_groups}
        theirs = {group.get("plan") for group in state_dict["param_groups"]}
        if own != theirs:
            raise other_plan(theirs, own)
        super().load_state_dict(state_dict)


def other_plan(theirs: Set[Any], own: Set[Any]) -> ValueError:
    """The error of an optimiser or its state that belongs to other plans, by their fingerprints."""
    saved, current = (", ".join(sorted(str(f)[:12] for f in each)) for each in (theirs, own))
    return ValueError(
        f"the optimiser state was saved under another plan (fingerprint {saved}, this one is "
        f"{current}): resume with the same model, the same units and the same extra_parameters=, "
        "keep= and rows=, or start a new optimiser"
    )


def rounding(parameters: Iterable[nn.Parameter]) -> dict[str, str]:
    """How weights are stored unless the caller says so, as an option of `PlanAdamW`.

    Parameters are of any shape. bfloat16 has 8 bits: a step of less than a 512th of a weight is
    lost to nearest. float16 parameters know no stochastic rounding.
    """
    dtypes = {p.dtype for p in parameters}
    stochastic = torch.bfloat16 in dtypes and torch.float16 not in dtypes
    return {"rounding": "stochastic"} if stochastic else {}


# What transformers calls AdamW with moments in full precision, each in a form of its own.
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")


def trainer_options(args: Any) -> dict[str, Any]:
    """What ``TrainingArguments`` say of AdamW, as options of `PlanAdamW`.

    Raises:
        ValueError: they ask for another optimiser, which would be passed over in silence.
    """
    name = getattr(args, "optim", None)
    name = getattr(name, "value", name)  # an enumeration
    more = getattr(args, "optim_args", None)
    if (name is not None and name not in _ADAMW) or more:
        what = f"optim is {name!r}" + (f" and optim_args {more!r}" if more else "")
        raise ValueError(
            f"args.{what}; with a plan's own optimiser it must be one of {', '.join(_ADAMW)}, "
            "without optim_args: it is AdamW, with moments of state_dtype= (for 8 bits write "
            "plan.optimizer_cls_and_kwargs(args, state_dtype='8bit')). To train with another "
            "optimiser give the trainer none of the plan's: its own will hold the trained slices"
        )
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def param_groups(
    parameters: Iterable[nn.Parameter],
    slices: Iterable[TrainedSlice],
    fingerprint: str,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups of what trains, with and without decay, with the dimension that units run along.

    Args:
        parameters: all that train, of any shape, in the order of the model; also what no slice is
            of, such as adapters that the model was given since.
        slices: what is known of them.
        fingerprint: of the plan.
        weight_decay: of parameters of more than one dimension; norms and biases do not decay.
    """
    parameters = list(parameters)
    n_dims = {id(p): p.dim() for p in parameters}
    # Slices are unit-major: units run along dimension 0, the default of the optimiser.
    dims: dict[int, Dim] = {}
    indices = {}
    for each in slices:
        key = id(each.parameter)
        if each.entries.single:  # a slice [trained] of a matrix decays as the matrix would
            n_dims[key] = len(each.entries.dims)
        if each.split:
            continue
        if each.parameter.dim() > 1:  # trains whole: of B, units run along dimension 1
            dims[key] = each.entries.dims[0]
        if each.entries.partial:  # sharded, or about to be: the optimiser selects what trains
            indices[key], dims[key] = each.index, each.entries.along
            n_dims[key] -= each.entries.experts  # [experts, out]: experts' biases are biases
    groups = []
    for decays in (True, False):
        own = [p for p in parameters if (n_dims[id(p)] > 1) == decays]
        if own:
            groups.append(
                {
                    "params": own,
                    "weight_decay": weight_decay if decays else 0.0,
                    "indices": [indices.get(id(p)) for p in own],
                    "dims": [dims.get(id(p), 0) for p in own],
                    "plan": fingerprint,
                }
            )
    return groups
