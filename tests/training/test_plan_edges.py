"""A model under a plan, met by others: pickled, read by name, measured by several threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plans import assert_equal, batch, draw, loss_of, make, snapshot
from tiny_models import build
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig

import ssah
from ssah.evaluation import utility_loss
from ssah.training import plan_of
from ssah.training.splitting import MaskedProjection

MODELS = ["llama", "gpt2", "phi3", "mixtral"]


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_a_split_weight_is_no_attribute(name: str, mode: str) -> None:
    model = build(name)
    with make(model, mode):
        split = [part for part in model.modules() if isinstance(part, MaskedProjection)]
        assert split
        for module in split:
            leaf = next(iter(module.split_tensors))
            assert not hasattr(module, leaf)
            assert getattr(module, leaf, None) is None
            for kind in (AttributeError, RuntimeError):
                with pytest.raises(kind, match=f"the {leaf} of this Masked.*an active plan"):
                    getattr(module, leaf)
            with pytest.raises(AttributeError, match="has no attribute 'other'"):
                module.other  # noqa: B018


@pytest.mark.parametrize("name", MODELS)
def test_what_needs_units_is_refused_under_a_plan(name: str) -> None:
    model = build(name)
    units = draw(model)
    with ssah.freeze(model, units):
        before = snapshot(model)
        attempts: list[Callable[[], Any]] = [
            lambda: ssah.find_modules(model),
            lambda: ssah.attribute(model, [batch()]),
            lambda: ssah.ablate(model, units),
            lambda: ssah.prune(model, units),
        ]
        for attempt in attempts:
            with pytest.raises(ValueError, match=r"active plan.*plan\.close\(\)"):
                attempt()
        assert_equal(snapshot(model), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_names_and_values_of_before_the_plan(name: str, mode: str) -> None:
    model = build(name)
    before = dict(model.named_parameters())
    values = {key: parameter.detach().clone() for key, parameter in before.items()}
    with make(model, mode) as plan:
        assert list(dict(model.named_parameters())) != list(before)
        assert_equal(dict(plan.original_named_parameters()), values)
        optimizer = plan.optimizer(lr=0.1)
        loss_of(model).backward()
        optimizer.step()
        moved = {key: value.detach().clone() for key, value in plan.original_named_parameters()}
        state = model.state_dict()
        assert_equal(moved, {key: state[key] for key in moved})
        assert any(not torch.equal(moved[key], values[key]) for key in values)
    assert_equal(moved, {key: p.detach() for key, p in model.named_parameters()})
    with pytest.raises(RuntimeError, match="the plan is closed"):
        next(plan.original_named_parameters())


# ------------------------------------------------------------------------------------- pickling


def saved_by_torch(thing: Any) -> None:
    torch.save(thing, io.BytesIO())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dump", [pickle.dumps, saved_by_torch])
def test_pickling_a_planned_model_is_refused_by_name(name: str, dump: Callable[[Any], Any]) -> None:
    model = build(name)
    with ssah.freeze(model, draw(model)) as plan:
        split = next(part for part in model.modules() if isinstance(part, MaskedProjection))
        for thing in (model, split, plan):
            with pytest.raises(pickle.PicklingError, match=r"under a plan.*plan\.close\(\)"):
                dump(thing)
        twin = copy.deepcopy(model)
        assert plan_of(twin) not in (None, plan)
    dump(model)


# -------------------------------------------------------------------------------------- threads


def in_a_thread(act: Callable[[], Any]) -> BaseException | None:
    """What ``act`` raises in a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_model_that_a_thread_measures_is_left_alone_by_others() -> None:
    model = build("llama")
    units = draw(model)
    backbone = model.model
    refused: dict[str, BaseException | None] = {}

    def loader() -> Iterator[dict[str, Tensor]]:
        yield batch()
        others: dict[str, Callable[[], Any]] = {
            "attribute": lambda: ssah.attribute(model, [batch()]),
            "backbone": lambda: ssah.attribute(backbone, [batch()]),
            "loss": lambda: utility_loss(model, [batch()]),
            "ablate": lambda: ssah.ablate(model, units).__enter__(),
            "prune": lambda: ssah.prune(model, units),
            "freeze": lambda: ssah.freeze(model, units),
        }
        for name, act in others.items():
            refused[name] = in_a_thread(act)
        yield batch(1)

    scores = ssah.attribute(model, loader()).scores
    assert len(refused) == 6
    for name, error in refused.items():
        assert isinstance(error, RuntimeError), name
        assert "being measured by another thread" in str(error)
    assert_equal(scores, ssah.attribute(model, [batch(), batch(1)]).scores)
    assert in_a_thread(lambda: utility_loss(model, [batch()])) is None


def test_copies_are_measured_by_several_threads() -> None:
    model = build("llama")
    expected = ssah.attribute(model, [batch()] * 4).scores
    twins = [copy.deepcopy(model) for _ in range(3)]
    found: dict[int, dict[str, Tensor]] = {}

    def score(number: int) -> None:
        found[number] = ssah.attribute(twins[number], [batch()] * 4).scores

    threads = [threading.Thread(target=score, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for scores in found.values():
        assert_equal(scores, expected)


# ------------------------------------------------------------------------------------ small ones


@pytest.mark.parametrize("metric", ["taylor", "fisher"])
def test_the_sign_is_kept_beside_the_score(metric: str, tmp_path: Any) -> None:
    """It says, to first order, how the loss changes as a unit is removed: by its negative."""
    model = build("llama").double()
    found = ssah.attribute(model, [batch()], metric=metric)
    assert found.signed is not None
    assert any(float(signed.min()) < 0 < float(signed.max()) for signed in found.signed.values())
    if metric == "taylor":
        assert_equal({name: signed.abs() for name, signed in found.signed.items()}, found.scores)
    found.save(tmp_path / "scores")
    loaded = ssah.Attribution.load(tmp_path / "scores").signed
    assert loaded is not None
    assert_equal(loaded, found.signed)


def test_the_sign_is_that_of_the_change_in_loss() -> None:
    model = build("llama").double()
    name = "model.layers.1.mlp.down_proj"
    found = ssah.attribute(model, [batch()], metric="taylor", tokens="all")
    assert found.signed is not None
    inputs = batch()
    n_targets = int((inputs["labels"][:, 1:] != -100).sum())
    weight, h = model.get_parameter(f"{name}.weight"), 1e-2  # norms are in float32
    for unit in (0, 1, 2, 3):
        losses = []
        for factor in (1 + h, 1 - h):
            scaled = copy.deepcopy(model)
            with torch.no_grad():
                scaled.get_parameter(f"{name}.weight")[:, unit] = factor * weight[:, unit]
                losses.append(float(loss_of(scaled)) * n_targets)
        derivative = (losses[0] - losses[1]) / (2 * h)
        assert float(found.signed[name][unit]) == pytest.approx(derivative, rel=1e-2, abs=1e-3)


def test_metrics_without_gradients_have_no_sign(tmp_path: Any) -> None:
    found = ssah.attribute(build("llama"), [batch()])
    assert found.signed is None
    found.save(tmp_path)
    assert ssah.Attribution.load(tmp_path).signed is None


def test_progress_is_shown_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    ssah.attribute(build("llama"), [batch()], progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "scoring units" in shown.err


def test_a_loss_needs_no_units() -> None:
    """An architecture that the library does not know has a loss all the same."""
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
    )
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with pytest.raises(ValueError, match="unknown architecture"):
        ssah.find_modules(model)
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].double()
    targets = inputs["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    assert utility_loss(model, [inputs]) == pytest.approx(float(expected), rel=1e-5)
