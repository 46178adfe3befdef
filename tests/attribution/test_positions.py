"""Padding never counts, on whichever side of a row it stands."""

from __future__ import annotations

import pytest
import tiny_chat
import torch
from scores import ragged
from tiny_models import EXPERTS, FAMILIES, build, cases, collate, rows
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ssah
from ssah.attribution import METRICS
from ssah.evaluation import answers, utility_loss

# Positions that a model learns, so that they are absolute.
LEARNED = ("gpt2", "gpt_bigcode", "gpt_bigcode_heads", "opt")
# In float32, where 1e-6 is out of reach: transformers' linear attention has no float64, and its
# eager attention makes NaN of a padded float64 row.
SINGLE = {"qwen3_next", "qwen3_5", "olmo_hybrid", "qwen3_next_experts", "qwen3_5_moe"}
SINGLE |= {"bloom", "gemma2"}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """Within ``limit`` of the largest score of the module."""
    for name, scores in expected.items():
        error = float((found[name] - scores).abs().max())
        assert error <= limit * float(scores.abs().max()), name


@pytest.mark.filterwarnings("ignore:.*experts that fewer than two:UserWarning")
@pytest.mark.parametrize("name", cases(*FAMILIES, *EXPERTS))
def test_scores_are_the_same_with_padding_on_either_side(name: str) -> None:
    model = build(name, dtype=torch.float32 if name in SINGLE else torch.float64)
    right, left = (ssah.attribute(model, ragged(side)) for side in ("right", "left"))
    assert left.count == right.count
    assert left.data_fingerprint == right.data_fingerprint
    assert_close(left.scores, right.scores, 1e-4 if name in SINGLE else 1e-6)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tokens", ["all", "labels"])
def test_learned_positions_begin_with_the_row(name: str, metric: str, tokens: str) -> None:
    model = build(name, dtype=torch.float64)
    right, left = (
        ssah.attribute(model, ragged(side), metric=metric, tokens=tokens).scores
        for side in ("right", "left")
    )
    # The slope of the loss is taken in float32.
    assert_close(left, right, 1e-6)


@pytest.mark.parametrize("name", LEARNED)
def test_losses_are_the_same_with_padding_on_either_side(name: str) -> None:
    model = build(name, dtype=torch.float64)
    right, left = (utility_loss(model, ragged(side)) for side in ("right", "left"))
    assert left == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_bigcode", "opt"])
def test_answers_and_probes_do_not_depend_on_the_padding(kind: str) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=800, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    config.update({"ffn_dim": 64, "word_embed_proj_dim": 32} if kind == "opt" else {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that positions matter
    tokenizer = tiny_chat.tokenizer()
    requests = ["a", "a much longer request than the other ones are", "short one"]
    together = answers(model, tokenizer, requests, max_new_tokens=8)
    assert together == [answers(model, tokenizer, [r], max_new_tokens=8)[0] for r in requests]
    both, single = (
        ssah.probe(model, tokenizer, requests, tokens=3, batch_size=size) for size in (3, 1)
    )
    torch.testing.assert_close(both.refusal_distances, single.refusal_distances)


@pytest.mark.parametrize("name", LEARNED)
def test_positions_that_are_given_are_kept(name: str) -> None:
    """Those of a loader that knows better, here in reverse."""
    model = build(name, dtype=torch.float64)
    batch = collate(rows((7, 7)))
    shifted = {**batch, "position_ids": torch.arange(7).flip(0).expand(2, 7)}
    plain, other = (ssah.attribute(model, [each]).scores for each in (batch, shifted))
    assert any(not torch.allclose(plain[name], other[name]) for name in plain)
