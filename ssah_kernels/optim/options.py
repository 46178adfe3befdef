"""What the options of a masked optimiser must be, and what of each parameter trains.

A parameter group may have options of its own, so that each group is checked, not the defaults.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, indices, overlap
from ..sharded import Dim, check_layout, is_sharded, local

ROUNDINGS = ("nearest", "stochastic", "remainder")
STATE_DTYPES = (torch.float32, torch.bfloat16)
EIGHT_BIT = "8bit"
SHORTEST_ROW = 64  # elements: of a shorter row, scales would take back what codes save


def _number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raise unless ``value`` is a number from 0 to below ``below``."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{name} is a {value.dtype} tensor of shape {tuple(value.shape)}; it must be a "
                "real number, or a tensor of one"
            )
    elif isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {checks.shown(value)}; it must be a number")
    if not 0 <= float(value) < below:
        most = "finite" if below == math.inf else f"less than {below:g}"
        raise ValueError(f"{name} is {value}; it must be at least 0 and {most}")


def check_lr(lr: Any) -> None:
    """Raise ValueError before a step that would make every weight NaN; no tensor is read."""
    if isinstance(lr, (int, float)) and not 0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}; it must be at least 0 and finite")


def check(group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError, with its name, where an option of a group is wrong."""
    for name in ("lr", "weight_decay", "eps", "momentum"):
        if name in group:
            _number(name, group[name])
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas is {checks.shown(betas)}; it must be two numbers")
        for i, beta in enumerate(betas):
            _number(f"betas[{i}]", beta, below=1)
    if "momentum" in group:
        dampening = group["dampening"]
        if not isinstance(dampening, (int, float)) or not math.isfinite(dampening):
            raise ValueError(f"dampening is {checks.shown(dampening)}; it must be a finite number")
        if group["nesterov"] and (group["momentum"] <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum greater than 0 and no dampening")
    if group["rounding"] == "kahan":
        warnings.warn(
            "rounding='kahan' is now rounding='remainder', which keeps bfloat16 weights exactly",
            DeprecationWarning,
            stacklevel=2,
        )
        group["rounding"] = "remainder"
    if group["rounding"] not in ROUNDINGS:
        raise ValueError(
            f"rounding is {checks.shown(group['rounding'])}; it must be one of "
            f"{', '.join(ROUNDINGS)}"
        )
    if group["state_dtype"] not in (None, EIGHT_BIT, *STATE_DTYPES):
        raise ValueError(
            f"state_dtype is {checks.shown(group['state_dtype'])}; it must be torch.float32, "
            f"torch.bfloat16, {EIGHT_BIT!r} or None (float32, and float64 for float64 parameters)"
        )
    seed, max_norm = group["seed"], group["max_norm"]
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {checks.shown(seed)}; it must be a whole number")
    if max_norm is not None and (
        isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0
    ):
        raise ValueError(
            f"max_norm is {checks.shown(max_norm)}; it must be None or a number greater than 0"
        )


def state_dtype(
    group: dict[str, Any], shape: Sequence[int], dtype: torch.dtype, dim: int
) -> torch.dtype:
    """The dtype of state of ``shape`` [trained, other] for a parameter of ``dtype``; uint8 are
    codes in 8 bits.

    With ``"8bit"``, parameters of one dimension (norms, biases) and rows of fewer than 64 elements
    have state in float32. Both follow from the shape of what trains, which no sharding changes.
    """
    wanted = group["state_dtype"]
    if wanted == EIGHT_BIT:
        n = len(shape)
        row = shape[1:] if n > 1 and dim % n == 0 else shape[-1:]
        if n > 1 and math.prod(row) >= SHORTEST_ROW:
            return torch.uint8
        wanted = None
    return torch.float64 if dtype == torch.float64 else wanted or torch.float32


def as_list(name: str, value: Any, n: int, default: Any) -> list[Any]:
    """``value`` as a list with one entry a parameter; None: ``default`` for each.

    Raises:
        ValueError: it is no list, or of another length.
    """
    if value is None:
        return [default] * n
    if name == "dims" and isinstance(value, int):
        return [value] * n
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{name} is a {type(value).__name__}; it must be a list with one entry a parameter"
        )
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries; it must have {n}, one a parameter")
    return list(value)


def check_parameters(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError or TypeError where an update of the last group could not work."""
    params = groups[-1]["params"]
    # torch looks for a parameter in other groups alone, and only warns within one.
    seen = {p for group in groups[:-1] for p in group["params"]}
    for i, p in enumerate(params):
        name = f"params[{i}]"
        if p in seen:
            raise ValueError(f"{name} is given twice; it must be in one group, once")
        seen.add(p)
        # A negated view keeps the opposite of its values in memory, which kernels would read.
        if p.is_nested or p.is_neg():
            kind = "a nested tensor" if p.is_nested else "a negated view"
            raise TypeError(f"{name} is {kind}; it must be an ordinary tensor")
        checks.dense(name, p)
        if p.dtype not in checks.FLOATS:
            raise TypeError(f"{name} has dtype {p.dtype}; it must be a floating-point one")
        if overlap.within(local(p)):
            raise ValueError(
                f"{name} has several elements in one place, as expanded tensors do; each must have "
                "a place of its own: clone() it"
            )


def entries(name: str, p: Tensor, index: Any, dim: Dim) -> Tensor | None:
    """``index`` as an update takes it: on the device of ``p``, contiguous.

    Args:
        name: of both in errors, such as ``"[3]"``.
        p: the parameter.
        index: int64 [trained], which entries train along ``dim``; None: all.
        dim: a dimension, or of a parameter with experts a pair of them.

    Raises:
        ValueError: ``index`` or ``dim`` does not fit the parameter.
    """
    n = p.dim() or 1
    if is_sharded(p):
        check_layout(f"params{name}", p)
    elif not isinstance(dim, int):
        if dim[0] != 0 or not 0 < dim[1] < p.dim() or p.dim() > 3:
            raise ValueError(
                f"dims{name} is {dim} for a parameter of {p.dim()} dimensions; a pair must be "
                "(0, d): the experts, and the dimension of theirs that entries run along"
            )
    elif not -n <= dim < n or dim % n not in (0, n - 1):
        raise ValueError(
            f"dims{name} is {dim} for a parameter of {p.dim()} dimensions; it must be the first or "
            "the last"
        )
    if index is None:
        return None
    if not isinstance(index, Tensor):
        raise ValueError(
            f"indices{name} is a {type(index).__name__}; it must be an int64 tensor or None"
        )
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"indices{name} is {index.dtype} with {index.dim()} dimensions; it must be int64 [n], "
            "strictly increasing"
        )
    if not p.dim():
        raise ValueError(f"indices{name} is of a parameter without dimensions; it must be None")
    if index.numel() == 0:
        raise ValueError(f"indices{name} is empty; a parameter must have entries to train")
    size = p.shape[dim] if isinstance(dim, int) else math.prod(p.shape[d] for d in dim)
    index = index.to(p.device).contiguous()
    # Read here, once, so that no step has to wait for the GPU to read it.
    low, high = indices.bounds(f"indices{name}", index)
    indices.check_range(f"indices{name}", low, high, size)
    return index
