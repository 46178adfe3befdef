"""Plans under ``transformers.Trainer`` and TRL's ``SFTTrainer``."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_models
import torch
from plans import assert_equal, draw, masks, snapshot
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ssah.models import load_model
from ssah.training import ImportanceCallback, UpdatePlan, freeze, train_only

Rows = list[dict[str, Tensor]]


def rows(n: int = 12) -> Rows:
    data = tiny_models.rows((9,) * n)
    return [{"input_ids": ids, "labels": labels} for ids, labels in data]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def build_trainer(plan: UpdatePlan, args: TrainingArguments, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", None)
    return Trainer(
        plan.model,
        args,
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=plan.optimizer_cls_and_kwargs(args, **options),
    )


def test_trainer_resumes_bit_for_bit_and_refuses_other_units(tmp_path: Path) -> None:
    model = tiny_models.build("llama_bias")
    before, units = snapshot(model), draw(model)
    plan = freeze(model, units)
    trainer = build_trainer(plan, arguments(tmp_path))
    trainer.train()
    plan.verify()
    wanted = snapshot(model)
    assert any(not torch.equal(wanted[name], before[name]) for name in before)
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    plain = Trainer(tiny_models.build("llama_bias"), arguments(tmp_path))
    decayed = plain.get_decay_parameter_names(plain.model)
    ours = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter, _, _ in plan.trained_slices():
        assert (name in decayed) == (id(parameter) in ours), name

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert_equal(snapshot(saved), wanted)

    resumed = tiny_models.build("llama_bias")
    again = freeze(resumed, units)
    build_trainer(again, arguments(tmp_path)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    again.verify()
    assert_equal(snapshot(resumed), wanted)

    base = tiny_models.build("llama_bias")
    other = freeze(base, draw(base, seed=9))
    with pytest.raises(ValueError, match="another plan"):
        build_trainer(other, arguments(tmp_path)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_updates_in_the_backward_pass_under_trainer(tmp_path: Path) -> None:
    states = []
    for in_backward in (False, True):
        model = tiny_models.build("llama")
        plan = freeze(model, draw(model))
        args = arguments(tmp_path / str(in_backward), max_grad_norm=0)
        trainer = build_trainer(plan, args, in_backward=in_backward)
        trainer.train()
        states.append(snapshot(model))
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert (max(norms) == 0) == in_backward  # no gradient is there any more
    assert_equal(states[1], states[0])
    resumed = tiny_models.build("llama")
    plan = freeze(resumed, draw(resumed))
    build_trainer(plan, args, in_backward=True).train(
        resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-3")
    )
    assert_equal(snapshot(resumed), states[0])
    optimizer, _ = plan.optimizers(args, in_backward=True)
    assert optimizer.in_backward


@pytest.mark.parametrize(
    "wrong",
    [{"gradient_accumulation_steps": 2}, {"max_grad_norm": 1.0}, {"fp16": True}, {"world_size": 2}],
)
def test_arguments_that_need_gradients_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    args = argparse.Namespace(**(vars(arguments(tmp_path, max_grad_norm=0)) | wrong))
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"args\.{name} is {value}, must be .*in_backward=True"):
        plan.optimizers(args, in_backward=True)
    plan.optimizers(args)


def test_importance_is_logged(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    units = draw(model)
    plan = train_only(model, units)
    callback = ImportanceCallback(plan, {"mine": units})
    args = arguments(tmp_path, save_strategy="no", gradient_checkpointing=True)
    trainer = build_trainer(plan, args, track_importance=True, callbacks=[callback])
    trainer.train()
    logged = [entry["importance/mine"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6
    assert all(value > 0 for value in logged)
    signed = plan.importance().signed
    mean = torch.cat([signed[name][index].abs() for name, index in units.items()]).mean()
    assert trainer.state.log_history[-1]["importance/mine"] == pytest.approx(float(mean))
    plan.verify()


class Restore(TrainerCallback):
    """Dense training whose frozen entries are put back after every step."""

    def __init__(self, model: PreTrainedModel, trains: dict[str, Tensor]) -> None:
        self.trains = trains
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            parameter.grad.mul_(self.trains[name])

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            parameter.copy_(torch.where(self.trains[name] == 1, parameter, self.start[name]))


def test_evaluation_loss_is_that_of_dense_masked_training(tmp_path: Path) -> None:
    model = tiny_models.build("qwen2")
    dense = copy.deepcopy(model)
    units = draw(model)
    # Clipping would see other gradients: dense training clips before it masks.
    args = arguments(tmp_path, save_strategy="no", max_grad_norm=0.0)
    restore = Restore(dense, masks(model, units, "freeze"))
    plan = freeze(model, units)
    ours = build_trainer(plan, args)
    ours.train()
    theirs = Trainer(dense, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[restore])
    theirs.train()
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-3)
    plan.verify()


def sft(
    model: PreTrainedModel,
    plan: UpdatePlan | None,
    tokenizer: Any,
    texts: Iterable[str],
    **options: Any,
) -> Any:
    """An SFTTrainer; of the whole model where there is no plan."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    callbacks = options.pop("callbacks", None)
    defaults: dict[str, Any] = {
        "max_length": 16,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": False,
    }
    args = SFTConfig(**{**defaults, **options})
    return SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=plan and plan.optimizer_cls_and_kwargs(args),
    )


def logged_losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trainer_ends_where_dense_masked_training_ends(tmp_path: Path) -> None:
    model = tiny_models.build("llama", dtype=torch.float64)
    dense, units = copy.deepcopy(model), draw(model)
    before, trains = snapshot(model), masks(model, units, "train_only")
    restore = Restore(dense, trains)
    plan = train_only(model, units)
    texts = [f"w{3 + i} w{9 + i} w{20 + i} w{7 + i}" for i in range(8)]
    # Clipping would see other gradients: dense training clips before it masks.
    options: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
    }
    ours = sft(model, plan, tiny_chat.word_tokenizer(), texts, **options)
    theirs = sft(dense, None, tiny_chat.word_tokenizer(), texts, callbacks=[restore], **options)
    for trainer in (ours, theirs):
        trainer.train()
    plan.verify()
    assert logged_losses(ours) == pytest.approx(logged_losses(theirs), rel=1e-9)
    for name, expected in snapshot(dense).items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-9, atol=1e-12)
        moved = expected != before[name]
        assert moved.any() == trains[name].any()


# ------------------------------------------------------------------------------ real weights


SENTENCES = (
    "The river rises in the hills and runs for two hundred miles to the sea.",
    "A loaf needs flour, water, salt and time; the oven does the rest.",
    "When the bell rang the children ran outside to look at the snow.",
    "Light takes about eight minutes to travel from the sun to the earth.",
)


@pytest.mark.exhaustive  # tiny models do, above
@pytest.mark.real
def test_real_model_ends_where_dense_masked_training_ends(smollm2: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(smollm2))
    data = []
    for sentence in SENTENCES:
        ids = torch.tensor(tokenizer(sentence).input_ids[:12])
        data.append({"input_ids": ids, "labels": ids.clone()})
    dense = copy.deepcopy(model)
    units = draw(model, 0.075)
    restore = Restore(dense, masks(model, units, "freeze"))
    plan = freeze(model, units)
    args = arguments(
        tmp_path, save_strategy="no", max_grad_norm=0.0, learning_rate=2e-5, max_steps=2
    )
    losses = []
    for each, callbacks in ((model, None), (dense, [restore])):
        optimizer = plan.optimizer_cls_and_kwargs(args) if each is model else None
        trainer = Trainer(
            each,
            args,
            train_dataset=data,
            eval_dataset=data,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer,
        )
        if each is model:
            losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    start, ours, theirs = losses
    assert ours < start
    # A difference far below what training itself changed.
    assert abs(ours - theirs) < 0.02 * (start - ours)
    plan.verify()


@pytest.mark.exhaustive
@pytest.mark.real
def test_real_model_under_sft_trainer(smollm2: Path, tmp_path: Path) -> None:
    """The first loss is that of the model as it was, and training lowers it."""
    model, tokenizer = load_model(str(smollm2))
    plan = train_only(model, draw(model, 0.1))
    trainer = sft(
        model,
        plan,
        tokenizer,
        SENTENCES,
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=len(SENTENCES),
        learning_rate=1e-4,
    )
    total, n = 0.0, 0
    for row in trainer.train_dataset:
        ids = torch.tensor(row["input_ids"][: trainer.args.max_length])  # some releases cut later
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        n += len(ids) - 1
    trainer.train()
    plan.verify()
    first, second = logged_losses(trainer)
    assert first == pytest.approx(total / n, rel=1e-5)  # in float32, in another order
    assert second < first
