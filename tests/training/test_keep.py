"""Parameters and rows that a plan keeps or trains beside units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from plans import assert_equal, check_moved, draw, loss_of, masks, snapshot, train

from ssah.training import freeze, load_update, plan_of, train_only

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# -------------------------------------------------------------- what did not train before


def test_what_required_no_gradient_stays_and_is_verified() -> None:
    model = tiny_models.build("llama")
    units, before = draw(model), snapshot(model)
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.norm.weight",
    ]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    trains = masks(model, units, "freeze")
    trains.update((name, torch.zeros_like(trains[name])) for name in names)
    plan = freeze(model, units)
    assert set(names) <= set(plan.digests)
    train(plan)
    plan.verify()
    model.get_parameter("model.norm.weight").data[3] += 1
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        plan.verify()
    model.get_parameter("model.norm.weight").data[3] = before["model.norm.weight"][3]
    plan.close()
    check_moved(model, before, trains)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == names


def test_unfreeze_trains_it_as_well() -> None:
    model = tiny_models.build("llama")
    units, before = draw(model), snapshot(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*unfreeze=True"):
        freeze(model, units)
    assert plan_of(model) is None
    plan = freeze(model, units, unfreeze=True)
    train(plan)
    plan.verify()
    plan.close()
    check_moved(model, before, masks(model, units, "freeze"))
    assert not any(p.requires_grad for p in model.parameters())


def test_train_only_trains_what_it_is_given() -> None:
    model = tiny_models.build("llama")
    units, before = draw(model), snapshot(model)
    model.requires_grad_(False)
    plan = train_only(model, units)
    train(plan)
    plan.close()
    check_moved(model, before, masks(model, units, "train_only"))


def test_adapters_go_on_training_alone() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_models.build("llama")
    units, before = draw(model), snapshot(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    plan = freeze(adapted.get_base_model(), units)
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained
    train(plan)
    plan.verify()
    plan.close()
    assert any(bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name)
    assert_equal(snapshot(adapted.unload()), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi3", "opt"])
def test_names_and_patterns_are_kept_whole(name: str) -> None:
    model = tiny_models.build(name)
    units, before = draw(model), snapshot(model)
    trains = masks(model, units, "freeze")
    patterns = {
        "gpt2": ["*ln_*", "transformer.h.0.mlp.c_fc.weight", "*c_attn.bias"],
        "mixtral": ["*norm*", "model.layers.0.mlp.experts.*"],
        "phi3": ["*norm*", "*layers.1.mlp.down_proj.weight"],
        "opt": ["*bias", "*embed*"],
    }.get(name, ["*norm*", HEAD, "*v_proj*", "*layers.0.mlp.up_proj*"])
    kept = {n for n in trains if any(_matches(n, pattern) for pattern in patterns)}
    assert kept
    trains.update((n, torch.zeros_like(trains[n])) for n in kept)
    plan = freeze(model, units, keep=patterns)
    assert kept <= set(plan.digests)
    before_plan = loss_of(model).item()
    train(plan)
    plan.verify()
    assert loss_of(model).item() != before_plan
    plan.close()
    check_moved(model, before, trains)


def _matches(name: str, pattern: str) -> bool:
    """Whether all pieces between the stars are in the name, in their order."""
    first, *rest = pattern.split("*")
    if not name.startswith(first):
        return False
    place = len(first)
    for piece in rest:
        place = name.rfind(piece) if piece is rest[-1] and piece else name.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return place == len(name) or pattern.endswith("*")


def test_the_same_gradients_as_dense_training_with_parts_kept() -> None:
    model, dense = (tiny_models.build("llama") for _ in range(2))
    units = draw(model)
    loss_of(dense).backward()
    plan = freeze(model, units, keep=["*gate_proj*", "*v_proj*"])
    loss_of(model).backward()
    for each, parameter in plan.named_parameters():
        assert parameter.grad is not None, each
    for name, parameter, index, _ in plan.trained_slices():
        expected = dense.get_parameter(name).grad
        assert expected is not None
        dim = 1 if "down_proj" in name or "o_proj" in name else 0
        if parameter.shape != expected.shape:
            expected = expected.movedim(dim, 0)[index]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert not any("gate_proj" in name for name, _ in plan.named_parameters())
    plan.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": ["*nrom*"]}, ValueError, r"keep has names that the model lacks: \*nrom\*"),
        ({"keep": "*norm*"}, TypeError, "keep is a string, must be a collection"),
        ({"keep": True}, TypeError, "keep is a bool, must be a collection"),
        ({"keep": ["*"]}, ValueError, "nothing to train.*stay frozen whole"),
        ({"rows": [5]}, TypeError, "rows is a list, must be a mapping"),
        ({"rows": {"embed": [5]}}, ValueError, "rows has names that the model lacks: embed;"),
        ({"rows": {HEAD: [128]}}, ValueError, r"rows has 128 for .*from 0 to 127"),
        ({"rows": {HEAD: [-1]}}, ValueError, r"rows has -1 for .*from 0 to 127"),
        ({"rows": {HEAD: []}}, ValueError, r"rows has 'no row' for"),
        ({"rows": {HEAD: [1.5]}}, ValueError, r"rows has 1.5 for"),
        ({"rows": {HEAD: 5}}, TypeError, "rows has 5 for .*list of row numbers"),
        ({"rows": {HEAD: torch.ones(128) > 0}}, TypeError, r"mask.nonzero\(\)"),
        (
            {"rows": {"model.layers.0.mlp.up_proj.weight": [1]}},
            ValueError,
            "of which units own entries",
        ),
    ],
)
def test_wrong_names_and_rows_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_models.build("llama")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        freeze(model, draw(model), **options)
    assert plan_of(model) is None
    assert_equal(snapshot(model), before)


def test_none_needs_something_else_and_names_are_given_once() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(TypeError, match=r"units is None.*keep= or rows="):
        freeze(model)
    with pytest.raises(TypeError, match=r"units is None.*extra_parameters= or rows="):
        train_only(model)
    with pytest.raises(ValueError, match="extra_parameters trains whole"):
        train_only(model, extra_parameters=[HEAD], rows={HEAD: [3]})
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="twice: it is tied"):
        train_only(model, rows={HEAD: [3], EMBEDDING: [3]})
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        train_only(model, rows={HEAD: [3]})
    assert plan_of(model) is None


def test_a_part_of_split_experts_is_not_kept() -> None:
    model = tiny_models.build("mixtral")
    with pytest.raises(
        ValueError, match=r"keep \(or requires_grad=False\) has .*down_proj.*none of"
    ):
        freeze(model, draw(model), keep=["model.layers.0.mlp.experts.down_proj"])
    assert plan_of(model) is None


def test_an_update_is_merged_where_a_whole_b_stayed(tmp_path: Path) -> None:
    """Its columns lie in the plan's order meanwhile, as the channels do that enter it."""
    model, base = (tiny_models.build("llama") for _ in range(2))
    plan = freeze(model, draw(model), keep=["*down_proj.weight"])
    train(plan)
    plan.save_pretrained(tmp_path)
    plan.verify()
    plan.close()
    load_update(base, tmp_path)
    assert_equal(snapshot(base), snapshot(model))
