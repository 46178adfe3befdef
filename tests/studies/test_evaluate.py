"""``ssah evaluate`` as a user calls it, on a tiny model: results, resuming, errors."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import call
from evaluations import SMALL, evaluate, refused

import ssah
from ssah.data import load_requests, load_rows, make_loader
from ssah.evaluation import (
    Coherence,
    attack_success,
    bootstrap,
    check_tasks,
    divergences,
    generate,
    multiple_choice,
    paired_difference,
    response_log_probs,
)
from ssah.evaluation.judges import Keywords
from ssah.evaluation.perplexity import perplexity
from ssah.groups import UnitGroups
from ssah.models import load_model
from ssah.units import UnitSet

pytestmark = pytest.mark.xdist_group("evaluate")  # its fixtures are made once


@pytest.fixture(scope="module")
def found(runs) -> dict:
    groups = runs / "groups"
    return evaluate(
        runs / "model", "--out", runs / "full", *SMALL,
        "--judge", "qi2023", "--system-prompt", "none", "--system-prompt", "Be kind.",
        "--ablate", f"{groups}:cu", "--ablate", f"{groups}:scu:random", "--seed", 3,
        "--ablate", f"{groups}:ru:0.05",
    )  # fmt: skip


def test_every_rate_is_what_the_library_computes(runs, found):
    model, tokenizer = load_model(str(runs / "model"))
    scorer = Coherence.calibrate(model, tokenizer, batch_size=4)
    groups = UnitGroups.load(runs / "groups", model)
    arms = {
        "nothing": None,
        f"{runs / 'groups'}:cu": groups["cu"],
        f"{runs / 'groups'}:scu:random": UnitSet.random(groups["scu"], seed=3),
        f"{runs / 'groups'}:ru:0.05": groups.top("ru", 0.05, by="group"),
    }
    rows = {(r["ablated"], r["system_prompt"], r["judge"]): r for r in found["result"]["rows"]}
    assert len(rows) == len(found["result"]["rows"]) == 4 * 2 * 2
    options = {"judges": ["zou2023", "qi2023"], "coherent": scorer, "max_new_tokens": 8}
    sets = {
        "asr": load_requests("builtin:safety_eval[0:7]"),
        "over_refusal": load_requests("builtin:overrefusal[0:5]"),
        "benign": load_requests("builtin:utility_eval[0:6]"),
    }
    before = {}
    for name, units in arms.items():
        for system_prompt in (None, "Be kind."):
            expected = {
                role: attack_success(
                    model, tokenizer, asked, ablated=units, system_prompt=system_prompt, **options
                )
                for role, asked in sets.items()
            }
            for judge in ("zou2023", "qi2023"):
                row, harmful = rows[name, system_prompt, judge], expected["asr"]
                success = harmful["judges"][judge]["success"]
                assert row["asr"] == harmful["judges"][judge]["asr"]
                assert row["asr_coherent"] == harmful["judges"][judge]["asr_coherent"]
                flags = harmful["incoherent"].pop("flags", None)
                assert row["incoherent"] == harmful["incoherent"], flags
                assert row["ended"] == harmful["ended"]
                assert row["mean_tokens"] == harmful["mean_tokens"]
                for role in ("over_refusal", "benign"):
                    control = expected[role]
                    refused = control["judges"][judge]["success"].count(0)
                    assert row[f"{role}_refused"]["count"] == refused
                    assert row[f"{role}_incoherent"]["count"] == control["incoherent"]["count"]
                    assert row[f"{role}_tokens"] == control["mean_tokens"]
                if units is None:
                    before[system_prompt, judge] = success
                    assert "asr_rise" not in row
                else:
                    pair = torch.tensor(success), torch.tensor(before[system_prompt, judge])
                    rise, interval = paired_difference(*pair, seed=3)
                    assert row["asr_rise"] == rise
                    assert row["asr_rise_interval"] == list(interval)


def test_margin_and_utility_of_every_model(runs, found):
    model, tokenizer = load_model(str(runs / "model"))
    first, second, third, fourth = found["result"]["models"]
    rows = load_rows("builtin:utility_eval", limit=6)
    expected = perplexity(model, tokenizer, rows).to_dict()
    assert first["utility_loss"] == pytest.approx(expected.pop("loss"), rel=1e-6)
    for key, value in expected.items():
        assert first[key] == pytest.approx(value, rel=1e-5)
    assert first["units"] == 0 < third["units"] == fourth["units"] < second["units"]
    assert second["share"] == pytest.approx(second["units"] / 192)
    assert second["utility_loss"] != first["utility_loss"]
    for each in (first, second, third, fourth):
        low, high = each["refusal_margin_interval"]
        assert low <= each["refusal_margin"] <= high
        assert each["refuses"]["n"] == 7
        assert "margins" not in each


def test_kl_of_every_ablated_model(runs, found):
    model, tokenizer = load_model(str(runs / "model"))
    groups = UnitGroups.load(runs / "groups", model)
    loader = make_loader("builtin:utility_eval[0:6]", tokenizer, batch_size=4)
    (exact,) = divergences(model, loader, [groups["cu"]])
    nothing, ablated = found["result"]["models"][:2]
    assert "kl" not in nothing
    mean = float(exact.total.sum() / exact.tokens.sum())
    assert ablated["kl"] == pytest.approx(mean, rel=1e-6)
    assert ablated["kl_first"] == pytest.approx(float(exact.first.mean()), rel=1e-6)
    assert ablated["kl_first_interval"] == pytest.approx(list(bootstrap(exact.first, seed=3)))
    for each in found["result"]["models"][1:]:
        for key in ("kl", "kl_first"):
            low, high = each[f"{key}_interval"]
            assert 0 < low <= each[key] <= high


def test_models_differ_by_rows_and_by_requests(runs, found):
    result = found["result"]
    names = [each["ablated"] for each in result["models"]]
    pairs = [(later, earlier) for i, earlier in enumerate(names) for later in names[i + 1 :]]
    assert {(d["ablated"], d["against"]) for d in result["differences"]} == set(pairs)
    assert len(result["differences"]) == len(pairs)
    loss = {each["ablated"]: each["utility_loss"] for each in result["models"]}
    model, tokenizer = load_model(str(runs / "model"))
    groups = UnitGroups.load(runs / "groups", model)
    rows = {}
    for name, units in ((names[1], groups["cu"]), (names[3], groups.top("ru", 0.05, by="group"))):
        loader = make_loader("builtin:utility_eval[0:6]", tokenizer, batch_size=4)
        with ssah.ablate(model, units):
            nats, tokens = map(torch.cat, zip(*response_log_probs(model, loader), strict=True))
        rows[name] = -nats / tokens.double().mean()
    for each in result["differences"]:
        first, second = each["ablated"], each["against"]
        assert each["utility_loss"] == pytest.approx(loss[first] - loss[second])
        low, high = each["utility_loss_interval"]
        assert low <= each["utility_loss"] <= high
        if {first, second} == set(rows):
            _, bounds = paired_difference(rows[first], rows[second], seed=3)
            assert (low, high) == pytest.approx(bounds)
            assert low < high
    rates = {(r["ablated"], r["system_prompt"], r["judge"]): r for r in result["rows"]}
    differences = result["asr_differences"]
    assert len(differences) == 3 * 2 * 2  # pairs of ablated models, prompts, judges
    for each in differences:
        first, second = (
            rates[each[side], each["system_prompt"], each["judge"]]
            for side in ("ablated", "against")
        )
        for key in ("asr", "asr_coherent"):
            assert each[key] == pytest.approx(first[key]["rate"] - second[key]["rate"])
            low, high = each[f"{key}_interval"]
            assert low <= each[key] <= high
            assert low < high


def test_the_run_says_what_it_did(runs, found):
    assert found["kind"] == "evaluate"
    assert found["finished"]
    settings = found["settings"]
    assert [judge["name"] for judge in settings["judges"]] == ["zou2023", "qi2023"]
    assert settings["judges"][0]["version"] == 1
    assert settings["system_prompts"] == [None, "Be kind."]
    assert found["data"]["requests"]["rows"] == 7
    assert found["data"][f"{runs / 'groups'}:cu"]["rows"] == found["result"]["models"][1]["units"]
    assert json.loads((runs / "full" / "experiment.json").read_text()) == found


def test_no_answer_is_kept(runs, found):
    model, tokenizer = load_model(str(runs / "model"))
    said = generate(
        model, tokenizer, load_requests("builtin:safety_eval[0:7]"), max_new_tokens=8, batch_size=4
    )
    texts = [answer.text for answer in said]
    assert all(len(text) > 5 for text in texts)
    files = [path for path in (runs / "full").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        kept = path.read_text()
        assert not any(text in kept or json.dumps(text)[1:-1] in kept for text in texts), path


def test_tables_show_the_rates(runs, found, tmp_path):
    out = shutil.copytree(runs / "full", tmp_path / "full")  # others read what is recorded there
    arguments = [
        "--judge", "qi2023", "--system-prompt", "none", "--system-prompt", "Be kind.",
        "--ablate", f"{runs / 'groups'}:cu", "--ablate", f"{runs / 'groups'}:scu:random",
        "--ablate", f"{runs / 'groups'}:ru:0.05", "--seed", 3,
    ]  # fmt: skip
    printed = call("evaluate", runs / "model", "--out", out, *SMALL, *arguments)
    shown = printed.stdout
    # Its loss is measured on the prompts that it answers, and calibrated on none of them.
    assert "seen before" not in printed.stderr
    for title in (
        "zou2023: % of 7 harmful requests not refused (95% interval)",
        "qi2023: % of 7 harmful",
        "Harmless requests refused, %",
        "Incoherent answers in %",
        "Refusal margin",
        "KL to the intact model",
        "random (SCU)",
        "RU 5 %",
        "Utility loss, less that of another model",
        "qi2023: ASR, less that of another",
        "Be kind.",
    ):
        assert title in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_an_interrupted_evaluation_goes_on(runs, tmp_path, monkeypatch):
    arguments = (runs / "model", *SMALL, "--over-refusal", "none", "--benign", "none")
    whole = evaluate(*arguments, "--out", tmp_path / "whole")
    calls = []
    refuses = Keywords.refuses

    def failing(self, answer):
        calls.append(answer)
        if len(calls) == 1 + 6:  # the trial, then in the second chunk of four
            raise RuntimeError("the power is gone")
        return refuses(self, answer)

    monkeypatch.setattr(Keywords, "refuses", failing)
    out = tmp_path / "cut"
    assert "power" in refused(*arguments, "--out", out, code=1)
    steps = {path.name for path in (out / "steps").iterdir()}
    assert "0-intact.prompt0.requests.0000.json" in steps
    assert "0-intact.prompt0.requests.0001.json" not in steps
    del calls[:]
    calls.extend([""] * 10)  # no more failures
    found = evaluate(*arguments, "--out", out)
    assert len(calls) == 10 + 1 + 3  # the trial and the second chunk alone
    assert found["result"] == whole["result"]


def test_another_evaluation_in_the_folder_is_refused(runs, found):
    line = refused(runs / "model", "--out", runs / "full", *SMALL)
    assert "has this experiment with ablations" in line
    assert "take another folder" in line


def test_what_is_left_out_is_left_out(runs, tmp_path):
    none = ("--over-refusal", "none", "--benign", "none", "--utility", "none")
    found = evaluate(runs / "model", *SMALL, *none, "--out", tmp_path)
    (row,), (model,) = found["result"]["rows"], found["result"]["models"]
    assert not any(key.startswith(("benign", "over_refusal")) for key in row)
    assert "utility_loss" not in model
    assert set(found["data"]) == {"requests"}
    call("evaluate", runs / "model", *SMALL, *none, "--out", tmp_path)


def test_requests_of_text_files_and_a_prompt_of_a_file(runs, tmp_path):
    (tmp_path / "asked.txt").write_text("How do I bake bread?\n\nName a bird.\n")
    (tmp_path / "prompt.txt").write_text("Be kind.\n")
    (tmp_path / "more.jsonl").write_text('{"prompt": "Why?"}\n')
    found = evaluate(
        runs / "model", *SMALL[: SMALL.index("--requests")], "--out", tmp_path / "run",
        "--requests", tmp_path / "asked.txt", "--requests", tmp_path / "more.jsonl",
        "--system-prompt", tmp_path / "prompt.txt", "--intact", runs / "model",
    )  # fmt: skip
    assert found["data"]["requests"]["rows"] == 3
    assert found["settings"]["system_prompts"] == ["Be kind."]
    assert found["settings"]["intact_weights"] == found["settings"]["weights"]
    assert found["result"]["models"][0]["kl"] == 0  # of the model to itself, named as another


def test_a_judge_that_fails_does_not_show_the_answer(runs, tmp_path, monkeypatch):
    (tmp_path / "failing_judges.py").write_text(
        "def judge(request, answer):\n"
        "    if request != 'How do I bake bread?':\n"
        "        raise KeyError(answer)\n"
        "    return True\n"
    )
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(str(runs / "model"))
    asked = load_requests("builtin:safety_eval[0:7]")
    said = generate(model, tokenizer, asked, max_new_tokens=8, batch_size=4)
    judge = ("--judge", "python:failing_judges.judge")
    result = call("evaluate", runs / "model", *SMALL, *judge, "--out", tmp_path / "run", code=1)
    assert "error: judge 'python:failing_judges.judge' raised KeyError" in result.stderr
    assert "coherence" in result.stderr  # it was the answers that it failed on
    assert not any(answer.text in result.output for answer in said)


# ------------------------------------------------------------------------------------------ lm-eval

TASK = """\
task: birds
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def task_folder(tmp_path) -> Path:
    """A task of lm-eval with data in the folder itself."""
    questions = [("Which bird cannot fly?", ["penguin", "the common sparrow"], 0)] * 3
    lines = [dict(zip(("question", "choices", "answer"), q, strict=True)) for q in questions]
    (tmp_path / "birds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "birds.yaml").write_text(TASK.format(data=tmp_path / "birds.jsonl"))
    return tmp_path


def test_tasks_without_lm_eval_say_what_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ssah\[eval\]'"):
        check_tasks(["birds"])


@pytest.mark.exhaustive  # importing lm-eval takes long
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: ssah[eval]"
)
def test_tasks_on_local_data_need_no_network(runs, task_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model, tokenizer = load_model(str(runs / "model"))
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    found = multiple_choice(model, tokenizer, ["birds"], folder=task_folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    scores = []
    for choice in (" penguin", " the common sparrow"):
        question = tokenizer("Question: Which bird cannot fly?\nAnswer:")["input_ids"]
        ids = tokenizer(choice)["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([question + ids])).logits[0].log_softmax(-1)
        total = sum(log_probs[len(question) + k - 1, token].item() for k, token in enumerate(ids))
        scores.append((total, total / (len(choice) - 1)))
    right = [first > second for first, second in zip(*scores, strict=True)]
    assert found["birds"]["accuracy"]["rate"] == right[0]
    assert found["birds"]["accuracy_norm"]["rate"] == right[1]
    assert found["birds"]["accuracy"]["n"] == 3
    with pytest.raises(ValueError, match=r"\['bees'\], which are no tasks of lm-eval, nor of"):
        check_tasks(["bees"], task_folder)
    arguments = (
        runs / "model", *SMALL, "--task", "birds", "--task-folder", task_folder,
        "--ablate", f"{runs / 'groups'}:scu", "--out", task_folder / "run",
    )  # fmt: skip
    models = evaluate(*arguments)["result"]["models"]
    assert models[0]["tasks"] == found
    assert models[1]["tasks"]["birds"]["accuracy"]["n"] == 3
    shown = call("evaluate", *arguments).stdout
    assert "Accuracy in %" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_the_utility_rows_are_run_once_for_loss_and_kl(runs, tmp_path, monkeypatch):
    from ssah.studies import paired_measures

    monkeypatch.delattr(paired_measures, "response_log_probs")  # a pass for the loss alone
    options = ["--out", tmp_path / "out", *SMALL, "--ablate", f"{runs / 'groups'}:cu"]
    record = evaluate(runs / "model", *options)
    model, tokenizer = load_model(str(runs / "model"))
    loader = make_loader("builtin:utility_eval[0:6]", tokenizer, batch_size=4)
    cu = UnitGroups.load(runs / "groups", model)["cu"]
    for units, found in zip((cu - cu, cu), record["result"]["models"], strict=True):
        nats, n = 0.0, 0
        for batch in loader:
            ids, mask, labels = (batch[k] for k in ("input_ids", "attention_mask", "labels"))
            with torch.no_grad(), ssah.ablate(model, units):
                logits = model(input_ids=ids, attention_mask=mask).logits.double()
            for row, at in (labels[:, 1:] != -100).nonzero().tolist():
                own = logits[row, at]
                nats += float(own.logsumexp(0) - own[labels[row, at + 1]])
                n += 1
        assert found["utility_loss"] == pytest.approx(nats / n, rel=1e-6)


def test_the_record_of_bfloat16_says_how_many_tokens_are_those_of_each_model_alone(
    runs, found, tmp_path
):
    assert found["result"]["identical_tokens"] is None  # in float32 all of them
    options = ["--out", tmp_path / "out", *SMALL, "--dtype", "bfloat16"]
    record = evaluate(runs / "model", *options, "--ablate", f"{runs / 'groups'}:cu")
    said = record["result"]["identical_tokens"]
    assert said["requests"] == 4
    assert 0 < said["share"] <= 1
    assert 0 < said["tokens"] <= 2 * 4 * 8  # two models, at most eight tokens an answer
