"""Activation checkpointing runs modules again in the backward pass: every token counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scores import ragged
from tiny_models import build
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ssah.attribution import METRICS, Attribution, attribute


def checkpointed(model: PreTrainedModel, layers: slice, reentrant: bool) -> PreTrainedModel:
    """``model``, whose ``layers`` compute their activations again, as a user's wrapper does it."""

    def wrap(layer: nn.Module) -> None:
        own = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(lambda *x: own(*x, **kwargs), *args, use_reentrant=reentrant)

        layer.forward = forward

    for layer in model.base_model.layers[layers]:
        wrap(layer)
    return model


def assert_same(actual: Attribution, expected: Attribution) -> None:
    assert actual.count == expected.count
    for field in ("scores", "mean", "variance"):
        for name, value in getattr(expected, field).items():
            assert torch.equal(getattr(actual, field)[name], value), (field, name)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen2_moe"])
def test_recomputed_activations_count_once(name: str, metric: str) -> None:
    expected = attribute(build(name), ragged(), metric=metric)
    model = checkpointed(build(name), slice(None), reentrant=False)
    assert_same(attribute(model, ragged(), metric=metric), expected)
    model = build(name)  # transformers checkpoints in training mode, which scoring leaves
    model.gradient_checkpointing_enable()
    assert_same(attribute(model.train(), ragged(), metric=metric), expected)


@pytest.mark.parametrize("layers", [slice(None), slice(0, 1), slice(1, 2)])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_activations_without_gradients_are_refused(name: str, layers: slice) -> None:
    for metric in ("variance", "norm"):
        expected = attribute(build(name), ragged(), metric=metric)
        model = checkpointed(build(name), layers, reentrant=True)
        assert_same(attribute(model, ragged(), metric=metric), expected)
    for metric in ("taylor", "fisher"):
        model = checkpointed(build(name), layers, reentrant=True)
        with pytest.raises(RuntimeError, match=r"under torch\.no_grad\(\).*use_reentrant=False"):
            attribute(model, ragged(), metric=metric)
