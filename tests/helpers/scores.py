"""Scores in float64, from activations that plain hooks capture in a model's own forward."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import IGNORED, collate, rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution import Attribution
from ssah.units import find_modules

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Batches = list[dict[str, Tensor]]


def ragged(side: str = "right", labels: bool = True) -> Batches:
    """Two ragged batches of four rows."""
    data = rows(), rows((6, 10, 3, 10), seed=1)
    return [collate(part, side=side, labels=labels) for part in data]


def capture(
    model: PreTrainedModel, batch: dict[str, Tensor], gradient: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What enters every B in the whole model's own forward, and dL/d of it, in float64."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            if gradient:
                args[0].retain_grad()

        return keep

    found = find_modules(model)
    hooks = [m.down.register_forward_pre_hook(hook(name)) for name, m in found.items()]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if hasattr(model.base_model, "wpe"):  # learned positions: those of the row, not of the batch
        inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.set_grad_enabled(gradient):
        logits = model(**inputs, use_cache=False).logits
        if gradient:
            following = batch.get("labels", batch["input_ids"])[:, 1:]
            attended = batch["attention_mask"].bool()
            targets = following.masked_fill(~(attended[:, 1:] & attended[:, :-1]), IGNORED)
            nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum"
            ).backward()
    for handle in hooks:
        handle.remove()
    model.zero_grad(set_to_none=True)
    shape = batch["input_ids"].shape
    a = {name: x.detach().double().reshape(*shape, -1) for name, x in seen.items()}
    if not gradient:
        return a, {}
    return a, {name: x.grad.double().reshape(*shape, -1) for name, x in seen.items()}


def expected(
    model: PreTrainedModel,
    batches: Batches,
    metric: str,
    tokens: str,
    captured: list[tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores in float64, and the magnitude that their error is measured against.

    What `capture` gave for every batch may be passed, and, where B is packed, its weights.
    """
    gradient = metric in ("taylor", "fisher")
    activations: dict[str, list[Tensor]] = {}
    products: dict[str, list[Tensor]] = {}
    captured = captured or [capture(model, batch, gradient) for batch in batches]
    for batch, (a, g) in zip(batches, captured, strict=True):
        keep = batch["attention_mask"].bool()
        if tokens == "labels":
            keep &= batch["labels"] != IGNORED
        for name in a:
            activations.setdefault(name, []).append(a[name][keep])
            if gradient:
                products.setdefault(name, []).append((a[name] * g[name])[keep])
    scores, scale = {}, {}
    for name, module in find_modules(model).items():
        weight = (weights[name] if weights else module.down.weight.detach()).double()
        norms = weight.square().sum(1 - module.output.dim)
        x = torch.cat(activations[name])
        if metric == "variance":
            scores[name] = scale[name] = x.var(0, correction=1) * norms
        elif metric == "norm":
            scores[name] = scale[name] = x.square().mean(0) * norms
        else:
            product = torch.cat(products[name])
            if metric == "taylor":
                scores[name], scale[name] = product.sum(0).abs(), product.abs().sum(0)
            else:
                scores[name] = scale[name] = product.square().sum(0)
    return scores, scale


def assert_close(
    result: Attribution, scores: dict[str, Tensor], scale: dict[str, Tensor], tol: float
) -> None:
    assert list(result.scores) == list(scores)
    for name, score in scores.items():
        actual = result.scores[name]
        assert actual.dtype == torch.float64
        assert score.max() > 0
        bound = tol * (scale[name] + 1e-3 * scale[name].mean())
        excess = ((actual - score).abs() / bound).max()
        assert excess <= 1, f"{name}: {excess:.2f} times the tolerance"
