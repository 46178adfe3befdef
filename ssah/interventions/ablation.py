"""Taking units out of a model: for a while (`ablate`) or for good (`prune`)."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssah.interventions.biases import create_biases
from ssah.models import check_idle, check_plain, nonfinite, scheme_of
from ssah.units import (
    DepthTwoModule,
    UnitSet,
    UnitSlice,
    check_parameters,
    check_units,
    is_computed,
)

if TYPE_CHECKING:
    from ssah.attribution import Attribution

# How many ablations each B is inside of. Weak keys, and not an attribute of the module: a copy of
# the model made inside keeps its zeros for good and is an ordinary model.
_ABLATED: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Columns:
    """Some columns of one module's B."""

    module: DepthTwoModule
    index: Tensor  # int64 [n], along `dim` of the weight

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def dim(self) -> int:
        """Of the weight, running over units: 1 in a Linear, 0 in a Conv1D."""
        return self.module.output.dim


def _columns(
    model: nn.Module, units: UnitSet, modules: Mapping[str, DepthTwoModule]
) -> dict[str, _Columns]:
    """The columns of B that units own, by module; refuses weights that cannot be written."""
    columns = {}
    for name, module in modules.items():
        if len(units[name]) == 0:
            continue
        weight = module.weight
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                f"{module.output.param} is {weight.dtype} on {weight.device}; it must be a "
                "floating-point weight in memory (dequantize the model, and load it whole)"
            )
        index = module.output.index[units[name]].to(weight.device)
        columns[name] = _Columns(module, index)
    return columns


def _checked_modules(model: nn.Module, units: UnitSet) -> dict[str, DepthTwoModule]:
    if not isinstance(units, UnitSet):
        raise TypeError(
            f"units is {type(units).__name__}; it must be a UnitSet, for instance groups['scu']"
        )
    return check_units(model, units)


# Writes happen in inference mode: it alone may write to inference tensors, and ordinary
# parameters still get their version counted, so that a pending backward pass notices the change.


def ablate(model: nn.Module, units: UnitSet) -> AbstractContextManager[nn.Module]:
    """Context manager: the units' columns of B are zero inside, and back bit for bit after.

    They are put back after an exception too. Only the touched columns are copied. Ablations nest
    and may overlap, as long as the last one entered is the first one left, which `with` ensures.
    Inside, what is trained or loaded into these columns is lost, and what would make the zeros
    permanent is refused: `freeze`, `train_only`, `prune` and `load_update`.

    A packed weight (:mod:`ssah.models.packed`) cannot hold every column of zeros, and one that is
    computed anew as the model runs (``torch.nn.utils.prune``, ``parametrize``, ``weight_norm``)
    would not keep them. Neither is touched: there a hook sets the units' channels to zero before
    they enter B, which is the same function (where B rounds its input by the largest channel, of
    the input without these).

    Args:
        model: a model that `find_modules` knows.
        units: what to ablate, for instance `groups["scu"]`. Yields the model.

    Raises:
        ValueError: where units belong to another model, a weight is not in memory, or experts'
            weights are computed anew.
        FloatingPointError: as the block is entered, where a column to be zeroed is NaN or infinite.

    Source: Li & Kim, arXiv 2410.10862 (ablation of each group).
    """
    modules = _checked_modules(model, units)
    check_idle(model, "to be ablated")
    experts = {module.output.param for module in modules.values() if module.routed is not None}
    check_parameters(model, experts, "to be ablated")  # no hook sees what enters an expert's B
    packed = {
        name
        for name, module in modules.items()
        if scheme_of(module.down) is not None
        or (module.routed is None and is_computed(model, module.output.param))
    }
    plain = {name: module for name, module in modules.items() if name not in packed}
    muted = [(modules[name].down, units[name]) for name in packed if len(units[name])]
    return _ablated(model, _columns(model, units, plain), muted)


def check_not_ablated(model: nn.Module, purpose: str) -> None:
    """Refuse a model inside `ablate`: what is done to it now would see zeros, or keep them.

    Args:
        model: the model.
        purpose: what it was to be used for, e.g. ``"to be pruned"``.

    Raises:
        ValueError: it is inside; a module is named.
    """
    for name, module in model.named_modules():
        if module in _ABLATED:
            raise ValueError(
                f"model is inside `with ssah.ablate(...)`: columns of {name} are zero for the "
                f"while. It must be left {purpose}: do that after the `with` block"
            )


@contextmanager
def _ablated(
    model: nn.Module, columns: Mapping[str, _Columns], muted: Iterable[tuple[nn.Module, Tensor]]
) -> Iterator[nn.Module]:
    saved: list[tuple[_Columns, Tensor]] = []
    hooks = ExitStack()
    inside = Counter(down for down, _ in muted) + Counter(c.module.down for c in columns.values())
    try:
        for down, n in inside.items():
            _ABLATED[down] = _ABLATED.get(down, 0) + n
        for down, channels in muted:
            hooks.callback(down.register_forward_pre_hook(_mute(channels)).remove)
        with torch.inference_mode():
            for each in columns.values():
                saved.append((each, each.weight.index_select(each.dim, each.index)))
            _check_finite(saved)
            for each in columns.values():
                each.weight.index_fill_(each.dim, each.index, 0)
        yield model
    finally:
        hooks.close()
        for down, n in inside.items():
            _ABLATED[down] -= n
            if not _ABLATED[down]:
                del _ABLATED[down]
        _put_back(saved)


def _check_finite(saved: Iterable[tuple[_Columns, Tensor]]) -> None:
    """Refuse columns that are no numbers: without them the model would only look whole."""
    name = nonfinite((each.module.output.param, values) for each, values in saved)
    if name is not None:
        raise FloatingPointError(
            f"{name} is NaN or infinite in columns that are to be zero: the checkpoint is damaged, "
            "or was written by a run that diverged; load another one"
        )


@torch.inference_mode()
def _put_back(saved: list[tuple[_Columns, Tensor]]) -> None:
    """Restores every module that can be, also where another one cannot."""
    failed: list[tuple[str, Exception]] = []
    for each, values in reversed(saved):
        try:
            weight = each.weight  # as it is now: it may have been moved or converted inside
            values = values.to(weight.device, weight.dtype)
            weight.index_copy_(each.dim, each.index.to(weight.device), values)
        except (RuntimeError, IndexError, AttributeError) as error:
            failed.append((each.module.name, error))
    if failed:
        raise RuntimeError(
            f"columns of {len(failed)} modules could not be put back ({failed[0][0]} for one): "
            "their weights were replaced inside `with ssah.ablate(...)`. All others are back; "
            "load the model again"
        ) from failed[0][1]


def _mute(channels: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (x.index_fill(-1, channels.to(x.device), 0), *args[1:])

    return hook


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
    modules = _checked_modules(model, units)
    check_idle(model, "to be pruned")
    check_not_ablated(model, "to be pruned")
    check_plain(model, "to be pruned (ablate works)")
    params = (param for module in modules.values() for param in module.params)
    check_parameters(model, params, "to be pruned")
    columns = _columns(model, units, modules)
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
    with torch.inference_mode():
        for name, each in columns.items():
            each.weight.index_fill_(each.dim, each.index, 0)
            for rows in modules[name].inputs:
                _zero_rows(model, rows, units.mask(name), each, modules[name])
            if name in shifts:
                bias = modules[name].bias
                assert bias is not None
                bias.copy_(bias.to("cpu", torch.float64) + shifts[name])


def _zero_rows(
    model: nn.Module, rows: UnitSlice, pruned: Tensor, columns: _Columns, module: DepthTwoModule
) -> None:
    """Zero the entries of one parameter of A that feed nothing but zero columns of B."""
    parameter = rows.tensor(model)
    size = parameter.shape[rows.dim]
    fed = torch.bincount(rows.index, minlength=size)  # units that each entry feeds
    dead = pruned
    if int(fed.max()) > 1:
        other = columns.weight.dim() - 1 - columns.dim
        empty = (columns.weight == 0).all(other).cpu()  # also those pruned earlier
        dead = empty[module.output.index]
    gone = torch.bincount(rows.index[dead], minlength=size) == fed
    gone &= torch.bincount(rows.index[pruned], minlength=size) > 0
    parameter.index_fill_(rows.dim, gone.nonzero().flatten().to(parameter.device), 0)


# ------------------------------------------------------------------------------- compensation


def _mean_values(
    model: nn.Module, means: Attribution | Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    if isinstance(means, Mapping):
        return means
    means.check_model(model)
    return means.mean


def _mean_outputs(
    columns: Mapping[str, _Columns], units: UnitSet, means: Mapping[str, Tensor]
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
        mean = mean[units[name]]
        if not bool(mean.isfinite().all()):
            raise ValueError(f"means of {name} are NaN or infinite at pruned units; must be finite")
        with torch.inference_mode():
            chosen = each.weight.index_select(each.dim, each.index).to("cpu", torch.float64)
        _check_finite([(each, chosen)])
        outputs[name] = torch.tensordot(chosen, mean, dims=([each.dim], [0]))
    return outputs
