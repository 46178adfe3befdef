"""Logits of wanted positions and shared beginnings, against passes over whole rows, one by one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import tiny_chat
import torch
from in_float64 import InFloat64
from tiny_models import build

from ssah.evaluation import generate, refusal_margins, utility_loss
from ssah.evaluation.measures import Predictions, logits_at
from ssah.evaluation.measures.margin import opened
from ssah.interventions import Add, ablate, arms, intervene
from ssah.units import UnitSet, find_modules

BEGIN = list(range(20, 31))  # 11 tokens, which all rows begin with


def batch(lengths, seed=0, begin=BEGIN):
    """Right-padded rows, their mask, and the positions wanted of each: the last two."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), len(begin) + max(lengths), dtype=torch.int64)
    mask, where = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        n = len(begin) + length
        ids[row, :n] = torch.tensor(
            [*begin, *torch.randint(3, 120, (length,), generator=generator)]
        )
        mask[row, :n], where[row, n - 2 : n] = 1, True
    return {"input_ids": ids, "attention_mask": mask}, where


def whole(model, inputs, where):
    """Logits of each row by itself, all positions, without padding: ``[n, vocabulary]``."""
    rows = []
    for ids, mask, wanted in zip(inputs["input_ids"], inputs["attention_mask"], where, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[mask.bool()][None], use_cache=False).logits[0]
        rows.append(logits[wanted[mask.bool()]])
    return torch.cat(rows)


@contextmanager
def tokens_run(model):
    """Shapes ``(rows, tokens)`` of what is embedded inside."""
    passes = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: passes.append(tuple(args[0].shape))
    )
    yield passes
    hook.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "gemma3", "qwen3_next"])
def test_logits_are_those_of_whole_rows(name):
    model = build(name).double().eval()
    predictions = Predictions(model)
    with tokens_run(model) as passes, InFloat64():
        for seed, lengths in enumerate([(5, 9, 4), (6, 6), (7,)]):
            inputs, where = batch(lengths, seed)
            found = predictions(inputs, where)
            exact = whole(model, inputs, where)
            assert torch.allclose(found, exact, rtol=0, atol=1e-10)
            assert torch.allclose(logits_at(model, inputs, where), exact, rtol=0, atol=1e-10)
    rest = [shape for shape in passes if shape[0] > 1]
    if name in ("llama", "gpt2", "bloom"):
        # The beginning is run once for both batches; `logits_at` always runs whole rows.
        assert passes[0] == (1, 11)
        assert rest == [(3, 9), (3, 20), (2, 6), (2, 17)]
    else:  # a window or a running state
        assert rest == [(3, 20), (3, 20), (2, 17), (2, 17)]


def test_the_projection_is_given_the_wanted_positions_alone():
    model = build("llama")
    inputs, where = batch((5, 9, 4))
    given = []
    model.lm_head.register_forward_hook(lambda _, args, out: given.append(tuple(out.shape)))
    logits_at(model, inputs, where)
    assert given == [(1, 6, model.config.vocab_size)]


def test_what_all_rows_begin_with_and_predict_is_no_beginning():
    model = build("llama").double()
    inputs, where = batch((5, 9, 4))
    where[1, 4] = True  # predicts a token of what is alike
    with tokens_run(model) as passes:
        found = Predictions(model)(inputs, where)
    assert passes == [(3, 20)]  # four tokens are not worth a pass
    assert torch.allclose(found, whole(model, inputs, where), rtol=0, atol=1e-10)


def test_another_beginning_is_run_anew():
    model = build("llama").double()
    predictions = Predictions(model)
    for begin in (BEGIN, [*BEGIN, 7, 8], list(range(40, 52))):
        inputs, where = batch((5, 8), begin=begin)
        found = predictions(inputs, where)
        assert torch.allclose(found, whole(model, inputs, where), rtol=0, atol=1e-10)


@pytest.mark.parametrize("at", ["last", 3, "all"])
def test_changes_at_some_positions_see_whole_rows(at):
    model = build("llama").double()
    inputs, where = batch((5, 9, 4))
    change = Add(0, torch.ones(model.config.hidden_size, dtype=torch.float64), at=at)
    with intervene(model, change), tokens_run(model) as passes:
        found = Predictions(model)(inputs, where)
        assert passes == ([(1, 11), (3, 9)] if at == "all" else [(3, 20)])
        exact = whole(model, inputs, where)
    assert torch.allclose(found, exact, rtol=0, atol=1e-10)
    plain = whole(model, inputs, where)
    assert not torch.allclose(exact, plain, atol=1e-3)


def test_rows_of_several_arms_are_run_whole_and_of_one_arm_in_parts():
    model = build("llama").double()
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    units = UnitSet.random(sum(sizes.values()) // 3, sizes, seed=1)
    inputs, where = batch((5, 9, 4))
    with ablate(model, units):
        without = whole(model, inputs, where)
    exact = whole(model, inputs, where)
    with arms(model, [None, units]) as run, tokens_run(model) as passes:
        run.assign([1, 0, 1])
        found = Predictions(model)(inputs, where)
        assert passes == [(3, 20)]
        mixed = torch.where(torch.tensor([1, 1, 0, 0, 1, 1])[:, None] == 1, without, exact)
        assert torch.allclose(found, mixed, rtol=0, atol=1e-10)
        passes.clear()
        run.assign(1)  # all rows, however many a batch has
        assert torch.allclose(Predictions(model)(inputs, where), without, rtol=0, atol=1e-10)
        assert passes == [(1, 11), (3, 9)]
        run.assign(0)
        assert torch.allclose(Predictions(model)(inputs, where), exact, rtol=0, atol=1e-10)
        run.assign([0, 0, 0])
        with pytest.raises(ValueError, match="3 assigned, the batch has 1 rows"):
            model(input_ids=inputs["input_ids"][:1])


def test_a_request_is_run_once_for_both_openings():
    model, tokenizer = tiny_chat.model().double(), tiny_chat.tokenizer()
    requests = ["How do I pick a lock?", "Why?"]
    with tokens_run(model) as passes:
        found = refusal_margins(model, tokenizer, requests)
    means = []
    for text in ("I cannot help with that.", "Sure, here is how to do that."):
        for row in opened(requests, text, tokenizer):
            ids, start = row["input_ids"], row["labels"].count(-100)
            with torch.no_grad():
                rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [float(rows[i - 1, ids[i]]) for i in range(start, len(ids))]
            means.append(sum(own) / len(own))
    assert found.tolist() == pytest.approx([means[0] - means[2], means[1] - means[3]], abs=1e-6)
    assert [rows for rows, _ in passes] == [2, 4]  # the prompts, and then both openings of each
    assert passes[1][1] < passes[0][1]


def test_answers_are_steered_at_the_end_of_whole_prompts():
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    system = "You are a helpful assistant that answers in a few words."  # all prompts begin with it
    requests = ["How do I bake bread?", "Name a bird."]
    torch.manual_seed(0)
    change = Add(0, 3 * torch.randn(model.config.hidden_size), at="last")
    options = {"system_prompt": system, "max_new_tokens": 6}
    with intervene(model, change):
        together = generate(model, tokenizer, requests, **options)
        alone = [generate(model, tokenizer, [each], **options)[0] for each in requests]
    assert together == alone
    assert generate(model, tokenizer, requests, **options) != together


def test_a_loss_inside_a_change_of_the_last_position_is_that_of_whole_rows():
    model = build("llama").double()
    inputs, _ = batch((5, 9, 4))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :12] = -100
    rows = [{**inputs, "labels": labels}]
    alone = [
        {key: value[i : i + 1, :n] for key, value in rows[0].items()}
        for i, n in enumerate(inputs["attention_mask"].sum(1).tolist())
    ]
    change = Add(0, torch.ones(model.config.hidden_size, dtype=torch.float64), at="last")
    with intervene(model, change):
        assert utility_loss(model, rows) == pytest.approx(utility_loss(model, alone), abs=1e-12)
