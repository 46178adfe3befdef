"""A new way of packing weights is one line in `SCHEMES`: one is made up here, and all take it."""

from __future__ import annotations

import pytest
import torch
from plans import draw
from scores import ragged
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import ssah
from ssah.models import describe_packing, n_parameters, packed, packed_modules, weights_hash


class Halves(nn.Module):
    """A projection whose weight is kept as whole halves: int8 ``[out, in]``."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        codes = (2 * of.weight.detach()).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), of.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, halves(self), self.bias)


def halves(module: nn.Module) -> Tensor:
    return module.weight.float() / 2


def test_a_scheme_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = build("llama"), build("llama")
    with torch.no_grad():
        for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
            layer.mlp.down_proj.weight.mul_(9)  # so that halves are fine enough
            layer.mlp.down_proj = Halves(layer.mlp.down_proj)
            other.mlp.down_proj.weight.copy_(halves(layer.mlp.down_proj))
    with pytest.raises(ValueError, match="is a Halves, must be nn"):
        ssah.find_modules(model)

    place = f"{Halves.__module__}.{Halves.__qualname__}"  # the recipe
    scheme = packed.Scheme("halves", "halves", halves, "load the whole weights")
    monkeypatch.setitem(packed.SCHEMES, place, scheme)

    assert len(packed_modules(model)) == 2
    assert describe_packing(model) == "halves"
    assert n_parameters(model) == n_parameters(plain)
    before = weights_hash(model)
    scores = ssah.attribute(model, ragged()).scores
    for name, score in ssah.attribute(plain, ragged()).scores.items():
        torch.testing.assert_close(scores[name], score, rtol=1e-5, atol=0)
    units = draw(model)
    with ssah.ablate(model, units):
        ablated = ssah.attribute(model, ragged(), metric="norm").scores
    assert all(not ablated[name][index].any() for name, index in units.items())
    assert weights_hash(model) == before
    with pytest.raises(ValueError, match=r"quantised \(halves\).*load the whole weights"):
        ssah.freeze(model, units)
    model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    assert weights_hash(model) != before
