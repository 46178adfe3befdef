"""What a plan takes from the arguments of trainers, and TRL's trainers that take ``optimizers=``.

What moved is judged by a mask made from the modules alone (``plans.masks``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat
import tiny_models
import torch
from plans import assert_equal, draw, loss_of, masks, snapshot
from torch import nn

from ssah.training import freeze


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward()
    optimizer.step()


def arguments(**options: Any) -> Any:
    values = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "optim": "adamw_torch"}
    return SimpleNamespace(**{"learning_rate": 1e-2, "weight_decay": 0.1} | values | options)


def test_optimizers_for_trl_take_the_arguments() -> None:
    model = tiny_models.build("llama")
    dense = copy.deepcopy(model)
    trains, before = masks(model, draw(model), "freeze"), snapshot(model)
    plan = freeze(model, draw(model))
    optimizer, schedule = plan.optimizers(arguments(), state_dtype=torch.float32)
    assert schedule is None
    for p in dense.parameters():
        p.requires_grad_(True)
    decays = [p for p in dense.parameters() if p.dim() > 1]
    others = [p for p in dense.parameters() if p.dim() == 1]
    theirs = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    step(model, optimizer)
    step(dense, theirs)
    now, wanted = model.state_dict(), dense.state_dict()
    for name, mask in trains.items():
        expected = torch.where(mask == 1, wanted[name], before[name])
        torch.testing.assert_close(now[name], expected, rtol=1e-4, atol=2e-5)
    assert plan._installed.last_optimizer is not None


@pytest.mark.parametrize(
    "options", [{"optim": "adamw_8bit"}, {"optim": "sgd"}, {"optim_args": "rank=8"}]
)
def test_an_optimiser_that_would_be_passed_over_is_refused(options: dict[str, str]) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    for take in (plan.optimizers, plan.optimizer_cls_and_kwargs):
        with pytest.raises(ValueError, match=f"{next(iter(options))} .*its own will hold"):
            take(arguments(**options))
        take(arguments())


@pytest.mark.parametrize("sync", [False, True])
def test_dpo_trains_what_the_plan_trains(sync: bool, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = tiny_models.build("llama")
    trains, before = masks(model, draw(model), "freeze"), snapshot(model)
    plan = freeze(model, draw(model))
    reference = copy.deepcopy(model)
    args = DPOConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        bf16=False,
        logging_steps=1,
        sync_ref_model=sync,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    rows = [
        {"prompt": "w3 w4", "chosen": f" w{9 + i} w7", "rejected": f" w{20 + i} w8"}
        for i in range(8)
    ]
    optimizers = plan.optimizers(args)
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_chat.word_tokenizer(),
        optimizers=optimizers,
    )
    trainer.train()
    now = model.state_dict()
    for name, mask in trains.items():
        assert torch.equal(now[name][mask == 0], before[name][mask == 0]), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)  # ln 2: both models are one
    for name, value in reference.state_dict().items():
        assert torch.equal(value, now[name] if sync else before[name]), name
    assert sync or losses[2] < losses[0]
    assert all(each["initial_lr"] == args.learning_rate for each in optimizers[0].param_groups)


@pytest.mark.parametrize(("name", "twin_will_do"), [("use_vllm", False), ("sync_ref_model", True)])
def test_what_reads_whole_weights_waits_for_a_prepared_trainer(
    name: str, twin_will_do: bool
) -> None:
    model = tiny_models.build("llama")
    plan = freeze(model, draw(model))
    before = snapshot(model)
    optimizer, _ = plan.optimizers(arguments(**{name: True}))
    with pytest.raises(RuntimeError, match=rf"args\.{name} is True.*prepare_trainer"):
        step(model, optimizer)
    assert_equal(snapshot(model), before)
    twin = copy.deepcopy(model)  # a reference with the same slices
    if twin_will_do:
        step(model, optimizer)
    else:
        with pytest.raises(RuntimeError, match="prepare_trainer"):
            step(model, optimizer)
    del twin
