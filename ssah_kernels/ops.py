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

import torch
from torch import Tensor

from ssah_kernels.bit_updates import bit_masked_adamw_

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


def new_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero state (count [], mean [C], m2 [C]) in float64 for ``x`` [..., C]."""
    # Float64, since a float32 sum over a million tokens has few digits left for the next one. The
    # count is a tensor too, so that merging a batch waits for no GPU.
    mean = x.new_zeros(x.shape[-1], dtype=torch.float64)
    return x.new_zeros((), dtype=torch.float64), mean, torch.zeros_like(mean)


def channel_moments_(
    x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, token_mask: Tensor | None = None
) -> None:
    """Merge the rows of ``x`` into running moments of every channel, in one pass over ``x``.

    Args:
        x: ``[..., C]`` float64, float32, bfloat16 or float16; any strides. Read once.
        count: float64 ``[]``, tokens seen so far. Updated in place.
        mean: float64 ``[C]``, mean over those tokens. Updated in place.
        m2: float64 ``[C]``, sum of squared deviations from the mean; the unbiased variance is
            ``m2 / (count - 1)``. Updated in place.
        token_mask: bool ``[...]``; only rows that are True count. A masked row never
            contributes, even if it is NaN.

    Range: squares are summed in float32 for a few hundred rows at most, and again in float64 on the
    CPU where that does not hold them. So every finite value is right on the CPU; on GPUs deviations
    from 1e-17 to 1e17 are, beyond which ``m2`` is infinite or NaN. An infinite value makes ``m2``
    NaN, and ``mean`` infinite or NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.

    Source: Chan, Golub and LeVeque (1979), merge of (n, mean, M2); SSAH (arXiv 2410.10862) eq. 1.
    """
    torch.ops.ssah.channel_moments_(x, count, mean, m2, token_mask)


def gated_moments(
    gate: Tensor,
    up: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    token_mask: Tensor | None = None,
    *,
    act: str = "silu",
) -> Tensor:
    """act(gate) * up of a gated FFN, and its running moments, in one pass.

    Args:
        gate, up: ``[..., C]`` of one dtype and shape; any strides. Each is read once.
        count, mean, m2, token_mask: as in ``channel_moments_``; over the output as rounded to its
            dtype.
        act: ``"silu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"relu2"`` (squared).

    Returns:
        act(gate) * up, ``[..., C]`` contiguous, in gate's dtype: computed in float32 (float64 for
        float64 input) and rounded once. Differentiable with respect to gate and up, as often
        as wanted: a second derivative is composed of torch's operators.

    Range: of values below 1e-37 float32 leaves 0. At -infinity the activations other than ReLU are
    NaN, as in torch; the square of ``"relu2"`` is infinite beyond 1.8e19.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
    """
    return torch.ops.ssah.gated_moments(gate, up, count, mean, m2, token_mask, act=act)


def gated_product(
    gate: Tensor,  # e.g. [8, 128, 11008]: eight rows of 128 tokens
    up: Tensor,  # [8, 128, 11008]
    factors: Tensor,  # [4, 11008]: four arms
    arm: Tensor,  # [8]: an arm for each row
    *,
    act: str = "silu",
) -> Tensor:
    """act(gate) * up * factors[arm] of a gated FFN whose rows run under arms, in one pass.

    Args:
        gate, up: ``[..., C]`` of one dtype and shape; any strides. Each is read once.
        factors: ``[arms, C]``, float32 or gate's dtype: what channel c is multiplied by under each
            arm. It takes no gradient.
        arm: int64, of gate's leading shape ``[...]``, or of the first dimensions of it: ``[rows]``
            for gate ``[rows, tokens, C]`` gives all tokens of a row one arm. Its values are read
            once, and again after they were changed in place.
        act: as in ``gated_moments``.

    Returns:
        ``[..., C]`` contiguous, in gate's dtype: computed in float32 (float64 for float64 input),
        from left to right, and rounded once. A factor of 0 makes of infinity and NaN a NaN, as a
        column of zeros in the next projection would. Differentiable with respect to gate and up, as
        often as wanted; the gradient that comes in is multiplied by the factors and rounded first.

    Range: as of ``gated_moments``. Where act(gate) * up goes beyond float32, no factor brings it
    back.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device, or an arm
            is none of factors.
        NotImplementedError: factors requires a gradient.

    Source: a factor for each unit, as the mask variables of Michel et al. (arXiv 1905.10650).
    """
    return torch.ops.ssah.gated_product(gate, up, factors, arm, act=act)


def taylor_moments_(
    x: Tensor, grad: Tensor, signed: Tensor, squared: Tensor, token_mask: Tensor | None = None
) -> None:
    """Add sum(x * grad) and sum((x * grad)^2) over tokens to every channel's accumulators.

    Args:
        x, grad: ``[..., C]`` of one dtype and shape: an activation and dL/dx. Each is read once.
        signed, squared: float64 ``[C]``. Updated in place.
        token_mask: as in ``channel_moments_``.

    Range: products below 1e-38 count as 0. Their squares are as those of ``channel_moments_``:
    always right on the CPU, on GPUs from products of 1e-17 to products of 1e17.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.

    Source: first-order Taylor importance, Molchanov et al. (arXiv 1906.10771).
    """
    torch.ops.ssah.taylor_moments_(x, grad, signed, squared, token_mask)


def column_sq_norms(weight: Tensor) -> Tensor:
    """Squared Euclidean norm of every column of ``weight`` [out_features, in_features].

    Returns:
        float64 ``[in_features]``, differentiable. Right for every finite weight on the CPU, and for
        weights from 1e-17 to 1e17 (and 0) on GPUs, where squares are summed in float32 for 32 to
        1,024 rows.

    Raises:
        TypeError, ValueError: weight is not a floating-point matrix.

    Source: SSAH (arXiv 2410.10862) eq. 1.
    """
    return torch.ops.ssah.column_sq_norms(weight)


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
    torch.ops.ssah.masked_adamw_(
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
    torch.ops.ssah.masked_sgd_(
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
    return torch.ops.ssah.masked_grad_norm(grads, indices, dims, grad_scale)
