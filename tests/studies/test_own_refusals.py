"""``ssah refusals``: what is kept, what is dropped and forgotten, resuming, wrong input."""

from __future__ import annotations

import json

import pytest
import tiny_chat
import torch
from commands import call, fails

from ssah.data import load_requests, load_rows
from ssah.evaluation import Answer, prompts
from ssah.studies.refusals import RefusalSettings, run_refusals

SAID = {
    "a": Answer("I cannot help with that. It is wrong.", 9, True),
    "b": Answer("Sure, step 1: take a secret part.", 9, True),
    "c": Answer("I cannot help with", 64, False),
    "d": Answer("Of course, take a secret part. I cannot do it for you.", 12, True),
    "e": Answer("", 0, True),
    "f": Answer("", 64, False, unfinished=True),
    "g": Answer("I'm sorry, but no.", 5, True),
    "h": Answer("I cannot help with that. It is wrong.", 9, True),
}
MARGINS = dict(zip("abcdefgh", (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -0.5, 0.1), strict=True))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The file of the requests; the model is made to say `SAID`. Texts asked stand in a list."""
    calls = []

    def generate(model, tokenizer, requests, **options):
        calls.append(requests)
        return [SAID[each] for each in requests]

    def margins(model, tokenizer, requests, **options):
        return torch.tensor([MARGINS[each] for each in requests], dtype=torch.float64)

    monkeypatch.setattr("ssah.studies.refusals.run.generate", generate)
    monkeypatch.setattr("ssah.studies.refusals.run.refusal_margins", margins)
    file = tmp_path / "asked.txt"
    file.write_text("\n".join([*SAID, "a"]))
    return file, calls


def test_what_two_judges_call_a_refusal_is_kept_and_nothing_else(loading, asked, tmp_path):
    file, calls = asked
    out = tmp_path / "own.jsonl"
    record = run_refusals(loading, out, RefusalSettings(batch_size=3), requests=str(file))
    assert [dict(row) for row in load_rows(out)] == [
        {"prompt": name, "completion": SAID["a"].text} for name in ("a", "h")
    ]
    assert record["result"] == {
        "dtype": "float32",
        "requests": 8,  # "a" is asked once
        "kept": 2,
        "texts": 1,
        "dropped": {
            "cut off": 1,
            "empty": 1,
            "ended inside its reasoning": 1,
            "no refusal to margin": 1,
            "no refusal to qi2023": 2,
        },
    }
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or "secret" not in path.read_text()
    # A finished run writes the same again, and asks nothing.
    before, n = out.read_text(), len(calls)
    out.unlink()
    run_refusals(loading, out, RefusalSettings(batch_size=3), requests=str(file))
    assert (out.read_text(), len(calls)) == (before, n)


def test_an_interrupted_run_goes_on(loading, asked, tmp_path, monkeypatch):
    file, calls = asked
    out, settings = tmp_path / "own.jsonl", RefusalSettings(batch_size=3)
    with monkeypatch.context() as patch:
        patch.setitem(SAID, "e", None)  # which is no answer
        with pytest.raises(AttributeError):
            run_refusals(loading, out, settings, requests=str(file))
    assert not out.exists()
    calls.clear()
    run_refusals(loading, out, settings, requests=str(file))
    assert calls == [["d", "e", "f"], ["g", "h"]]
    assert len(load_rows(out)) == 2


def test_the_command_writes_what_the_model_says(tmp_path, monkeypatch):
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    stops = list(range(0, 800, 7))  # so that a random model ends its turns
    model.generation_config.eos_token_id = stops
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "never_fulfilled.py").write_text("def judge(request, answer):\n    return False\n")
    own = {"name": "own", "version": 1, "source": "here", "strings": list("aeiou")}
    rule = {"match": "anywhere", "case_sensitive": False, "strip": True, "min_words": 20}
    (tmp_path / "own.json").write_text(json.dumps({**own, "rule": rule}))
    monkeypatch.chdir(tmp_path)
    requests = load_requests("builtin:safety_eval[0:6]")
    expected = []
    for request, ids in zip(requests, prompts(tokenizer, requests), strict=True):
        new: list[int] = []
        while len(new) < 40 and (not new or new[-1] not in stops):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + new])).logits
            new.append(int(logits[0, -1].argmax()))
        text = tokenizer.decode(new[:-1], skip_special_tokens=True).strip()
        if new[-1] in stops and text:
            expected.append({"prompt": request, "completion": text})
    assert expected
    arguments = (
        "refusals", folder, "--requests", "builtin:safety_eval[0:6]", "--dtype", "float32",
        "--judge", "own.json", "--judge", "python:never_fulfilled.judge", "--max-new-tokens", 40,
        "--out", "own.jsonl",
    )  # fmt: skip
    found = json.loads(call(*arguments, "--json").stdout)
    assert [dict(row) for row in load_rows("own.jsonl")] == expected
    assert found["kept"] == len(expected)
    assert found["kept"] + sum(found["dropped"].values()) == found["requests"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judge", "qi2023", "--judge", "zou2023"), "must be of two kinds at least"),
        (("--judge", "margin"), "must be of two kinds at least"),
        (("--judge", "wei2024", "--judge", "margin", "--max-new-tokens", 8), "max_new_tokens is 8"),
        (("--requests", "none.txt"), "none.txt"),
    ],
)
def test_wrong_input_is_refused(model_folder, tmp_path, options, message):
    requests = () if "--requests" in options else ("--requests", "builtin:safety_eval[0:2]")
    out = tmp_path / "own.jsonl"
    assert message in fails("refusals", model_folder, *requests, *options, "--out", out)
    assert not list(tmp_path.iterdir())


def test_a_file_of_somebody_else_stays(loading, tmp_path):
    out = tmp_path / "own.jsonl"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"own\.jsonl', which is there already"):
        run_refusals(loading, out, RefusalSettings(), requests="builtin:safety_eval[0:2]")
    assert out.read_text() == "mine"


def test_no_refusal_at_all_is_an_error(loading, tmp_path):
    out = tmp_path / "own.jsonl"
    with pytest.raises(ValueError, match="requests has 2, and no answer is a refusal: "):
        run_refusals(loading, out, RefusalSettings(), requests="builtin:safety_eval[0:2]")
    assert not out.exists()
