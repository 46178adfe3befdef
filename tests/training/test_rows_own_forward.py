"""Rows of embeddings that have a forward of their own: Gemma's scale, OPT's shifted positions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, check_moved, loss_of, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ssah.training import freeze, load_update, train_only

# Model, embedding, rows: Gemma's embedding is tied to the head; OPT's first position is row 2.
CASES = {
    "gemma3": ("model.embed_tokens.weight", [5, 6, 7, 40]),
    "gemma3_scattered": ("model.embed_tokens.weight", list(range(3, 60, 3))),
    "gemma3n": ("model.embed_tokens_per_layer.weight", [5, 9]),
    "opt": ("model.decoder.embed_positions.weight", [2, 3, 7]),
}


def build(case: str) -> PreTrainedModel:
    return tiny_models.build(case.removesuffix("_scattered"))


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_are_those_of_dense_training_in_these_rows(case: str, tmp_path: Path) -> None:
    """A second model trains whole, and its other rows are put back after each step."""
    name, rows = CASES[case]
    model, dense = build(case), build(case)
    before = snapshot(model)
    head = model.get_output_embeddings().weight
    plan = train_only(model, rows={name: rows})
    weight = dense.get_parameter(name)
    dense.requires_grad_(False)
    weight.requires_grad_(True)
    others = [row for row in range(len(weight)) if row not in rows]
    kept = weight.detach()[others].clone()
    optimizers = [
        plan.optimizer(lr=1e-3, weight_decay=0.1),
        torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1),
    ]
    for step in range(50):
        losses = [loss_of(each, step % 2) for each in (model, dense)]
        if step == 0:
            assert torch.equal(*losses)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            weight[others] = kept
    plan.verify()
    plan.save_pretrained(tmp_path / "update")
    model.save_pretrained(tmp_path / "checkpoint")
    plan.close()
    mask = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    mask[name][rows] = 1.0
    check_moved(model, before, mask)
    torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-4, atol=1e-5)
    assert model.get_output_embeddings().weight is head  # tied as before
    again = type(model).from_pretrained(tmp_path / "checkpoint")
    assert_equal(snapshot(again), snapshot(model))
    base = build(case)
    load_update(base, tmp_path / "update")
    assert_equal(snapshot(base), snapshot(model))
    assert torch.equal(*(each(**batch()).logits for each in (base, model)))


@pytest.mark.parametrize("case", ["gemma3", "opt"])
def test_the_module_is_what_it_was_after_the_plan(case: str) -> None:
    name, rows = CASES[case]
    model = build(case)
    before, module = model(**batch()).logits, model.get_submodule(name.removesuffix(".weight"))
    plain = type(module)
    plan = freeze(model, rows={name: rows})
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert torch.equal(model(**batch()).logits, before)
    lent = functional_call(model, {n: p * 0.5 for n, p in own.items()}, kwargs=batch()).logits
    assert not torch.equal(lent, before)
    assert not hasattr(module, "weight")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch()).logits, before)
    plan.close()
    assert type(module) is plain
    assert torch.equal(model(**batch()).logits, before)


def test_a_compiled_embedding_has_the_same_rows_and_gradients() -> None:
    name, rows = CASES["gemma3"]
    model = build("gemma3")
    plan = train_only(model, rows={name: rows})
    module, ids = model.get_input_embeddings(), batch()["input_ids"]
    found = []
    for each in (module, torch.compile(module, backend="eager", fullgraph=True)):
        plan_slices = list(plan.parameters())
        each(ids).square().sum().backward()
        found.append([p.grad.clone() for p in plan_slices if p.grad is not None])
        for parameter in plan_slices:
            parameter.grad = None
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Reads(nn.Embedding):
    """Computes with its weight beside what it looks up."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) - self.weight.mean(0)


class Own(nn.Embedding):
    """Looks up by itself."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * 2


def test_forwards_that_compute_with_the_weight_are_refused() -> None:
    name, rows = "model.embed_tokens.weight", [3]
    model = tiny_models.build("llama")
    model.model.embed_tokens.__class__ = Own
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"embed_tokens', a Own; .* forward calls super\(\)"):
        train_only(model, rows={name: rows})
    assert_equal(snapshot(model), before)
    model.model.embed_tokens.__class__ = Reads
    with (
        train_only(model, rows={name: rows}),
        pytest.raises(AttributeError, match=r"reads weight\.mean; .* extra_parameters= or keep="),
    ):
        model(**batch())
    assert_equal(snapshot(model), before)
