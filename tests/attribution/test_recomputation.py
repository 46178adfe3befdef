"""Activation checkpointing runs modules again in the backward pass: every token counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scores import ragged
from tiny_models import build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

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
    model = build(name)
    model.gradient_checkpointing_enable()
    assert_same(attribute(model.train(), ragged(), metric=metric), expected)
    assert all("forward" not in vars(layer) for layer in model.base_model.layers)


def test_gradient_checkpointing_keeps_less_in_evaluation_mode() -> None:
    config = build("llama").config
    config.num_hidden_layers = 8
    kept, found = [], []
    for on in (False, True):
        sizes: dict[int, int] = {}  # address of what the forward pass keeps -> its bytes

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        if on:
            model.gradient_checkpointing_enable()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found.append(attribute(model, ragged()[:1], metric="taylor"))
        kept.append(sum(size for at, size in sizes.items() if at not in weights))
    assert_same(found[1], found[0])
    assert kept[1] < kept[0] / 2, kept


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
