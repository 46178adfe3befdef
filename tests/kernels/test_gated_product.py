"""gated_product: arms and factors, its derivatives, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssah_kernels
from ssah_kernels import ops

F64 = torch.float64
X, FACTORS, ARM = torch.ones(3, 2, 4), torch.ones(2, 4), torch.tensor([0, 1, 1])


def drawn(*shape: int, dtype: torch.dtype = F64) -> list[Tensor]:
    """Gate, up and the gradient of what comes of them."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=F64).to(dtype) for _ in range(3)]


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_loops_over_rows_tokens_and_channels(backend: str) -> None:
    gate, up, _ = drawn(3, 2, 5)
    factors = torch.tensor([[1.0, 0, 1, -0.5, 2], [0, 1, 1, 1, 1]], dtype=F64)
    arms = [1, 0, 1]
    with ssah_kernels.use(backend):
        got = ops.gated_product(gate, up, factors, torch.tensor(arms))
    for row, arm in enumerate(arms):
        for token in range(2):
            for c in range(5):
                at = row, token, c
                expected = silu(float(gate[at])) * float(up[at]) * float(factors[arm, c])
                assert float(got[at]) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
def test_derivatives_under_arms_of_rows_and_of_tokens(backend: str, lead: tuple[int, ...]) -> None:
    gate, up = (each.requires_grad_() for each in drawn(3, 2, 4)[:2])
    factors = torch.tensor([[1.0, 0, 0.3, 1], [-2, 1, 1, 0]], dtype=F64)
    arm = torch.arange(math.prod(lead)).view(lead) % 2

    def output(gate: Tensor, up: Tensor) -> Tensor:
        return ops.gated_product(gate, up, factors, arm, act="gelu")

    with ssah_kernels.use(backend):
        assert torch.autograd.gradcheck(output, (gate, up))
        assert torch.autograd.gradgradcheck(output, (gate, up))


def test_gradients_of_bfloat16_are_those_of_eager_float64() -> None:
    gate, up, grad = drawn(4, 6, 33, dtype=torch.bfloat16)
    factors = torch.tensor([[1.0], [0.3]]).repeat(1, 33)  # float32: 0.3 is not rounded to bfloat16
    arm = torch.tensor([0, 1, 1, 0])
    leaves = [each.clone().requires_grad_() for each in (gate, up)]
    ops.gated_product(*leaves, factors, arm).backward(grad)
    exact = [each.double().requires_grad_() for each in (gate, up)]
    (nn.functional.silu(exact[0]) * exact[1] * factors.double()[arm][:, None]).backward(grad)
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-2, atol=1e-3)


def test_a_factor_of_0_keeps_what_a_column_of_zeros_would() -> None:
    """Ablation sets a column of the next projection to 0, where infinity gives NaN."""
    gate = torch.tensor([[1.0], [2.0], [3.0]])
    up = torch.tensor([[math.inf], [math.nan], [1.0]])
    off = ops.gated_product(gate, up, torch.zeros(1, 1), torch.tensor(0))
    ablated = (nn.functional.silu(gate) * up) @ torch.zeros(1, 1)
    assert (
        off.isnan().flatten().tolist() == ablated.isnan().flatten().tolist() == [True, True, False]
    )
    assert off[2] == ablated[2] == 0


def test_compiles_with_its_gradient() -> None:
    def loss(gate: Tensor, up: Tensor, arm: Tensor) -> Tensor:
        return ops.gated_product(2 * gate, up, factors, arm, act="gelu").sin().sum()

    factors, arm = torch.tensor([[1.0] * 8, [0.5] * 8]), torch.tensor([0, 1, 1])
    leaves = [each.requires_grad_() for each in drawn(3, 8, dtype=torch.float32)[:2]]
    outcomes = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*leaves, arm)
        outcomes.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_arms_are_read_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them waits for a GPU."""
    arm, reads = torch.tensor([0, 1, 0]), []
    monkeypatch.setattr(Tensor, "aminmax", lambda t: reads.append(t) or torch.aminmax(t))
    for _ in range(3):
        ops.gated_product(X, X, FACTORS, arm)
    assert len(reads) == 1
    arm += 1
    with pytest.raises(ValueError, match="arm goes from 1 to 2; it must stay within 0 to 1"):
        ops.gated_product(X, X, FACTORS, arm)
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"up": X[:2]}, ValueError, "up has shape"),
        ({"act": "tanh"}, ValueError, "act is 'tanh'"),
        ({"factors": FACTORS.double()}, TypeError, "factors has dtype torch.float64; it must"),
        ({"factors": FACTORS.int()}, TypeError, "factors has dtype torch.int32"),
        ({"factors": FACTORS[:, :3]}, ValueError, r"factors has shape \(2, 3\); .* \(arms, 4\)"),
        ({"factors": FACTORS[0]}, ValueError, r"factors has shape \(4,\)"),
        ({"arm": ARM.int()}, TypeError, "arm has dtype torch.int32; it must be int64"),
        ({"arm": ARM[:2]}, ValueError, r"arm has shape \(2,\); it must be \(3, 2\)"),
        ({"arm": torch.zeros(3, 2, 4).long()}, ValueError, "arm has shape"),
        ({"arm": ARM - 1}, ValueError, "arm goes from -1 to 0"),
        ({"factors": FACTORS[:1]}, ValueError, "arm goes from 0 to 1; it must stay within 0 to 0"),
        ({"factors": FACTORS.to("meta")}, ValueError, "factors is on meta; it must be on cpu"),
        ({"arm": ARM.to("meta")}, ValueError, "arm is on meta"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.gated_product(**{"gate": X, "up": X, "factors": FACTORS, "arm": ARM, **changes})


def test_a_gradient_of_factors_is_refused() -> None:
    factors = FACTORS.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"pass factors\.detach\(\)"):
        ops.gated_product(X, X, factors, ARM)
    with torch.no_grad():
        ops.gated_product(X, X, factors, ARM)
