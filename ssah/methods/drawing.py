"""What methods and controls draw: as many of the same things, directions of no meaning, masks."""

from __future__ import annotations

from typing import TypeAlias
from zlib import crc32

import torch
from torch import Tensor

from ssah.deltas.subspaces import Subspace
from ssah.selections import Selection
from ssah.units import UnitSet

Chosen: TypeAlias = UnitSet | Selection


def random_like(chosen: Chosen, seed: int) -> Chosen:
    """As many units, heads, layers or weights of the same places, drawn uniformly."""
    if isinstance(chosen, UnitSet):
        return UnitSet.random(chosen, seed=seed)
    return Selection.random(chosen, seed=seed)


def random_subspace(n: int, rank: int, seed: int, what: str) -> Subspace:
    """A subspace of R^n drawn uniformly, another one for each ``what``: a tensor, a side of it."""
    return Subspace.random(n, rank, seed_of(seed, what))


def random_direction(size: int, seed: int) -> Tensor:
    """A direction drawn uniformly: float64 ``[size]``, of length 1."""
    # A Gaussian vector prefers no direction, and that is what a random subspace is made of.
    return Subspace.random(size, 1, seed).basis[:, 0]


def random_numbers(count: int, n: int, seed: int) -> list[int]:
    """So many of the numbers below n, each at most once, drawn uniformly."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def shuffled(tensor: Tensor, seed: int, what: str) -> Tensor:
    """The entries of a tensor ``[...]`` in random places, others for each ``what``."""
    order = torch.randperm(tensor.numel(), generator=generator_of(seed, what))
    return tensor.flatten()[order].view(tensor.shape)


def relaxed_bernoulli(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1] that are near 0 or 1 the more, the lower the temperature is.

    sigmoid((logit + log u - log(1 - u)) / temperature) with a uniform u: ``[...]`` as the logits,
    differentiable in them. It is above 0.5 with the probability sigmoid(logit).

    Source: Maddison et al. 2016, arXiv 1611.00712.
    """
    u = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).to(logits.device)
    return ((logits + torch.logit(u)) / temperature).sigmoid()


def generator_of(seed: int, what: str) -> torch.Generator:
    """A generator of its own for each ``what``: a tensor, a side of it."""
    return torch.Generator().manual_seed(seed_of(seed, what))


def seed_of(seed: int, what: str) -> int:
    """A seed for what is drawn for one thing, whatever is drawn for others."""
    # Python's own hash of a text differs between processes.
    return crc32(f"{seed} {what}".encode())
