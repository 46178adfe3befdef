"""The update of single elements, as a typed function: see :mod:`ssah_kernels.ops`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .schema import operators


def bit_masked_adamw_(
    params: Sequence[Tensor],  # each e.g. [11008, 4096], of which 100 single elements train
    grads: Sequence[Tensor],  # [11008, 4096]
    exp_avgs: Sequence[Tensor],  # [100]
    exp_avg_sqs: Sequence[Tensor],  # [100]
    masks: Sequence[Tensor],  # [5636096]
    offsets: Sequence[Tensor],  # [44033]
    lr: Tensor,  # []
    step: Tensor,  # []
    grad_scale: Tensor | None = None,  # []
    clip_coef: Tensor | None = None,  # []
    seed: Tensor | None = None,  # []
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> None:
    """One AdamW step of single elements, chosen by a mask of one bit each, in one pass.

    As ``masked_adamw_`` on what is chosen. All other elements stay bit for bit what they were; a
    vector of the processor without a chosen element is neither read nor written.

    Args:
        params: of one dtype and contiguous. Updated in place.
        grads: of the parameters' shapes. Only read; one that is not contiguous is copied.
        exp_avgs, exp_avg_sqs: of the chosen elements alone, in row-major order, contiguous; dtypes
            as for ``masked_adamw_``, but not in 8 bits. Updated in place.
        masks: uint8, as :func:`ssah_kernels.bit_masks.pack_bits` gives them.
        offsets: int64, what :func:`ssah_kernels.bit_masks.block_offsets` gives for each mask. Both
            are read to compare them once, and again after they were changed in place.
        lr, step, grad_scale, clip_coef, seed: as for ``masked_adamw_``; the noise depends on
            (seed, step, position in the list, position among the chosen elements).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device; offsets or
            states do not belong to a mask.

    Source: as for ``masked_adamw_``.
    """
    operators.bit_masked_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        masks,
        offsets,
        lr,
        step,
        grad_scale,
        clip_coef,
        seed,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )
