"""z-scores have the bits of exactly rounded sums."""

from __future__ import annotations

import math

import pytest
import torch

from ssah.units import normalized


def one_by_one(x: torch.Tensor) -> torch.Tensor:
    """z-scores of one module by math.fsum, which rounds the exact sum once."""
    deviation = x - math.fsum(x.tolist()) / len(x)
    deviation = deviation / deviation.abs().max()
    return deviation / math.sqrt(math.fsum((deviation * deviation).tolist()) / len(x))


@pytest.mark.parametrize("n", [2, 3, 7, 100, 768, 1536])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 300.0])
def test_z_scores_of_many_modules_have_the_bits_of_exactly_rounded_sums(
    n: int, spread: float
) -> None:
    """Together or one by one, over magnitudes far apart, denormal numbers included."""
    generator = torch.Generator().manual_seed(n)
    draw = {"generator": generator, "dtype": torch.float64}
    scores = {
        str(i): torch.randn(n, **draw) * torch.exp(spread * torch.randn(n, **draw)).clamp(max=1e250)
        for i in range(20)
    }
    scores["denormal"] = torch.randn(n, **draw) * 1e-310
    scores["of another size"] = torch.randn(n + 1, **draw)
    scores["constant"] = torch.full((n,), 0.1, dtype=torch.float64)
    found = normalized(scores, "zscore")
    assert list(found) == list(scores)
    assert not found.pop("constant").any()
    for name, values in found.items():
        assert torch.equal(values, one_by_one(scores[name])), name


def test_scores_near_the_largest_number_have_z_scores() -> None:
    """Their sum is beyond float64, their mean is not."""
    values = torch.tensor([1e308, 1.5e308, -1e308], dtype=torch.float64)
    found = normalized({"a": values}, "zscore")["a"]
    assert torch.allclose(found, one_by_one(values / 2.0**200), rtol=1e-15, atol=0)
