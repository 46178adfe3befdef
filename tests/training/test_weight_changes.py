"""Step-to-step changes of a training model, applied to a second one."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from plans import assert_equal, draw, loss_of, make, snapshot

import ssah
from ssah.training import ChangedWeight, WeightChanges, apply_changes

EMBEDDING = "model.embed_tokens.weight"


def build(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return tiny_models.build(name, dtype=dtype)


@pytest.mark.parametrize("mode", ["freeze", "train_only"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_a_second_model_stays_equal_bit_for_bit(name: str, mode: str) -> None:
    """Also with freeze, under which embeddings and norms train whole."""
    dtype = torch.bfloat16 if name == "llama" else torch.float32
    model, engine = build(name, dtype), build(name, dtype)
    plan = make(model, mode)
    changes, optimizer = WeightChanges(plan), plan.optimizer(lr=1e-3)
    assert list(changes.take()) == []
    for step in range(3):
        before = snapshot(model)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        sent = list(changes.take())
        apply_changes(engine, sent)
        now = snapshot(model)
        assert_equal(snapshot(engine), now)
        count = 0
        for each in sent:  # nothing twice, and nothing that did not change
            assert bool((each.index.diff() > 0).all())
            old, new = before[each.name].flatten(), now[each.name].flatten()
            assert bool((old[each.index] != new[each.index]).all())
            count += len(each.index)
        names = [n for n, _ in engine.named_parameters()]
        assert count == sum(int((before[n] != now[n]).sum()) for n in names)
    assert list(changes.take()) == []


def test_rows_of_a_tied_embedding_and_signs_of_zeros() -> None:
    model, engine = build("llama_tied"), build("llama_tied")
    plan = ssah.train_only(model, rows={EMBEDDING: [3, 4, 90]})
    changes = WeightChanges(plan)
    with torch.no_grad():
        for _, parameter, index, _ in plan.trained_slices():
            parameter[index.tolist().index(3) if 3 in index.tolist() else 0, 0] = 0.0
    apply_changes(engine, changes.take())
    with torch.no_grad():
        for _, parameter, *_ in plan.trained_slices():
            parameter.mul_(-1)
    apply_changes(engine, changes.take())
    assert_equal(snapshot(engine), snapshot(model))
    assert bool(torch.signbit(engine.model.embed_tokens.weight[3, 0]))
    assert engine.lm_head.weight is engine.model.embed_tokens.weight


def test_what_does_not_fit_is_refused_and_nothing_changed() -> None:
    model = build("llama")
    plan = make(model, "train_only", draw(model, 0.1))
    changes = WeightChanges(plan)
    with torch.no_grad():
        for parameter in plan.parameters():
            parameter.add_(1)
    sent = list(changes.take())
    other = build("llama", torch.bfloat16)
    before = snapshot(other)
    for wrong, message in (
        (other, r"changed as torch\.float32, and the model has torch\.bfloat16"),
        (build("gpt2"), "no such parameter"),
        (model, "active plan"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_changes(wrong, sent)
    assert_equal(snapshot(other), before)
    engine = build("llama")
    far = ChangedWeight(sent[-1].name, torch.tensor([10**6]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"position 1000000, and the model has \d+ elements"):
        apply_changes(engine, [*sent, far])
    assert_equal(snapshot(engine), snapshot(build("llama")))
    model.double()
    with pytest.raises(RuntimeError, match=r"was torch\.float32 .* make a new WeightChanges"):
        next(changes.take())
    plan.close()
    with pytest.raises(RuntimeError, match="plan is closed"):
        WeightChanges(plan)
