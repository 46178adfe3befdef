"""What methods write, tensor by tensor, against the equations by loops in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ablatable import assert_same_bits, bits
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssah
from ssah.methods import Edited, Inputs, method

SAFETY, UTILITY = [collate(rows((9, 7), seed=1))], [collate(rows((8, 6), seed=2))]
MODELS = ["llama", "gpt2"]


def moved(model_name: str, seed: int, by: float) -> PreTrainedModel:
    """The same model a little further: what training might have made of it."""
    model = build(model_name, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += by * noise
    return model


def state(found: Any) -> dict[str, Tensor]:
    assert isinstance(found, Edited)
    made = found.write()
    assert isinstance(made, dict)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_interpolation_and_its_control(name: str) -> None:
    aligned, tuned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    before = bits(aligned), bits(tuned)
    found = method("interpolation", alpha=0.4).find(Inputs(aligned=aligned, tuned=tuned))
    made, drawn = state(found), state(found.control(1))
    lengths = [0.0, 0.0]
    for key, a in aligned.named_parameters():
        t = tuned.get_parameter(key)
        torch.testing.assert_close(made[key], 0.6 * a + 0.4 * t, rtol=1e-12, atol=1e-14)
        # A weight of the control has changed whole, or not at all.
        assert bool(((drawn[key] == a) | (drawn[key] == t)).all())
        for place, each in enumerate((made[key], drawn[key])):
            lengths[place] += float((each - a.detach()).pow(2).sum())
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)  # of some 60,000 weights
    other = state(found.control(2))
    assert any(not torch.equal(other[key], drawn[key]) for key in drawn)
    assert_same_bits(aligned, before[0])
    assert_same_bits(tuned, before[1])


def test_interpolation_of_folders(tmp_path: Path) -> None:
    aligned, tuned = build("llama"), moved("llama", 1, 0.1).float()
    aligned.save_pretrained(tmp_path / "aligned")
    tuned.save_pretrained(tmp_path / "tuned")
    folders = {name: str(tmp_path / name) for name in ("aligned", "tuned")}
    found = method("interpolation").find(Inputs(**folders))
    assert isinstance(found, Edited)
    assert found.write(tmp_path / "half") == tmp_path / "half"
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for key, a in aligned.named_parameters():
        torch.testing.assert_close(half.get_parameter(key), (a + tuned.get_parameter(key)) / 2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("rewinding", {"scu": 0.05, "ucu": 0.1, "ru": 0.1}),
        ("set-difference-rewinding", {"safety_share": 0.1, "utility_share": 0.1}),
        ("set-difference-rewinding", {"safety_share": 0.2, "level": "units"}),
    ],
)
def test_what_is_put_back_is_what_would_be_frozen(
    name: str, what: str, settings: dict[str, Any]
) -> None:
    aligned, tuned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    given = Inputs(aligned=aligned, tuned=tuned, safety=SAFETY, utility=UTILITY)
    put_back = method(what, **settings).find(given)
    freezing = what.replace("rewinding", "freezing") if what != "rewinding" else "ssah-freezing"
    # Of SSAH's units no complex ones are put back.
    more = {"complex": 0.0} if what == "rewinding" else {}
    frozen: Any = method(freezing, **settings, **more).find(given)
    for seed in (None, 1):
        made = state(put_back if seed is None else put_back.control(seed))
        chosen = (frozen if seed is None else frozen.control(seed)).selection
        with ssah.freeze(aligned, chosen) as plan:
            trains = _trains(plan, aligned)
        assert any(bool(mask.any()) and not bool(mask.all()) for mask in trains.values())
        for key, a in aligned.named_parameters():
            t = tuned.get_parameter(key)
            assert torch.equal(made[key], torch.where(trains[key], t, a)), key


def _trains(plan: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """Which weights move when all that train take a step: bool, of each parameter's shape."""
    before = {key: value.detach().clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
    plan.optimizer(lr=1e-3).step()
    after = {key: value.detach().clone() for key, value in model.state_dict().items()}
    model.load_state_dict(before)
    return {key: after[key] != before[key] for key in before}
