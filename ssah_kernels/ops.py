"""The operators as typed functions. Each equals ``torch.ops.ssah.<name>``, gradients included.

An operator that changes tensors in place changes nothing where it raises, and refuses what torch's
own refuse: tensors that share memory (``ValueError``), tensors that require grad where gradients
are recorded, and outside inference mode those that were made in it (``RuntimeError``). What it
changes counts as changed for autograd.

Shapes, dtypes and devices are checked, and the values of indices and masks. Other values are not,
since that would wait for a GPU: a step of 0 or a rate of NaN give what the formula gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .activations import (
    channel_moments_,
    column_sq_norms,
    gated_moments,
    gated_product,
    new_moments,
    taylor_moments_,
)
from .bit_updates import bit_masked_adamw_
from .schema import operators

__all__ = [
    "bit_masked_adamw_",
    "channel_moments_",
    "column_sq_norms",
    "gated_moments",
    "gated_product",
    "masked_adamw_",
    "masked_grad_norm",
    "masked_sgd_",
    "new_moments",
    "taylor_moments_",
]


def masked_adamw_(
    params: Sequence[Tensor],  # each e.g. [11008, 4096], of which 2,202 rows train
    grads: Sequence[Tensor],  # [2202, 4096], or [11008, 4096]
    exp_avgs: Sequence[Tensor],  # [2202, 4096]
    exp_avg_sqs: Sequence[Tensor],  # [2202, 4096]
    indices: Sequence[Tensor | None],  # [2202]
    dims: Sequence[int],  # 0
    lr: Tensor,  # []
    step: Tensor,  # []
    grad_scale: Tensor | None = None,  # []
    clip_coef: Tensor | None = None,  # []
    seed: Tensor | None = None,  # []
    compensations: Sequence[Tensor] | None = None,  # [2202, 4096]
    signed: Sequence[Tensor] | None = None,  # [2202]
    squared: Sequence[Tensor] | None = None,  # [2202]
    exp_avg_scales: Sequence[Tensor] | None = None,  # [2202, 16]
    exp_avg_sq_scales: Sequence[Tensor] | None = None,  # [2202, 16]
    found_inf: Tensor | None = None,  # []
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> None:
    """One AdamW step, with decoupled weight decay, of the trained elements alone, in one pass.

    Nothing else of a parameter is read or written: it stays bit for bit what it was. Arithmetic is
    float32 (float64 for float64 parameters). Lists have one entry a parameter.

    Args:
        params: float64, float32, bfloat16 or float16, all alike; any strides. Updated in place.
            Where three or more dimensions are no matrix by their strides (``channels_last``), a
            copy of what trains is updated and written back.
        grads: compact, or of the parameter's shape: then read at ``indices[i]`` in the pass. In the
            parameters' dtype, all alike; or float32, of bfloat16 and float16 parameters. A gradient
            or state is *compact* when it has its parameter's shape with ``len(indices[i])`` in
            place of the size along ``dims[i]``. The shape tells the two apart: only where all
            entries train it is the same, and so are they.
        exp_avgs, exp_avg_sqs: compact and contiguous; float32 or bfloat16 (float64 for float64
            parameters), or with scales uint8. Updated in place.
        indices: int64, contiguous, strictly increasing, or None for all: what is trained along
            ``dims[i]``. Their values are read once, and again after they were changed in place.
        dims: the first or the last dimension of the parameter, the one that runs over units.
        lr, step: floating-point tensors of one element; ``step`` counts from 1 and is incremented
            by the caller.
        grad_scale: what the loss was multiplied by: gradients are divided by it.
        clip_coef: gradients are multiplied by it, after that.
        seed: int64 tensor of one element: round bfloat16 parameters and state stochastically. The
            noise depends on (seed, step, position in the list, position in the compact tensor).
        compensations: of bfloat16 or float16 parameters: compact, zero at the start: what their 16
            bits cannot hold. Of bfloat16 int16, the other half of a float32 weight: the update is,
            bit for bit, that of float32 parameters. Of float16 Kahan's, in float16. Parameters are
            rounded to nearest. Updated in place.
        signed, squared: float64, the compact size along ``dims[i]``: every unit's sum of p * g and
            of (p * g)^2 is added, with p as before the update and g without ``clip_coef``. Squares
            are of float32: of p * g beyond 1.8e19 infinite, and 0 below 1e-22.
        exp_avg_scales, exp_avg_sq_scales: float32 and contiguous, of the shape that
            :func:`ssah_kernels.dynamic_map.scales_shape` gives: state is in 8 bits then, codes of
            the dynamic map with a scale for each 256 of them. All zero at the start. Updated in
            place. The update is of the state as it reads back, before it is rounded again.
        found_inf: where it is not zero, nothing is written, see ``torch.amp.GradScaler``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.

    Source: Loshchilov and Hutter (arXiv 1711.05101), as ``torch.optim.AdamW`` computes it; the
    rounding is specified in ``reference/masked_update.py``.
    """
    lists = params, grads, exp_avgs, exp_avg_sqs, indices, dims
    scalars = lr, step, grad_scale, clip_coef, seed
    operators.masked_adamw_(
        *lists,
        *scalars,
        compensations,
        signed,
        squared,
        exp_avg_scales,
        exp_avg_sq_scales,
        found_inf,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    seed: Tensor | None = None,
    compensations: Sequence[Tensor] | None = None,
    signed: Sequence[Tensor] | None = None,
    squared: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """One SGD step of the trained elements alone, in one pass: as ``torch.optim.SGD`` does.

    Args:
        momentum_buffers: compact [trained, other] and contiguous, as AdamW's state; None if
            momentum is 0. At step 1 their content is not used. Updated in place.
        momentum_scales: of buffers in 8 bits, as AdamW's.

    The rest is as for ``masked_adamw_``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
    """
    lists = params, grads, momentum_buffers, indices, dims
    scalars = lr, step, grad_scale, clip_coef, seed
    operators.masked_sgd_(
        *lists,
        *scalars,
        compensations,
        signed,
        squared,
        momentum_scales,
        found_inf,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
    )


def masked_grad_norm(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Euclidean norm of the gradient of all trained elements together.

    Args:
        grads: dense gradients, or compact ones with None in ``indices``; all of one dtype.
        indices, dims, grad_scale: as for ``masked_adamw_``.

    Returns:
        float64 ``[]``, summed in float64; the same bits for any number of threads. Differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
    """
    return operators.masked_grad_norm(grads, indices, dims, grad_scale)
