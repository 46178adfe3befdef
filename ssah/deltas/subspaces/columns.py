"""Whether training changed a matrix where it puts out much, or where it puts out little.

Of a matrix W ``[out, in]`` and of what training changed D, the leading left singular vectors are
taken that have 90 % of the energy (the sum of squares of singular values). Their overlap is the
mean squared cosine of the angles between both; what is left of 1 lies in what W hardly puts out:

    W = [[3, 0, 0], [0, 0, 0]]   has (1, 0)      D = [[0, 0, 0], [0, 1, 0]]   has (0, 1)

These share nothing, and D lies wholly outside.

**The controls.** A random subspace of as many directions as D's, and as many of those in which W
puts out most on ordinary data. A low overlap says something where it is below both.

Sources: the claim, Jain et al. 2024, arXiv 2407.10264 (their code takes the angle of single
vectors with all columns, which are the whole space where ``out`` is at most ``in``); the control,
Ponkshe et al. 2025, arXiv 2505.14185.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.deltas.subspaces.bases import Subspace, output_subspace
from ssah.deltas.subspaces.gram_matrices import Gram, check_projections
from ssah.deltas.subspaces.overlaps import Share, overlap


def column_overlaps(
    base: nn.Module,
    tuned: nn.Module,
    *,
    share: float = 0.9,
    utility: Mapping[str, Gram] | None = None,
) -> dict[str, Share]:
    """How much of what training changed lies where the projections of the base put out most.

    Args:
        base, tuned: models of one architecture, in memory.
        share: of the energy that the directions of both have.
        utility: of the projections, as of `gram`, for the second control.

    Returns:
        Name of a projection in the layers -> its overlap; none of one that training left alone.

    Raises:
        ValueError: ``share`` is not above 0 and at most 1, or a projection of the base is 0 or of
            another shape.
        FloatingPointError: a weight is NaN or infinite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    found = {}
    for name in check_projections(base, None):
        before, after = (_weight(model, name) for model in (base, tuned))
        if before.shape != after.shape:
            raise ValueError(
                f"{name} is {list(before.shape)} in base and {list(after.shape)} in tuned; they "
                "must be of one model"
            )
        changed = after - before
        if not bool(changed.isfinite().all()):
            raise FloatingPointError(f"{name} is NaN or infinite in one of the models")
        if not bool(changed.any()):
            continue
        own, columns = leading_directions(changed, share), leading_directions(before, share)
        most = None if utility is None else output_subspace(before, utility[name], own.rank)
        found[name] = overlap(own, columns, utility=most)
    return found


def leading_directions(matrix: Tensor, share: float) -> Subspace:
    """The fewest left singular vectors with a share of the energy of ``matrix`` ``[out, in]``."""
    u, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    energy = s.square().cumsum(0)
    # The first place at which enough is reached; rounding may leave the last one just below.
    rank = min(int((energy < share * energy[-1]).sum()) + 1, len(s))
    return Subspace(u[:, :rank].contiguous())


def _weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a projection, float64 ``[out, in]``."""
    module = model.get_submodule(name)
    weight = module.get_parameter("weight").detach().double().cpu()
    return weight.T if isinstance(module, Conv1D) else weight
