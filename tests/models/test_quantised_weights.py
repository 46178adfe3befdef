"""Scores of the single weights of quantised models: those of the weights that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_models import Build
from tiny_models import collate, rows
from transformers import AutoModelForCausalLM

from ssah.attribution import attribute_weights
from ssah.models import dequantised, packed_modules


@pytest.mark.parametrize("scheme", ["bnb-nf4", "torchao-int8", "gguf"])
def test_scores_are_those_of_the_dequantised_model(build: Build, scheme: str) -> None:
    model = build(scheme)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    packed = {
        f"{name}.weight": dequantised(model.get_submodule(name)) for name in packed_modules(model)
    }
    state = {name: t for name, t in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict({**state, **packed})
    batches = [collate(rows(seed=1)), collate(rows((8, 5), seed=2), side="left")]
    for metric in ("snip", "wanda", "magnitude"):
        loader = None if metric == "magnitude" else batches
        found = attribute_weights(model, loader, metric=metric)
        expected = attribute_weights(plain, loader, metric=metric)
        assert list(found.scores) == list(expected.scores)
        for param, score in expected.scores.items():
            assert found.scores[param].shape == plain.get_parameter(param).shape
            assert float((found.scores[param] - score).norm() / score.norm()) < 1e-3, (
                metric,
                param,
            )
