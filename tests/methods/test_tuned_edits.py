"""Edits of tuned models that look at data: removed weights, kept changes, against loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ablatable import assert_same_bits, bits
from edits import moved, state
from tiny_models import IGNORED, build, collate, rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssah.methods import Changed, Inputs, method
from ssah.methods.editing import edited

HARMFUL = [collate(rows((9, 7), seed=5), side="left"), collate(rows((8,), seed=6))]
SAFETY = [collate(rows((9, 7, 12), seed=1), side="left"), collate(rows((14, 11), seed=2))]
MODELS = ["llama", "gpt2"]  # shared key/value heads; Conv1D


def projections(model: PreTrainedModel) -> dict[str, nn.Module]:
    inside = "transformer.h." if hasattr(model, "transformer") else "model.layers."
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(inside) and type(module).__name__ in ("Linear", "Conv1D")
    }


def inputs_of(model: PreTrainedModel, batches: Any, *, answers: bool) -> dict[str, np.ndarray]:
    """What enters each projection, ``[tokens, in]``, row by row and without padding."""
    seen: dict[str, list[Tensor]] = {name: [] for name in projections(model)}
    for batch in batches:
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            real = mask.bool()
            counted = labels[real] != IGNORED if answers else torch.ones(int(real.sum())).bool()
            handles = [
                module.register_forward_pre_hook(
                    lambda _, args, own=seen[name], counted=counted: own.append(args[0][0, counted])
                )
                for name, module in projections(model).items()
            ]
            with torch.no_grad():
                model(ids[real][None])
            for handle in handles:
                handle.remove()
    return {name: torch.cat(own).double().numpy() for name, own in seen.items()}


def as_out_in(module: nn.Module, weight: Tensor) -> np.ndarray:
    w = weight.detach().double().numpy()
    return w.T if type(module).__name__ == "Conv1D" else w


@pytest.mark.parametrize("name", MODELS)
def test_antidote_removes_the_highest_of_each_matrix(name: str) -> None:
    aligned, tuned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    before = bits(tuned)
    found = method("antidote", share=0.1).find(
        Inputs(aligned=aligned, tuned=tuned, harmful=HARMFUL)
    )
    made, drawn = state(found), state(found.control(1))
    seen = inputs_of(tuned, HARMFUL, answers=True)
    removed = sum(int((made[f"{own}.weight"] == 0).sum()) for own in seen)
    assert found.facts == {"share": 0.1, "per": "matrix", "weights": removed}
    for key, t in tuned.named_parameters():
        owner = key.removesuffix(".weight")
        if owner not in seen:
            assert torch.equal(made[key], t)
            assert torch.equal(drawn[key], t)
            continue
        module = tuned.get_submodule(owner)
        w = as_out_in(module, t)
        scores = np.abs(w) * np.sqrt((seen[owner] ** 2).sum(0))
        count = round(0.1 * w.size)
        expected = w.copy()
        expected.ravel()[np.argsort(-scores.ravel())[:count]] = 0
        assert np.array_equal(as_out_in(module, made[key]), expected)
        # The control removes as many, and others.
        assert int((drawn[key] == 0).sum()) == count
        assert not torch.equal(drawn[key] == 0, made[key] == 0)
    assert_same_bits(tuned, before)


def test_antidote_loads_a_folder_to_run_it(tmp_path: Path) -> None:
    aligned, tuned = build("llama"), moved("llama", 1, 0.1).float()
    tuned.save_pretrained(tmp_path / "tuned")
    aligned.save_pretrained(tmp_path / "aligned")
    folders: dict[str, Any] = {key: str(tmp_path / key) for key in ("aligned", "tuned")}
    found: Any = method("antidote", share=0.2).find(Inputs(**folders, harmful=HARMFUL))
    found.write(tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    given = Inputs(aligned=aligned, tuned=tuned, harmful=HARMFUL)
    made = state(method("antidote", share=0.2).find(given))
    assert all(torch.equal(written[key], value) for key, value in made.items())
    with pytest.raises(TypeError, match="tuned is dict; it must be a transformers model in memory"):
        method("antidote").find(Inputs(aligned=aligned, tuned=made, harmful=HARMFUL))


# Of some 3,000 entries with squares of 0.01: budgets for about half of the columns.
@pytest.mark.parametrize(
    ("name", "spent"),
    [
        ("llama", {"budget": 0.005 * 4096**2}),
        ("gpt2", {"budget": 0.005 * 4096**2}),
        ("llama", {"share": 0.3}),
    ],
)
def test_safe_delta_keeps_the_cheapest_columns_and_compensates(
    name: str, spent: dict[str, float], tmp_path: Path
) -> None:
    aligned, tuned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    before = bits(aligned), bits(tuned)
    given = Inputs(aligned=aligned, tuned=tuned, safety=SAFETY)
    found = method("safe-delta", **spent, never=0.2, damping=0.05).find(given)
    made, drawn = state(found), state(found.control(1))
    seen = inputs_of(aligned, SAFETY, answers=False)
    numbers = set()
    for key, a in aligned.named_parameters():
        owner = key.removesuffix(".weight")
        if owner not in seen:
            assert torch.equal(made[key], a)
            assert torch.equal(drawn[key], a)
            continue
        module = aligned.get_submodule(owner)
        base, after = (as_out_in(module, w) for w in (a, tuned.get_parameter(key)))
        d, x = after - base, seen[owner]
        h = x.T @ x
        h += 0.05 * np.mean(np.diag(h)) * np.eye(len(h))
        c = 1 / np.diag(np.linalg.inv(h))
        kept, cost, columns = [], 0.0, d.shape[1]
        most = 0.005 * c.mean() * d.size
        if "share" in spent:
            most = 0.3 * sum(d[i, j] ** 2 * c[j] for i in range(len(d)) for j in range(columns))
        for j in np.argsort(c)[: columns - int(0.2 * columns + 0.5)]:
            cost += sum(value**2 * c[j] for value in d[:, j])
            if cost > most:
                break
            kept.append(int(j))
        numbers.add(len(kept) / columns)
        # The rest by least squares: what it puts out on refusals, and damping, change least.
        free = [j for j in range(columns) if j not in kept]
        root = np.linalg.cholesky(h).T  # of H = root' root, so that e H e' = |root e'|^2
        change = np.zeros_like(d)
        change[:, kept] = d[:, kept]
        change[:, free] = -np.linalg.lstsq(root[:, free], root[:, kept] @ d[:, kept].T)[0].T
        np.testing.assert_allclose(as_out_in(module, made[key]), base + change, atol=1e-8)
        control = as_out_in(module, drawn[key]) - base
        changed = np.flatnonzero(np.abs(control).max(0) > 1e-9)
        assert len(changed) == len(kept)
        np.testing.assert_allclose(control[:, changed], d[:, changed], atol=1e-12)
    assert any(0.1 < number < 0.8 for number in numbers)
    # The same of a tuned model in a folder, which is read tensor by tensor.
    tuned.save_pretrained(tmp_path / "tuned")
    folder = Inputs(aligned=aligned, tuned=str(tmp_path / "tuned"), safety=SAFETY)
    again: Any = method("safe-delta", **spent, never=0.2, damping=0.05).find(folder)
    again.write(tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(written[key], value) for key, value in made.items())
    assert_same_bits(aligned, before[0])
    assert_same_bits(tuned, before[1])


@pytest.mark.parametrize("name", MODELS)
def test_resta_drops_entries_of_the_vector_and_rescales_the_rest(name: str) -> None:
    base, aligned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    tuned = moved(name, 2, 0.1)
    given = Inputs(base=base, aligned=aligned, tuned=tuned)
    made = state(method("resta", gamma=0.5, drop=0.75, seed=3).find(given))
    other = state(method("resta", gamma=0.5, drop=0.75, seed=4).find(given))
    added = total = 0
    for key, t in tuned.named_parameters():
        whole = 0.5 / 0.25 * (aligned.get_parameter(key) - base.get_parameter(key)).detach()
        own = (made[key] - t).detach()
        kept = own.abs() > 1e-12
        torch.testing.assert_close(own[kept], whole[kept], rtol=1e-9, atol=1e-12)
        added, total = added + int(kept.sum()), total + kept.numel()
    assert added / total == pytest.approx(0.25, abs=0.01)
    assert any(not torch.equal(other[key], made[key]) for key in made)


def test_an_edit_records_its_settings_and_the_seed_of_its_control(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    seeds: list[int | None] = []

    def plan(deltas: Any, seed: int | None) -> Any:
        seeds.append(seed)
        return lambda name: deltas.read(name)[0]

    found = edited(method("interpolation", alpha=0.25), folder, [folder], plan)
    found.write(tmp_path / "out")
    found.control(5).write(tmp_path / "control")
    assert seeds == [None, 5]
    assert found.facts == {"alpha": 0.25}
    records = [
        json.loads((tmp_path / own / "delta.json").read_text()) for own in ("out", "control")
    ]
    for record, seed in zip(records, (None, 5), strict=True):
        assert (record["edit"], record["alpha"], record["control"]) == ("interpolation", 0.25, seed)


@pytest.mark.parametrize("name", MODELS)
def test_neurostrike_removes_what_a_probe_reads_harm_from(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    utility = [collate(rows((8, 6, 9, 7), seed=3))]
    given = Inputs(aligned=model, safety=SAFETY, utility=utility)
    found = method("neurostrike", share=0.05, penalty=0.5).find(given)
    assert isinstance(found, Changed)
    downs = [own for own in projections(model) if own.endswith(("down_proj", "mlp.c_proj"))]
    with found.on(model):
        gone = {own: zeroed(model.get_submodule(own)) for own in downs}
    with found.control(1).on(model):
        drawn = {own: zeroed(model.get_submodule(own)) for own in downs}
    assert drawn != gone
    for own in downs:
        z, y = prompts_of(model, own, SAFETY, utility)
        w = np.zeros(z.shape[1])
        pull = 0.5 * np.eye(len(w))
        pull[-1, -1] = 0
        for _ in range(30):
            p = 1 / (1 + np.exp(-z @ w))
            hessian = z.T @ (z * (p * (1 - p))[:, None]) + pull
            w = w - np.linalg.solve(hessian, z.T @ (p - y) + pull @ w)
        count = round(0.05 * (len(w) - 1))
        assert gone[own] == set(np.argsort(-w[:-1])[:count].tolist())
        assert len(drawn[own]) == count
    assert_same_bits(model, before)
    with pytest.raises(ValueError, match="which is no unit of any FFN; raise it"):
        method("neurostrike", share=0.001).find(given)


def zeroed(down: nn.Module) -> set[int]:
    return set(np.flatnonzero(~as_out_in(down, down.weight).any(0)).tolist())


def prompts_of(model: PreTrainedModel, own: str, *sets: Any) -> tuple[np.ndarray, np.ndarray]:
    """What enters a B at the last token of each prompt, standardised, with ones; and its class."""
    found, classes = [], []
    for number, batches in enumerate(sets):
        for batch in batches:
            for ids, mask, labels in zip(
                batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
            ):
                real = mask.bool()
                last = int((labels[real] != IGNORED).int().argmax()) - 1
                one = {"input_ids": ids[real][None], "attention_mask": mask[real][None]}
                one["labels"] = torch.full_like(one["input_ids"], IGNORED)
                one["labels"][0, last] = 1  # the one token that counts
                found.append(inputs_of(model, [one], answers=True)[own][0])
                classes.append(1.0 - number)
    x = np.stack(found)
    return np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(len(x))]), np.array(classes)
