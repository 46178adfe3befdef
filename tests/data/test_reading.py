"""How commands read and render rows: the same options for each of them, and what they record."""

from __future__ import annotations

import json
import shutil
import sys
import warnings

import pytest
import tiny_chat
import typer
from commands import as_json, call, commands, fails, prepare

from ssah.attribution import Attribution
from ssah.cli import app
from ssah.data import template_options

pytestmark = pytest.mark.xdist_group("cli")

OPTIONS = {
    "--prompt-column",
    "--response-column",
    "--skip-invalid",
    "--overlong",
    "--template",
    "--template-option",
}
NO_SYSTEM = tiny_chat.TEMPLATE.replace(
    "for m in messages", "for m in messages if m['role'] != 'system'"
)
DATED = "{{ strftime_now('%Y-%m-%d') }}\n" + tiny_chat.TEMPLATE
QUIET = tiny_chat.TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"))


def rendering(model, folder, template):
    """A copy of the model's folder with another template."""
    copy = shutil.copytree(model, folder / "model")
    (copy / "chat_template.jinja").write_text(template)
    return copy


def test_every_command_that_reads_rows_has_the_same_options():
    data = {"--data", "--requests", "--safety", "--utility"}
    reading = []
    for path, command in commands(typer.main.get_command(app)):
        own = {option for parameter in command.params for option in parameter.opts}
        if own & data:
            reading.append(path)
            assert own >= OPTIONS, path
        else:
            assert not own & OPTIONS, path
    assert len(reading) == 16


def test_what_is_left_out_and_cut_is_said_and_kept(model, tmp_path):
    rows = [
        {"question": "What is tea?", "said": "A drink."},
        {"question": "say", "said": "word " * 600},
        {"question": "word " * 600, "said": "x"},
        {"question": "", "said": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("attribute", model, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert "no response" in fails(*data)
    named = (*data, "--response-column", "said")
    assert "rows.jsonl:4: the prompt is empty (--skip-invalid" in fails(*named)
    assert "--overlong skip" in fails(*named, "--skip-invalid")
    options = (*named, "--skip-invalid", "--overlong", "skip")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = as_json(*options)
    told = " ".join(str(each.message) for each in said)
    assert "rows left out because they are not valid: 1 (the first" in told
    assert "1 of 3 rows were left out" in told
    assert "1 of 2 rows are longer than max_length = 512" in told
    counts = {"rows": 2, "invalid": 1, "overlong": 1, "cut_rows": 1, "repeated": 0}
    for record in (result["rows_read"], Attribution.load(tmp_path / "out").rows_read):
        assert {key: record[key] for key in counts} == counts
        assert record["cut_tokens"] > 0
        assert record["template"]["options"] == {}
    assert "must have at most max_length" in fails(
        *named, "--skip-invalid", "--overlong", "error", "--max-length", 200
    )


def test_a_warning_is_one_line(model, tmp_path, monkeypatch):
    def show(*args, **kwargs):  # as Python does where pytest does not collect warnings
        sys.stderr.write(warnings.formatwarning(*args[:4]))

    monkeypatch.setattr(warnings, "showwarning", show)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requests.txt").write_text("Why?\nWhy?\n")
    requests, groups = ("--requests", "requests.txt"), ("--groups", ".", "--group", "scu")
    found = call("ablate", model, *requests, *groups, code=2)
    warning, error = found.stderr.splitlines()[-2:]
    assert warning.startswith("warning: requests.txt: 1 of 2 rows repeat a prompt")
    assert error.startswith("error: ")
    assert "counts.py" not in found.stderr


def test_the_template_is_chosen_and_recorded(model, tmp_path):
    data = ("--data", "builtin:safety", "--limit", 4)
    plain = as_json("attribute", model, *data, "--out", tmp_path / "plain")
    (tmp_path / "own.jinja").write_text(QUIET)
    own = ("--template", tmp_path / "own.jinja")
    same = as_json("attribute", model, *data, *own, "--out", tmp_path / "same")
    assert same["data_fingerprint"] == plain["data_fingerprint"]
    assert same["rows_read"]["template"]["sha256"] != plain["rows_read"]["template"]["sha256"]
    option = ("--template-option", "enable_thinking=false")
    quiet = as_json("attribute", model, *data, *own, *option, "--out", tmp_path / "quiet")
    assert quiet["data_fingerprint"] != plain["data_fingerprint"]
    assert quiet["rows_read"]["template"]["options"] == {"enable_thinking": False}
    error = fails("attribute", model, *data, *option, "--out", tmp_path / "x")
    assert "template option 'enable_thinking' does nothing" in error
    error = fails("attribute", model, *data, "--template", "other", "--out", tmp_path / "x")
    assert "template is 'other', must be a file" in error


def test_a_run_goes_on_after_midnight(model, tmp_path, monkeypatch):
    import datetime

    from transformers.utils import chat_template_utils

    def on(day):
        now = classmethod(lambda cls, tz=None: datetime.datetime(2026, 7, day))
        today = type("Day", (datetime.datetime,), {"now": now})
        monkeypatch.setattr(chat_template_utils, "datetime", today)

    dated = rendering(model, tmp_path, DATED)
    prints = []
    for day in (1, 2):
        on(day)
        out = tmp_path / str(day)
        result = as_json("attribute", dated, "--data", "builtin:safety", "--limit", 4, "--out", out)
        prints.append(result["data_fingerprint"])
        assert result["rows_read"]["template"]["date"] == "2024-07-26"
    assert prints[0] == prints[1]


def test_evaluate_refuses_what_it_cannot_ask(model, tmp_path):
    quiet = rendering(model, tmp_path, NO_SYSTEM)
    (tmp_path / "harmful.csv").write_text('goal,target\n"How, then?",Sure\nWhy?,Sure\n')
    rest = ("--over-refusal", "none", "--benign", "none", "--utility", "none")
    options = ("--requests", tmp_path / "harmful.csv", "--judge", "zou2023", *rest)
    options = (*options, "--max-new-tokens", 4, "--out", tmp_path / "out")
    error = fails("evaluate", quiet, *options, "--system-prompt", "Be brief.")
    assert "leaves out the text of system (turn 0)" in error
    assert "leave the system prompt out" in error
    assert not (tmp_path / "out").exists()
    record = as_json("evaluate", quiet, *options)
    assert record["data"]["requests"]["rows"] == 2
    assert record["result"]["template"]["sha256"]
    (tmp_path / "harmful.csv").write_text(f"goal\n{'word ' * 3000}\nWhy?\n")
    error = fails("evaluate", quiet, *options[:-1], tmp_path / "long")
    assert "requests[0] has" in error
    options = (*options[:-1], tmp_path / "long", "--overlong", "skip")
    with pytest.warns(UserWarning, match="requests: 1 of 2 requests were left out"):
        record = as_json("evaluate", quiet, *options)
    assert record["data"]["requests"]["overlong"] == 1
    assert record["result"]["rows"][0]["asr"]["n"] == 1


@pytest.mark.parametrize("command", ["probe", "ablate"])
def test_overlong_requests_are_left_out_where_that_is_asked_for(model, tmp_path, command):
    (tmp_path / "requests.txt").write_text("word " * 600 + "\nWhy?\nHow?\n")
    requests = ("--requests", tmp_path / "requests.txt")
    if command == "probe":
        arguments = ("probe", model, *requests, "--tokens", 2, "--out", tmp_path / "out")
    else:
        prepared = prepare(tmp_path / "runs", 8)
        groups = ("--groups", prepared / "groups", "--group", "scu")
        arguments = ("ablate", prepared / "model", *requests, *groups)
    assert "--overlong skip" in fails(*arguments)
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="requests: 1 of 3 requests were left out"):
        found = as_json(*arguments, "--overlong", "skip")
    if command == "probe":
        assert found["requests"] == 2
    else:
        assert len(found["rows"]) == 2


def test_a_study_says_what_repeats_and_what_was_seen_before(model, tmp_path):
    rows = [{"prompt": f"Question {i}?", "completion": "An answer."} for i in range(4)]
    for name, own in (("safety", [*rows, rows[0]]), ("eval", rows[2:]), ("utility", rows)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    sets = [("--safety", "safety"), ("--utility", "utility"), ("--requests", "eval")]
    options = [word for option, name in sets for word in (option, tmp_path / f"{name}.jsonl")]
    with pytest.warns(UserWarning, match="repeat a prompt") as said:
        call(
            *("scan", model, *options, "--utility-eval", "builtin:utility_eval[:4]"),
            *("--shares", 0.1, "--ru-shares", 0.2, "--out", tmp_path / "out"),
        )
    told = [str(each.message) for each in said]
    assert any("safety.jsonl: 1 of 5 rows repeat a prompt" in each for each in told)
    assert any("2 of the 2 different prompts of requests are also in safety" in e for e in told)
    record = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert record["data"]["safety"]["repeated"] == 1


def test_rows_that_train_do_not_measure(model, tmp_path):
    options = ("--data", "builtin:utility[:8]", "--eval-data", "builtin:utility[6:9]")
    with pytest.warns(UserWarning, match=r"2 of the 3 different prompts of --eval-data .* --data"):
        found = as_json(
            *("finetune", model, *options, "--freeze", "none", "--max-steps", 1),
            *("--max-length", 60, "--out", tmp_path / "out"),
        )
    assert found["rows_read"]["rows"] == found["rows"] == 8
    assert found["rows_read"]["cut_rows"] > 0
    assert found["rows_read"]["template"]["sha256"]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["thinking"], "'thinking', must be KEY=VALUE"),
        (["=1"], "'=1', must be KEY=VALUE"),
        (["a=1", "a=2"], "'a' is given twice"),
    ],
)
def test_template_options_are_checked(given, what):
    with pytest.raises(ValueError, match=what):
        template_options(given)


def test_template_options_are_json_where_they_can_be():
    given = ["a=false", "b=3", "c=low", "d=2026-01-31", 'e="x"', "f=a=b"]
    found = {"a": False, "b": 3, "c": "low", "d": "2026-01-31", "e": "x", "f": "a=b"}
    assert template_options(given) == found
