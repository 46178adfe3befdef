"""The model as it was before its plan, for a forward pass: the reference of preference training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, draw, loss_of, make, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from ssah.models import weights_hash
from ssah.training import UpdatePlan, freeze, plan_of, train_only


def train(plan: UpdatePlan, steps: int = 2) -> None:
    optimizer = plan.optimizer(lr=1e-2, weight_decay=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(plan.model, seed).backward()
        optimizer.step()


def log_probability(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Of the labels, row by row: ``[rows]``."""
    logits, labels = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return -each.sum(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_logits_are_those_before_training_bit_for_bit(name: str, mode: str) -> None:
    model = tiny_models.build(name)
    base, before = copy.deepcopy(model), snapshot(model)
    plan = make(model, mode)
    first = model(**batch()).logits.detach()
    plan.keep_originals()
    train(plan)
    trained, logits = snapshot(model), model(**batch()).logits.detach()
    assert not torch.equal(logits, first)
    with plan.disabled():
        assert torch.equal(model(**batch()).logits, first)
        assert_equal(snapshot(model), before)
        plan.verify()
    torch.testing.assert_close(first, base(**batch()).logits, rtol=1e-4, atol=1e-5)
    assert_equal(snapshot(model), trained)
    assert torch.equal(model(**batch()).logits, logits)
    plan.close()
    assert_equal(snapshot(model), trained)


def test_logits_are_those_of_a_second_model_where_no_channel_changes_its_place() -> None:
    model = tiny_models.build("llama")
    base = copy.deepcopy(model)
    rows = {"model.embed_tokens.weight": list(range(128)[::2]), "lm_head.weight": [5, 6]}
    plan = train_only(model, rows=rows)
    with plan.disabled():  # keeps them: nothing has trained yet
        pass
    train(plan)
    with plan.disabled():
        assert torch.equal(model(**batch()).logits, base(**batch()).logits)
    assert not torch.equal(model(**batch()).logits, base(**batch()).logits)


def test_preferences_train_as_with_a_second_model() -> None:
    good, bad = batch(1), batch(2)

    def losses(second: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = tiny_models.build("llama")
        plan = freeze(model, draw(model))
        reference = copy.deepcopy(model)
        optimizer, found = plan.optimizer(lr=1e-3), []
        for _ in range(4):
            optimizer.zero_grad()
            chosen, rejected = (log_probability(model, each) for each in (good, bad))
            if second:
                with torch.no_grad():
                    old = [log_probability(reference, each) for each in (good, bad)]
            else:
                with plan.disabled():  # between the forward and the backward pass of the policy
                    old = [log_probability(model, each) for each in (good, bad)]
                    assert not old[0].requires_grad
            loss = -F.logsigmoid(0.1 * ((chosen - old[0]) - (rejected - old[1]))).mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        plan.verify()
        plan.close()
        return found, snapshot(model)

    (one, ours), (two, theirs) = losses(False), losses(True)
    assert one == two
    assert one[-1] < one[0]
    assert_equal(ours, theirs)


def test_an_error_and_a_nested_block_leave_what_was_trained() -> None:
    model = tiny_models.build("llama")
    before = snapshot(model)
    plan = train_only(model, draw(model))
    plan.keep_originals()
    train(plan)
    trained = snapshot(model)

    def fail() -> None:
        with plan.disabled():
            with plan.disabled():
                assert_equal(snapshot(model), before)
            assert_equal(snapshot(model), before)  # the inner block has not ended the outer one
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_equal(snapshot(model), trained)
    train(plan)  # hooks and checks are gone
    plan.close()


def test_what_would_be_lost_or_wrong_inside_is_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, draw(model))
    plan.keep_originals()
    train(plan)
    trained = snapshot(model)
    optimizer, loss = plan.optimizer(lr=1e-2), loss_of(model)
    sgd = torch.optim.SGD(plan.parameters(), lr=1.0)
    with plan.disabled():
        with pytest.raises(RuntimeError, match="backward pass runs inside"):
            loss.backward()
        for each in (optimizer.step, sgd.step, plan.close):
            with pytest.raises(RuntimeError, match="leave the block"):
                each()
        with pytest.raises(RuntimeError, match="leave the block"):
            plan.save_pretrained(tmp_path / "update")
        other = nn.Linear(2, 2)
        with torch.enable_grad():
            other(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()  # of something else
    assert not (tmp_path / "update").exists()
    assert not plan.closed
    assert_equal(snapshot(model), trained)
    plan.close()
    with pytest.raises(RuntimeError, match="the plan is closed"), plan.disabled():
        pass


def test_values_that_are_gone_are_not_made_up() -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    train(plan, 1)
    with pytest.raises(RuntimeError, match=r"keep_originals\(\) right after"), plan.disabled():
        pass
    plan.close()
    plan = freeze(model, draw(model))  # from the weights of now
    plan.keep_originals()
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"was torch\.float32 and is"), plan.disabled():
        pass


def test_adapters_are_not_taken_for_the_reference() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_models.build("llama")
    plan = train_only(model, draw(model))
    plan.keep_originals()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match="given parameters since"), plan.disabled():
        pass


def test_a_copy_has_originals_of_its_own() -> None:
    model = tiny_models.build("llama")
    before = snapshot(model)
    plan = train_only(model, draw(model))
    plan.keep_originals()
    train(plan)
    twin = copy.deepcopy(model)
    own = plan_of(twin)
    assert own is not None
    trained = snapshot(model)
    with own.disabled():
        assert_equal(snapshot(twin), before)
        assert_equal(snapshot(model), trained)
    assert_equal(snapshot(twin), trained)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_weights_have_one_hash_with_and_without_a_plan(name: str) -> None:
    model = tiny_models.build(name)
    before = weights_hash(model)
    plan = freeze(model, draw(model))
    assert plan.weights_hash == before == weights_hash(model)
    train(plan)
    during = weights_hash(model)
    plan.close()
    assert before != during == weights_hash(model)
