"""Weights that are NaN or infinite are named, wherever they first show."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import tiny_chat
import torch
from commands import fails
from plans import assert_equal, batch, draw, snapshot
from tiny_models import build

import ssah
from ssah.attribution import METRICS
from ssah.evaluation import answers, refusal_margin, utility_loss
from ssah.models import load_model, nonfinite
from ssah.studies.stability.row_moments import row_moments
from ssah.units import UnitSet, find_modules

DOWN = "model.layers.0.mlp.down_proj"
GATE = "model.layers.0.mlp.gate_proj"
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [*BAD, 1e5])
def test_one_element_is_found(dtype: torch.dtype, value: float) -> None:
    tensors = [(str(i), torch.ones(7, 5, dtype=dtype)) for i in range(4)]
    tensors += [("none", torch.ones(0)), ("meta", torch.ones(2, device="meta"))]
    tensors += [("ids", torch.ones(2, dtype=torch.int64))]
    assert nonfinite(tensors) is None
    tensors[2][1][6, 4] = value
    tensors[3][1][0, 0] = value
    found = "2" if not math.isfinite(float(tensors[2][1][6, 4])) else None
    assert found is not None or value == 1e5
    assert nonfinite(tensors) == found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "name", [DOWN, GATE, "model.layers.1.self_attn.v_proj", "model.embed_tokens"]
)
def test_scores_that_are_not_finite_name_the_weight(metric: str, value: float, name: str) -> None:
    model = build("llama")
    with torch.no_grad():
        weight = model.get_parameter(f"{name}.weight")
        weight[int(batch()["input_ids"][0, 0]) if "embed" in name else 0, 3] = value
    with pytest.raises(FloatingPointError, match=f"The weight '{name}.weight' is NaN or infinite"):
        ssah.attribute(model, [batch()], metric=metric)


def test_the_state_of_an_unfinished_run_names_it_too(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_parameter(f"{DOWN}.weight")[1, 2] = math.nan
    with pytest.raises(FloatingPointError, match=f"The weight '{DOWN}.weight'"):
        ssah.attribute(model, [batch()], resume_dir=tmp_path, save_every_seconds=0)


def test_every_measurement_names_the_weight() -> None:
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    with torch.no_grad():
        model.get_parameter(f"{GATE}.weight")[1, 2] = math.nan
    match = f"The weight '{GATE}.weight' is NaN or infinite"
    example = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    for measure in (
        lambda: utility_loss(model, [batch()]),
        lambda: refusal_margin(model, tokenizer, ["a"]),
        lambda: answers(model, tokenizer, ["a"], max_new_tokens=2),
        lambda: ssah.probe(model, tokenizer, ["a", "b"], tokens=2),
        lambda: row_moments(model, tokenizer, [example, example]),
    ):
        with pytest.raises(FloatingPointError, match=match):
            measure()


def test_an_overflow_names_no_weight() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_parameter(f"{DOWN}.weight").mul_(3e38)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite$"):
        ssah.attribute(model, [batch()])


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("leaf", ["down_proj", "up_proj"])
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_a_plan_is_refused(value: float, leaf: str, mode: str) -> None:
    model = build("llama")
    name = f"model.layers.1.mlp.{leaf}.weight"
    units = draw(model)
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = value
    with pytest.raises(FloatingPointError, match=f"parameter '{name}' is NaN or infinite"):
        getattr(ssah, mode)(model, units)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("trained" in name for name, _ in model.named_parameters())


def test_ablation_of_the_column_is_refused_and_of_others_is_not() -> None:
    model = build("llama")
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    with torch.no_grad():
        model.get_parameter(f"{DOWN}.weight")[1, 2] = math.inf
    before = snapshot(model)
    first = next(iter(sizes))
    with (
        pytest.raises(FloatingPointError, match=f"{DOWN}.weight is NaN or infinite in columns"),
        ssah.ablate(model, UnitSet({first: [0], DOWN: [2]}, sizes)),
    ):
        pass
    assert_equal(snapshot(model), before)
    with ssah.ablate(model, UnitSet({DOWN: [3]}, sizes)):
        assert float(model.get_parameter(f"{DOWN}.weight")[:, 3].abs().max()) == 0
    assert_equal(snapshot(model), before)


def test_compensation_of_the_column_is_refused() -> None:
    model = build("gpt2")
    name = "transformer.h.0.mlp.c_proj"
    sizes = {key: module.n_units for key, module in find_modules(model).items()}
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[2, 1] = math.inf
    before = snapshot(model)
    means = {key: torch.ones(size) for key, size in sizes.items()}
    with pytest.raises(FloatingPointError, match=f"{name}.weight is NaN or infinite in columns"):
        ssah.prune(model, UnitSet({name: [2]}, sizes), compensate=True, means=means)
    assert_equal(snapshot(model), before)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A checkpoint of the chat model with one weight that is NaN."""
    model = tiny_chat.model()
    with torch.no_grad():
        model.get_parameter(f"{GATE}.weight")[1, 2] = math.nan
    folder = tmp_path / "damaged"
    model.save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)
    return folder


def test_loading_says_so(damaged: Path, tiny_chat_folder: Path) -> None:
    with pytest.warns(UserWarning, match=f"NaN or infinite, in '{GATE}.weight' for one"):
        load_model(str(damaged), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(str(tiny_chat_folder), device="cpu")


def test_the_command_says_so(damaged: Path, tmp_path: Path) -> None:
    line = fails(
        "attribute", damaged, "--data", "builtin:safety", "--out", tmp_path / "out", code=1
    )
    assert f"The weight '{GATE}.weight' is NaN or infinite" in line


def test_streaming_names_it(damaged: Path) -> None:
    with pytest.raises(FloatingPointError, match=f"The weight '{GATE}.weight'"):
        ssah.stream(str(damaged), [batch()], device="cpu")
