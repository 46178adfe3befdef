"""Pruning: units set to zero for good, and what they put out on average moved to B's bias.

B's output is the sum over units j of h_j B[:, j] + b. Without the units of a set P it lacks, on
average over tokens, the sum over j in P of m_j B[:, j], with m_j the mean of h_j. With
``compensate=True`` that is added to b, so that the mean output stays. Example: a unit of constant
activation 2 with column (1, -1) can go without a trace if the bias gets (2, -2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssah.interventions.biases import create_biases
from ssah.interventions.columns import Columns, check_finite, checked_modules, columns_of
from ssah.interventions.intervention import check_not_ablated
from ssah.models import check_idle, check_plain
from ssah.units import DepthTwoModule, UnitSet, UnitSlice, check_parameters

if TYPE_CHECKING:
    from ssah.attribution import Attribution


def prune(
    model: nn.Module,
    units: UnitSet,
    *,
    compensate: bool = False,
    means: Attribution | Mapping[str, Tensor] | None = None,
) -> None:
    """Set units to zero for good: their columns of B, and their rows of A (weights and biases).

    Shapes stay. A row of V that several columns of O share becomes zero once all of these columns
    are zero. Nothing is changed where an error is raised.

    Args:
        model: a model that `find_modules` knows; changed in place.
        units: what to prune, for instance `groups["ru"]`.
        compensate: add what the units put out on average to B's bias: the sum over pruned j of
            means[j] * B[:, j], computed in float64 and rounded once. On the tokens that the means
            were taken over, B's mean output in that module stays what it was (the module's own
            input unchanged). Where B has no bias, zero biases are created as far as the model's
            configuration can say so (Llama: `mlp_bias=True` adds them to gate, up and down of
            every layer, `attention_bias=True` to q, k, v and o), and the configuration is set
            accordingly: `save_pretrained` and `from_pretrained` then keep them.
        means: with `compensate`, the mean activation entering B: an `Attribution` of this model,
            whose `.mean` is taken, or a mapping of B's name to [n_units].

    Raises:
        ValueError: where units belong to another model; where weights are packed; inside
            `ablate`; where `compensate` and `means` are not given together, or a mean is missing,
            of another length or not finite; where B has no bias and the configuration can express
            none (names the module).
        FloatingPointError: with `compensate`, where a column to be pruned is NaN or infinite.
    """
    modules = checked_modules(model, units)
    check_idle(model, "to be pruned")
    check_not_ablated(model, "to be pruned")
    check_plain(model, "to be pruned (ablate works)")
    params = (param for module in modules.values() for param in module.params)
    check_parameters(model, params, "to be pruned")
    columns = columns_of(units, modules)
    if compensate != (means is not None):
        raise ValueError(
            f"compensate is {compensate} and means is {'' if means is not None else 'not '}given; "
            "compensate=True needs means=, and means= is of use only with compensate=True"
        )
    shifts: dict[str, Tensor] = {}
    if means is not None:
        shifts = _mean_outputs(columns, units, _mean_values(model, means))
        lacking = [name for name in columns if modules[name].bias is None]
        if lacking:
            create_biases(model, lacking)
    with torch.inference_mode():  # as in `ablate`
        for name, each in columns.items():
            each.zero()
            for rows in modules[name].inputs:
                _zero_rows(model, rows, units.mask(name), each, modules[name])
            if name in shifts:
                bias = modules[name].bias
                assert bias is not None
                bias.copy_(bias.to("cpu", torch.float64) + shifts[name])


def _zero_rows(
    model: nn.Module, rows: UnitSlice, pruned: Tensor, columns: Columns, module: DepthTwoModule
) -> None:
    """Zero the entries of one parameter of A that feed nothing but zero columns of B.

    Args:
        model: the model.
        rows: the entries of A.
        pruned: bool ``[units]``, those that are pruned now.
        columns, module: of B, its columns already zero.
    """
    parameter = rows.tensor(model)
    size = parameter.shape[rows.dim]
    fed = torch.bincount(rows.index, minlength=size)  # [entries]: units that each one feeds
    dead = pruned
    if int(fed.max()) > 1:  # shared key/value heads: earlier prunings may have taken the others
        other = columns.weight.dim() - 1 - columns.dim
        empty = (columns.weight == 0).all(other).cpu()  # also those pruned earlier
        dead = empty[module.output.index]  # [units]
    gone = torch.bincount(rows.index[dead], minlength=size) == fed  # [entries]
    # What was zero before, and feeds nothing that is pruned now, is left alone.
    gone &= torch.bincount(rows.index[pruned], minlength=size) > 0
    parameter.index_fill_(rows.dim, gone.nonzero().flatten().to(parameter.device), 0)


def _mean_values(
    model: nn.Module, means: Attribution | Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """B's name -> ``[n_units]``, the mean of what enters B; refuses scores of another model."""
    if isinstance(means, Mapping):
        return means
    means.check_model(model)
    return means.mean


def _mean_outputs(
    columns: Mapping[str, Columns], units: UnitSet, means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """sum over j of means[j] * B[:, j] by module: float64 [out_features] on the CPU."""
    outputs = {}
    for name, each in columns.items():
        if name not in means:
            raise ValueError(f"means lacks {name}; it must have every module with pruned units")
        mean = torch.as_tensor(means[name]).detach().to("cpu", torch.float64)
        if mean.shape != (units.sizes[name],):
            raise ValueError(
                f"means of {name} has shape {list(mean.shape)}; it must be one number per unit, "
                f"[{units.sizes[name]}]"
            )
        mean = mean[units[name]]  # [n]
        if not bool(mean.isfinite().all()):
            raise ValueError(f"means of {name} are NaN or infinite at pruned units; must be finite")
        with torch.inference_mode():
            chosen = each.read().to("cpu", torch.float64)  # [out, n] or [n, out]
        check_finite([(each, chosen)])
        outputs[name] = torch.tensordot(chosen, mean, dims=([each.dim], [0]))
    return outputs
