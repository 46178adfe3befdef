"""The operators that read activations [..., C] or weights [out, C], as typed functions.

:mod:`ssah_kernels.ops` exports them, and says what holds for all operators. An FFN of two units for
example has activations [tokens, 2], and weights [hidden, 2] behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schema import operators


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
    operators.channel_moments_(x, count, mean, m2, token_mask)


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
    return operators.gated_moments(gate, up, count, mean, m2, token_mask, act=act)


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
    return operators.gated_product(gate, up, factors, arm, act=act)


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
    operators.taylor_moments_(x, grad, signed, squared, token_mask)


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
    return operators.column_sq_norms(weight)
