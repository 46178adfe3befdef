"""Updates that are attached to a model, scaled, combined, and taken off again."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from plans import assert_equal, draw, loss_of, make, masks, snapshot, train
from torch import Tensor
from transformers import PreTrainedModel

import ssah
from ssah.units import UnitSet


def updates(
    folder: Path, family: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, dict[str, dict[str, Tensor]], dict[str, UnitSet]]:
    """A base model, two updates of disjoint units in ``folder``, and the weights of each."""
    base = tiny_models.build(family, dtype=dtype)
    first = draw(base, 0.2)
    units = {"first": first, "second": draw(base, 0.4, seed=1) - first}
    tuned = {}
    for name, own in units.items():
        model = tiny_models.build(family, dtype=dtype)
        with make(model, "train_only", own) as plan:
            train(plan, 2)
            plan.save_pretrained(folder / name)
        tuned[name] = snapshot(model)
    return base, tuned, units


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "llama_tied"])
def test_disjoint_updates_are_combined_scaled_and_taken_off(family: str, tmp_path: Path) -> None:
    base, tuned, units = updates(tmp_path, family)
    before, (one, two) = snapshot(base), (tmp_path / name for name in tuned)
    trains = {name: masks(base, own, "train_only") for name, own in units.items()}
    with ssah.attach(base, one, two) as attached:
        now = snapshot(base)
        for name, mask in trains["first"].items():
            expected = torch.where(mask != 0, tuned["first"][name], tuned["second"][name])
            assert torch.equal(now[name], expected), name
        attached.scale(0, two)
        assert_equal(snapshot(base), tuned["first"])
        attached.scale(0.25)
        now = snapshot(base)
        for name, mask in trains["first"].items():
            target = torch.where(mask != 0, tuned["first"][name], tuned["second"][name])
            old = before[name].double()
            scaled = (old + 0.25 * (target.double() - old)).float()
            assert torch.equal(now[name], scaled), name
        attached.scale(1, two)
        attached.scale(0, one)
        assert_equal(snapshot(base), tuned["second"])
    assert_equal(snapshot(base), before)
    attached.detach()  # twice is nothing
    with pytest.raises(RuntimeError, match=r"are detached: attach them again"):
        attached.scale(1)
    with ssah.attach(base, one):
        assert_equal(snapshot(base), tuned["first"])
    assert_equal(snapshot(base), before)


def test_bfloat16_is_taken_back_bit_for_bit_after_an_error(tmp_path: Path) -> None:
    base, tuned, _ = updates(tmp_path, "llama", torch.bfloat16)
    before = snapshot(base)

    def fail() -> None:
        with ssah.attach(base, tmp_path / "first") as attached:
            assert_equal(snapshot(base), tuned["first"])
            attached.scale(-0.7)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert_equal(snapshot(base), before)


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    base, _, units = updates(tmp_path, "llama")
    before, one = snapshot(base), tmp_path / "first"
    other = tiny_models.build("llama")
    with make(other, "train_only", units["first"] | units["second"]) as plan:
        train(plan, 1)
        plan.save_pretrained(tmp_path / "both")
    other = tiny_models.build("llama")
    with ssah.train_only(other, extra_parameters=["model.layers.0.mlp.down_proj.weight"]) as plan:
        train(plan, 1)
        plan.save_pretrained(tmp_path / "whole")
    for second, message in (
        (tmp_path / "both", rf"'{one}' and .* both trained .*\.weight' \(\d+ entries, \d+ for"),
        (tmp_path / "whole", r"both trained 'model\.layers\.0\.mlp\.down_proj\.weight' \(in part"),
        (one, "must name each update once"),
    ):
        with pytest.raises(ValueError, match=message):
            ssah.attach(base, one, second)
        assert_equal(snapshot(base), before)
    with pytest.raises(TypeError, match="at least one update"):
        ssah.attach(base)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ssah.attach(base, one, tmp_path / "none")
    assert_equal(snapshot(base), before)
    with ssah.attach(base, one) as attached:
        with pytest.raises(ValueError, match="has updates attached already"):
            ssah.attach(base, tmp_path / "second")
        with pytest.raises(ValueError, match=r"factor is nan"):
            attached.scale(float("nan"))
        now = snapshot(base)
        with pytest.raises(ValueError, match=r"factor is 1e\+60, must be nearer to 0"):
            attached.scale(1e60)
        assert_equal(snapshot(base), now)
        with pytest.raises(ValueError, match=r"update is 'second', must be one of those"):
            attached.scale(0.5, "second")
        with make(base, "train_only"), pytest.raises(ValueError, match="active plan"):
            attached.detach()
    assert_equal(snapshot(base), before)


def test_entries_that_others_wrote_to_are_not_overwritten(tmp_path: Path) -> None:
    base, tuned, units = updates(tmp_path, "llama")
    attached = ssah.attach(base, tmp_path / "first")
    with make(base, "train_only", units["first"]) as plan:
        optimizer = plan.optimizer(lr=1e-2)
        loss_of(base).backward()
        optimizer.step()
    trained = snapshot(base)
    with pytest.raises(RuntimeError, match=r"is not as the attached updates left it"):
        attached.detach()
    assert_equal(snapshot(base), trained)
    base.load_state_dict(tuned["first"])
    attached.detach()
    base.bfloat16()
    assert_equal(snapshot(base), snapshot(tiny_models.build("llama").bfloat16()))
