"""The callback that verifies, saves and closes; and rows of embeddings under a Trainer."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_models
import torch
from plans import assert_equal, draw, masks, snapshot
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ssah.training import PlanCallback, UpdatePlan, freeze, load_update, train_only

EMBEDDING = "model.embed_tokens.weight"


def trainer_of(plan: UpdatePlan, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), **{**defaults, **options})
    data = tiny_models.rows((9,) * 12)
    return Trainer(
        plan.model,
        args,
        train_dataset=[{"input_ids": ids, "labels": labels} for ids, labels in data],
        eval_dataset=[{"input_ids": ids, "labels": labels} for ids, labels in data[:4]],
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=plan.optimizer_cls_and_kwargs(args),
    )


def test_it_verifies_saves_and_closes(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    units, before = draw(model), snapshot(model)
    trains = masks(model, units, "freeze")
    plan = freeze(model, units)
    trainer = trainer_of(plan, tmp_path / "run", PlanCallback(plan, tmp_path / "update"))
    trainer.train()
    assert plan.closed
    after = snapshot(model)
    for name, mask in trains.items():
        assert torch.equal(after[name][mask == 0], before[name][mask == 0]), name
        assert not torch.equal(after[name], before[name]), name
    base = tiny_models.build("llama")
    load_update(base, tmp_path / "update")
    assert_equal(snapshot(base), after)
    trainer.evaluate()  # an ordinary model
    with pytest.raises(RuntimeError, match="the plan is closed"):
        trainer.train()


def test_the_update_is_that_of_the_best_checkpoint(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, draw(model))
    trainer = trainer_of(
        plan,
        tmp_path / "run",
        PlanCallback(plan, tmp_path / "update"),
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.3,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    base = tiny_models.build("llama")
    load_update(base, tmp_path / "update")
    assert_equal(snapshot(base), snapshot(best))


class Meddling(TrainerCallback):
    """Writes to a frozen weight at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            kwargs["model"].model.norm.weight.data[3] += 1


@pytest.mark.parametrize(("at", "reached"), [(1, 2), (3, 4)])
def test_a_moved_weight_ends_the_run_at_the_next_save(
    at: int, reached: int, tmp_path: Path
) -> None:
    model = tiny_models.build("llama")
    plan = train_only(model, draw(model))
    callback = PlanCallback(plan, tmp_path / "update")
    options = {} if at == 1 else {"save_strategy": "no"}  # at the end as well
    trainer = trainer_of(plan, tmp_path / "run", Meddling(at), callback, **options)
    with pytest.raises(RuntimeError, match=r"frozen entries of model\.norm\.weight"):
        trainer.train()
    assert trainer.state.global_step == reached
    assert not (tmp_path / "update").exists()
    assert not plan.closed


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    one, two = (tiny_models.build("llama") for _ in range(2))
    plans = [train_only(each, draw(each)) for each in (one, two)]
    trainer = trainer_of(plans[0], tmp_path, PlanCallback(plans[1]))
    with pytest.raises(RuntimeError, match="the plan of another model"):
        trainer.train()


@pytest.mark.parametrize(
    "rows", [[5, 6, 40], pytest.param(list(range(1, 128, 2)), marks=pytest.mark.exhaustive)]
)
def test_rows_of_a_tied_embedding_resume_bit_for_bit(rows: list[int], tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool | None = None) -> dict[str, torch.Tensor]:
        model = tiny_models.build("llama")
        model.config.tie_word_embeddings = True
        model.tie_weights()
        plan = train_only(model, draw(model), rows={EMBEDDING: rows})
        trainer = trainer_of(plan, folder, PlanCallback(plan), max_steps=steps)
        trainer.train(resume_from_checkpoint=resume)
        return snapshot(model)

    whole = run(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert_equal(run(tmp_path / "run", 4, resume=True), whole)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert_equal(snapshot(again), whole)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_dpo_trainer_needs_no_second_model(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = [(f"w{3 + i} w{9 + i}", f" w{20 + i}", f" w{7 + i}") for i in range(8)]
    keys = ("prompt", "chosen", "rejected")

    def run(second: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = tiny_models.build("llama")
        plan = train_only(model, draw(model))
        args = DPOConfig(
            str(tmp_path / f"{second}"),
            max_steps=3,
            per_device_train_batch_size=2,
            precompute_ref_log_probs=not second,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = DPOTrainer(
            model,
            ref_model=copy.deepcopy(model) if second else None,
            args=args,
            train_dataset=Dataset.from_list([dict(zip(keys, each, strict=True)) for each in words]),
            processing_class=tiny_chat.word_tokenizer(),
            optimizers=(plan.optimizer(lr=1e-2), None),
            callbacks=[PlanCallback(plan, tmp_path / f"update-{second}")],
        )
        trainer.train()
        assert plan.closed
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, snapshot(model)

    (losses, weights), (expected, theirs) = run(False), run(True)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) == 3
    for name, value in weights.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    base = tiny_models.build("llama")
    load_update(base, tmp_path / "update-False")
    assert_equal(snapshot(base), weights)
