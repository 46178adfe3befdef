"""What methods write, tensor by tensor, against the equations by loops in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ablatable import assert_same_bits, bits
from edits import moved, state
from tiny_models import build, collate, rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssah
from ssah.methods import Edited, Inputs, method

SAFETY, UTILITY = [collate(rows((9, 7), seed=1))], [collate(rows((8, 6), seed=2))]
MODELS = ["llama", "gpt2"]


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


def matrices(model: PreTrainedModel) -> dict[str, bool]:
    """Every matrix in the layers, and whether it is a Conv1D's, ``[in, out]``."""
    inside = "transformer.h." if hasattr(model, "transformer") else "model.layers."
    return {
        f"{name}.weight": type(module).__name__ == "Conv1D"
        for name, module in model.named_modules()
        if name.startswith(inside) and getattr(module, "weight", torch.ones(1)).dim() == 2
    }


@pytest.mark.parametrize("name", MODELS)
def test_lox_adds_the_leading_directions_once_more(name: str) -> None:
    base, aligned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    found = method("lox", rank=2, alpha=0.5).find(Inputs(base=base, aligned=aligned))
    made, drawn = state(found), state(found.control(1))
    assert drawn.keys() == made.keys()
    for key, value in aligned.named_parameters():
        if key not in matrices(aligned):
            assert torch.equal(made[key], value)
            assert torch.equal(drawn[key], value)
            continue
        v = (value - base.get_parameter(key)).detach().numpy()
        # By eigenvectors of V V^T: U_k U_k^T V is the part of rank k.
        _, vectors = np.linalg.eigh(v @ v.T)
        u = vectors[:, -2:]
        expected = value.detach().numpy() + 0.5 * u @ (u.T @ v)
        np.testing.assert_allclose(made[key].numpy(), expected, atol=1e-9)
        added, control = ((each[key] - value).detach() for each in (made, drawn))
        torch.testing.assert_close(
            torch.linalg.svdvals(control)[:3], torch.linalg.svdvals(added)[:3], rtol=1e-6, atol=1e-9
        )
        assert abs(torch.cosine_similarity(added.flatten(), control.flatten(), 0)) < 0.5
    again = state(found.control(1))
    assert all(torch.equal(again[key], drawn[key]) for key in drawn)


@pytest.mark.parametrize("name", MODELS)
def test_safe_lora_projects_what_strays(name: str) -> None:
    base, aligned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    tuned = moved(name, 2, 0.05)
    cosines, projected = {}, {}
    for key, turned in matrices(aligned).items():
        w = [model.get_parameter(key).detach().numpy() for model in (base, aligned, tuned)]
        b, a, t = [each.T if turned else each for each in w]
        c = (a - b) @ (a - b).T / np.sqrt(((a - b) ** 2).sum())
        d = t - a
        cosines[key] = float((c @ d * d).sum() / np.linalg.norm(c @ d) / np.linalg.norm(d))
        projected[key] = (a + c @ d).T if turned else a + c @ d
    limit = sorted(cosines.values())[len(cosines) // 2 - 1] + 1e-9  # half of them lie below
    given = Inputs(base=base, aligned=aligned, tuned=tuned)
    found = method("safe-lora", threshold=limit).find(given)
    made, drawn = state(found), state(found.control(1))
    changed = {key for key, cosine in cosines.items() if cosine <= limit}
    assert len(changed) == len(cosines) // 2
    for key, value in tuned.named_parameters():
        if key in changed:
            np.testing.assert_allclose(made[key].numpy(), projected[key], atol=1e-10)
            assert not torch.allclose(drawn[key], made[key], atol=1e-4)
            assert not torch.equal(drawn[key], value)
        else:
            assert torch.equal(made[key], value)
            assert torch.equal(drawn[key], value)


@pytest.mark.parametrize("name", MODELS)
def test_resta_adds_what_alignment_changed(name: str) -> None:
    base, aligned = build(name, dtype=torch.float64), moved(name, 1, 0.1)
    tuned = moved(name, 2, 0.1)
    given = Inputs(base=base, aligned=aligned, tuned=tuned)
    found = method("resta", gamma=0.7).find(given)
    made, drawn = state(found), state(found.control(1))
    for key, t in tuned.named_parameters():
        v = aligned.get_parameter(key) - base.get_parameter(key)
        torch.testing.assert_close(made[key], t + 0.7 * v, rtol=1e-12, atol=1e-13)
        # The control adds the same numbers in other places.
        added = (drawn[key] - t).flatten()
        torch.testing.assert_close(
            added.sort().values, 0.7 * v.flatten().sort().values, rtol=1e-9, atol=1e-12
        )
        assert not torch.allclose(added, 0.7 * v.flatten(), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "family"),
    [("lox", "llama"), ("lox", "mixtral"), ("safe-lora", "llama"), ("resta", "mixtral")],
)
def test_edits_by_the_alignment_of_folders(name: str, family: str, tmp_path: Path) -> None:
    models = {"base": build(family), "aligned": moved(family, 1, 0.1).float()}
    models["tuned"] = moved(family, 2, 0.1).float()
    for key, model in models.items():
        model.save_pretrained(tmp_path / key)
    folders: dict[str, Any] = {key: str(tmp_path / key) for key in models}
    found = method(name).find(Inputs(**folders))
    assert isinstance(found, Edited)
    found.control(1).write(tmp_path / "control")
    found.write(tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    made = state(method(name).find(Inputs(**models)))
    assert all(torch.equal(written[key], value) for key, value in made.items())
