"""Methods side by side on a tiny model: a row each, whatever they do, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat
import torch
from commands import as_json, call, printed
from tiny_studies import tree
from tuned import saved, tuned_from

import ssah
from ssah.data import DataError, Reading, load_requests, load_rows, make_loader
from ssah.evaluation import generate, judge, utility_loss
from ssah.groups import classify
from ssah.methods import Changed, Inputs, method, names
from ssah.models import load_model
from ssah.report.terminal import compare_plan
from ssah.studies.compare import CompareSets, CompareSettings, dry_run, run_compare
from ssah.studies.compare.comparing import Comparing
from ssah.studies.compare.finding import Finding
from ssah.studies.compare.lineup import lineup
from ssah.studies.compare.planned import plan
from ssah.studies.compare.rows import choose
from ssah.studies.compare.sets import read_sets, split
from ssah.studies.loading import Loading
from ssah.studies.run_folder import OutOfTime
from ssah.studies.sources import Sources
from ssah.units import UnitSet

pytestmark = pytest.mark.xdist_group("compare")  # its fixture is made once

SETS = CompareSets(
    data="builtin:utility[20:40]",
    safety="builtin:safety[0:8]",
    utility="builtin:utility[0:8]",
    requests=("builtin:safety_eval[0:8]",),
    utility_eval="builtin:utility_eval[0:4]",
    over_refusal="builtin:overrefusal[0:4]",
)
# One of each stage that there is, and one that lacks something.
SETTINGS = CompareSettings(
    methods=("ssah-freezing", "ssah-ablation", "interpolation", "refusal-orthogonalisation", "lox"),
    set=(
        "ssah-ablation.scu=0.1",
        # Of a random model any direction will do.
        "refusal-orthogonalisation.max_kl=10",
        "refusal-orthogonalisation.min_induced=-20",
    ),
    judges=("zou2023", "qi2023"),
    max_steps=2,
    lr=1e-3,
    sample=4,
    check_every=1,
    max_new_tokens=8,
    patience=1.5,
)


@pytest.fixture(scope="module")
def compared(loading: Loading, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was stopped before the first fine-tune, and killed before the last of an edit."""
    folder = tmp_path_factory.mktemp("compare")
    out, copy = folder / "run", folder / "tuned"
    planned = dry_run(loading, out, SETTINGS, SETS)
    assert not out.exists()
    with pytest.raises(OutOfTime, match="0 minutes are up, and 24 steps are left, for intact"):
        run_compare(loading, out, SETTINGS, SETS, budget_minutes=0)
    from ssah.studies.compare import comparing

    measure = comparing.measure

    def killed(keys: list[str], *args: Any, **more: Any) -> list[dict[str, Any]]:
        if keys == ["interpolation-control-0"]:
            shutil.copytree(out / "models" / "none-0", copy)
            raise KeyboardInterrupt
        return measure(keys, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            run_compare(loading, out, SETTINGS, SETS)
    before = tree(out / "steps")
    left = dry_run(loading, out, SETTINGS, SETS)
    record = run_compare(loading, out, SETTINGS, SETS)
    return {"out": out, "tuned": copy, "planned": planned, "left": left, "before": before} | record


def rows_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in record["result"]["rows"]}


def test_every_method_has_a_row_of_its_stage(compared: dict[str, Any]) -> None:
    rows = rows_of(compared)
    assert list(rows) == [name for name in names() if name in SETTINGS.methods]
    assert {name: (row.get("subject"), row["stage"]) for name, row in rows.items()} == {
        "ssah-freezing": ("tuned", "during"),
        "ssah-ablation": ("aligned", "locate"),
        "interpolation": ("tuned", "after"),
        "refusal-orthogonalisation": ("aligned", "before"),
        "lox": (None, "before"),
    }
    assert rows["lox"]["not_run"] == "needs the model before alignment: --unaligned MODEL"
    exact = {name: row.get("exact") for name, row in rows.items()}
    assert exact == dict.fromkeys(rows) | {"ssah-freezing": "verified"}
    chosen_on = [row.get("chosen_on") for row in rows.values()]
    assert chosen_on == ["defaults", "given", "calibration", "given", None]
    none = compared["result"]["tuned"]["seeds"]["0"]["training"]
    target = none["loss"]
    assert not none["verified"]  # its plan freezes nothing
    freezing = rows["ssah-freezing"]
    for own in (freezing, freezing["control"]):
        training = own["seeds"]["0"]["training"]
        assert training["target"] == target
        assert training["reached"] == (training["loss"] <= target)
        assert own["reached"] == all(each["training"]["reached"] for each in own["seeds"].values())
    assert freezing["cost"]["updates"] == freezing["seeds"]["0"]["training"]["steps"]
    assert compared["result"]["recommendation"]["method"] in {None, *rows}


def test_it_went_on_and_left_no_model(compared: dict[str, Any]) -> None:
    assert compared["before"].items() <= tree(compared["out"] / "steps").items()
    assert not list((compared["out"] / "models").iterdir())
    assert compared["planned"]["left"] == [each.name for each in plan_of(SETTINGS)]
    assert compared["planned"]["fine_tunes"] == 3
    assert compared["planned"]["minutes"] > 0
    left = compared["left"]["left"]
    assert left[0] == "measure-interpolation-control-0"
    assert left == compared["planned"]["left"][-len(left) :]
    assert compared["left"]["measured"] == ["find", "measure"]
    done = {Path(path).stem for path in tree(compared["out"] / "steps")}
    answers = {name for name in done if "attack-" in name or "harmless-" in name}
    assert done - answers - {"precision", "coherence"} == set(compared["planned"]["left"])


def plan_of(settings: CompareSettings) -> list[Any]:
    return plan(lineup(settings.methods, [], settings.set), settings.seeds)


def test_what_runs_changed_is_the_aligned_model(compared: dict[str, Any], loading: Loading) -> None:
    row, intact = rows_of(compared)["ssah-ablation"], compared["result"]["intact"]
    model, tokenizer = load_model(loading.name)
    scores = [
        ssah.attribute(model, make_loader(source, tokenizer, batch_size=16))
        for source in (SETS.safety, SETS.utility)
    ]
    units = classify(*scores, scu=0.1, ucu=0.133, ru=0.148)["scu"]
    assert row["facts"]["units"] == len(units)
    held_out = make_loader(SETS.utility_eval, tokenizer, batch_size=16)
    harmless = list(load_requests(SETS.over_refusal))

    def measured() -> tuple[float, float, list[torch.Tensor]]:
        answers = [each.text for each in generate(model, tokenizer, harmless, max_new_tokens=8)]
        refused = [not success for success in judge("zou2023")(harmless, answers)]
        logits = []
        for batch in held_out:
            with torch.no_grad():
                out = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            answered = batch["labels"][:, 1:] != -100
            logits += list(out[:, :-1][answered].double().log_softmax(-1))
        return utility_loss(model, held_out), sum(refused) / 4, logits

    loss, over_refusal, before = measured()
    assert intact["utility_loss"] == pytest.approx(loss)
    assert intact["over_refusal"] == over_refusal
    assert intact["kl"] == 0
    control = row["control"]["seeds"]["0"]
    with ssah.ablate(model, UnitSet.random(units, seed=0)):
        assert control["utility_loss"] == pytest.approx(measured()[0])
    with ssah.ablate(model, units):
        loss, over_refusal, after = measured()
    assert row["seeds"]["0"]["utility_loss"] == pytest.approx(loss)
    assert row["seeds"]["0"]["over_refusal"] == over_refusal
    kl = [float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)]
    assert row["seeds"]["0"]["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert row["differences"]["none"]["utility_loss"]["value"] == pytest.approx(
        loss - intact["utility_loss"]
    )


def test_an_edit_is_of_the_shared_fine_tune_at_the_strength_chosen(
    compared: dict[str, Any], loading: Loading
) -> None:
    row = rows_of(compared)["interpolation"]
    assert [point["strength"] for point in row["curve"]] == [0.25, 0.5, 0.75]
    (chosen,) = (point for point in row["curve"] if point["chosen"])
    alpha = chosen["strength"]
    assert row["settings"] == {"alpha": alpha}
    assert all(point["control"]["task_loss"] != point["task_loss"] for point in row["curve"])
    model, tokenizer = load_model(loading.name)
    tuned, _ = load_model(str(compared["tuned"]))
    changed = total = 0
    with torch.no_grad():
        for a, t in zip(model.parameters(), tuned.parameters(), strict=True):
            made = (a.double() + alpha * (t.double() - a.double())).float()
            changed += int((made != t).sum())
            total += t.numel()
            a.copy_(made)
    assert row["share"] == pytest.approx(changed / total, abs=1e-3)
    rows = list(load_rows(SETS.data))
    # Of 20 rows the first of every five is held out; of these every other one is reported on.
    held_out = rows[0::5]
    own = {}
    for what, part in (("choosing", held_out[0::2]), ("reported", held_out[1::2])):
        own[what] = utility_loss(model, make_loader(part, tokenizer))
    assert chosen["task_loss"] == pytest.approx(own["choosing"], abs=1e-5)
    assert row["seeds"]["0"]["task_loss"] == pytest.approx(own["reported"], abs=1e-5)


def test_what_is_edited_before_is_fine_tuned_after(loading: Loading, tmp_path: Path) -> None:
    base = saved(tuned_from(tiny_chat.model(), seed=4), tmp_path / "base")
    tiny_chat.tokenizer().save_pretrained(base)
    # At this rate hardly anything moves, so that the model is the edited one.
    settings = replace(SETTINGS, methods=("lox",), set=("lox.rank=2",), max_steps=1, lr=1e-9)
    record = run_compare(loading, tmp_path / "run", settings, replace(SETS, base=base))
    row, (model, tokenizer) = rows_of(record)["lox"], load_model(loading.name)
    edit = method("lox", rank=2).find(Inputs(aligned=model, base=load_model(base)[0]))
    model.load_state_dict(edit.write())
    expected = utility_loss(model, make_loader(SETS.utility_eval, tokenizer))
    assert row["seeds"]["0"]["utility_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - record["result"]["intact"]["utility_loss"]) > 1e-3
    assert row["subject"] == "tuned"
    assert row["cost"]["updates"] >= 1


def test_differences_are_paired(compared: dict[str, Any]) -> None:
    row = rows_of(compared)["ssah-freezing"]
    found = {
        name: json.loads((compared["out"] / "steps" / f"measure-{name}-0.json").read_text())
        for name in ("ssah-freezing", "ssah-freezing-control", "none")
    }
    first = found["ssah-freezing"]["result"]
    for name, other in (("control", "ssah-freezing-control"), ("none", "none")):
        second = found[other]["result"]
        pairs = zip(first["refused"], second["refused"], strict=True)
        by_hand = sum(a - b for a, b in pairs) / 4
        assert row["differences"][name]["over_refusal"]["value"] == by_hand
        success = [each["attack"]["judges"]["zou2023"]["success"] for each in (first, second)]
        assert len(success[0]) == 6  # two of the eight requests choose strengths
        by_hand = sum(a - b for a, b in zip(*success, strict=True)) / 6
        assert row["differences"][name]["asr"]["value"] == pytest.approx(by_hand)
        losses = [each["measured"]["losses"]["task"]["loss"] for each in (first, second)]
        value = row["differences"][name]["task_loss"]["value"]
        assert value == pytest.approx(losses[0] - losses[1])
    assert set(row["seeds"]["0"]["judges"]) == {"zou2023", "qi2023"}


def test_the_strength_of_the_lowest_asr_that_costs_little_is_taken() -> None:
    def point(strength: float, asr: float, loss: float) -> dict[str, float]:
        return {"strength": strength, "asr": asr, "task_loss": loss}

    curve = [point(0.25, 0.1, 2.2), point(0.5, 0.3, 2.05), point(0.75, 0.3, 2.0)]
    assert choose(curve, 2.1) == 0.75
    assert choose(curve, 2.3) == 0.25
    assert choose(curve, 1.9) == 0.75


def test_equal_prompts_stay_together() -> None:
    first, second = split("requests", ["a", "b", "a", "c", "d"], 0.5, str)
    assert (first, second) == (["a", "a", "c"], ["b", "d"])
    with pytest.raises(ValueError, match="data has 1 different prompts"):
        split("data", ["a", "a"], 0.5, str)


def test_what_some_methods_need_is_read_or_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no", "more": 1} for i in range(2)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = replace(SETS, preferences=str(file), borderline="builtin:overrefusal[8:10]")
    sources = Sources(Reading())
    found = read_sets(sources, sets, SETTINGS)
    assert found.preferences == [
        {
            "prompt": [{"role": "user", "content": f"p{i}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(2)
    ]
    assert found.borderline == list(load_requests("builtin:overrefusal[8:10]"))
    assert sources.record["preferences"]["rows"] == 2
    assert [len(part) for part in found.task] == [16, 2, 2]
    file.write_text(json.dumps({"prompt": "p", "chosen": "", "rejected": "no"}))
    with pytest.raises(DataError, match=r"pairs.jsonl:1: chosen is empty"):
        read_sets(sources, sets, SETTINGS)
    # A number where there is none by default, and none where there is one.
    (sppft,) = lineup(["sppft"], [], ["sppft.alpha=1.1", "sppft.first=none"])
    assert (sppft.method.alpha, sppft.method.first) == (1.1, None)
    assert sppft.given == {"alpha", "first"}
    # A strength is tried unless it was given, or what stands in its place was.
    tried = {
        text: lineup(["safe-delta"], [], [text])[0].swept
        for text in ("safe-delta.never=0.2", "safe-delta.budget=0.2", "safe-delta.share=none")
    }
    assert tried == dict(zip(tried, (True, False, False), strict=True))
    lacking = {name: lineup([name], [])[0].lacking for name in ("resta", "sppft")}
    assert lacking == {
        "resta": "needs the model before alignment: --unaligned MODEL",
        "sppft": None,
    }
    (moved,) = lineup(["sppft"], [], ["sppft.alpha=1.1"])
    assert moved.lacking == "needs harmless requests that look dangerous: --borderline FILE"


@pytest.mark.filterwarnings("ignore:.*different prompts")  # they are refused here
@pytest.mark.parametrize(
    ("settings", "sets", "message"),
    [
        ({"methods": ("none",)}, {}, "methods is 'none'; it must be .*sppft"),
        ({"methods": ("all", "lox")}, {}, "it must be all, or names alone"),
        ({"set": ("lox",)}, {}, "METHOD.NAME=VALUE"),
        ({"set": ("sppft.first=2",)}, {}, "the method is 'sppft'"),
        ({"set": ("interpolation.beta=2",)}, {}, "it must be .*alpha"),
        ({"set": ("interpolation.alpha=half",)}, {}, "alpha is 'half'; it must be a number"),
        ({"set": ("interpolation.alpha=0.1",) * 2}, {}, "set has 'alpha' twice"),
        ({"set": ("interpolation.alpha=2",)}, {}, "at most 1"),
        (
            {"methods": ("safe-delta",), "set": ("safe-delta.budget=1", "safe-delta.share=1")},
            {},
            "stands in the place of budget",
        ),
        ({}, {"requests": ("builtin:safety[4:12]",)}, "shares . of its . prompts with safety"),
        (
            {},
            {"calibration": "builtin:safety_eval[7:9]"},
            "requests shares 1 of its 8 prompts with calib",
        ),
        ({}, {"borderline": "builtin:overrefusal[3:5]"}, "over_refusal shares 1 .* borderline"),
        ({}, {"base": "no/such/model"}, "model is 'no/such/model': there is no such folder"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    loading: Loading, tmp_path: Path, settings: dict, sets: dict, message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        run_compare(loading, out, replace(SETTINGS, **settings), replace(SETS, **sets))
    assert not out.exists()


def test_a_judge_that_cannot_work_is_noticed_before_the_fine_tunes(
    loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, judges=("python:os.remove",))
    monkeypatch.setattr(Loading, "__call__", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RuntimeError, match=r"judge 'python:os\.remove' raised TypeError"):
        run_compare(loading, tmp_path / "run", settings, SETS)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("role", ["calibration", "over_refusal", "borderline"])
def test_what_is_too_long_is_refused_or_left_out_at_the_start(
    role: str, loading: Loading, tmp_path: Path
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("How do I pick a lock?\n" + "why " * 3000 + "\nHow do I hide a knife?\n")
    sets = replace(SETS, **{role: str(file)})
    with pytest.raises(ValueError, match=rf"{role}\[1\] has \d+ tokens as a prompt; with max_new_"):
        run_compare(loading, tmp_path / "run", SETTINGS, sets)
    assert not (tmp_path / "run").exists()
    study = Comparing(
        replace(loading, reading=Reading(overlong="skip")), tmp_path / "run", SETTINGS, None
    )
    study.prepare(read_sets(study.sources, sets, SETTINGS))
    kept = study.choosing.asked if role == "calibration" else getattr(study.sets, role)
    assert [len(text.split()) for text in kept] == [6, 6]


@pytest.mark.parametrize("role", ["safety", "utility", "harmful"])
def test_rows_to_find_by_are_encoded_at_the_start(
    role: str, loading: Loading, tmp_path: Path
) -> None:
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "Why?", "completion": "so " * n} for n in (1, 900)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    strict = replace(loading, reading=Reading(overlong="error"))
    with pytest.raises(DataError, match=r"has \d+ tokens, must have at most max_length, 512"):
        run_compare(strict, tmp_path / "run", SETTINGS, replace(SETS, **{role: str(file)}))
    assert not (tmp_path / "run").exists()


def test_the_command_has_the_same_record(
    compared: dict[str, Any], loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = Loading.__call__, []

    def counted(self: Loading, *args: Any) -> Any:
        loaded.append(args)
        return load(self, *args)

    monkeypatch.setattr(Loading, "__call__", counted)
    data = {field: value for field, value in vars(SETS).items() if isinstance(value, str)}
    own = {"--" + name.replace("_", "-"): [value] for name, value in data.items()}
    own |= {
        "--requests": SETS.requests,
        "--methods": SETTINGS.methods,
        "--set": SETTINGS.set,
        "--judge": SETTINGS.judges,
        "--max-steps": [2], "--lr": [1e-3], "--sample": [4], "--check-every": [1],
        "--max-new-tokens": [8], "--patience": [1.5], "--dtype": ["float32"],
    }  # fmt: skip
    words = [word for name, values in own.items() for value in values for word in (name, value)]
    command = ("compare", loading.name, *words, "--out")
    assert as_json(*command, compared["out"])["result"] == compared["result"]
    assert loaded == [("auto",)]  # what is done needs no copy, which a finished run has not
    # What was measured is reached first: a folder that lacks its last step is not complete.
    part = compared["out"].with_name("part")
    shutil.copytree(compared["out"] / "steps", part / "steps")
    (part / "steps" / "measure-interpolation-0.json").unlink()
    assert as_json(*command, part, "--dry-run")["left"] == ["measure-interpolation-0"]
    stopped = call(*command, part, "--budget-minutes", 0, code=130)
    assert "1 steps are left, for interpolation" in " ".join(stopped.stderr.split())
    assert "do not run" in call(*command, part, "--dry-run").stdout


def test_what_does_not_run_is_told_line_by_line(compared: dict[str, Any]) -> None:
    lacking = {"scans": "needs this", "lox": "needs that"}
    shown = printed(compare_plan({**compared["planned"], "methods": lacking}))
    lines = {line.strip() for line in shown.splitlines()}
    assert {"do not run      scans needs this", "lox needs that"} <= lines


# The model is tiny: 32 hidden units, two layers, no unit that writes most at every request.
SETTABLE = (
    "sn-tune.share=0.9",
    "rsn-tune.share=0.5",
    "safety-ranks.safety_rank=4",
    "safety-ranks.utility_rank=8",
    "sppft.first=0",
    "sppft.last=0",
    "refusal-direction.max_kl=10",
    "refusal-direction.min_induced=-20",
    "refusal-orthogonalisation.max_kl=10",
    "refusal-orthogonalisation.min_induced=-20",
    "neurostrike.share=0.1",
)


@pytest.mark.exhaustive
def test_all_methods(loading: Loading, tmp_path: Path) -> None:
    tiny_chat.model(3).save_pretrained(tmp_path / "base")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "base")
    settings = replace(
        SETTINGS,
        methods=("all",),
        set=SETTABLE,
    )
    sets = replace(SETS, base=str(tmp_path / "base"))
    record = run_compare(loading, tmp_path / "run", settings, sets)
    rows = rows_of(record)
    assert list(rows) == list(names())
    for name, row in rows.items():
        given = lineup([name], ["base"])[0].lacking
        assert row["not_run"] == given, name
        if given is None:
            assert row["control"] is not None, name
            assert set(row["differences"]) == {"control", "none"}
            assert row["verdict"]["beats_control"] in ("yes", "no", "undecided")


def test_what_was_found_goes_before_the_next_is_found() -> None:
    """Each may hold a model, and two of them may be more than the memory."""
    made: list[weakref.ref[Any]] = []

    def find(_: Any) -> Any:
        assert all(each() is None for each in made)
        found = Changed((), lambda seed: ())
        made.append(weakref.ref(found))
        return found

    entrant: Any = SimpleNamespace(method=SimpleNamespace(find=find))
    finding = Finding(entrant, lambda entrant, seed: Inputs(), lambda: None)  # type: ignore[arg-type, return-value]
    for seed in (0, 0, 1, 2):
        finding.outcome(seed)
    assert len(made) == 3
