"""TRL's trainers under a plan, and with a protected adapter that they make themselves.

What moved is judged by a mask made from the modules alone (``plans.masks``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import trl_trainers
from plans import draw, make, masks, snapshot

import ssah
from ssah.training import AdapterCallback, PlanCallback

pytest.importorskip("trl")


def kinds(*every_time: str) -> list[Any]:
    """All of them; those that are not named are exhaustive."""
    return [
        kind if kind in every_time else pytest.param(kind, marks=pytest.mark.exhaustive)
        for kind in trl_trainers.KINDS
    ]


@pytest.mark.parametrize("kind", kinds("grpo", "online_dpo", "kto"))
def test_each_takes_its_optimiser_from_its_arguments(kind: str, tmp_path: Path) -> None:
    model = trl_trainers.build_model(kind)
    mode = "train_only" if kind == "kto" else "freeze"
    units, before = draw(model), snapshot(model)
    trains = masks(model, units, mode)
    plan = make(model, mode, units)
    trainer = trl_trainers.make(
        kind,
        model,
        tmp_path,
        optimizers=plan.optimizers,
        given={"callbacks": [PlanCallback(plan, tmp_path / "update")]},
    )
    groups: list[dict[str, Any]] = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups} == {1e-2}
    assert {group["betas"] for group in groups} == {(0.8, 0.999)}
    decays = {name for name, mask in trains.items() if mask.any() and mask.dim() > 1}
    assert sum(len(g["params"]) for g in groups if g["weight_decay"] == 0.1) == len(decays)
    trainer.train()
    assert plan.closed
    now = snapshot(model)
    for name, mask in trains.items():
        still = mask == 0
        assert now[name][still].equal(before[name][still]), name
        assert now[name].equal(before[name]) != bool(mask.any()), name
    base = trl_trainers.build_model(kind)
    base.load_state_dict(before)
    ssah.load_update(base, tmp_path / "update")
    for name, value in base.state_dict().items():
        assert value.equal(now[name]), name


@pytest.mark.parametrize("kind", kinds("grpo"))
def test_each_protects_the_adapter_that_it_makes(kind: str, tmp_path: Path) -> None:
    model = trl_trainers.build_model(kind)
    units, base = draw(model, 0.2), copy.deepcopy(model)
    before = snapshot(base)
    kept = masks(base, units, "train_only")  # 1 where a unit owns the entry
    callback = AdapterCallback(units)
    trainer = trl_trainers.make(
        kind,
        model,
        tmp_path,
        given={
            "callbacks": [callback],
            "peft_config": peft.LoraConfig(
                r=4,
                target_modules=["gate_proj", "up_proj", "down_proj", "v_proj", "o_proj"],
                task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM",
            ),
        },
    )
    trainer.train()
    assert callback.protected is not None
    now = trainer.model.merge_and_unload().state_dict()
    moved = 0
    for name, mask in kept.items():
        if any(part in name for part in ("mlp", "v_proj", "o_proj")):
            assert now[name][mask == 1].equal(before[name][mask == 1]), name
            moved += int(now[name].ne(before[name]).sum())
    assert moved
