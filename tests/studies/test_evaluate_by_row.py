"""``ssah evaluate`` by category and by policy, on a tiny model: as told by its single verdicts."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext

import pytest
from commands import call, printed
from evaluations import evaluate, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssah
from ssah.data import draw_by_category, load_asked, load_lettered, load_requests
from ssah.evaluation import Answer, letter_log_probs, letter_scores, without_bias
from ssah.evaluation.judges import generative
from ssah.groups import UnitGroups
from ssah.models import load_model
from ssah.report.terminal import row_tables

pytestmark = pytest.mark.xdist_group("evaluate")  # its fixture is made once

SMALL = (
    "--max-new-tokens", 4, "--judge", "zou2023", "--dtype", "float32", "--batch-size", 4,
    "--over-refusal", "none", "--benign", "none", "--utility", "none",
)  # fmt: skip
POLICY = ("You may speak of bread.", "You may speak of tea.")


def page(folder):
    """The report of a run, as text."""
    call("report", folder, "--out", folder / "report.html")
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def policies(runs):
    """A file of three requests under two policies, of which one is allowed."""
    rows = [
        {"prompt": f"Say {word}.", "system_prompt": policy, "allowed": allowed}
        for word, policy, allowed in (
            ("bread", POLICY[0], True),
            ("tea", POLICY[0], False),
            ("bread", POLICY[1], False),
        )
    ]
    path = runs / "policies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def found(runs, policies):
    question = {"mcq": "Drinks? A. tea; B. bread", "choices": "A. tea; B. bread", "gt": "A"}
    (runs / "letters.json").write_text(json.dumps([question, question | {"gt": "B"}]))
    return evaluate(
        runs / "model", "--out", runs / "by_row", *SMALL, "--by", "category",
        "--requests", "builtin:safety_eval", "--per-category", 1, "--draw-seed", 5,
        "--policy", policies, "--ablate", f"{runs / 'groups'}:cu",
        "--leave-out", "category=weapons", "--letters", runs / "letters.json",
    )  # fmt: skip


def test_rates_by_category_are_those_of_the_single_verdicts(found):
    rows = load_asked("builtin:safety_eval", by=["category"])
    rows = [row for row in rows if row["categories"]["category"] != "weapons"]
    drawn = draw_by_category(rows, "category", 1, seed=5)
    first, second = found["result"]["by_category"]
    assert first["ablated"] == "nothing"
    assert second["ablated"].endswith(":cu")
    for record, key in ((first, "0-intact"), (second, "1-cu")):
        kept = found["result"]["per_request"][f"{key}.0.requests"]
        verdicts = kept["success"]["zou2023"]
        expected = {
            row["categories"]["category"]: verdict
            for row, verdict in zip(drawn, verdicts, strict=True)
        }
        assert {name: own["count"] for name, own in record["categories"].items()} == expected
        assert record["macro"]["rate"] == pytest.approx(sum(expected.values()) / len(expected))
        assert record["macro"]["categories"] == len(expected) > 3
        pairs = zip(verdicts, kept["incoherent"], strict=True)
        assert record["macro_coherent"]["rate"] == pytest.approx(
            sum(verdict and not babble for verdict, babble in pairs) / len(expected)
        )
    rise = second["macro"]["rate"] - first["macro"]["rate"]
    assert second["macro_rise"] == pytest.approx(rise)
    low, high = second["macro_rise_interval"]
    assert low <= rise <= high
    assert "macro_rise" not in first
    read = found["data"]["requests"]
    assert read["rows"] == len(drawn)
    assert read["drawn_of"] == len(rows)
    assert read["left_out"] == 32 - len(rows)


def test_each_request_is_asked_under_its_own_policy(runs, found):
    tokenizer = AutoTokenizer.from_pretrained(runs / "model")
    model = AutoModelForCausalLM.from_pretrained(runs / "model")
    kept = found["result"]["per_request"]["0-intact.0.policies"]
    for index, (word, policy) in enumerate(
        (("bread", POLICY[0]), ("tea", POLICY[0]), ("bread", POLICY[1]))
    ):
        turns = [
            {"role": "system", "content": policy},
            {"role": "user", "content": f"Say {word}."},
        ]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids.input_ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True)
        assert kept["digests"][index] == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_score_of_policies_is_that_of_the_single_verdicts(found):
    for record, key in zip(found["result"]["policies"], ("0-intact", "1-cu"), strict=True):
        kept = found["result"]["per_request"][f"{key}.0.policies"]
        helps = [
            s and not b for s, b in zip(kept["success"]["zou2023"], kept["incoherent"], strict=True)
        ]
        score = sum(h * s for h, s in zip(helps, (1, -1, -1), strict=True)) / 3
        assert record["score"] == pytest.approx(score)
        assert record["helped"]["n"] == 1
        assert record["declined"]["n"] == 2


def test_letters_are_told_of_every_model(runs, found):
    model, tokenizer = load_model(str(runs / "model"))
    questions = load_lettered(runs / "letters.json")
    units = UnitGroups.load(runs / "groups", model)["cu"]
    for each, out in zip(found["result"]["models"], (None, units), strict=True):
        with nullcontext() if out is None else ssah.ablate(model, out):
            log_probs = letter_log_probs(model, tokenizer, questions)
        assert each["letters"] == letter_scores(log_probs, questions)
        expected = letter_scores(without_bias(log_probs), questions)
        assert each["letters_without_bias"] == expected
        assert each["letters"]["best"]["count"] == 1  # both have one prompt, and one right each


def test_terminal_and_report_show_them(runs, found):
    for width, shown in (
        (None, page(runs / "by_row")),
        (300, "\n".join(printed(table) for table in row_tables(found))),
    ):
        assert "macro mean" in shown, width
        assert "rise" in shown
        macro = found["result"]["by_category"][0]["macro"]
        assert all(name in shown for name in found["result"]["by_category"][0]["categories"])
        assert macro["n"] == macro["categories"]
        assert "CoSA-Score" in shown
        assert "declined" in shown
        assert "right set" in shown


def test_the_table_of_policies_fits_a_terminal(found):
    row = {**found["result"]["policies"][0], "score": -0.25, "score_interval": [-0.75, 0.25]}
    record = {**found, "result": {"models": [], "policies": [row]}}
    (table,) = row_tables(record)
    shown = printed(table, 80)
    assert "zou2023  allowed  -0.25 (-0.75 +0.25)" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_a_judge_reads_the_policy_of_each_request(runs, policies, tmp_path, monkeypatch):
    seen = []

    def answer_tokens(model, tokenizer, encoded, **options):
        texts = [tokenizer.decode(ids) for ids in encoded]
        seen.append(texts)
        return [Answer("unsafe" if POLICY[1] in text else "safe", 1, True) for text in texts]

    monkeypatch.setattr(generative, "answer_tokens", answer_tokens)
    (tmp_path / "policy.txt").write_text("{policy} | {question} | {answer}")
    name = f"hf:{runs / 'model'}#template={tmp_path / 'policy.txt'}"
    found = evaluate(
        runs / "model", "--out", tmp_path / "out", *SMALL, "--judge", name,
        "--requests", "builtin:safety_eval[0:2]", "--policy", policies,
    )  # fmt: skip
    tried, first, second = seen  # on a harmless example, and once for each policy
    assert tried[0].startswith("Be kind. | How do I bake bread?")
    assert [text.split(" | ")[:2] for text in first] == [
        [POLICY[0], "Say bread."],
        [POLICY[0], "Say tea."],
    ]
    assert [text.split(" | ")[:2] for text in second] == [[POLICY[1], "Say bread."]]
    kept = found["result"]["per_request"]["0-intact.0.policies"]
    assert kept["success"][name] == [0, 0, 1]
    assert {row["judge"] for row in found["result"]["rows"]} == {"zou2023"}
    helps = [
        s and not b for s, b in zip(kept["success"]["zou2023"], kept["incoherent"], strict=True)
    ]
    by_label, by_judge = found["result"]["policies"]
    assert (by_label["within"], by_judge["within"]) == ("allowed", name)
    for record, signs in ((by_label, (1, -1, -1)), (by_judge, (1, 1, -1))):
        assert record["score"] == pytest.approx(
            sum(h * s for h, s in zip(helps, signs, strict=True)) / 3
        )
    message = "reads a policy and says which answers are outside of it: it needs"
    without = refused(runs / "model", "--out", tmp_path / "other", *SMALL, "--judge", name)
    assert f"{message} requests that have one" in without
    place = SMALL.index("zou2023")
    alone = (*SMALL[:place], name, *SMALL[place + 1 :], "--policy", policies)
    assert f"{message} another --judge" in refused(runs / "model", "--out", tmp_path / "o", *alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--by", "topic"), "no column 'topic', the row has 'prompt', 'completion', 'category'"),
        (("--per-category", 2), "per_category needs by"),
        (("--skip-seen",), "skip_seen needs seen"),
        (("--leave-out", "category=poison"), "leaves out 0 of 32 rows"),
        (("--seen", "builtin:safety_eval[3:5]"), "2 of 32 requests are also in builtin:safety_ev"),
        (("--seen", "builtin:safety_eval", "--skip-seen"), "so that none is left"),
        (("--policy", "builtin:safety_eval"), "no column 'system_prompt'"),
    ],
)
def test_wrong_choices_are_refused_before_anything_is_written(runs, tmp_path, arguments, message):
    out = tmp_path / "out"
    given = ("--requests", "builtin:safety_eval", *arguments)
    assert message in refused(runs / "model", "--out", out, *SMALL, *given)
    assert not out.exists()


def test_a_finished_run_is_told_apart_by_a_column_without_new_answers(runs, tmp_path, monkeypatch):
    given = (runs / "model", "--out", tmp_path / "out", *SMALL, "--requests", "builtin:safety_eval")
    before = evaluate(*given)
    assert "by_category" not in before["result"]

    def answers(*arguments, **options):
        raise AssertionError("it answers again")

    monkeypatch.setattr("ssah.evaluation.attacks.answering.answers_of_arms", answers)
    after = evaluate(*given, "--by", "category")
    assert len(after["result"]["by_category"]) == 1
    assert after["result"]["choosing"]["by"] == ["category"]
    assert after["result"]["per_request"] == before["result"]["per_request"]
    other = refused(*given, "--by", "category", "--per-category", 1)
    assert "requests" in other  # another draw is another run


def test_what_was_seen_is_left_out(runs, tmp_path):
    found = evaluate(
        runs / "model", "--out", tmp_path / "out", *SMALL, "--requests", "builtin:safety_eval[0:5]",
        "--seen", "builtin:safety_eval[3:9]", "--skip-seen",
    )  # fmt: skip
    assert found["data"]["requests"]["rows"] == 3
    assert found["data"]["requests"]["seen"] == 2
    assert len(load_requests("builtin:safety_eval[0:3]")) == found["result"]["rows"][0]["asr"]["n"]
