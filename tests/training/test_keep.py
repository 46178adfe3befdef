"""Parameters and rows that a plan keeps or trains beside units."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, draw, loss_of, loss_on, masks, snapshot
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.training import UpdatePlan, freeze, load_update, plan_of, train_only
from ssah.units import UnitSet

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def train(plan: UpdatePlan, steps: int = 3) -> None:
    """With weight decay, momentum and gradients left to whatever is trained."""
    optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(plan.model, seed).backward()
        optimizer.step()


def check_moved(model: nn.Module, before: dict[str, Tensor], trains: dict[str, Tensor]) -> None:
    """What does not train has every bit; something of what does has moved."""
    for name, mask in trains.items():
        now, old = model.state_dict()[name], before[name]
        assert torch.equal(now[mask == 0], old[mask == 0]), name
        assert torch.equal(now, old) != bool(mask.any()), name


def moved_rows(model: nn.Module, before: dict[str, Tensor], name: str) -> list[int]:
    return (model.state_dict()[name] != before[name]).any(-1).nonzero()[:, 0].tolist()


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
        ({"rows": {"model.norm.weight": [1]}}, ValueError, "a LlamaRMSNorm; it must be the weight"),
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


# -------------------------------------------------------------------- rows of embeddings and heads


def tied(name: str = "llama") -> PreTrainedModel:
    model = tiny_models.build(name)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def row_mask(model: nn.Module, name: str, rows: list[int], value: float) -> Tensor:
    mask = torch.full_like(model.get_parameter(name), 1 - value)
    mask[rows] = value
    return mask


# Stretches alias the weight; more than eight are gathered.
FEW, MANY = [5, 6, 7, 40], list(range(3, 60, 3))


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["stretches", "gathered"])
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
@pytest.mark.parametrize("own_units", [False, True])
@pytest.mark.parametrize("head", ["tied", "apart"])
def test_fifty_steps_move_nothing_but_the_rows(
    rows: list[int], mode: str, own_units: bool, head: str, tmp_path: Path
) -> None:
    model = tied() if head == "tied" else tiny_models.build("llama")
    units, before = (draw(model) if own_units else None), snapshot(model)
    trains = masks(model, UnitSet({}, draw(model).sizes) if units is None else units, mode)
    value = float(mode == "train_only")
    names = [EMBEDDING] if head == "tied" else [EMBEDDING, HEAD]
    given = {(HEAD if head == "tied" else EMBEDDING): rows}  # of tied weights either name
    trains[EMBEDDING] = row_mask(model, EMBEDDING, rows, value)
    if head == "apart":
        given[HEAD] = rows
        trains[HEAD] = row_mask(model, HEAD, rows, value)
    plan = {"freeze": freeze, "train_only": train_only}[mode](model, units, rows=given)
    expected = {name for name in trains if trains[name].any()}
    assert {name for name, *_ in plan.trained_slices()} == expected
    for name in names:
        own = [p for n, p, *_ in plan.trained_slices() if n == name]
        assert sum(map(len, own)) == (len(rows) if value else 128 - len(rows))
    optimizer = plan.optimizer(lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    plan.verify()
    model.save_pretrained(tmp_path / "checkpoint")
    plan.save_pretrained(tmp_path / "update")
    inputs = {**batch(), "labels": batch()["labels"]}
    logits = model(**inputs).logits
    plan.close()
    check_moved(model, before, trains)
    for name in names:
        moved = moved_rows(model, before, name)
        assert moved == (rows if value else sorted(set(moved) - set(rows)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head == "tied")
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)

    again = type(model).from_pretrained(tmp_path / "checkpoint")
    assert_equal(snapshot(again), snapshot(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (head == "tied")
    base = tied() if head == "tied" else tiny_models.build("llama")
    load_update(base, tmp_path / "update")
    assert_equal(snapshot(base), snapshot(model))


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["stretches", "gathered"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [None, 6])
def test_gradients_of_rows_are_those_of_dense_training(
    name: str, rows: list[int], padding: int | None
) -> None:
    models = [tiny_models.build(name) for _ in range(2)]
    for model in models:
        model.get_input_embeddings().padding_idx = padding
        if name == "llama":  # GPT-2 ties them itself
            model.lm_head.weight = model.model.embed_tokens.weight
    model, dense = models
    weight = EMBEDDING if name == "llama" else "transformer.wte.weight"
    plan = train_only(model, rows={weight: rows})
    inputs = batch()
    loss, expected = loss_on(model, inputs), loss_on(dense, inputs)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    grad = dense.get_parameter(weight).grad
    assert grad is not None
    for _, parameter, index, _ in plan.trained_slices():
        torch.testing.assert_close(parameter.grad, grad[index], rtol=1e-5, atol=1e-7)
    plan.close()


def test_a_lookup_has_the_gradients_of_a_whole_embedding_in_every_bit() -> None:
    model, dense = (tiny_models.build("llama") for _ in range(2))
    plan = train_only(model, rows={EMBEDDING: MANY})
    ids = torch.arange(60).repeat(2).view(4, 30)
    factors = torch.rand(4, 30, 48, generator=torch.Generator().manual_seed(0))
    for each in (model, dense):
        (each.get_input_embeddings()(ids) * factors).sum().backward()
    ((_, parameter, index, _),) = plan.trained_slices()
    grad = dense.get_parameter(EMBEDDING).grad
    assert grad is not None
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, grad[index])
    plan.close()


def test_rows_of_queries_train_too() -> None:
    model = tiny_models.build("qwen2")  # its queries have a bias, which stays
    name, before = "model.layers.0.self_attn.q_proj.weight", snapshot(model)
    plan = train_only(model, rows={name: [1, 5, 9]})
    train(plan)
    plan.verify()
    plan.close()
    trains = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    check_moved(model, before, trains | {name: row_mask(model, name, [1, 5, 9], 1.0)})


def test_tokens_that_were_added_train_alone(tmp_path: Path) -> None:
    model = tied()
    model.resize_token_embeddings(130)
    before = snapshot(model)
    plan = train_only(model, rows={EMBEDDING: range(128, 130)})
    inputs = batch()
    inputs["input_ids"][:, 2] = 129
    optimizer = plan.optimizer(lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss_on(model, inputs).backward()
        optimizer.step()
    plan.verify()
    plan.save_pretrained(tmp_path / "update")
    plan.close()
    trains = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    trains[EMBEDDING] = row_mask(model, EMBEDDING, [128, 129], 1.0)
    check_moved(model, before, trains)
    assert moved_rows(model, before, EMBEDDING) == [128, 129]
    base = tied()
    torch.manual_seed(7)
    base.resize_token_embeddings(130)  # new rows are drawn: those of the update replace them
    load_update(base, tmp_path / "update")
    assert_equal(snapshot(base), snapshot(model))


def test_a_row_that_moved_is_named() -> None:
    model = tied()
    plan = train_only(model, rows={HEAD: FEW})
    storage = plan.masked["lm_head"].split_tensors["weight"].storage
    storage[8, 0] += 1
    with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight"):
        plan.verify()
    storage[8, 0] -= 1
    plan.close()


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["stretches", "gathered"])
def test_an_ordinary_model_while_rows_train(rows: list[int]) -> None:
    model = tied()
    before, names = snapshot(model), [n for n, _ in model.named_parameters()]
    plan = train_only(model, rows={EMBEDDING: rows})
    state = model.state_dict()
    assert_equal({n: v.clone() for n, v in state.items()}, before)
    assert state[EMBEDDING].data_ptr() == state[HEAD].data_ptr()  # tied there as well
    head = model.lm_head.state_dict()
    assert torch.equal(head["weight"], before[HEAD])
    with pytest.raises(RuntimeError, match="split into trained and frozen"):
        _ = model.lm_head.weight
    twin = copy.deepcopy(model)
    train(plan_of(twin))  # type: ignore[arg-type]
    assert_equal(snapshot(model), before)
    trained = snapshot(twin)
    assert not torch.equal(trained[EMBEDDING], before[EMBEDDING])
    assert torch.equal(trained[EMBEDDING], trained[HEAD])
    model.load_state_dict(trained)
    assert_equal(snapshot(model), trained)
    model.double().float()
    assert_equal(snapshot(model), trained)
    train(plan, 1)
    plan.close()
    assert [n for n, _ in model.named_parameters()] == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
