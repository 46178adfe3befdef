"""The running sums of every module: what they are, and those of all ranks merged into one.

Of n tokens with the activations a_1 ... a_n of one unit, the state is the count n, the mean, and
M2, the sum of squared deviations from the mean. Two states are merged by Chan's formula (Chan,
Golub & LeVeque, 1983), which never subtracts two large numbers:

    n = n1 + n2      d = mean2 - mean1
    mean = mean1 + d * n2 / n
    M2 = M2_1 + M2_2 + d^2 * n1 * n2 / n

Example: activations 1, 3 on one rank (2, mean 2, M2 2) and 6 on another (1, mean 6, M2 0) give
n = 3, mean = 2 + 4 / 3 = 10 / 3, M2 = 2 + 0 + 16 * 2 / 3 = 38 / 3, as of 1, 3 and 6 at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ssah.distributed import Ranks
from ssah.models import device_of, to_host
from ssah.units import DepthTwoModule
from ssah_kernels.reference.channel_moments import merge_moments_

_UNITS_AT_ONCE = 2**18  # gathered at a time: 2 MiB a rank and sum


@dataclass(frozen=True, eq=False)
class Sums:
    """Running state of one module, float64, on the device of its B.

    That of all experts of a layer has one dimension more in front, ``[experts, ...]``.

    Attributes:
        count: ``[]``, tokens seen.
        mean, m2: ``[n_units]``, mean of the activation and sum of squared deviations from it.
        signed, squared: ``[n_units]``, sums over tokens of a * dL/da and of its square.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    signed: Tensor
    squared: Tensor

    @classmethod
    def zeros(cls, shape: Sequence[int], device: torch.device) -> Sums:
        """No token seen yet: of ``shape`` ``(n_units,)``, or ``(experts, n_units)``."""
        count = torch.zeros(shape[:-1], dtype=torch.float64, device=device)
        channels = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(4))
        return cls(count, *channels)

    def of_expert(self, expert: int) -> ExpertSums:
        """The state of one of all experts: views."""
        own = {field.name: getattr(self, field.name)[expert] for field in fields(Sums)}
        return ExpertSums(**own, layer=self)


@dataclass(frozen=True, eq=False)
class ExpertSums(Sums):
    """Running state of one routed expert.

    Attributes:
        layer: the state of all experts of the layer, ``[experts, ...]``, of which this is a part.
    """

    layer: Sums


def new_sums(modules: Mapping[str, DepthTwoModule]) -> dict[str, Sums]:
    """No token seen yet, of every module; experts of one layer have one state together."""
    layers: dict[nn.Module, Sums] = {}
    sums: dict[str, Sums] = {}
    for name, module in modules.items():
        device, routed = device_of(module.down), module.routed
        if routed is None or module.expert is None:
            sums[name] = Sums.zeros((module.n_units,), device)
            continue
        if module.down not in layers:
            layers[module.down] = Sums.zeros((routed.n_experts, module.n_units), device)
        sums[name] = layers[module.down].of_expert(module.expert)
    return sums


def on_host(sums: Mapping[str, Sums]) -> dict[str, Sums]:
    """The sums of every module on the host, brought there together: each copy waits for a GPU."""
    names = [field.name for field in fields(Sums)]
    every = iter(to_host([getattr(state, name) for state in sums.values() for name in names]))
    return {module: Sums(*(next(every) for _ in names)) for module in sums}


def join(ranks: Ranks, sums: Mapping[str, Sums], *, gradient: bool) -> None:
    """Replace every module's state by that of all ranks together: the same bits on each.

    (count, mean, M2) are merged by Chan's formula and the gradient sums are added, in float64
    and in the order of the ranks. Received: 16 bytes a unit and rank, 32 with ``gradient``.

    Raises:
        ValueError: all ranks hold the same state, so that they ran the same batches.
    """
    if ranks.size == 1:
        return
    states = list(sums.values())
    units = [len(state.mean) for state in states]
    counts = ranks.gather(torch.stack([state.count.cpu() for state in states]))  # [ranks, modules]
    module = torch.repeat_interleave(torch.tensor(units))  # [units], which one each is of
    fields = ("mean", "m2", "signed", "squared") if gradient else ("mean", "m2")
    # The units of all modules in one row, [units] a field: few large messages, not many small.
    flat = [torch.cat([getattr(state, field).cpu() for state in states]) for field in fields]
    same = bool((counts == counts[0]).all())
    for start in range(0, len(module), _UNITS_AT_ONCE):
        piece = slice(start, start + _UNITS_AT_ONCE)
        parts = [ranks.gather(values[piece]) for values in flat]  # [ranks, units] each
        same = same and all(bool((part == part[0]).all()) for part in parts)
        for values in flat:
            values[piece] = 0
        count = torch.zeros_like(flat[0][piece])
        mean, m2, *added = (values[piece] for values in flat)
        # Every rank merges in the order of the ranks, so that rounding is the same on each.
        for rank, n in enumerate(counts[:, module[piece]]):  # n: [units]
            merge_moments_(count, mean, m2, n, parts[0][rank], parts[1][rank])
            for total, part in zip(added, parts[2:], strict=True):
                total += part[rank]
    ranks.check_dealt(same and bool(counts.any()))
    for i, state in enumerate(states):
        state.count.copy_(counts[:, i].sum())
    for field, values in zip(fields, flat, strict=True):
        for state, own in zip(states, values.split(units), strict=True):  # own: [n_units]
            getattr(state, field).copy_(own)


def check_ran(modules: Mapping[str, DepthTwoModule], sums: Mapping[str, Sums]) -> None:
    """Raise RuntimeError, with the module's name, where nothing was summed."""
    # Of a layer's experts, some may see no token: all are the same module.
    ran = {modules[name].down for name, state in sums.items() if state.count}
    for name in sums:
        if modules[name].down not in ran:
            raise RuntimeError(f"module {name!r} never ran: its units have no score")


def check_finite(sums: Mapping[str, Sums], gradient: bool) -> None:
    """Raise FloatingPointError, with the module's name, where a sum is not finite."""
    for name, state in sums.items():
        if not _finite(state.mean, state.m2):
            raise FloatingPointError(f"activations that enter {name!r} are NaN or infinite")
    # A gradient flows backward: the last module that has a NaN is where it came from.
    for name, state in reversed(list(sums.items())) if gradient else ():
        if not _finite(state.signed, state.squared):
            raise FloatingPointError(f"gradients at the input of {name!r} are NaN or infinite")


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
