"""What is temporary (an ablation) and what is permanent (a plan, a pruning, an update) may meet."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from plans import assert_equal, draw, loss_of, make, snapshot
from tiny_models import build

from ssah.interventions import ablate, prune
from ssah.training import freeze, load_update, plan_of, train_only
from ssah.training.splitting import SplitTensor
from ssah.units import find_modules

MODES = ["freeze", "train_only"]


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_inside_ablate_is_refused(mode: str) -> None:
    model = build("llama")
    before = snapshot(model)
    with ablate(model, draw(model)), pytest.raises(ValueError, match=r"inside `with ssah\.ablate"):
        make(model, mode)
    assert_equal(snapshot(model), before)
    assert plan_of(model) is None
    make(model, mode).close()


def test_pruning_and_updating_inside_ablate_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    with freeze(model, draw(model)) as plan:
        plan.save_pretrained(tmp_path)
    before = snapshot(model)
    with ablate(model, draw(model)):
        with pytest.raises(ValueError, match="after the `with` block"):
            prune(model, draw(model, seed=1))
        with pytest.raises(ValueError, match="after the `with` block"):
            load_update(model, tmp_path)
    assert_equal(snapshot(model), before)


def test_a_copy_made_inside_ablate_is_an_ordinary_model() -> None:
    model = build("llama")
    with ablate(model, draw(model)):
        ablated = copy.deepcopy(model)
    freeze(ablated, draw(ablated)).close()
    assert not torch.equal(loss_of(ablated), loss_of(model))


def test_nested_ablations_are_inside_until_the_outer_one_is_left() -> None:
    model = build("llama")
    with ablate(model, draw(model)):
        with ablate(model, draw(model, seed=1)):
            pass
        with pytest.raises(ValueError, match=r"inside `with ssah\.ablate"):
            freeze(model, draw(model))
    freeze(model, draw(model)).close()


def test_a_model_converted_inside_ablate_gets_its_columns_back() -> None:
    model = build("llama")
    expected = snapshot(copy.deepcopy(model).half())
    with ablate(model, draw(model)):
        model.half()
    assert_equal(snapshot(model), expected)


def test_one_replaced_weight_does_not_keep_the_others_ablated() -> None:
    model = build("llama")
    before = snapshot(model)
    name = next(iter(find_modules(model)))
    with pytest.raises(RuntimeError, match=f"{name}.weight for one"), ablate(model, draw(model)):
        model.get_submodule(name).weight = torch.nn.Parameter(torch.zeros(0))
    after = snapshot(model)
    del before[f"{name}.weight"], after[f"{name}.weight"]
    assert_equal(after, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_a_plan_that_fails_while_it_is_made_leaves_the_model_as_it_was(
    family: str, at: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    loss_of(model).backward()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before = snapshot(model)
    state = {n: (p.requires_grad, p.grad, id(p)) for n, p in model.named_parameters()}
    made = SplitTensor.of
    calls = 0

    def of(*args: object) -> SplitTensor:
        nonlocal calls
        calls += 1
        if calls > at:
            raise torch.OutOfMemoryError("no memory left")
        return made(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SplitTensor, "of", of)
        with pytest.raises(torch.OutOfMemoryError):
            make(model, mode)
    assert calls == at + 1
    assert_equal(snapshot(model), before)
    assert plan_of(model) is None
    after = {n: (p.requires_grad, p.grad, id(p)) for n, p in model.named_parameters()}
    assert list(after) == list(state)
    for name, (trains, grad, identity) in state.items():
        assert after[name][0] == trains
        assert after[name][1] is grad
        assert after[name][2] == identity
    make(model, mode).close()  # and a plan can be made


def test_the_optimizer_of_a_closed_plan_does_not_step() -> None:
    model = build("llama")
    plan = train_only(model, draw(model))
    optimizer = plan.optimizer(lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    plan.close()
    before = snapshot(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="train under no plan in force"):
        optimizer.step()
    assert_equal(snapshot(model), before)
    second = train_only(model, draw(model))  # an equal plan, with other parameters
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="train under no plan in force"):
        optimizer.step()
    second.optimizer(lr=1e-2).step()
    second.close()


@pytest.mark.parametrize("form", ["optimizer", "optimizer_cls_and_kwargs"])
def test_small_steps_move_bfloat16_weights(form: str) -> None:
    """A step of 1e-5 on weights of 0.02 is a seventh of their last bit; it must not be lost."""
    from transformers import TrainingArguments

    lr, steps = 1e-5, 10
    model = build("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    plan = freeze(model, draw(model))
    before = [p.detach().double() for p in plan.parameters()]  # copies
    if form == "optimizer":
        optimizer = plan.optimizer(lr=lr, weight_decay=0.0)
    else:
        args = TrainingArguments("unused", learning_rate=lr, weight_decay=0.0, report_to=[])
        cls, options = plan.optimizer_cls_and_kwargs(args)
        optimizer = cls(**options)
    for _ in range(steps):
        for parameter in plan.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    now = [p.detach().double() for p in plan.parameters()]
    moved = torch.cat([(b - n).flatten() for b, n in zip(before, now, strict=True)])
    # Adam under a constant gradient moves every weight by lr a step. The mean of n unbiased
    # roundings has a standard error of at most half a last bit / sqrt(n); last bit: 2^-13 at 0.02.
    error = 3 * 0.5 * 2**-13 * steps**0.5 / len(moved) ** 0.5
    assert abs(float(moved.mean()) - lr * steps) < error
    assert error < 0.05 * lr * steps
    plan.close()


def test_a_plan_closes_on_a_model_that_was_given_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    before = snapshot(model)
    plan = freeze(model, draw(model))
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    plan.close()
    assert plan.closed
    assert_equal(snapshot(adapted.unload()), before)


def test_a_mapping_is_no_collection_of_names() -> None:
    model = build("llama")
    rows = {"model.embed_tokens.weight": [3, 7]}
    with pytest.raises(TypeError, match="extra_parameters is a mapping"):
        train_only(model, draw(model), extra_parameters=rows)
    assert plan_of(model) is None


@pytest.mark.filterwarnings("default")
def test_extra_parameters_go_by_their_old_name_for_one_release() -> None:
    model = build("llama")
    units = draw(model)
    with train_only(model, units, extra_parameters=["model.norm.weight"]) as plan:
        expected = plan.fingerprint
    with pytest.warns(DeprecationWarning, match=r"also=\) is now .*extra_parameters="):
        plan = train_only(model, units, also=["model.norm.weight"])  # type: ignore[call-arg]
    assert plan.fingerprint == expected
    plan.close()
