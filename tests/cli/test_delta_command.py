"""``ssah delta`` does what the library does, and refuses what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_chat
import torch
from commands import as_json, call, fails, prepare
from tuned import assert_same_state, loaded, saved, tuned_from

from ssah import deltas
from ssah.groups import UnitGroups


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its groups, and two models tuned from it."""
    folder = prepare(tmp_path_factory.mktemp("delta"), limit=6)
    for seed in (1, 2):
        model = tuned_from(tiny_chat.model(), seed)
        tiny_chat.tokenizer().save_pretrained(saved(model, folder / f"tuned{seed}"))
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--interpolate", 0.5], lambda b, t, _: deltas.interpolate(b, t[0], 0.5)),
        (["--interpolate", 0], lambda b, *_: b.state_dict()),
        (["--keep", 0.1], lambda b, t, _: deltas.keep(b, t[0], 0.1)),
        (
            ["--keep", 0.1, "--by", "random", "--rescale", "--seed", 3],
            lambda b, t, _: deltas.keep(b, t[0], 0.1, by="random", rescale=True, seed=3),
        ),
        (["--rank", 2], lambda b, t, _: deltas.low_rank(b, t[0], 2)),
        (
            ["--rewind", "scu", "--rewind", "cu:0.1", "--rewind", "model.norm"],
            lambda b, t, g: deltas.rewind(
                b, t[0], [g["scu"] | g.top("cu", 0.1, by="group"), "model.norm"]
            ),
        ),
        (
            ["--merge", "ties", "--keep", 0.2, "--scale", 0.8, "--scope", "tensor"],
            lambda b, t, _: deltas.merge(b, t, how="ties", scale=0.8, share=0.2, scope="tensor"),
        ),
        (["--merge", "mean"], lambda b, t, _: deltas.merge(b, t)),
        (
            ["--merge", "sum", "--scale", 1, "--scale", -0.5],
            lambda b, t, _: deltas.merge(b, t, how="sum", scale=[1, -0.5]),
        ),
    ],
)
def test_it_does_what_the_library_does(
    options: list[Any], expected: Any, folder: Path, tmp_path: Path
) -> None:
    several = options[0] == "--merge"
    tuned = [folder / "tuned1", folder / "tuned2"][: 1 + several]
    if "scu" in options:
        options = [*options, "--groups", folder / "groups"]
    found = as_json("delta", folder / "model", *tuned, *options, "--out", tmp_path / "out")
    assert found["out"] == str(tmp_path / "out")
    assert found["tuned"] == [str(each) for each in tuned]
    models = [tuned_from(tiny_chat.model(), seed) for seed in (1, 2)][: 1 + several]
    groups = UnitGroups.load(folder / "groups")
    assert_same_state(loaded(tmp_path / "out"), expected(tiny_chat.model(), models, groups))


def test_it_shows_how_large_a_delta_is(folder: Path) -> None:
    call_it = (
        "delta",
        folder / "model",
        folder / "tuned1",
        "--show",
        "--groups",
        folder / "groups",
    )
    found = as_json(*call_it)
    sizes = deltas.measure(
        tiny_chat.model(), tuned_from(tiny_chat.model()), UnitGroups.load(folder / "groups")
    )
    assert found["total"]["norm"] == pytest.approx(sizes.total.norm)
    assert found["groups"]["scu"]["share"] == pytest.approx(sizes.groups["scu"].share)
    assert set(found["groups"]) == {"scu", "ucu", "ru", "cu", "no unit"}
    shown = call(*call_it).stdout
    for word in ("embedding", "attention", "by layer", "SCU", "random units", "no unit"):
        assert word in shown
    assert f"{sizes.groups['scu'].share:.2%}" in shown


def test_a_change_of_low_rank_is_written_as_an_adapter(folder: Path, tmp_path: Path) -> None:
    model, generator = tiny_chat.model(), torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        b, a = (torch.randn(shape, generator=generator) for shape in ((32, 2), (2, 32)))
        model.get_parameter(f"{name}.weight").add_(b @ a)
    tuned = saved(model, tmp_path / "tuned")
    found = as_json("delta", folder / "model", tuned, "--lora", 2, "--out", tmp_path / "out")
    assert list(found["left_out"]) == [name]
    adapted = peft.PeftModel.from_pretrained(tiny_chat.model(), tmp_path / "out")
    whole = adapted.merge_and_unload().get_parameter(f"{name}.weight")
    torch.testing.assert_close(whole, model.get_parameter(f"{name}.weight"), rtol=1e-5, atol=1e-5)
    line = fails("delta", folder / "model", tuned, "--lora", 1, "--out", tmp_path / "other")
    assert f"the change of '{name}.weight' is not of rank 1" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "what to do is none; it must be one of --show, --interpolate"),
        (["--show", "--keep", 0.5], "what to do is --show, --keep; it must be one of"),
        (["--show", "--out", "x"], "--out is given, which --show has no use for"),
        (["--interpolate", 0.5], "--out is not given; --interpolate must have a folder"),
        (["--rewind", "scu", "--out", "x"], "--groups is not given; --rewind scu must have"),
        (["--rewind", "a.b", "--out", "x"], "'a.b', which is no parameter and no module"),
        (
            ["--interpolate", 1, "--seed", 3, "--out", "x"],
            "--seed is given, which --interpolate",
        ),
        (["--merge", "sum", "--by", "random", "--out", "x"], "--by is given, which --merge has no"),
        (["second", "--keep", 0.5, "--out", "x"], "TUNED is 2 models; it must be one"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: list[Any], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails("delta", folder / "model", folder / "tuned1", *options)
    assert not list(tmp_path.iterdir())


def test_what_is_quickly_seen_is_refused_before_the_base_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    """A base that is a GGUF file takes long to load: here it would be missed."""
    (tmp_path / "file").touch()
    for tuned, out, message in (
        (folder / "tuned1", tmp_path, "is there already, must be new or empty"),
        (tmp_path / "no_tuned", tmp_path / "out", "no_tuned"),
    ):
        line = fails("delta", tmp_path / "no_base", tuned, "--interpolate", 0.5, "--out", out)
        assert message in line
        assert "no_base" not in line


def test_what_was_done_is_shown_in_words(folder: Path, tmp_path: Path) -> None:
    names = ("--rewind", "model.norm", "--rewind", "model.layers.0")
    shown = call("delta", folder / "model", folder / "tuned1", *names, "--out", tmp_path / "out")
    assert "model.norm, model.layers.0" in shown.stdout
