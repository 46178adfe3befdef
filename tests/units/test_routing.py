"""Products of all experts of a layer, and how many calls and waits a layer of many experts has.

What they compute is compared with every token's own product, in float64.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from pretend_gpu import PretendGPU
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ssah.attribution.sums import ExpertSums, Sums, new_sums
from ssah.attribution.watch import watching
from ssah.training import freeze, train_only
from ssah.training.splitting.masked_experts import MaskedExperts
from ssah.units import DepthTwoModule, UnitSet, find_modules
from ssah.units.routing import Routing

TOKENS, TOP_K = 37, 3
NO_AUTOCAST = mock.patch("torch.is_autocast_enabled", return_value=False)  # of the pretended


def routing(n_experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Choices of every token and their weights, ``[tokens, k]`` each; expert 1 is never chosen."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(TOKENS, n_experts, generator=g)
    scores[:, 1] = -1
    weights, chosen = scores.topk(TOP_K)
    return chosen, weights


@pytest.mark.parametrize("sizes", [(16, 24), (15, 7)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_gradients_are_those_of_each_token(
    sizes: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> None:
    chosen, weights = routing(5)
    weights = weights.to(dtype)
    (n_in, n_out), g = sizes, torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, n_in, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(5, n_in, n_out, generator=g).to(dtype)
    weight = weight if not transposed else weight.mT.contiguous().mT
    weight.requires_grad_()
    sort = Routing.of(chosen, 5)
    assert sort.spans[1][0] == sort.spans[1][1]
    calls = []
    grouped = F.grouped_mm
    with mock.patch.object(F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped(*a, **k)):
        out = sort.weighed(sort.product(x[sort.token], weight), weights)
    assert bool(calls) == (dtype != torch.float64 and sizes == (16, 24))
    slope = torch.randn(TOKENS, n_out, generator=g).to(dtype)
    found = torch.autograd.grad(out, (x, weight), slope)
    wide, matrices = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    each = torch.einsum("ti,tkio->tko", wide, matrices[chosen])
    must = (each * weights.double()[..., None]).sum(1)
    wanted = torch.autograd.grad(must, (wide, matrices), slope.double())
    tolerance = 8 * torch.finfo(dtype).eps
    for own, right in zip((out, *found), (must, *wanted), strict=True):
        torch.testing.assert_close(
            own.double(), right, rtol=tolerance, atol=tolerance * float(right.detach().abs().max())
        )
    assert not found[1][1].any(), "an expert without tokens"


def test_rows_that_are_not_aligned_or_lie_otherwise_are_multiplied_too() -> None:
    chosen, _ = routing(4)
    sort, g = Routing.of(chosen, 4), torch.Generator().manual_seed(0)
    pairs = len(sort.token)
    shifted = torch.randn(1 + pairs * 16, generator=g)[1:].view(pairs, 16)
    spread = torch.randn(16, 2 * pairs, generator=g).t()[::2]
    weight = torch.randn(4, 16, 8, generator=g)
    for x in (shifted, spread, torch.randn(1, 16, generator=g).expand(pairs, 16), shifted[:0]):
        own = sort if len(x) else Routing.of(chosen[:0], 4)
        must = torch.einsum("pi,pio->po", x, weight[own.expert])
        torch.testing.assert_close(own.product(x, weight), must)
        right = own.gradient(x, must)
        one_hot = F.one_hot(own.expert, 4).float()
        torch.testing.assert_close(right, torch.einsum("pe,pi,po->eio", one_hot, x, must))


# ------------------------------------------------------------------------------- calls and waits


class Counting(PretendGPU):
    """Counts the operators that are called, too."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.calls: list[str] = []

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        self.calls.append(str(func))
        super()._note(func, args, kwargs)

    def _operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.calls.append(str(func))
        return super()._operator(func, args, kwargs)


def mixture(n_experts: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=n_experts,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=16,
        decoder_sparse_step=1,
    )
    return Qwen3MoeForCausalLM(config)


def inputs(n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(TOKENS) % 5 != 0
    return x, *routing(n_experts), mask


def on_device(gpu: PretendGPU, *tensors: Tensor) -> list[Tensor]:
    return [each.to(gpu.device) for each in tensors]


def scored(
    modules: dict[str, DepthTwoModule],
    sums: dict[str, Sums],
    given: tuple[Tensor, ...],
    mask: Tensor,
    gradient: bool,
) -> list[Tensor]:
    """The sums ``[experts, ...]`` and the output after two passes through the experts."""
    x, chosen, weights = given
    with watching(modules, sums, gradient=gradient) as watch:
        watch.token_mask = mask
        for _ in range(2):
            if gradient:
                x = x.detach().requires_grad_()
            out = next(iter(modules.values())).down(x, chosen, weights)
            if gradient:
                out.backward(torch.ones_like(out))
    first = next(iter(sums.values()))
    assert isinstance(first, ExpertSums)
    own = first.layer
    return [own.count, own.mean, own.m2, own.signed, own.squared, out.detach()]


@pytest.mark.parametrize("gradient", [False, True])
def test_scoring_many_experts_takes_no_more_calls_and_no_wait(gradient: bool) -> None:
    counts = {}
    for n_experts in (8, 64):
        model, (*given, mask) = mixture(n_experts), inputs(n_experts)
        modules = {n: m for n, m in find_modules(model).items() if ".0.mlp.experts" in n}
        must = scored(modules, new_sums(modules), tuple(given), mask, gradient)
        with (
            NO_AUTOCAST if gradient else nullcontext(),
            mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
            Counting("lazy" if gradient else "cuda") as gpu,
        ):
            gpu.take(model)
            *there, mask = on_device(gpu, *given, mask)
            sums = new_sums(modules)
            gpu.waits.clear()
            gpu.calls.clear()
            found = scored(modules, sums, tuple(there), mask, gradient)
            assert gpu.waits == [], gpu.said()
            counts[n_experts] = len(gpu.calls)
            found = [each.cpu() for each in found]
        for own, right in zip(found, must, strict=True):
            torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-6)
        assert not found[0][1], "nobody chose it"
        assert int(found[0].sum()) == 2 * TOP_K * int(inputs(n_experts)[-1].sum())
    assert counts[8] == counts[64] < 300


@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_training_many_experts_takes_no_more_calls_and_no_wait(mode: str) -> None:
    counts = {}
    for n_experts in (8, 64):
        model, (x, chosen, weights, _) = mixture(n_experts), inputs(n_experts)
        known = find_modules(model)
        units = UnitSet(
            {name: [0, 2, 5, 7] for name, module in known.items() if module.expert},
            {name: module.n_units for name, module in known.items()},
        )
        plan = {"freeze": freeze, "train_only": train_only}[mode](model, units)
        experts = model.model.layers[0].mlp.experts
        assert isinstance(experts, MaskedExperts)

        def step(*given: Tensor, own: MaskedExperts = experts) -> list[Tensor]:
            hidden = given[0].detach().requires_grad_()
            out = own(hidden, *given[1:])
            out.backward(torch.ones_like(out))
            grads = [p.grad for p in own.parameters() if p.grad is not None]
            return [out.detach(), hidden.grad, *grads]

        must = step(x, chosen, weights)
        assert len(must) == 4
        with NO_AUTOCAST, Counting("lazy") as gpu:
            gpu.take(experts)
            experts.remember()
            for split in experts.split_tensors.values():
                split.storage, split.places = on_device(gpu, split.storage, split.places)
            there = on_device(gpu, x, chosen, weights)
            step(*there)  # the first brings the indices there
            for parameter in experts.parameters():
                parameter.grad = None
            gpu.waits.clear()
            gpu.calls.clear()
            found = step(*there)
            assert gpu.waits == [], gpu.said()
            counts[n_experts] = len(gpu.calls)
            found = [each.cpu() for each in found]
        for own, right in zip(found, must, strict=True):
            torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-5)
        del plan
    assert counts[8] == counts[64] < 300
