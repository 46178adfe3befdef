"""Ablation: units put out nothing for a while, and the model is what it was, bit for bit, after.

with ablate(model, groups["scu"]):
    ...                                  # their columns of B are zero
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssah.interventions.columns import Columns, check_finite, checked_modules, columns_of
from ssah.models import check_idle, is_offloaded, scheme_of
from ssah.units import UnitSet, check_parameters, is_computed

# How many ablations each B is inside of. Weak keys, and not an attribute of the module: a copy of
# the model made inside keeps its zeros for good and is an ordinary model.
_ABLATED: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def ablate(model: nn.Module, units: UnitSet) -> AbstractContextManager[nn.Module]:
    """Context manager: the units' columns of B are zero inside, and back bit for bit after.

    They are put back after an exception too. Only the touched columns are copied. Ablations nest
    and may overlap, as long as the last one entered is the first one left, which `with` ensures.
    Inside, what is trained or loaded into these columns is lost, and what would make the zeros
    permanent is refused: `freeze`, `train_only`, `prune` and `load_update`.

    A packed weight (:mod:`ssah.models.packed`) cannot hold every column of zeros. One that is
    computed anew as the model runs (``torch.nn.utils.prune``, ``parametrize``, ``weight_norm``), or
    that accelerate fetches then, would not keep them. None of these is touched: there a hook sets
    the units' channels to zero before they enter B, which is the same function (where B rounds its
    input by the largest channel, of the input without these).

    Args:
        model: a model that `find_modules` knows.
        units: what to ablate, for instance `groups["scu"]`. Yields the model.

    Raises:
        ValueError: where units belong to another model, a weight is not in memory, or experts'
            weights are computed anew.
        FloatingPointError: as the block is entered, where a column to be zeroed is NaN or infinite.

    Source: Li & Kim, arXiv 2410.10862 (ablation of each group).
    """
    modules = checked_modules(model, units)
    check_idle(model, "to be ablated")
    experts = {module.output.param for module in modules.values() if module.routed is not None}
    check_parameters(model, experts, "to be ablated")  # no hook sees what enters an expert's B
    hooked = {
        name
        for name, module in modules.items()
        if scheme_of(module.down) is not None
        or (
            module.routed is None
            and (is_computed(model, module.output.param) or is_offloaded(module.down))
        )
    }
    plain = {name: module for name, module in modules.items() if name not in hooked}
    # Where the weight cannot hold the zeros, the channels that enter it are zeroed by a hook.
    muted = [(modules[name].down, units[name]) for name in hooked if len(units[name])]
    return _ablated(model, columns_of(units, plain), muted)


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
    model: nn.Module, columns: Mapping[str, Columns], muted: Iterable[tuple[nn.Module, Tensor]]
) -> Iterator[nn.Module]:
    """Inside, ``columns`` are zero, and of each B of ``muted`` these channels: int64 ``[n]``."""
    saved: list[tuple[Columns, Tensor]] = []
    hooks = ExitStack()
    inside = Counter(down for down, _ in muted) + Counter(c.module.down for c in columns.values())
    try:
        for down, n in inside.items():
            _ABLATED[down] = _ABLATED.get(down, 0) + n
        for down, channels in muted:
            hooks.callback(down.register_forward_pre_hook(_mute(channels)).remove)
        # It alone may write to inference tensors, and ordinary parameters still get their version
        # counted, so that a pending backward pass notices the change.
        with torch.inference_mode():
            # Everything is read, and may be refused, before anything is written.
            saved.extend((each, each.read()) for each in columns.values())
            check_finite(saved)
            for each in columns.values():
                each.zero()
        yield model
    finally:
        hooks.close()
        # Before anything can be refused: a model that cannot be put back is not inside any more.
        for down, n in inside.items():
            _ABLATED[down] -= n
            if not _ABLATED[down]:
                del _ABLATED[down]
        _put_back(saved)


@torch.inference_mode()
def _put_back(saved: list[tuple[Columns, Tensor]]) -> None:
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
    """A hook that sets some channels of what enters B, ``[..., units]``, to zero."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (x.index_fill(-1, channels.to(x.device), 0), *args[1:])

    return hook
