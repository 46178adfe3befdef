"""The scoring rules of FLAP and Wanda in eager operations, written afresh from the papers.

FLAP (arXiv 2312.11983) keeps a running mean of a layer's input and the mean of its squared
deviations; Wanda (arXiv 2306.11695) keeps a running squared norm. Both transpose the input and
make a copy in float32, as their code does.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Flap:
    """Running mean and fluctuation of every channel; a call adds ``x`` [samples, ..., C]."""

    def __init__(self, channels: int) -> None:
        self.n = 0
        self.mean = torch.zeros(channels)
        self.fluctuation = torch.zeros(channels)

    def __call__(self, x: Tensor) -> None:
        samples = x.shape[0]
        columns = x.flatten(0, -2).t()  # [C, tokens]
        before = self.mean.clone()
        self.mean *= self.n / (self.n + samples)
        self.mean += columns.mean(dim=1) * samples / (self.n + samples)
        columns = columns.float()
        if self.n:
            self.fluctuation *= (self.n - 1) / (self.n + samples - 1)
        spread = (columns - self.mean[:, None]) * (columns - before[:, None])
        self.fluctuation += spread.sum(dim=1) / (self.n + samples)
        self.n += samples

    def score(self, weight: Tensor) -> Tensor:
        """Of ``weight`` [out_features, C]: a score for each channel."""
        return self.fluctuation * weight.float().square().sum(dim=0)


class Wanda:
    """Running squared norm of every channel; a call adds ``x`` [samples, ..., C]."""

    def __init__(self, channels: int) -> None:
        self.n = 0
        self.row = torch.zeros(channels)

    def __call__(self, x: Tensor) -> None:
        samples = x.shape[0]
        columns = x.flatten(0, -2).t().float()  # [C, tokens]
        self.row *= self.n / (self.n + samples)
        self.row += torch.linalg.vector_norm(columns, dim=1) ** 2 / (self.n + samples)
        self.n += samples

    def score(self, weight: Tensor) -> Tensor:
        """Of ``weight`` [out_features, C]: a score for each channel."""
        return (weight.float().abs() * self.row.sqrt()).sum(dim=0)
