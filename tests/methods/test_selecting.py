"""What methods choose: units, weights and layers, against loops over rows in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_chat
import torch
from ablatable import assert_same_bits, bits
from tiny_models import IGNORED, build, collate, rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import ssah
from ssah.methods import Changed, Inputs, Outcome, Trained, method
from ssah.methods.sppft import opening, other_run, with_best_ends
from ssah.selections import Selection
from ssah.units import UnitSet

SAFETY = [*rows((9, 7, 8), seed=1), *rows((6,), seed=2)]
UTILITY = [*rows((8, 10), seed=3), *rows((7, 5), seed=4)]
Row = tuple[Tensor, Tensor]
MODELS = ["llama", "gpt2"]  # shared key/value heads; Conv1D


def batches(data: list[Row]) -> list[dict[str, Tensor]]:
    return [collate(data[:2], side="left"), collate(data[2:])]


def inputs(model: PreTrainedModel, **more: Any) -> Inputs:
    return Inputs(aligned=model, safety=batches(SAFETY), utility=batches(UTILITY), **more)


def entering(model: PreTrainedModel, row: Row) -> dict[str, Tensor]:
    """What enters every B at the response of one row without padding, ``[tokens, units]``."""
    ids, labels = row
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def copy(_: nn.Module, args: Any) -> None:
            seen[name] = args[0][0, labels != IGNORED].detach().double()

        return copy

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name))
        for name in ssah.find_modules(model)
    ]
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    return seen


def columns(model: PreTrainedModel, name: str) -> Tensor:
    """B as ``[units, out]``."""
    down = model.get_submodule(name)
    return down.weight.detach() if type(down).__name__ == "Conv1D" else down.weight.detach().T


def zscores(model: PreTrainedModel, data: list[Row]) -> list[tuple[str, int, float]]:
    """Equation 1 of every unit, within its module less the mean, by the standard deviation."""
    seen = [entering(model, row) for row in data]
    found = []
    for name in ssah.find_modules(model):
        x = torch.cat([each[name] for each in seen])  # [tokens, units]
        b = columns(model, name)
        own = [
            float(((x[:, j] - x[:, j].mean()) ** 2).sum() / (len(x) - 1) * b[j].pow(2).sum())
            for j in range(x.shape[1])
        ]
        mean = sum(own) / len(own)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in own) / len(own))
        found += [(name, j, (value - mean) / deviation) for j, value in enumerate(own)]
    return found


def sorted_units(model: PreTrainedModel, scu: float, cu: float, ru: float) -> list[set[Any]]:
    """SCU, the highest of CU, and RU, by sorting lists."""
    safety, utility = zscores(model, SAFETY), zscores(model, UTILITY)
    every = [((name, j), s, u) for (name, j, s), (_, _, u) in zip(safety, utility, strict=True)]
    n = len(every)
    every.sort(key=lambda each: each[1] + each[2])
    low, every = every[: round(ru * n)], every[round(ru * n) :]
    every.sort(key=lambda each: each[2] - each[1])
    top, every = every[: round(scu * n)], every[round(scu * n) :]
    every = every[: len(every) - round(0.1 * n)]  # UCU: the lowest I_S - I_U of what is left
    every.sort(key=lambda each: -each[1])
    return [{key for key, *_ in some} for some in (top, every[: round(cu * n)], low)]


def as_set(units: Any) -> set[tuple[str, int]]:
    return {(name, j) for name, index in units.items() for j in index.tolist()}


@pytest.mark.parametrize("name", MODELS)
def test_ssah_takes_the_units_of_its_equation(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    shares = {"scu": 0.05, "ucu": 0.1, "ru": 0.2}
    scu, cu, ru = sorted_units(model, 0.05, 0.08, 0.2)
    given = inputs(model)
    frozen = method("ssah-freezing", **shares, complex=0.08).find(given)
    budget = method("ssah-budget", **shares).find(given)
    ablated = method("ssah-ablation", **shares).find(given)
    assert isinstance(frozen, Trained)
    assert isinstance(budget, Trained)
    assert isinstance(ablated, Changed)
    assert as_set(frozen.selection) == scu | cu
    assert as_set(budget.selection) == ru
    assert budget.alone
    assert ablated.facts == {"units": len(scu)}
    with ablated.on(model):
        for module in ssah.find_modules(model):
            zero = {(module, j) for j, b in enumerate(columns(model, module)) if not b.any()}
            assert zero == {key for key in scu if key[0] == module}
    assert_same_bits(model, before)
    _is_a_control(frozen)
    _is_a_control(budget)


def _is_a_control(found: Trained) -> None:
    """As many of each module, others, the same for the same seed."""
    drawn = [found.control(seed) for seed in (1, 1, 2)]
    chosen = [each.selection for each in (found, *drawn)]
    assert chosen[1] == chosen[2] != chosen[3]
    assert chosen[0] != chosen[1]
    assert all(each.alone == found.alone for each in drawn)
    for units in chosen:
        assert isinstance(units, UnitSet)
        counts = {name: len(index) for name, index in units.items()}
        assert counts == {name: len(index) for name, index in found.selection.items()}  # type: ignore[union-attr]


def test_random_freezing_takes_its_share_of_each_module() -> None:
    found = method("random-freezing", share=0.25, seed=3).find(Inputs(aligned=build("llama")))
    assert isinstance(found, Trained)
    assert isinstance(found.selection, UnitSet)
    assert {name: len(index) for name, index in found.selection.items()} == {
        f"model.layers.{layer}.{part}": n // 4
        for layer in range(2)
        for part, n in (("mlp.down_proj", 72), ("self_attn.o_proj", 48))
    }
    # Another draw, of the method's own seed too: a comparison has the same small numbers for both.
    for seed in range(6):
        assert found.control(seed).selection != found.selection
    _is_a_control(found)


def by_row(model: PreTrainedModel, metric: str, data: list[Row]) -> dict[str, Tensor]:
    """Scores of every matrix in the layers, ``[out, in]``, one row of data at a time."""
    owners = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "weight")
        and module.weight.dim() == 2
        and (".layers." in name or ".h." in name)
    }
    sums = {name: torch.zeros_like(module.weight) for name, module in owners.items()}
    squares: dict[str, Any] = dict.fromkeys(owners, 0.0)
    for ids, labels in data:
        seen: dict[nn.Module, Tensor] = {}

        def copy(module: nn.Module, args: Any, seen: dict[nn.Module, Tensor] = seen) -> None:
            seen[module] = args[0][0].detach()

        handles = [module.register_forward_pre_hook(copy) for module in owners.values()]
        logits = model(ids[None]).logits[0]
        for handle in handles:
            handle.remove()
        loss = nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
        )
        gradients = torch.autograd.grad(loss, [module.weight for module in owners.values()])
        for (name, module), gradient in zip(owners.items(), gradients, strict=True):
            sums[name] += (module.weight * gradient).abs().detach() / len(data)
            squares[name] += seen[module][labels != IGNORED].pow(2).sum(0)
    found = {}
    for name, module in owners.items():
        turned = type(module).__name__ == "Conv1D"
        weight, snip = (w.T if turned else w for w in (module.weight.detach(), sums[name]))
        found[name] = snip if metric == "snip" else weight.abs() * squares[name].sqrt()
    return found


def highest(scores: list[float], share: float) -> set[int]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return set(order[: math.floor(share * len(scores) + 0.5)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("metric", ["snip", "wanda"])
def test_a_set_difference_is_that_of_each_row(name: str, metric: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    settings: Any = {"metric": metric, "safety_share": 0.1, "utility_share": 0.2}
    found = method("set-difference-removal", **settings).find(inputs(model))
    frozen = method("set-difference-freezing", **settings).find(inputs(model))
    assert isinstance(found, Changed)
    assert isinstance(frozen, Trained)
    assert isinstance(frozen.selection, Selection)
    safety, utility = by_row(model, metric, SAFETY), by_row(model, metric, UTILITY)
    kept = {}
    for owner, scores in safety.items():
        weight = model.get_submodule(owner).weight
        turned = type(model.get_submodule(owner)).__name__ == "Conv1D"
        gone = torch.zeros(scores.shape, dtype=torch.bool)  # [out, in]
        for i, (s, u) in enumerate(zip(scores.tolist(), utility[owner].tolist(), strict=True)):
            for j in highest(s, 0.1) - highest(u, 0.2):
                gone[i, j] = True
        assert 0 < int(gone.sum()) < gone.numel() / 8
        mask = gone.T if turned else gone
        assert torch.equal(frozen.selection.mask(f"{owner}.weight").expand_as(mask), mask)
        kept[owner] = (mask, weight.detach().clone())
    with found.on(model):
        for owner, (mask, weight) in kept.items():
            assert torch.equal(model.get_submodule(owner).weight, weight * ~mask)
    assert_same_bits(model, before)
    drawn = frozen.control(1).selection
    assert isinstance(drawn, Selection)
    assert drawn.counts == frozen.selection.counts
    assert drawn != frozen.selection


@pytest.mark.parametrize("name", MODELS)
def test_a_set_difference_of_units_sums_their_columns(name: str) -> None:
    model = build(name, dtype=torch.float64)
    settings: Any = {"safety_share": 0.2, "utility_share": 0.3, "level": "units"}
    found = method("set-difference-freezing", **settings).find(inputs(model))
    safety, utility = by_row(model, "snip", SAFETY), by_row(model, "snip", UTILITY)
    expected = {
        (name, j)
        for name in ssah.find_modules(model)
        for j in highest(safety[name].sum(0).tolist(), 0.2)
        - highest(utility[name].sum(0).tolist(), 0.3)
    }
    assert isinstance(found, Trained)
    assert as_set(found.selection) == expected
    assert expected


def test_a_set_difference_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"utility_share 1\.0, of which nothing is left"):
        method("set-difference-removal", utility_share=1.0).find(inputs(build("llama")))


def angles(model: PreTrainedModel) -> list[float]:
    """The gap of each layer, by loops over pairs of rows."""
    states: list[list[Tensor]] = []
    for data in (SAFETY, UTILITY):
        states.append([])
        for ids, labels in data:
            last = next(t for t in range(len(ids)) if labels[t] != IGNORED) - 1
            with torch.no_grad():
                hidden = model(ids[None], output_hidden_states=True).hidden_states
            # The last one is normed, which a hook would have to undo: see below.
            states[-1].append(torch.stack([h[0, last] for h in hidden[1:-1]]).double())
    harmful, ordinary = states
    found = []
    for layer in range(len(harmful[0])):
        between, within = [], []
        for i, n in enumerate(ordinary):
            for m in harmful:
                between.append(float(torch.cosine_similarity(n[layer], m[layer], dim=0)))
            for k, other in enumerate(ordinary):
                if k != i:
                    within.append(float(torch.cosine_similarity(n[layer], other[layer], dim=0)))
        means = [sum(each) / len(each) for each in (between, within)]
        found.append(math.acos(means[0]) - math.acos(means[1]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_sppft_sees_the_gap_of_each_layer(name: str) -> None:
    model = build(name, dtype=torch.float64)
    found = method("sppft").gap(inputs(model))  # type: ignore[attr-defined]
    expected = angles(model)
    assert len(expected) == model.config.num_hidden_layers - 1  # all but the last
    torch.testing.assert_close(found[:-1].tolist(), expected, rtol=1e-8, atol=1e-10)


def test_the_safety_layers_are_where_the_gap_opens() -> None:
    gap = torch.tensor([0.0, 0.1, 0.5, 0.8, 0.85], dtype=torch.float64)
    assert opening(gap, 0.1, 0.9) == range(1, 4)
    assert opening(gap, 0.2, 0.95) == range(2, 5)
    assert opening(gap, 0.5, 0.5) == range(2, 3)
    assert opening(gap, 1.0, 1.0) == range(4, 5)
    # What falls again after the gap has opened changes nothing.
    rough = torch.tensor([-0.1, 0.5, 0.02, 1.0, 0.3], dtype=torch.float64)
    assert opening(rough, 0.1, 0.9) == range(1, 4)
    with pytest.raises(ValueError, match="opens in no layer"):
        opening(-gap, 0.1, 0.9)
    with pytest.raises(ValueError, match=r"opens is 0\.95; it must be at most flat, 0\.9"):
        method("sppft", opens=0.95).find(inputs(build("llama")))


def test_other_layers_are_as_many_and_apart() -> None:
    drawn = {other_run(range(2, 4), 8, seed) for seed in range(40)}
    assert drawn == {range(start, start + 2) for start in (0, 4, 5, 6)}
    assert other_run(range(1, 4), 4, 0) == range(3)  # none is apart
    with pytest.raises(ValueError, match="all 4 layers are safety layers"):
        other_run(range(4), 4, 0)


def test_sppft_freezes_whole_layers() -> None:
    model = build("llama")
    found: Outcome = method("sppft", first=1, last=1).find(inputs(model))
    assert isinstance(found, Trained)
    assert found.facts == {"layers": [1]}
    with found.plan(model) as plan:
        ids = collate(UTILITY[:2])["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer = plan.optimizer(lr=0.1)
        before = bits(model)
        optimizer.step()
        plan.verify()
    moved = {key for key, value in bits(model).items() if not torch.equal(value, before[key])}
    assert {key for key in before if ".layers.1." in key}.isdisjoint(moved)
    assert {key for key in before if ".layers.0." in key} <= moved
    drawn = found.control(0).selection
    assert isinstance(drawn, Selection)
    assert {name.split(".")[2] for name in drawn} == {"0"}
    with pytest.raises(ValueError, match="first is 1 and last is None; both must be given"):
        method("sppft", first=1).find(inputs(model))


def four_layers(name: str) -> PreTrainedModel:
    """A random model of the tiny chat model's vocabulary."""
    sizes: Any = {"vocab_size": 800, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if name == "gpt2":
        config: Any = GPT2Config(n_embd=32, n_layer=4, n_head=4, initializer_range=0.3, **sizes)
    else:
        config = tiny_chat.model().config
        config.num_hidden_layers = 4
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [1.5, 0.6])
def test_sppft_moves_its_ends_by_refusals(
    name: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = four_layers(name), tiny_chat.tokenizer()
    before, borderline = bits(model), [f"How do I kill {n} lights?" for n in range(12)]

    def verdicts(requests: list[str], texts: list[str]) -> list[bool]:
        assert requests == borderline
        return [sum(map(ord, text)) % 3 > 0 for text in texts]  # a third of them is refused

    monkeypatch.setattr("ssah.methods.sppft.judge", lambda name: verdicts)

    def refused(first: int, last: int) -> int:
        scaled = copy.deepcopy(model)
        for key, parameter in scaled.named_parameters():
            if any(f".{layer}." in key for layer in range(first, last + 1)):
                parameter.data *= alpha
        found = ssah.evaluation.answers(scaled, tokenizer, borderline, max_new_tokens=4)
        return verdicts(borderline, found).count(False)

    given = inputs(model, tokenizer=tokenizer, borderline=borderline)
    settings: Any = {"first": 1, "last": 2, "alpha": alpha, "reach": 1, "max_new_tokens": 4}
    found = method("sppft", **settings).find(given)
    best = max if alpha > 1 else min
    counts = {(1, last): refused(1, last) for last in (1, 2, 3)}
    # The old end comes first, so that it stays where another one is as good.
    last = best((2, 1, 3), key=lambda end: counts[1, end])
    counts |= {(first, last): refused(first, last) for first in (0, 1, 2) if first <= last}
    first = best((1, 0, 2) if last > 1 else (1, 0), key=lambda end: counts[end, last])
    assert found.facts["layers"] == list(range(first, last + 1))
    assert found.facts["refused"] == {f"{i}-{j}": count for (i, j), count in counts.items()}
    assert len(set(counts.values())) > 1
    assert isinstance(found, Trained)
    assert found.selection == ssah.selections.layers(model, range(first, last + 1))
    assert_same_bits(model, before)


def test_ends_move_to_the_highest_score_within_reach() -> None:
    scores = {(1, 2): 4, (1, 3): 7, (1, 4): 9, (0, 4): 8, (2, 4): 5, (1, 5): 50}
    asked = []

    def score(run: range) -> float:
        asked.append((run[0], run[-1]))
        return scores.get(asked[-1], 0)

    assert with_best_ends(range(1, 4), 8, 1, score) == range(1, 5)
    assert set(asked) == {(1, 2), (1, 3), (1, 4), (0, 4), (2, 4)}
    assert with_best_ends(range(1, 4), 8, 2, score) == range(1, 6)
    assert with_best_ends(range(1, 4), 4, 3, lambda run: 0) == range(1, 4)  # nothing is better


def test_the_second_step_of_sppft_needs_what_it_asks() -> None:
    given = inputs(build("llama"))
    with pytest.raises(ValueError, match=r"'sppft' lack tokenizer .* and bord"):
        method("sppft", alpha=1.2).find(given)
    given = replace(given, tokenizer=tiny_chat.tokenizer(), borderline=["w3"])
    with pytest.raises(ValueError, match="alpha is 1, which changes nothing"):
        method("sppft", alpha=1.0).find(given)
