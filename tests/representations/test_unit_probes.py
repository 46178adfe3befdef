"""Activations of units row by row, and the linear probe over them, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ablatable import assert_same_bits, bits
from tiny_models import IGNORED, build, collate, rows
from torch import Tensor

import ssah
from ssah.representations import logistic_regression, unit_activations

DATA = rows((9, 7, 8), seed=1)


def loop(model: torch.nn.Module, kind: str) -> dict[str, Tensor]:
    """What enters every B at the last token of each prompt, ``[rows, units]``."""
    found = {name: m for name, m in ssah.find_modules(model).items() if m.kind == kind}
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    for ids, labels in DATA:
        last = int((labels != IGNORED).int().argmax()) - 1
        handles = [
            module.down.register_forward_pre_hook(
                lambda _, args, own=seen[name], last=last: own.append(args[0][0, last])
            )
            for name, module in found.items()
        ]
        with torch.no_grad():
            model(ids[None])
        for handle in handles:
            handle.remove()
    return {name: torch.stack(own).double() for name, own in seen.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_activations_are_those_of_each_row_alone(name: str, kind: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    batches = [collate(DATA[:2], side="left"), collate(DATA[2:])]
    found = unit_activations(model, batches, modules=(kind,))
    expected = loop(model, kind)
    assert found.keys() == expected.keys()
    for key, own in expected.items():
        torch.testing.assert_close(found[key], own, rtol=1e-10, atol=1e-12)
    assert_same_bits(model, before)


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="has none but routed experts; choose another kind"):
        unit_activations(build("mixtral"), [collate(DATA)])
    with pytest.raises(ValueError, match="loader yielded no batch"):
        unit_activations(build("llama"), [])


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_probe_is_the_minimum_that_newton_finds(penalty: float) -> None:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(12, 5, generator=generator) + torch.tensor([1.0, 0.5, 0, 0, 0])
    second = torch.randn(9, 5, generator=generator)
    first[:, 4] = second[:, 4] = 3.0  # says nothing
    found = logistic_regression(first, second, penalty=penalty).numpy()
    x = np.concatenate([first.double().numpy(), second.double().numpy()])
    z = np.ones((21, 6))
    for j in range(5):
        z[:, j] = 0 if j == 4 else (x[:, j] - x[:, j].mean()) / x[:, j].std()
    y = np.array([1.0] * 12 + [0.0] * 9)
    w, pull = np.zeros(6), np.diag([penalty] * 5 + [0.0])
    for _ in range(50):  # Newton's steps, the last weight is b
        p = 1 / (1 + np.exp(-z @ w))
        hessian = z.T @ (z * (p * (1 - p))[:, None]) + pull
        w = w - np.linalg.solve(hessian, z.T @ (p - y) + pull @ w)
    np.testing.assert_allclose(found, w[:5], atol=1e-5)
    assert found[4] == 0
    np.testing.assert_allclose(
        logistic_regression(second, first, penalty=penalty).numpy(), -w[:5], atol=1e-5
    )


def test_what_cannot_be_told_apart_is_refused() -> None:
    some = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"must be \[rows, channels\] with the same channels"):
        logistic_regression(some, torch.ones(2, 4))
    with pytest.raises(ValueError, match="each class must have at least one"):
        logistic_regression(some, torch.ones(0, 3))
    with pytest.raises(ValueError, match="penalty is 0; it must be above 0"):
        logistic_regression(some, some, penalty=0)
    generator = torch.Generator().manual_seed(1)
    rows_of = [torch.randn(20, 4, generator=generator) for _ in range(2)]
    # The gradient is a sum over rows, whose rounding is more than such a penalty can tell.
    with pytest.raises(RuntimeError, match=r"must be within 1e-05.*raise the penalty, which is 1e"):
        logistic_regression(*rows_of, penalty=1e-14)
