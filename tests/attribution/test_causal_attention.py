"""The CPU's faster backward of causal attention against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssah.attribution.causal_attention import FastCausalBackward


def inputs(rows: int, length: int, heads: int, groups: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(rows, length, n, width, generator=generator)
        .to(torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for n in (heads, groups, groups)
    ]


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize(
    "shape", [(2, 1, 2, 2, 8), (2, 33, 4, 2, 16), (1, 256, 2, 1, 8), (1, 600, 2, 2, 8)]
)
def test_gradients(shape: tuple[int, ...], scale: float | None) -> None:
    qkv = inputs(*shape)
    options: dict[str, Any] = {
        "is_causal": True,
        "scale": scale,
        "enable_gqa": shape[2] != shape[3],
    }
    with FastCausalBackward():
        out = F.scaled_dot_product_attention(*qkv, **options)
    assert "CausalAttention" in out.grad_fn.name()
    plain = F.scaled_dot_product_attention(*qkv, **options)
    assert torch.equal(out, plain)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    expected = torch.autograd.grad(
        F.scaled_dot_product_attention(*exact, **options), exact, grad.double()
    )
    for ours, true in zip(torch.autograd.grad(out, qkv, grad), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - true).norm() <= 1e-2 * (true.norm() + grad.double().norm())


@pytest.mark.parametrize("what", ["mask", "float32", "not causal", "dropout", "no gradient"])
def test_everything_else_is_left_alone(what: str) -> None:
    q, k, v = inputs(2, 9, 2, 2, 8)
    options: dict[str, Any] = {"is_causal": True}
    if what == "mask":
        options = {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()}
    elif what == "float32":
        q, k, v = q.float(), k.float(), v.float()
    elif what == "not causal":
        options = {}
    elif what == "dropout":
        options["dropout_p"] = 0.5
    elif what == "no gradient":
        q, k, v = q.detach(), k.detach(), v.detach()
    with FastCausalBackward():
        out = F.scaled_dot_product_attention(q, k, v, **options)
    assert out.grad_fn is None or "CausalAttention" not in out.grad_fn.name()
