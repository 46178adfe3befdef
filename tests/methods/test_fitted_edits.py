"""Patches and masks that are trained, against Adam by hand and one row at a time, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ablatable import assert_same_bits, bits
from edits import moved, state
from tiny_chat import word_tokenizer
from tiny_models import IGNORED, build, collate, rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssah.data import encode
from ssah.deltas import Draw
from ssah.methods import Inputs, method
from ssah.methods.drawing import generator_of, relaxed_bernoulli

MODELS = ["llama", "gpt2"]  # shared key/value heads; Conv1D
DATA = rows((9, 7, 8), seed=5)
HARMFUL = [collate(DATA[:2], side="left"), collate(DATA[2:])]
Row = tuple[Tensor, Tensor]


def matrices(model: PreTrainedModel) -> list[str]:
    """Of layers; routers of experts are none."""
    inside = ("transformer.h.", "model.layers.")
    return [
        name
        for name, own in model.named_parameters()
        if name.startswith(inside) and own.dim() >= 2 and not name.endswith(".gate.weight")
    ]


def log_prob(model: PreTrainedModel, row: Row) -> Tensor:
    """Of the response of one row without padding."""
    ids, labels = row
    scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
    counted = labels[1:] != IGNORED
    return scores[counted, ids[1:][counted]].sum()


def adam(
    values: dict[str, Tensor],
    gradients: Callable[[int], dict[str, Tensor] | None],
    lr: float,
    steps: int,
) -> None:
    """Change ``values`` in place; a step whose gradients are None is not taken."""
    m = {key: torch.zeros_like(own) for key, own in values.items()}
    v = {key: torch.zeros_like(own) for key, own in values.items()}
    taken = looked = still = 0
    while taken < steps and still < 2:
        found = gradients(looked)
        looked += 1
        still = still + 1 if found is None else 0
        if found is None:
            continue
        taken += 1
        rate = lr * (1 + math.cos(math.pi * (taken - 1) / steps)) / 2
        for key, g in found.items():
            m[key] = 0.9 * m[key] + 0.1 * g
            v[key] = 0.999 * v[key] + 0.001 * g * g
            values[key] -= (
                rate * (m[key] / (1 - 0.9**taken)) / ((v[key] / (1 - 0.999**taken)).sqrt() + 1e-8)
            )


def patch(tuned: PreTrainedModel, lr: float, steps: int, bound: float | None) -> dict[str, Tensor]:
    """What ascent up to a bound, or descent, changes in the matrices."""
    model = copy.deepcopy(tuned)
    names = matrices(model)

    def gradients(number: int) -> dict[str, Tensor] | None:
        own = (DATA[:2], DATA[2:])[number % 2]
        model.zero_grad()
        losses = [-log_prob(model, row) for row in own]
        tokens = [int((labels != IGNORED).sum()) for _, labels in own]
        if bound is None:
            (sum(losses) / sum(tokens)).backward()
        else:
            rising = [
                loss / n for loss, n in zip(losses, tokens, strict=True) if loss.item() / n < bound
            ]
            if not rising:
                return None
            (-sum(rising) / len(own)).backward()
        return {name: model.get_parameter(name).grad for name in names}

    with torch.no_grad():
        values = {name: model.get_parameter(name).data for name in names}
    adam(values, gradients, lr, steps)
    before = dict(tuned.named_parameters())
    return {name: (values[name] - before[name]).detach() for name in names}


def highest(
    tuned: PreTrainedModel, change: dict[str, Tensor], share: float, place: int
) -> dict[str, Tensor]:
    """Bool: the highest by SNIP among what is retained of a patch, under the patched model."""
    model = copy.deepcopy(tuned)
    kept = {n: Draw(0.5, 7, n, place).mask(c.flatten()).view(c.shape) for n, c in change.items()}
    with torch.no_grad():
        for name, own in change.items():
            model.get_parameter(name).add_(own * kept[name])
    scores = {name: torch.zeros_like(own) for name, own in change.items()}
    for row in DATA:
        model.zero_grad()
        log_prob(model, row).backward()
        for name in scores:
            w = model.get_parameter(name)
            scores[name] += (w * w.grad).abs().detach() / len(DATA)
    found = {}
    for name, own in scores.items():
        own = torch.where(kept[name], own, -1.0).flatten()
        mask = torch.zeros_like(own, dtype=torch.bool)
        mask[own.argsort(descending=True)[: math.floor(share * len(own) + 0.5)]] = True
        found[name] = mask.view(change[name].shape)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_safe_patching_adds_each_patch_where_it_alone_matters(name: str) -> None:
    tuned = moved(name, 1, 0.05)
    before = bits(tuned)
    settings = {"harm_share": 0.2, "refusal_share": 0.1, "alpha": 2.0, "beta": 0.5}
    training = {"retained": 0.5, "bound": 8.0, "steps": 6, "lr": 1e-3, "seed": 7}
    given = Inputs(aligned=build(name, dtype=torch.float64), tuned=tuned, harmful=HARMFUL)
    found = method("safe-patching", **settings, **training).find(given)
    assert_same_bits(tuned, before)
    made, drawn = state(found), state(found.control(1))
    harm, refusal = patch(tuned, 1e-3, 6, 8.0), patch(tuned, 1e-3, 6, None)
    of_harm, of_refusal = highest(tuned, harm, 0.2, 1), highest(tuned, refusal, 0.1, 0)
    for key, t in tuned.named_parameters():
        if key not in harm:
            assert torch.equal(made[key], t)
            continue
        only = (of_harm[key] & ~of_refusal[key], of_refusal[key] & ~of_harm[key])
        added = 2.0 * harm[key] * only[0] + 0.5 * refusal[key] * only[1]
        torch.testing.assert_close(made[key], t + added, rtol=0, atol=1e-6)
        assert torch.equal(made[key] != t, only[0] | only[1])
        # The control touches other entries, by what the same patches have there.
        touched = int((drawn[key] != t).sum())
        assert 0.8 * int((only[0] | only[1]).sum()) < touched <= sum(int(m.sum()) for m in only)
        assert not torch.equal(drawn[key] != t, made[key] != t)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_folders_are_patched_as_models_in_memory_are(family: str, tmp_path: Path) -> None:
    models: dict[str, Any] = {"aligned": build(family), "tuned": moved(family, 1, 0.05).float()}
    for key, model in models.items():
        model.save_pretrained(tmp_path / key)
    folders: dict[str, Any] = {key: str(tmp_path / key) for key in models}
    patching = method("safe-patching", steps=2, lr=1e-3, bound=9.0)
    made = state(patching.find(Inputs(**models, harmful=HARMFUL)))
    found: Any = patching.find(Inputs(**folders, harmful=HARMFUL))
    found.write(tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    changed = [
        key for key, own in models["tuned"].named_parameters() if bool((made[key] != own).any())
    ]
    assert changed == matrices(models["tuned"])
    for key, value in made.items():
        torch.testing.assert_close(written[key], value, rtol=1e-5, atol=1e-6)


def test_ascent_stops_where_all_answers_are_at_the_bound() -> None:
    tuned = moved("llama", 1, 0.05)
    harm, further = (patch(tuned, 1e-3, 30, bound) for bound in (6.0, 9.0))
    training = {"retained": 1.0, "bound": 6.0, "steps": 30, "lr": 1e-3}
    given = Inputs(aligned=tuned, tuned=tuned, harmful=HARMFUL)
    shares = {"harm_share": 0.5, "refusal_share": 0.01, "beta": 0.0}
    found = method("safe-patching", **training, **shares).find(given)
    made = state(found)
    name = matrices(tuned)[0]
    change = made[name] - tuned.get_parameter(name)
    touched = change != 0
    assert bool(touched.any())
    # A higher bound is reached later, so that the lower one did end the training.
    assert float(harm[name].norm()) < 0.9 * float(further[name].norm())
    torch.testing.assert_close(change[touched], harm[name][touched], rtol=0, atol=1e-6)
    # Rounding aside, every answer is at the bound in the end.
    assert found.facts["unlearnt_loss"] == pytest.approx(6.0)
    with pytest.raises(ValueError, match="harmful has no batch; it must have at least one"):
        method("safe-patching").find(Inputs(aligned=tuned, tuned=tuned, harmful=[]))
    with pytest.raises(ValueError, match=r"bound is 0\.1, and every harmful answer is that unlik"):
        method("safe-patching", bound=0.1, steps=1).find(given)
    with pytest.raises(ValueError, match=r"both must be below retained, 0\.3, of which they"):
        method("safe-patching", harm_share=0.3).find(given)


PAIRS = [
    {"prompt": "w5 w6 w7", "chosen": "w9 w10", "rejected": "w11 w12 w13"},
    {"prompt": "w8 w20", "chosen": "w30 w31 w32 w33", "rejected": "w40"},
    {"prompt": "w21 w22", "chosen": "w50 w51", "rejected": "w52 w53"},
]


def encoded(side: str) -> list[Row]:
    data = [{"prompt": row["prompt"], "completion": row[side]} for row in PAIRS]
    return [
        (torch.tensor(row["input_ids"]), torch.tensor(row["labels"]))
        for row in encode(data, word_tokenizer())
    ]


def fitted(aligned: PreTrainedModel, tuned: PreTrainedModel, steps: int) -> dict[str, Tensor]:
    """Logits after training, the chain rule of the mask by hand."""
    names = matrices(tuned)
    policy = copy.deepcopy(tuned)
    tau = {n: (tuned.get_parameter(n) - aligned.get_parameter(n)).detach() for n in names}
    logits = {name: torch.zeros_like(own) for name, own in tau.items()}
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = encoded("chosen"), encoded("rejected")

    def gradients(number: int) -> dict[str, Tensor]:
        own = ((0, 1), (2,))[number % 2]
        masks = {}
        for name in names:
            u = torch.rand(tau[name].shape, generator=generator, dtype=torch.float64)
            noise = u.log() - (1 - u).log()
            masks[name] = 1 / (1 + torch.exp(-(logits[name] + noise) / 0.5))
            with torch.no_grad():
                change = 0.7 * tau[name] * masks[name] / masks[name].mean()
                policy.get_parameter(name).copy_(aligned.get_parameter(name) + change)
        policy.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for i in own:
            with torch.no_grad():
                reference = log_prob(tuned, chosen[i]) - log_prob(tuned, rejected[i])
            gain = log_prob(policy, chosen[i]) - log_prob(policy, rejected[i]) - reference
            loss = loss + torch.log(1 + torch.exp(-0.4 * gain)) / len(own)
        loss.backward()
        found = {}
        for name, mask in masks.items():
            g = 0.7 * tau[name] * policy.get_parameter(name).grad  # d loss / d (M / mean)
            mean, n = mask.mean(), mask.numel()
            of_mask = g / mean - (g * mask).sum() / (mean**2 * n)
            found[name] = of_mask * mask * (1 - mask) / 0.5
        return found

    adam(logits, gradients, 0.05, steps)
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_somf_learns_a_mask_by_preferences(name: str) -> None:
    aligned, tuned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    before = bits(aligned), bits(tuned)
    given = Inputs(aligned=aligned, tuned=tuned, tokenizer=word_tokenizer(), preferences=PAIRS)
    settings = {"scale": 0.7, "beta": 0.4, "lr": 0.05, "batch_size": 2, "epochs": 2, "seed": 3}
    found = method("somf", **settings).find(given)
    binary = state(method("somf", **settings, export="binary").find(given))
    made, drawn = state(found), state(found.control(1))
    assert found.facts["first_loss"] != found.facts["last_loss"]
    logits = fitted(aligned, tuned, 4)
    for key, t in tuned.named_parameters():
        if key not in logits:
            assert torch.equal(made[key], t)
            continue
        a = aligned.get_parameter(key).detach()
        u = torch.rand(a.shape, generator=generator_of(3, key), dtype=torch.float64)
        mask = torch.sigmoid((logits[key] + u.log() - (1 - u).log()) / 0.5)
        tau = 0.7 * (t - a).detach()
        torch.testing.assert_close(made[key], a + tau * mask / mask.mean(), rtol=0, atol=1e-6)
        hard = (mask > 0.5).double()
        torch.testing.assert_close(binary[key], a + tau * hard / hard.mean(), rtol=0, atol=1e-6)
        # The control has the numbers of the same mask in other places.
        numbers = ((drawn[key] - a) / tau).flatten().sort().values
        expected = (mask / mask.mean()).flatten().sort().values
        torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(drawn[key], made[key], atol=1e-3)
    assert_same_bits(aligned, before[0])
    assert_same_bits(tuned, before[1])


def test_rows_that_are_no_preferences_are_refused_before_anything_runs() -> None:
    model = build("llama")
    given: dict[str, Any] = {"aligned": model, "tuned": model, "tokenizer": word_tokenizer()}
    with pytest.raises(ValueError, match=r"preferences\[1\] lacks chosen and rejected; a pref"):
        method("somf").find(Inputs(**given, preferences=[PAIRS[0], {"prompt": "w5"}]))
    with pytest.raises(ValueError, match="preferences is empty; it must have at least one row"):
        method("somf").find(Inputs(**given, preferences=[]))


def test_a_relaxed_draw_is_above_a_half_as_often_as_its_logit_says() -> None:
    logits = torch.full((40_000,), 1.2)
    drawn = relaxed_bernoulli(logits, 0.5, generator_of(1, "some"))
    expected = 1 / (1 + math.exp(-1.2))
    assert float((drawn > 0.5).float().mean()) == pytest.approx(expected, abs=0.01)
    colder = relaxed_bernoulli(logits, 0.05, generator_of(1, "some"))
    assert torch.equal(colder > 0.5, drawn > 0.5)
    assert float((colder - colder.round()).abs().mean()) < float(
        (drawn - drawn.round()).abs().mean()
    )
