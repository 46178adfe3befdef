"""The one set-up of Trainer: quiet, on one device, in one process, with the plan's optimiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from plans import draw
from tiny_chat import word_tokenizer

from ssah.compat.trainer import TrainingArguments
from ssah.data import Encoded
from ssah.training import train_only
from ssah.training.finetune import make_trainer

ROWS: list[Encoded] = [
    {"input_ids": list(range(3, 3 + n)), "labels": [-100, *range(4, 3 + n)]} for n in (4, 7, 5, 6)
]


def test_what_trains_is_the_plans_and_nothing_is_written_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.build("llama")
    out = tmp_path / "scratch"
    with train_only(model, draw(model)) as plan:
        before = [p.detach().clone() for p in plan.parameters()]
        trainer = make_trainer(
            model,
            ROWS,
            word_tokenizer(),
            out,
            plan=plan,
            learning_rate=1e-2,
            max_steps=2,
            per_device_train_batch_size=2,
        )
        trainer.train()
        assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
            id(p) for p in plan.parameters()
        }
        moved = [not torch.equal(a, b) for a, b in zip(before, plan.parameters(), strict=True)]
        assert all(moved)
        plan.verify()
    assert not list(out.glob("*"))
    assert capsys.readouterr().out == ""


def test_rows_in_order_and_masks_left_out(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    batches = {
        drop: list(
            make_trainer(
                model,
                ROWS,
                word_tokenizer(),
                tmp_path,
                drop_mask=drop,
                in_order=True,
                per_device_train_batch_size=2,
            ).get_train_dataloader()
        )
        for drop in (False, True)
    }
    assert [batch["input_ids"].shape for batch in batches[True]] == [(2, 7), (2, 6)]
    for with_mask, without in zip(batches[False], batches[True], strict=True):
        assert with_mask.keys() - without.keys() == {"attention_mask"}
        assert torch.equal(with_mask["input_ids"], without["input_ids"])
        losses = [model(**batch).loss.detach() for batch in (with_mask, without)]
        assert torch.allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("world_size", 2, "WORLD_SIZE is 2; this command runs in one process"),
        ("device", torch.device("cuda", 1), "device is cpu; transformers trains on cuda:1 here"),
    ],
)
def test_several_processes_and_another_device_are_refused(
    name: str, value: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("llama")
    monkeypatch.setattr(TrainingArguments, name, property(lambda self: value))
    with pytest.raises(ValueError, match=message):
        make_trainer(model, ROWS, word_tokenizer(), tmp_path)
