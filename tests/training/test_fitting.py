"""Objectives and the fit of tensors that weights are made of, against loops over rows."""

from __future__ import annotations

import math

import pytest
import torch
from ablatable import assert_same_bits, bits
from tiny_models import IGNORED, build, collate, rows
from torch import Tensor

from ssah.attribution import BatchReader
from ssah.models import as_it_was
from ssah.training import bounded_ascent, fit, log_probs_under, preference_loss


def test_preferences_are_the_mean_of_the_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(4)]
    given[0].requires_grad_()
    loss = preference_loss(*given, beta=0.3)
    expected, slopes = 0.0, []
    for pc, pj, rc, rj in zip(*(each.tolist() for each in given), strict=True):
        x = 0.3 * ((pc - rc) - (pj - rj))
        expected += math.log(1 + math.exp(-x)) / 3
        slopes.append(-0.3 / (1 + math.exp(x)) / 3)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert given[0].grad.tolist() == pytest.approx(slopes, rel=1e-12)
    same = torch.zeros(2)
    assert float(preference_loss(same, same, same, same, 0.1)) == pytest.approx(math.log(2))


def test_preferences_of_other_shapes_are_refused() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(3,\)\]; they must be \[pairs\]"):
        preference_loss(two, three, two, two, 0.1)
    with pytest.raises(ValueError, match="at least one"):
        preference_loss(two[:0], two[:0], two[:0], two[:0], 0.1)
    with pytest.raises(ValueError, match="beta is 0; it must be above 0"):
        preference_loss(two, two, two, two, 0)


def test_an_answer_at_the_bound_pulls_no_more() -> None:
    log_probs = torch.tensor([-2.0, -30.0, -3.0], requires_grad=True)
    tokens = torch.tensor([2, 6, 1])  # 1, 5 and 3 nats a token
    loss = bounded_ascent(log_probs, tokens, 4.0)
    assert float(loss) == pytest.approx(-(1 + 4 + 3) / 3)
    loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([1 / 6, 0, 1 / 3])
    with pytest.raises(ValueError, match="bound is 0; it must be above 0"):
        bounded_ascent(log_probs, tokens, 0)
    with pytest.raises(ValueError, match="an answer has no token"):
        bounded_ascent(log_probs, tokens * 0, 4.0)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_log_probs_are_those_of_a_model_that_has_the_weights(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    data = rows((9, 6), seed=1)
    key = next(key for key, own in model.named_parameters() if "layers.1" in key or "h.1" in key)
    other = model.get_parameter(key).detach() * 1.5
    other.requires_grad_()
    batch = BatchReader(model, tokens="labels").read(collate(data, side="left"), 0)
    with as_it_was(model):
        found, tokens = log_probs_under(model, {key: other}, batch)
        found.sum().backward()
    assert_same_bits(model, before)
    second = build(name, dtype=torch.float64)
    with torch.no_grad():
        second.get_parameter(key).copy_(other)
    total = torch.zeros((), dtype=torch.float64)
    for row, (ids, labels) in enumerate(data):
        logits = second(ids[None]).logits[0]
        own = torch.zeros((), dtype=torch.float64)
        for at in range(1, len(ids)):
            if labels[at] != IGNORED:
                own = own + logits[at - 1].log_softmax(0)[labels[at]]
        total = total + own
        assert float(found[row]) == pytest.approx(float(own), rel=1e-9)
    total.backward()
    torch.testing.assert_close(other.grad, second.get_parameter(key).grad, rtol=1e-7, atol=1e-10)
    assert tokens.tolist() == [int((labels != IGNORED).sum()) for _, labels in data]


def test_a_fit_is_adam_with_a_cosine() -> None:
    x = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    losses = fit([x], lambda target: (x - target).square().sum(), [1.0, -1.0], lr=0.1, steps=5)
    y, m, v = [3.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for k in range(5):
        target = (1.0, -1.0)[k % 2]
        assert losses[k] == pytest.approx(sum((each - target) ** 2 for each in y))
        rate = 0.1 * (1 + math.cos(math.pi * k / 5)) / 2
        for i in range(2):
            g = 2 * (y[i] - target)
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            step = (m[i] / (1 - 0.9 ** (k + 1))) / (math.sqrt(v[i] / (1 - 0.999 ** (k + 1))) + 1e-8)
            y[i] -= rate * step
    assert x.tolist() == pytest.approx(y, rel=1e-9)


def test_a_fit_ends_where_all_batches_are_at_the_floor() -> None:
    x = torch.zeros(1, requires_grad=True)

    def loss(bound: float) -> Tensor:
        return -x.clamp(max=bound).sum()

    # A batch at its floor takes no step: not even by the momentum of the steps before.
    losses = fit([x], loss, [1.0, 1.0], lr=0.4, steps=100, floor=-1.0)
    assert 1.0 <= float(x) < 1.5
    assert losses[-2:] == [-1.0, -1.0]
    assert len(losses) < 10
    with pytest.raises(ValueError, match="batches is empty"):
        fit([x], loss, [], lr=0.1, steps=1)
    with pytest.raises(FloatingPointError, match="NaN or infinite after 0 steps"):
        fit([x], lambda _: x.sum() * float("nan"), [1.0], lr=0.1, steps=1)
