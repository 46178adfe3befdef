"""SafeNeuron: its units by loops over tokens, and DPO beside them by hand, in float64."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import tiny_chat
import torch
from ablatable import assert_same_bits, bits
from in_float64 import InFloat64
from plans import draw, masks
from tiny_models import IGNORED, build, collate, rows
from torch import Tensor, nn
from torch.func import functional_call
from trained_by_hand import Weights, assert_trained_alike, by_hand, parameters, without_dropout
from transformers import PreTrainedModel

import ssah
from ssah.attribution import attribute, effect_sizes, mean_shifts
from ssah.compat import LibraryError
from ssah.data import DataError
from ssah.methods import Edited, Inputs, method
from ssah.studies.compare.lineup import lineup
from ssah.studies.protect import ProtectSettings
from ssah.studies.protect.run import _protecting
from ssah.training import train_on_preferences
from ssah.units import UnitSet

SAFETY, UTILITY = rows((9, 7, 8), seed=1), rows((8, 10, 7, 5), seed=3)
PAIRS = [
    {"prompt": f"w{3 + i} w{9 + i}", "chosen": f"w{20 + i} w7 w{50 + i}", "rejected": f"w{40 + i}"}
    for i in range(3)
]
MODELS = ["llama", "gpt2"]  # shared key/value heads; Conv1D
Row = tuple[Tensor, Tensor]


def inputs(model: PreTrainedModel, **more: Any) -> Inputs:
    return Inputs(
        aligned=model, safety=[collate(SAFETY, side="left")], utility=[collate(UTILITY)], **more
    )


def entering(model: PreTrainedModel, data: Sequence[Row]) -> dict[str, Tensor]:
    """What enters every B at the responses, ``[tokens, units]``, row by row."""
    seen: dict[str, list[Tensor]] = {name: [] for name in ssah.find_modules(model)}
    for ids, labels in data:

        def hook(name: str, kept: Tensor = labels != IGNORED) -> Callable[..., None]:
            return lambda _, args: seen[name].append(args[0][0, kept].detach().double())

        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in seen]
        model(ids[None])
        for handle in handles:
            handle.remove()
    return {name: torch.cat(own) for name, own in seen.items()}


def measured(a: Tensor, b: Tensor) -> tuple[list[float], list[float]]:
    """Effect sizes and shifts of the units of one module, by loops."""
    sizes, shifts = [], []
    for x, y in zip(a.T.tolist(), b.T.tolist(), strict=True):
        shift = sum(x) / len(x) - sum(y) / len(y)
        squares = sum((value - sum(x) / len(x)) ** 2 for value in x)
        squares += sum((value - sum(y) / len(y)) ** 2 for value in y)
        sizes.append(shift / math.sqrt(squares / (len(x) + len(y) - 2)))
        shifts.append(shift)
    return sizes, shifts


def top(values: list[float], share: float) -> set[int]:
    order = sorted(range(len(values)), key=lambda j: (-abs(values[j]), j))
    return set(order[: math.floor(share * len(values) + 0.5)])


@pytest.mark.parametrize("name", MODELS)
def test_safety_neurons_are_high_by_both_measures(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = bits(model)
    scores = [attribute(model, each) for each in ([collate(SAFETY)], [collate(UTILITY)])]
    sizes, shifts = effect_sizes(*scores), mean_shifts(*scores)
    found = method("safe-neuron", share=0.3).units(inputs(model))  # type: ignore[attr-defined]
    seen = [entering(model, data) for data in (SAFETY, UTILITY)]
    for module in ssah.find_modules(model):
        own = measured(*(each[module] for each in seen))
        torch.testing.assert_close(sizes[module].tolist(), own[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(shifts[module].tolist(), own[1], rtol=1e-8, atol=1e-10)
        chosen = top(own[0], 0.3) & top(own[1], 0.3)
        assert set(found[module].tolist()) == chosen
        assert 0 < len(chosen) < 0.3 * len(own[0])
    assert_same_bits(model, before)


def test_what_does_not_vary_has_no_effect_size() -> None:
    model = build("llama", dtype=torch.float64)
    name = "model.layers.0.mlp.down_proj"
    gate = model.get_submodule("model.layers.0.mlp.gate_proj")
    with torch.no_grad():
        gate.weight[3] = 0  # silu(0) is 0, whatever comes in
    safety, utility = (attribute(model, [collate(data)]) for data in (SAFETY, UTILITY))
    assert effect_sizes(safety, utility)[name][3] == 0
    other = attribute(model, [collate(UTILITY)], tokens="all")
    with pytest.raises(ValueError, match="'labels' tokens, b of 240 and 'all'; they must be of"):
        effect_sizes(safety, other)
    other = attribute(model, [collate(UTILITY)], modules="mlp")
    with pytest.raises(ValueError, match=r"a is of 240 units .* b of 144"):
        mean_shifts(safety, other)


def preference_loss(
    model: PreTrainedModel, start: Weights, pairs: list[dict[str, str]], beta: float
) -> Callable[[int, Weights], Tensor]:
    """DPO, pair by pair: the mean of -log sigmoid(beta (margin of now - margin of before))."""
    tokenizer = tiny_chat.word_tokenizer()
    end = tokenizer.eos_token_id

    def log_probability(weights: Weights, prompt: str, answer: str) -> Tensor:
        asked = tokenizer(f"{prompt}\n\n")["input_ids"]
        said = [*tokenizer(answer)["input_ids"], end]
        with InFloat64():
            logits = functional_call(
                model, weights, kwargs={"input_ids": torch.tensor([asked + said])}
            ).logits[0]
        given = nn.functional.log_softmax(logits.double(), dim=-1)
        return sum(given[len(asked) + i - 1, token] for i, token in enumerate(said))

    def margin(weights: Weights, pair: dict[str, str]) -> Tensor:
        return log_probability(weights, pair["prompt"], pair["chosen"]) - log_probability(
            weights, pair["prompt"], pair["rejected"]
        )

    with torch.no_grad():
        reference = [margin(start, pair) for pair in pairs]

    def loss(_: int, weights: Weights) -> Tensor:
        losses = [
            -nn.functional.logsigmoid(beta * (margin(weights, pair) - old))
            for pair, old in zip(pairs, reference, strict=True)
        ]
        return torch.stack(losses).mean()

    return loss


@pytest.mark.parametrize("name", MODELS)
def test_preferences_train_beside_the_safety_neurons(name: str) -> None:
    pytest.importorskip("trl")
    model = without_dropout(name)
    before, start = bits(model), parameters(model)
    given = inputs(model, tokenizer=tiny_chat.word_tokenizer(), preferences=PAIRS)
    settings: Any = {"share": 0.3, "steps": 4, "lr": 2e-4, "batch_size": 3, "beta": 0.5}
    chosen = method("safe-neuron", **settings)
    found = chosen.find(given)
    assert isinstance(found, Edited)
    units = chosen.units(given)  # type: ignore[attr-defined]
    assert found.facts == {"units": len(units)}
    with InFloat64():
        made = found.write()
    assert isinstance(made, dict)
    assert_same_bits(model, before)
    assert list(made) == list(model.state_dict())
    trains = masks(model, units, "freeze")
    loss = preference_loss(without_dropout(name), start, PAIRS, 0.5)
    expected = by_hand(start, loss, 4, 2e-4, trains=trains)
    # TRL keeps what the model said before in float32.
    assert_trained_alike(made, expected, start, moved=2e-4, atol=1e-6)
    for key, mask in trains.items():
        assert torch.equal(made[key][mask == 0], start[key][mask == 0]), key
    assert float(loss(0, expected)) < math.log(2)


def test_the_control_freezes_as_many_random_units(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[UnitSet] = []

    def kept(plan: Any, *args: Any, **settings: Any) -> None:
        frozen.append(plan.units)
        with torch.no_grad():
            plan.model.model.norm.weight.add_(1)

    monkeypatch.setattr("ssah.methods.safe_neuron.train_on_preferences", kept)
    model = build("llama", dtype=torch.bfloat16)
    given = inputs(model, tokenizer=tiny_chat.word_tokenizer(), preferences=PAIRS)
    found = method("safe-neuron", share=0.3).find(given)
    assert isinstance(found, Edited)
    made = found.write()
    assert isinstance(made, dict)
    moved = {key: made[key] - value for key, value in model.state_dict().items()}
    assert {value.dtype for value in made.values()} == {torch.bfloat16}
    assert {key for key, value in moved.items() if value.any()} == {"model.norm.weight"}
    for seed in (1, 1, 2):
        found.control(seed).write()
    counts = [{name: len(index) for name, index in units.items()} for units in frozen]
    assert counts[1:] == counts[:1] * 3
    assert frozen[0] != frozen[1] == frozen[2] != frozen[3]
    with pytest.raises(ValueError, match="out is 'runs/x', must be None where a model in memory"):
        found.write("runs/x")
    with pytest.raises(ValueError, match=r"share is 0\.001, and no unit is in it by both; raise"):
        method("safe-neuron", share=0.001).find(given)


def test_a_template_makes_conversations_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    given: list[Any] = []

    class Kept:
        def __init__(self, **options: Any) -> None:
            given.append(options)

        def remove_callback(self, callback: Any) -> None: ...

        def train(self) -> None: ...

    place = "ssah.training.preference_training.preference_trainer"
    monkeypatch.setattr(place, lambda: (Kept, trl.DPOConfig))
    tokenizer, model = tiny_chat.tokenizer(), tiny_chat.model()
    tokenizer.pad_token = None
    with ssah.freeze(model, draw(model)) as plan:
        train_on_preferences(plan, tokenizer, PAIRS, steps=7, lr=0.25, beta=0.75, seed=9)
    assert given[0]["train_dataset"][2] == {
        "prompt": [{"role": "user", "content": PAIRS[2]["prompt"]}],
        "chosen": [{"role": "assistant", "content": PAIRS[2]["chosen"]}],
        "rejected": [{"role": "assistant", "content": PAIRS[2]["rejected"]}],
    }
    # TRL sets the padding of what it is given, which must not be the user's own.
    assert given[0]["processing_class"] is not tokenizer
    args = given[0]["args"]
    assert (args.max_steps, args.learning_rate, args.beta, args.seed) == (7, 0.25, 0.75, 9)
    assert {group["lr"] for group in given[0]["optimizers"][0].param_groups} == {0.25}


def test_rows_without_a_text_and_a_missing_library_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    tokenizer = tiny_chat.word_tokenizer()
    with ssah.train_only(model, draw(model)) as plan:
        pytest.importorskip("trl")
        for pairs, match in (
            ([], "preferences is empty"),
            (
                [*PAIRS, {"prompt": "w3", "chosen": "w4"}],
                r"preferences\[3\] lacks rejected",
            ),
            ([{**PAIRS[0], "chosen": " "}], r"preferences\[0\]: chosen is empty"),
        ):
            with pytest.raises(DataError, match=match):
                train_on_preferences(plan, tokenizer, pairs, steps=1, lr=1e-3)
        monkeypatch.setitem(sys.modules, "trl", None)
        with pytest.raises(LibraryError, match=r"which ssah needs to train on pref"):
            train_on_preferences(plan, tokenizer, PAIRS, steps=1, lr=1e-3)
        monkeypatch.setattr("importlib.metadata.version", not_installed)
        with pytest.raises(LibraryError, match=r"^trl is not installed.*install 'ssah\[train"):
            train_on_preferences(plan, tokenizer, PAIRS, steps=1, lr=1e-3)
    # Before anything is computed, and without the other methods of a comparison.
    with pytest.raises(ImportError, match="'safe-neuron' needs the package trl: pip install 'ssah"):
        method("safe-neuron").find(Inputs())
    lacking = [each.lacking for each in lineup(["safe-neuron", "lora"], ["preferences"])]
    assert lacking == [None, "needs the package trl: pip install 'ssah[train]'"]
    with pytest.raises(ImportError, match="'safe-neuron' needs the package trl"):
        _protecting(ProtectSettings(method="safe-neuron"))


def not_installed(name: str) -> str:
    raise PackageNotFoundError(name)
