"""Training by hand: AdamW written out, in float64, of any loss of a tiny model's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from in_float64 import InFloat64
from tiny_models import IGNORED, build, collate
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ssah.data import Encoded

Weights = dict[str, Tensor]


def without_dropout(name: str) -> PreTrainedModel:
    """A tiny model in float64, without the dropout that nothing by hand would repeat."""
    model = build(name, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def parameters(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def loss_of_batches(
    model: PreTrainedModel, order: Sequence[Encoded], size: int
) -> Callable[[int, Weights], Tensor]:
    """Of an update and of weights: the mean loss over the labels of that update's rows."""

    def loss(step: int, weights: Weights) -> Tensor:
        own = order[step * size : (step + 1) * size]
        batch = collate([
            (torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in own
        ])  # fmt: skip
        labels = batch.pop("labels")
        with InFloat64():
            logits = functional_call(model, weights, kwargs=batch).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )

    return loss


def by_hand(
    start: Weights,
    loss: Callable[[int, Weights], Tensor],
    steps: int,
    lr: float,
    *,
    pull: Callable[[int], tuple[float, int]] = lambda step: (0.0, 0),
    trains: Weights | None = None,
) -> Weights:
    """AdamW, with gradients clipped at 1, of ``loss`` + rho / 2 |w - a|^2.

    Args:
        start: what trains, before.
        loss: of the number of an update, and of the weights then.
        steps: updates.
        lr: learning rate.
        pull: of an update rho, and before which update the weights were a.
        trains: 1 where an entry trains, by name.
    """
    w = {name: value.detach().clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in w.items()}
    second = {name: torch.zeros_like(value) for name, value in w.items()}
    history: list[Weights] = []
    for step in range(steps):
        history.append(w)
        rho, since = pull(step)
        leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
        total = loss(step, leaves)
        for name, leaf in leaves.items():
            total = total + rho / 2 * ((leaf - history[since][name]) ** 2).sum()
        grads = dict(zip(w, torch.autograd.grad(total, list(leaves.values())), strict=True))
        if trains is not None:
            grads = {name: grad * trains[name] for name, grad in grads.items()}
        norm = float(torch.cat([grad.flatten() for grad in grads.values()]).norm())
        new = {}
        for name, grad in grads.items():
            grad = grad * min(1.0, 1.0 / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            square = second[name] / (1 - 0.999 ** (step + 1))
            new[name] = w[name] - lr * mean / (square.sqrt() + 1e-8)
        w = new
    return w


def assert_trained_alike(
    found: Weights, expected: Weights, start: Weights, *, moved: float, atol: float = 1e-8
) -> None:
    """Equal within ``atol``, and farther than ``moved`` from the start somewhere."""
    for name, value in expected.items():
        # A bias of keys shifts all scores alike: its gradient is rounding, which Adam blows up.
        kept = torch.ones(len(value), dtype=torch.bool)
        if name.endswith("c_attn.bias"):
            kept.view(3, -1)[1] = False
        torch.testing.assert_close(found[name][kept], value[kept], rtol=0, atol=atol)
    assert max(float((found[name] - start[name]).abs().max()) for name in expected) > moved
