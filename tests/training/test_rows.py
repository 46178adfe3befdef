"""Rows of embeddings and heads that train or stay under a plan."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from plans import assert_equal, batch, check_moved, draw, loss_of, loss_on, masks, snapshot, train
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers import PreTrainedModel

from ssah.training import freeze, load_update, plan_of, train_only
from ssah.units import UnitSet

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def moved_rows(model: nn.Module, before: dict[str, Tensor], name: str) -> list[int]:
    return (model.state_dict()[name] != before[name]).any(-1).nonzero()[:, 0].tolist()


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
def test_twenty_steps_move_nothing_but_the_rows(
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
    for _ in range(20):
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


@pytest.mark.parametrize("together", [False, True], ids=["apart", "tied"])
def test_functional_call_and_gradients_of_rows(together: bool) -> None:
    """What a call lends counts in it and is not kept; ``torch.func.grad`` gives the gradients."""
    model = tied() if together else tiny_models.build("llama")
    ids = batch()["input_ids"]
    plan = train_only(model, rows={EMBEDDING: FEW})
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(ids).logits
        lent = {name: p * 0.5 for name, p in own.items()}
        assert not torch.equal(functional_call(model, lent, (ids,)).logits, before)
        assert torch.equal(model(ids).logits, before)
    found = grad(lambda given: functional_call(model, given, (ids,)).logits.square().mean())(own)
    model(ids).logits.square().mean().backward()
    for name, parameter in plan.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
