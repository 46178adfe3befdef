"""Scores, from the sums over all tokens.

Unit j of a module has the activation a_j(t) at token t, which enters B, and B has the column b_j.
Over n counted tokens, with L the summed next-token loss in nats:

    variance   sum_t (a_j(t) - mean)^2 / (n - 1) * |b_j|^2    Li & Kim, arXiv 2410.10862, eq. 1
    norm       sum_t a_j(t)^2 / n * |b_j|^2                   Wanda, arXiv 2306.11695, per column
    taylor     |sum_t a_j(t) * dL/da_j(t)|                    arXiv 1906.10771
    fisher     sum_t (a_j(t) * dL/da_j(t))^2

Example: the activations 1 and 3 (mean 2, M2 2) and a column of squared norm 10. The variance is 2 /
(2 - 1) * 10 = 20. The mean square is M2 / n + mean^2 = 1 + 4 = 5, as of (1 + 9) / 2, so that the
norm is 50.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssah.attribution.result import GRADIENT_METRICS, Attribution
from ssah.attribution.sums import Sums
from ssah.models import at_hand, dequantised, to_host
from ssah.units import DepthTwoModule, model_name, units_hash
from ssah_kernels import ops
from ssah_kernels.sharded import is_sharded


def score_all(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    sums: Mapping[str, Sums],
    norms: Mapping[str, Tensor],
    *,
    metric: str,
    tokens: str,
    fingerprint: str,
    all_experts: bool = False,
    weights_hash: str | None = None,
) -> Attribution:
    """The result on ``model``, of the sums over all batches; warns of experts hardly reached.

    It is called by what users call, so that the warning names their line.

    Args:
        model: only its configuration matters.
        modules: B's name -> module.
        sums: B's name -> sums.
        norms: B's name -> `column_sq_norms`, ``[n_units]``; not needed for gradient metrics.
        metric, tokens, all_experts: as `attribute` takes them, ``tokens`` resolved.
        fingerprint: of the data.
        weights_hash: of the weights that were scored, if anybody knows it.
    """
    signed = None
    if metric in GRADIENT_METRICS:
        signed = {name: sums[name].signed.cpu() for name in modules}
    attribution = Attribution(
        scores={name: _score(metric, sums[name], norms.get(name)).cpu() for name in modules},
        mean={name: sums[name].mean.cpu() for name in modules},
        variance={name: _variance(sums[name]).cpu() for name in modules},
        count={name: int(sums[name].count) for name in modules},
        metric=metric,
        tokens=tokens,
        model_name=model_name(model),
        units_hash=units_hash(model),
        data_fingerprint=fingerprint,
        all_experts=all_experts,
        weights_hash=weights_hash,
        signed=signed,
    )
    scarce = [name for name in attribution.scarce() if modules[name].routed]
    if scarce:
        warnings.warn(
            f"{len(scarce)} of {len(modules)} modules are experts that fewer than two of the "
            f"counted tokens were routed to, {scarce[0]!r} for one: a variance there is 0 (see "
            "Attribution.scarce; more data reaches them, or all_experts=True)",
            stacklevel=4,  # this function, its caller, what takes renamed parameters, the user
        )
    return attribution


def _variance(sums: Sums) -> Tensor:
    """Unbiased, ``[n_units]``."""
    return sums.m2 / (sums.count - 1) if sums.count > 1 else torch.full_like(sums.m2, math.nan)


def _score(metric: str, sums: Sums, norms: Tensor | None) -> Tensor:
    """``[n_units]``, by the formulas above."""
    if metric == "taylor":
        return sums.signed.abs()
    if metric == "fisher":
        return sums.squared
    if sums.count < (2 if metric == "variance" else 1):  # an expert that was hardly reached
        return torch.zeros_like(sums.m2)
    assert norms is not None
    moment = _variance(sums) if metric == "variance" else sums.m2 / sums.count + sums.mean.square()
    return moment * norms


def column_sq_norms(module: DepthTwoModule) -> Tensor:
    """Squared norm of every column of B, float64 ``[n_units]``, on the host.

    Raises:
        FloatingPointError: the weight is NaN or infinite.
        ValueError: it is packed in a layout that cannot be dequantised.
    """
    return all_column_sq_norms({module.name: module})[module.name]


def all_column_sq_norms(modules: Mapping[str, DepthTwoModule]) -> dict[str, Tensor]:
    """:func:`column_sq_norms` of every module, B's name -> ``[n_units]``, on the host.

    They are brought there, and looked at, when all are computed: a GPU is waited for once.

    Raises:
        FloatingPointError, ValueError: as there.
    """
    norms = dict(zip(modules, to_host([*map(_norms, modules.values())]), strict=True))
    for name, each in norms.items():
        if not bool(each.isfinite().all()):
            raise FloatingPointError(f"the weight of {name!r} is NaN or infinite")
    return norms


def _norms(module: DepthTwoModule) -> Tensor:
    """The squared norms ``[n_units]``, where the weight lies."""
    with at_hand(module.down):
        plain = dequantised(module.down)
        weight = module.weight.detach() if plain is None else plain
        if is_sharded(weight):
            weight = weight.full_tensor()
        if module.output.dim == 1:  # [hidden, n_units]
            return ops.column_sq_norms(weight)
        # Conv1D holds the columns of B as rows, [n_units, hidden]. Chunked: no float64 copy of the
        # whole weight.
        return torch.cat([rows.double().square().sum(1) for rows in weight.split(256)])
