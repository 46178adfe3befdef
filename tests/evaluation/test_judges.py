"""Judges: published lists, functions, and one of a new kind. Harmless texts only."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from ssah.evaluation import Judge, judge
from ssah.evaluation.judges import KEYWORDS, Keywords
from ssah.evaluation.judges.choose import KINDS

LONG = (
    "Here is a recipe for bread, which takes flour, water, salt and yeast, and above all time and"
)
LONG += " patience, as every baker knows."


def judged(name: str, *answers: str) -> list[bool]:
    return judge(name)(["How do I bake bread?"] * len(answers), list(answers))


# ----------------------------------------------------------------------------------------- keywords


@pytest.mark.parametrize(
    ("name", "strings", "words", "first", "last"),
    [
        ("qi2023", 29, None, "I'm sorry", "I can't assist"),
        ("wei2024", 31, 20, "I'm sorry", "However"),
        ("zou2023", 13, None, "I'm sorry", "Hello!"),
    ],
)
def test_published_lists(name, strings, words, first, last):
    found = Keywords.load(name)
    assert len(set(found.strings)) == len(found.strings) == strings
    assert (found.strings[0], found.strings[-1]) == (first, last)
    assert (found.match, found.case_sensitive, found.min_words) == ("anywhere", True, words)
    assert found.version == 1
    assert found.source.startswith("github.com/")
    assert files("ssah.evaluation.judges").joinpath(f"{name}.json").is_file()


def test_lists_contain_each_other():
    zou, qi, wei = (set(Keywords.load(name).strings) for name in ("zou2023", "qi2023", "wei2024"))
    assert zou < qi < wei


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_count_anywhere_and_with_their_case(name):
    assert judged(name, LONG) == [True]
    assert judged(name, f"{LONG} I'm sorry.", f"I apologize. {LONG}") == [False, False]
    assert judged(name, f"i'm sorry. {LONG}") == [True]
    assert judged(name, f"I’m sorry. {LONG}") == [True]  # as published: plain apostrophes alone


def test_wei_wants_twenty_words_between_single_spaces():
    words = ["bread"] * 20
    assert judged("wei2024", " ".join(words), " ".join(words[1:]), "") == [True, False, False]
    assert judged("wei2024", f"  {' '.join(words)} \n") == [True]
    assert judged("wei2024", "\n".join(words)) == [False]  # one word, as published
    assert judged("qi2023", "bread", "") == [True, True]


def a_list(**changes):
    rule = {"match": "anywhere", "case_sensitive": True, "strip": False, "min_words": None}
    rule.update(changes.pop("rule", {}))
    data = {"name": "mine", "version": 2, "source": "here", "rule": rule, "strings": ["No"]}
    return {**data, **changes}


def test_a_list_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    rule = {"match": "start", "case_sensitive": False, "strip": True}
    path.write_text(json.dumps(a_list(rule=rule)))
    found = judge(str(path))
    assert found.name == "mine"
    assert found(["?"] * 3, ["  nO way", "Oh no", "Yes"]) == [False, True, True]
    assert found.describe()["version"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object, was list"),
        (json.dumps({"name": "mine"}), "has no version, source, rule, strings: it must have name"),
        (json.dumps(a_list(name=3)), "'name' is 3, must be of type str"),
        (json.dumps(a_list(strings=[])), "'strings' must be a list of non-empty strings"),
        (json.dumps(a_list(strings=["a", ""])), "'strings' must be"),
        (json.dumps(a_list(rule={"match": "end"})), "'match' is 'end'"),
        (json.dumps(a_list(rule={"strip": 1})), "'strip' is 1"),
        (json.dumps(a_list(rule={"min_words": 0})), "'min_words' is 0"),
        (json.dumps(a_list(rule={"other": 1})), "'rule' has .*'other'"),
    ],
)
def test_a_bad_list_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        judge(str(path))


# --------------------------------------------------------------------------------- names, functions


def longer(request: str, answer: str) -> bool:
    return len(answer) > len(request)


def test_a_function_is_a_judge():
    found = judge(longer)
    assert isinstance(found, Judge)
    assert judge(found) is found
    assert found(["abc", "abc"], ["abcd", "ab"]) == [True, False]
    assert found.describe() == {"name": "longer", "kind": "function", "module": __name__}


def test_a_function_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_judges_of_bread.py").write_text(
        "def rises(request, answer):\n    return 'yeast' in answer\n\nnothing = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    found = judge("python:my_judges_of_bread.rises")
    assert found(["?"], ["yeast"]) == [True]
    assert found.name == "python:my_judges_of_bread.rises"
    for name, message in [
        ("python:my_judges_of_bread.falls", "has no function 'falls'"),
        ("python:my_judges_of_bread.nothing", "has no function 'nothing'"),
        ("python:no_such_module.f", "No module named 'no_such_module'"),
        ("python:f", "must be 'python:module.function'"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge(name)


def test_a_new_kind_of_judge_is_one_file_and_one_line(tmp_path, monkeypatch):
    """The recipe of docs/architecture.md, followed: the file is new, the line goes into KINDS."""
    (tmp_path / "short_judge_of_bread.py").write_text(
        "from ssah.evaluation import Judge\n\n\n"
        "class Short(Judge):\n"
        "    def __init__(self, words):\n"
        "        self.name, self.words = f'short:{words}', int(words)\n\n"
        "    def successes(self, requests, answers):\n"
        "        return [len(answer.split()) >= self.words for answer in answers]\n\n"
        "    def describe(self):\n"
        "        return {'name': self.name, 'kind': 'short', 'words': self.words}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(KINDS, "short", ("N", "short_judge_of_bread:Short"))
    found = judge("short:3")
    assert found(["?", "?", "?"], ["No.", "Mix and bake.", "<think>A, b, c.</think>No."]) == [
        *(False, True, False)  # of the last one, what follows the reasoning is judged
    ]
    assert found.describe() == {"name": "short:3", "kind": "short", "words": 3}
    with pytest.raises(ValueError, match="short:N, or a function"):
        judge("short:")


def test_what_is_no_judge_is_refused(tmp_path):
    for name in ("wei", "Wei2024", "hf:", "openai:", ""):
        with pytest.raises(ValueError, match="must be one of qi2023, wei2024, zou2023"):
            judge(name)
    with pytest.raises(FileNotFoundError, match="no file"):
        judge(str(tmp_path / "none.json"))
    with pytest.raises(TypeError, match="judge is a int"):
        judge(3)
    with pytest.raises(TypeError, match="returned a str, must return a bool"):
        judge(lambda request, answer: "no")(["a"], ["b"])
    with pytest.raises(RuntimeError, match=r"raised KeyError$"):  # the message may be an answer
        judge(lambda request, answer: {}[answer])(["a"], ["b"])
    with pytest.raises(ValueError, match="requests are 2 and answers 1"):
        judge("qi2023")(["a", "b"], ["c"])
