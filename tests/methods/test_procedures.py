"""Fine-tuning in another way, against AdamW by hand in float64 on rows chosen by loops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ablatable import assert_same_bits, bits
from in_float64 import InFloat64
from plans import draw, masks
from tiny_chat import word_tokenizer
from tiny_models import build, collate, rows
from trained_by_hand import (
    Weights,
    assert_trained_alike,
    by_hand,
    loss_of_batches,
    parameters,
    without_dropout,
)
from transformers import PreTrainedModel

from ssah.data import encoded_rows, schedule
from ssah.methods import Inputs, Procedure, TrainingSetup, method, planned
from ssah.studies.training.to_loss import Recipe, train
from ssah.training import ProximalCallback, freeze
from ssah.training.finetune import make_trainer

SAFETY = encoded_rows([collate(rows((9, 7, 8, 6), seed=1))])
UTILITY = encoded_rows([collate(rows((8, 10, 7, 5, 6), seed=3))])
TASK = encoded_rows([collate(rows((6, 9, 5, 7, 8, 10, 4), seed=5))])
MODELS = ["llama", "gpt2"]  # shared key/value heads; Conv1D
LINEAR = ("Linear", "Conv1D")
LR, SIZE, STEPS = 1e-3, 2, 6


def inputs(model: PreTrainedModel) -> Inputs:
    batches = [
        [collate([(torch.tensor(r["input_ids"]), torch.tensor(r["labels"])) for r in data])]
        for data in (SAFETY, UTILITY)
    ]
    return Inputs(aligned=model, safety=batches[0], utility=batches[1])


def trained(setup: TrainingSetup, model: PreTrainedModel, steps: int = STEPS) -> Weights:
    """What `train` makes of it, by name."""
    recipe = Recipe(LR, SIZE, bf16=False, seed=4)
    with InFloat64():
        train(setup, model, word_tokenizer(), [TASK], TASK[:2], recipe, steps=steps)
    return {name: value.detach() for name, value in setup.finish().named_parameters()}


def prepared(name: str, of: str, seed: int | None, **settings: Any) -> Any:
    """A model, and the setup of a method on it or of its control."""
    model = without_dropout(name)
    before = bits(model)
    found = method(of, **settings).find(inputs(model))
    assert isinstance(found, Procedure)
    assert_same_bits(model, before)
    own = found if seed is None else found.control(seed)
    return model, own.prepare(model, 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [None, 1])
def test_refusals_are_mixed_into_the_batches(name: str, seed: int | None) -> None:
    model, setup = prepared(name, "mixed-refusals", seed, share=0.25)
    start = parameters(model)
    order = setup.order(TASK, SIZE, STEPS, 4)
    added = [i for i, row in enumerate(order) if row not in TASK]
    pool = SAFETY if seed is None else UTILITY
    assert len(added) == 0.25 * SIZE * STEPS
    assert all(order[i] in pool for i in added)
    plain = schedule([TASK], SIZE, STEPS, 4)
    expected = [row if i in added else plain[i] for i, row in enumerate(order)]
    assert order == expected
    expected = by_hand(start, loss_of_batches(copy.deepcopy(model), order, SIZE), STEPS, LR)
    assert_trained_alike(trained(setup, model), expected, start, moved=LR)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [None, 1])
def test_lisa_alternates_and_pulls(name: str, seed: int | None) -> None:
    settings = {"scale": 1.0, "safety_updates": 1, "task_updates": 3, "rho": 30.0, "start": 1 / 3}
    model, setup = prepared(name, "lisa", seed, **settings)
    start = parameters(model)
    order = setup.order(TASK, SIZE, STEPS, 4)
    pool = SAFETY if seed is None else UTILITY
    for step in range(STEPS):
        for row in order[step * SIZE : (step + 1) * SIZE]:
            assert row in (pool if step in (0, 4) else TASK)
    # Turns are 0, 1 to 3, 4 and 5; a third of 6 updates is without the pull: 0 and 1.
    anchors = [0, 1, 1, 1, 4, 5]
    loss = loss_of_batches(copy.deepcopy(model), order, SIZE)
    free = by_hand(start, loss, STEPS, LR)
    expected = by_hand(
        start, loss, STEPS, LR, pull=lambda step: (30.0 if step >= 2 else 0.0, anchors[step])
    )
    assert max(float((expected[key] - free[key]).abs().max()) for key in free) > LR / 10
    assert_trained_alike(trained(setup, model), expected, start, moved=LR)


def test_lisa_has_turns_of_one_update_at_least() -> None:
    assert method("lisa").turns == (1, 9)  # type: ignore[attr-defined]
    assert method("lisa", scale=1.0).turns == (100, 900)  # type: ignore[attr-defined]
    assert method("lisa", scale=0.001).turns == (1, 1)  # type: ignore[attr-defined]


def test_a_control_has_as_many_ordinary_rows() -> None:
    found = method("mixed-refusals", share=0.5).find(inputs(build("llama")))
    assert isinstance(found, Procedure)
    assert found.facts == {"rows": 4, "share": 0.5}
    drawn = []
    for seed in (1, 1, 2):
        order = found.control(seed).prepare(build("llama"), 0).order
        assert order is not None
        drawn.append([row for row in UTILITY if row in order(TASK, SIZE, 40, 0)])
        assert len(drawn[-1]) == 4  # of five, as many as there are refusals
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", MODELS)
def test_lora_trains_adapters_and_merges_them(name: str) -> None:
    model, setup = prepared(name, "lora", None, rank=3, lr_scale=20.0)
    start = {name: p.detach().clone() for name, p in setup.module.named_parameters()}
    adapters = {key: value for key, value in start.items() if "lora_" in key}
    turned = name == "gpt2"

    def whole(own: Weights) -> Weights:
        """The weights that the adapters make, by the names of a plain model."""
        plain = {
            key.replace("base_model.model.", "").replace("base_layer.", ""): value
            for key, value in start.items()
            if key not in adapters
        }
        for key, a in own.items():
            if "lora_A" in key:
                b = own[key.replace("lora_A", "lora_B")]
                target = key.partition(".lora_A")[0].replace("base_model.model.", "") + ".weight"
                plain[target] = plain[target] + 2 * ((b @ a).T if turned else b @ a)
        return plain

    fresh = without_dropout(name)
    before = parameters(fresh)
    adapted = {key.partition(".lora_A")[0] for key in adapters if "lora_A" in key}
    assert len(adapted) == (8 if turned else 14)  # of two layers, and none of the head
    order = schedule([TASK], SIZE, STEPS, 4)
    loss = loss_of_batches(fresh, order, SIZE)
    expected = whole(by_hand(adapters, lambda i, own: loss(i, whole(own)), STEPS, 20 * LR))
    assert_trained_alike(trained(setup, model), expected, before, moved=LR)


def test_adapters_are_drawn_by_the_seed_alone() -> None:
    found = method("lora").find(inputs(build("llama")))
    assert isinstance(found, Procedure)
    state = torch.random.get_rng_state()
    drawn = [
        {name: p for name, p in setup.module.named_parameters() if "lora_A" in name}
        for setup in (found.prepare(build("llama"), seed) for seed in (3, 3, 4))
    ]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", MODELS)
def test_the_control_of_lora_trains_as_many_single_weights(name: str) -> None:
    model, setup = prepared(name, "lora", 1, rank=3)
    assert setup.lr_scale == 1
    start = parameters(without_dropout(name))
    found = trained(setup, model, 2)
    matrices = 0
    head = model.get_output_embeddings()
    for key, before in start.items():
        moved = int((found[key] != before).sum())
        module = model.get_submodule(key.rpartition(".")[0])
        if key.endswith("bias") or module is head or type(module).__name__ not in LINEAR:
            assert moved == 0, key
        else:
            assert moved == 3 * sum(before.shape), key
            matrices += 1
    assert matrices == (8 if name == "gpt2" else 14)
    _, other = prepared(name, "lora", 2, rank=3)
    assert other.plan.selection != setup.plan.selection


@pytest.mark.parametrize("name", MODELS)
def test_the_pull_holds_under_a_plan(name: str) -> None:
    model = without_dropout(name)
    units = draw(model, 0.4)
    trains, start = masks(model, units, "freeze"), parameters(model)
    setup = planned(freeze(model, units))
    setup = TrainingSetup(
        setup.module, setup.plan, setup.finish, callbacks=(ProximalCallback(20.0),)
    )
    found = trained(setup, model)
    order = schedule([TASK], SIZE, STEPS, 4)
    loss = loss_of_batches(without_dropout(name), order, SIZE)
    expected = by_hand(start, loss, STEPS, LR, pull=lambda step: (20.0, 0), trains=trains)
    assert_trained_alike(found, expected, start, moved=LR)
    for key, mask in trains.items():
        assert torch.equal(found[key][mask == 0], start[key][mask == 0]), key


def test_the_pull_is_as_strong_where_gradients_are_accumulated(tmp_path: Path) -> None:
    found = []
    for size, passes in ((2, 1), (1, 2)):
        model = without_dropout("llama")
        with InFloat64():
            make_trainer(
                model, TASK[:6], word_tokenizer(), tmp_path, callbacks=[ProximalCallback(30.0)],
                in_order=True, learning_rate=LR, lr_scheduler_type="constant", max_steps=3,
                per_device_train_batch_size=size, gradient_accumulation_steps=passes,
            ).train()  # fmt: skip
        found.append(parameters(model))
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=0, atol=1e-8)
        assert not found[0][key].requires_grad


def test_the_pull_reaches_an_optimiser_that_steps_in_the_backward_pass(tmp_path: Path) -> None:
    found = []
    for in_backward in (False, True):
        model = without_dropout("llama")
        with freeze(model, draw(model, 0.4)) as plan, InFloat64():
            make_trainer(
                model, TASK[:6], word_tokenizer(), tmp_path, plan=plan, max_steps=3,
                optimizer_options={"in_backward": in_backward}, in_order=True, max_grad_norm=0.0,
                callbacks=[ProximalCallback(30.0)], learning_rate=LR,
                per_device_train_batch_size=2,
            ).train()  # fmt: skip
        found.append(parameters(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_pull_is_refused_where_gradients_are_scaled(tmp_path: Path) -> None:
    model = build("llama")
    trainer = make_trainer(model, TASK[:2], word_tokenizer(), tmp_path, max_steps=1)
    callback = ProximalCallback(1.0)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="fp16 is True; it must be False with ProximalCallback"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
