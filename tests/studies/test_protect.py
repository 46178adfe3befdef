"""``ssah protect``: what it trains and writes, what it measures, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from commands import as_json, call, fails
from paired import HARMLESS, REQUESTS, SMALL, UTILITY
from tiny_models import build
from tuned import loaded, saved, tuned_from

from ssah.data import encode, load_requests, load_rows
from ssah.evaluation import Coherence, attack_success, generate, judge
from ssah.methods import Inputs, Procedure, TrainingSetup, method, typed_method
from ssah.methods.random_units import RandomFreezing
from ssah.methods.somf import SOMF
from ssah.models import load_model
from ssah.studies.paired_models import PairedModels
from ssah.studies.protect import run
from ssah.studies.protect.making import PLAIN, Making

pytestmark = pytest.mark.xdist_group("protect")  # its fixtures are made once

TRAINING = ("--data", "builtin:utility[20:50]", "--max-steps", 2, "--lr", 1e-2)


def protect(model: Path, out: Path, *more: object) -> dict[str, Any]:
    return as_json("protect", model, *TRAINING, *SMALL, "--out", out, *more)["result"]


@pytest.fixture(scope="module")
def both(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Half way back, with the unprotected fine-tune beside it."""
    folder = tmp_path_factory.mktemp("protect")
    return folder, protect(model_folder, folder / "half", "--compare-plain")


def test_half_way_back_is_the_default(both: tuple[Path, dict], model_folder: Path) -> None:
    folder, found = both
    whole = protect(model_folder, folder / "whole", "--set", "alpha=1")
    a, t, half = (loaded(path) for path in (model_folder, folder / "whole", folder / "half"))
    moved = [name for name in a if not a[name].equal(t[name])]
    assert len(moved) == len(a)
    for name in a:
        expected = a[name].double() + (t[name].double() - a[name].double()) / 2
        torch.testing.assert_close(half[name], expected.float(), rtol=1e-6, atol=1e-8)
    assert found["method"]["settings"] == {"alpha": 0.5}
    assert found["exact"] is whole["exact"] is None
    # The plain fine-tune of one run is that of the other: rows and their order are the seed's.
    assert found["training"]["plain"]["loss"] == whole["training"]["protected"]["loss"]
    assert found["models"]["plain"]["task_loss"] == whole["models"]["protected"]["task_loss"]
    assert sorted(path.name for path in folder.iterdir() if "half" in path.name) == [
        "half",
        "half.run",
    ]
    assert not (folder / "half.run" / "models").exists()


def test_a_bfloat16_model_is_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_chat.model().bfloat16()
    tiny_chat.tokenizer().save_pretrained(saved(model, tmp_path / "model"))
    write, trained = Making._write, {}

    def kept(self: Any, name: str, tuned: Any, dtype: torch.dtype) -> None:
        if name == PLAIN:
            trained.update({key: value.double() for key, value in tuned.state_dict().items()})
        write(self, name, tuned, dtype)

    monkeypatch.setattr(Making, "_write", kept)
    # Small enough to be lost in bfloat16.
    protect(tmp_path / "model", tmp_path / "out", "--lr", 1e-4)
    before, after = loaded(tmp_path / "model"), loaded(tmp_path / "out")
    for name, value in trained.items():
        expected = (before[name].double() + value) / 2
        assert after[name].equal(expected.float().bfloat16()), name
    some = "model.layers.0.mlp.up_proj.weight"
    rounded = (before[some].double() + trained[some].bfloat16().double()) / 2
    assert not after[some].equal(rounded.float().bfloat16())


def test_what_is_measured_is_what_the_library_computes(
    both: tuple[Path, dict], model_folder: Path
) -> None:
    folder, found = both
    intact, tokenizer = load_model(str(model_folder))
    model, _ = load_model(str(folder / "half"))
    scorer = Coherence.calibrate(intact, tokenizer, batch_size=4)
    options = {"judges": ["zou2023"], "max_new_tokens": 6, "batch_size": 4}
    attack = attack_success(model, tokenizer, load_requests(REQUESTS), coherent=scorer, **options)
    own = found["models"]["protected"]
    assert own["asr"] == attack["judges"]["zou2023"]["asr"]["rate"]
    assert own["incoherent"] == attack["incoherent"]["rate"]
    harmless = load_requests(HARMLESS)
    answers = [each.text for each in generate(model, tokenizer, harmless, max_new_tokens=6)]
    refused = [not success for success in judge("zou2023")(harmless, answers)]
    assert own["over_refusal"] == sum(refused) / len(refused)
    asked = generate(model, tokenizer, load_requests(REQUESTS), max_new_tokens=6)
    kept = "".join(path.read_text() for path in (folder / "half.run").rglob("*.json"))
    said = [text for text in (*answers, *(each.text for each in asked)) if text]
    assert len(said) > 8
    assert not [text for text in said if json.dumps(text)[1:-1] in kept]  # no answer is stored
    # Every tenth row of the task is held out.
    rows = [*load_rows("builtin:utility[20:50]")]
    for name, each in (("intact", intact), ("protected", model)):
        expected = loss_of(each, tokenizer, rows[::10])
        assert found["models"][name]["task_loss"] == pytest.approx(expected, rel=1e-5)
    assert own["kl"] == pytest.approx(distance(intact, model, tokenizer), rel=1e-4)
    assert found["models"]["intact"]["kl"] is None
    assert found["differences"]["intact"]["task_loss"]["value"] == pytest.approx(
        own["task_loss"] - found["models"]["intact"]["task_loss"]
    )


def predicted(model: Any, tokenizer: Any, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities ``[n, vocabulary]`` where a token of the response is next, and these."""
    (encoded,) = encode([row], tokenizer, max_length=512)
    ids, labels = (torch.tensor(encoded[key]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    responds = labels[1:] != -100
    return logits[responds].log_softmax(-1), labels[1:][responds]


def loss_of(model: Any, tokenizer: Any, rows: list[dict]) -> float:
    nats, tokens = 0.0, 0
    for row in rows:
        log_probs, targets = predicted(model, tokenizer, row)
        nats -= sum(float(log_probs[i, t]) for i, t in enumerate(targets))
        tokens += len(targets)
    return nats / tokens


def distance(intact: Any, model: Any, tokenizer: Any) -> float:
    total, tokens = 0.0, 0
    for row in load_rows(UTILITY):
        (log_p, _), (log_q, _) = (predicted(each, tokenizer, row) for each in (intact, model))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(log_p)
    return total / tokens


def test_what_a_method_freezes_does_not_move(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = ("--method", "random-freezing", "--set", "share=0.5")
    found = protect(model_folder, tmp_path / "frozen", *share)
    before, after = loaded(model_folder), loaded(tmp_path / "frozen")
    name = "model.layers.0.mlp.down_proj.weight"
    still = (before[name] == after[name]).all(0)  # [units]
    assert int(still.sum()) == 32
    assert found["exact"] == "verified"
    assert found["training"]["protected"]["parameters"] < sum(v.numel() for v in before.values())

    trained = Making._trained

    def careless(self: Any, *given: Any) -> Any:
        training, model = trained(self, *given)
        with torch.no_grad():
            model.get_parameter(name)[0, still.nonzero()[0]] += 1
        return training, model

    monkeypatch.setattr(Making, "_trained", careless)
    line = fails(
        "protect", model_folder, *TRAINING, *SMALL, *share, "--out", tmp_path / "other", code=1
    )
    assert name in line
    assert not (tmp_path / "other").exists()


class FirstRow(RandomFreezing):
    """Trains in another way: on the first row of the task alone."""

    def _find(self, inputs: Inputs) -> Procedure:  # type: ignore[override]
        def order(rows: Any, size: int, steps: int, seed: int) -> Any:
            return [rows[0]] * size * steps

        def setup(model: Any, seed: int) -> TrainingSetup:
            return TrainingSetup(model, None, lambda: model, order)

        return Procedure(setup, lambda seed: setup)


def test_a_method_may_train_in_another_way(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_protecting", lambda settings: FirstRow())
    found = protect(model_folder, tmp_path / "out")
    _, tokenizer = load_model(str(model_folder))
    rows = [*load_rows("builtin:utility[20:50]")]
    (first,) = encode([rows[1]], tokenizer, max_length=512)  # the one before is held out
    assert found["training"]["protected"]["tokens"] == 2 * 8 * len(first["input_ids"])
    assert found["exact"] is None


def test_preferences_reach_the_method_that_needs_them(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def kept(self: Any, inputs: Inputs) -> Any:
        given.extend(inputs.pairs)
        return method("interpolation").find(inputs)

    monkeypatch.setattr(SOMF, "_find", kept)
    row = {"prompt": "How are you?", "chosen": "Well.", "rejected": "Go away."}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row))
    protect(model_folder, tmp_path / "out", "--method", "somf", "--preferences", file)
    assert given == [
        {
            "prompt": [{"role": "user", "content": "How are you?"}],
            "chosen": [{"role": "assistant", "content": "Well."}],
            "rejected": [{"role": "assistant", "content": "Go away."}],
        }
    ]
    record = json.loads((tmp_path / "out.run" / "experiment.json").read_text())
    assert record["data"]["preferences"]["rows"] == 1


def test_the_model_before_alignment_is_looked_at_first(model_folder: Path, tmp_path: Path) -> None:
    given = ("protect", model_folder, *TRAINING, *SMALL, "--method", "lox", "--set", "rank=2")
    out = ("--out", tmp_path / "out")
    smaller = saved(build("llama_tied"), tmp_path / "smaller")
    tiny_chat.tokenizer().save_pretrained(smaller)
    for name, said in (
        (tmp_path / "none", "there is no such folder"),
        (model_folder, "has the weights of the aligned model"),
        (smaller, "does not fit the aligned model"),
    ):
        line = fails(*given, "--unaligned", name, *out)
        assert said in line
        assert str(name) in line
    assert not (tmp_path / "out.run").exists()
    bases = [saved(tuned_from(tiny_chat.model(), seed=i), tmp_path / f"base{i}") for i in (4, 5)]
    for base in bases:
        tiny_chat.tokenizer().save_pretrained(base)
    call(*given, "--unaligned", bases[0], *out)
    assert "base5" in fails(*given, "--unaligned", bases[1], *out)  # no result of the other one
    # A folder of the same name may hold another model by now.
    shutil.copy(Path(bases[1]) / "model.safetensors", bases[0])
    assert "unaligned_weights" in fails(*given, "--unaligned", bases[0], *out)


def test_what_a_method_needs_is_encoded_at_the_start(model_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "Why?", "completion": "so " * 900}))
    given = ("protect", model_folder, *TRAINING, *SMALL, "--method", "sppft", "--set", "alpha=1.2")
    given = (*given, "--out", tmp_path / "out")
    assert "needs --borderline" in fails(*given)  # for the step that alpha asks for
    file = tmp_path / "long.txt"
    file.write_text("why " * 3000)
    assert "borderline[0] has 6" in fails(*given, "--borderline", file)
    strict = ("--borderline", "builtin:overrefusal", "--safety", rows, "--overlong", "error")
    assert "tokens, must have at most max_length" in fails(*given, *strict)
    assert not (tmp_path / "out.run").exists()


def test_what_acts_before_is_edited_first(model_folder: Path, tmp_path: Path) -> None:
    base = saved(tuned_from(tiny_chat.model(), seed=4), tmp_path / "base")
    tiny_chat.tokenizer().save_pretrained(base)
    given = ("--method", "lox", "--set", "rank=2", "--lr", 1e-9)
    assert "needs --unaligned" in fails(
        "protect", model_folder, *TRAINING, *SMALL, *given, "--out", tmp_path / "out"
    )
    protect(model_folder, tmp_path / "out", *given, "--unaligned", base)
    models = [load_model(str(path))[0] for path in (model_folder, base)]
    edit = method("lox", rank=2).find(Inputs(aligned=models[0], base=models[1])).write()
    after = loaded(tmp_path / "out")
    for name, expected in edit.items():  # trained at a rate at which hardly anything moves
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)


def test_it_goes_on_where_it_was(
    both: tuple[Path, dict], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, measure, trained = tmp_path / "out", [], PairedModels.measure, Making._trained

    def killed(self: Any, name: str, load: Any) -> Any:
        if not calls.count("killed"):
            calls.append("killed")
            raise KeyboardInterrupt
        return measure(self, name, load)

    def counted(self: Any, *given: Any) -> Any:
        calls.append("trained")
        return trained(self, *given)

    monkeypatch.setattr(PairedModels, "measure", killed)
    monkeypatch.setattr(Making, "_trained", counted)
    words = ("protect", model_folder, *TRAINING, *SMALL, "--compare-plain", "--out", out)
    call(*words, code=130)
    assert not out.exists()
    found = as_json(*words)["result"]
    assert calls == ["trained", "killed"]
    before = both[1]
    for each in (found, before):
        for own in each["training"].values():
            own.pop("seconds")
    assert found == before
    for name, value in loaded(out).items():
        assert value.equal(loaded(both[0] / "half")[name])
    assert as_json(*words)["result"]["models"] == found["models"]  # finished: it is read again
    shutil.rmtree(out)
    assert "is gone" in fails(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "ships"), "acts at the stage 'locate' with the aim 'remove'"),
        # It edits before the fine-tune, as lox does, and takes refusals out.
        (("--method", "refusal-orthogonalisation"), "the stage 'before' with the aim 'remove'"),
        (("--method", "scans"), "to keep refusals: ssah-freezing, ssah-budget, random-freezing"),
        (("--method", "somf"), "needs --preferences"),
        (("--set", "alpha=2"), "alpha is 2.0; it must be greater than 0 and at most 1"),
        (("--set", "alpha"), "set is 'alpha'; it must be NAME=VALUE"),
        (("--set", "beta=1"), "setting of 'interpolation' is 'beta'"),
        (("--data", "builtin:utility[0:1]"), "none is left to train on"),
        (("--judge", "wei2024"), "20"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_done(
    words: tuple[str, ...], said: str, model_folder: Path, tmp_path: Path
) -> None:
    line = fails("protect", model_folder, *TRAINING, *SMALL, *words, "--out", tmp_path / "out")
    assert said in line
    assert not (tmp_path / "out.run" / "steps").exists()


def test_a_place_that_is_taken_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    line = fails("protect", model_folder, *TRAINING, *SMALL, "--out", tmp_path)
    assert "must be new or empty" in line
    assert not tmp_path.with_name(f"{tmp_path.name}.run").exists()


def test_a_dry_run_reads_alone(tmp_path: Path) -> None:
    rows = [*load_rows("builtin:utility[0:21]")]
    rows[5] = rows[10]  # its prompt is held out: it trains in neither place
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", tmp_path / "task.jsonl", "--train-batch-size", 4, "--epochs", 2, *SMALL)
    # No model is loaded: there is none of this name.
    with pytest.warns(UserWarning, match="repeat"):
        found = as_json("protect", "none", *words, "--dry-run", "--out", tmp_path / "out")
    assert found["rows"] == {"trained": 17, "held_out": 3}
    assert found["updates"] == 9
    assert (found["trainings"], found["models"]) == (1, ["intact", "protected"])
    assert (found["requests"], found["harmless"]) == (6, 5)
    during = ("--method", "random-freezing", "--compare-plain", "--asr", 4)
    with pytest.warns(UserWarning, match="repeat"):
        shown = call("protect", "none", *words, *during, "--dry-run", "--out", tmp_path / "out")
    assert "2, of 9 updates each" in shown.stdout
    assert "4 harmful and 4 harmless" in shown.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task.jsonl"]


def test_a_report_shows_it(both: tuple[Path, dict]) -> None:
    folder, found = both
    call("report", folder)
    page = (folder / "report.html").read_text()
    assert "A protected fine-tune" in page
    assert "protected, less unprotected" in page
    assert found["conclusion"].partition(" (")[0] in page


def test_settings_as_text() -> None:
    assert typed_method("sppft", ["first=1", "last=none"]) == method("sppft", first=1, last=None)
    group = typed_method("ssah-ablation", ["group=ru", "ru=0.25"])
    assert group == method("ssah-ablation", group="ru", ru=0.25)
    for text, said in (("first=x", "whole number"), ("first=1.5", "whole number")):
        with pytest.raises(ValueError, match=said):
            typed_method("sppft", [text])
    with pytest.raises(ValueError, match="once"):
        typed_method("sppft", ["first=1", "first=2"])
    with pytest.raises(ValueError, match="it must be one of scu, ucu, ru"):
        typed_method("ssah-ablation", ["group=all"])
