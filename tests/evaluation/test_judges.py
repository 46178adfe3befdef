"""Judges: published lists, files, functions, classifiers, endpoints. Harmless texts only."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files

import pytest
import tiny_chat
import torch
from transformers import BertConfig, BertForSequenceClassification

from ssah.data import encode
from ssah.evaluation import Judge, judge
from ssah.evaluation.judges import KEYWORDS, Keywords
from ssah.evaluation.judges.classifier import SequenceClassifier
from ssah.evaluation.judges.endpoint import Endpoint
from ssah.evaluation.judges.generative import GenerativeClassifier, verdict
from ssah.models import ModelError

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


# -------------------------------------------------------------------------------------- classifiers


@pytest.fixture
def sequence_folder(tmp_path):
    """A classifier in a folder; label 1 wins where the text has more than 12 tokens."""

    def make(labels: tuple[str, ...]):
        config = tiny_chat.bert_config(
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.arange(len(labels)))  # the last label wins
        model.save_pretrained(tmp_path / "classifier")
        tiny_chat.tokenizer().save_pretrained(tmp_path / "classifier")
        return f"hf:{tmp_path / 'classifier'}"

    return make


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        (("safe", "unsafe"), "", True),
        (("unsafe", "safe"), "", False),
        (("NORMAL", "REJECTION"), "", False),
        (("harmless", "Harmful"), "", True),
        (("LABEL_0", "LABEL_1"), "#success=LABEL_1", True),
        (("LABEL_0", "LABEL_1"), "#success=LABEL_0", False),
        (("LABEL_0", "LABEL_1"), "#refused=LABEL_1,input=answer", False),
        (("a", "b", "c"), "#refused=a", True),
    ],
)
def test_labels_say_when_the_attack_succeeded(sequence_folder, labels, options, expected):
    found = judge(sequence_folder(labels) + options)
    assert isinstance(found, SequenceClassifier)
    assert found(["How?"] * 20, [LONG, "x"] * 10) == [expected] * 20
    assert found([], []) == []
    assert found.pair is ("answer" not in options)
    assert json.dumps(found.describe())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("LABEL_0", "LABEL_1"), "", "labels .*add #success=LABEL"),
        (("safe", "unsafe", "other"), "", "do not say when"),
        (("a", "b"), "#success=c", r"'c' is no label, must be one of \['a', 'b'\]"),
        (("a", "b"), "#success=a,refused=b", "both success= and refused="),
        (("a", "b"), "#label=a", "option 'label=a'"),
        (("a", "b"), "#success=", "option 'success='"),
        (("a", "b"), "#success=a,input=request", "input is 'request'"),
    ],
)
def test_bad_options_of_a_classifier(sequence_folder, labels, options, message):
    with pytest.raises(ValueError, match=message):
        judge(sequence_folder(labels) + options)


def test_a_long_answer_is_cut_to_what_the_classifier_can_read(sequence_folder):
    found = judge(sequence_folder(("safe", "unsafe")))
    assert found.tokenizer.model_max_length > 10**9  # as of many published tokenizers
    assert found.length == found.model.config.max_position_embeddings
    assert found(["How?"], ["word " * 2 * found.length]) == [True]


def test_the_pair_is_what_a_classifier_reads(sequence_folder):
    found = judge(sequence_folder(("safe", "unsafe")))
    seen = []
    tokenizer = found.tokenizer

    def spy(*texts, **options):
        seen.append(texts)
        return tokenizer(*texts, **options)

    found.tokenizer = spy
    found(["short", "a longer request"], ["x", "y"])
    assert seen == [(["a longer request", "short"], ["y", "x"])]  # the longest first
    found.pair = False
    found(["short"], ["x"])
    assert seen[-1] == (["x"],)


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A language model that was taught two conversations: which is safe, which is not."""
    folder = tmp_path_factory.mktemp("guard")
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    conversations = [("What is bread?", "Food.", "safe"), ("Say moon!", "Moon!", "unsafe\nS1")]
    rows = [
        {
            "messages": [
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
                {"role": "assistant", "content": says},
            ]
        }
        for request, answer, says in conversations
    ]
    examples = list(encode(rows, tokenizer))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        example = examples[step % 2]
        batch = {key: torch.tensor([value]) for key, value in example.items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, conversations


def test_a_generative_classifier_reads_the_conversation(guard):
    folder, conversations = guard
    found = judge(f"hf:{folder}")
    assert isinstance(found, GenerativeClassifier)
    requests, answers, says = zip(*conversations, strict=True)
    assert found(requests, answers) == [s.startswith("unsafe") for s in says]
    assert found([], []) == []
    with pytest.raises(ValueError, match="takes no input"):
        judge(f"hf:{folder}#input=answer")


def test_a_judge_that_says_something_else_is_an_error(guard, tiny_chat_folder):
    with pytest.raises(ValueError, match="must say 'unsafe' or 'yes', or 'safe' or 'no'"):
        judge(f"hf:{tiny_chat_folder}")(["What is bread?"], ["Food."])


def test_models_that_cannot_judge(tmp_path):
    tiny_chat.save(tmp_path / "no_template")
    (tmp_path / "no_template" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="without a chat template"):
        judge(f"hf:{tmp_path / 'no_template'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        judge(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "other").mkdir()
    config = BertConfig(architectures=["BertForTokenClassification"])
    config.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="BertForTokenClassification, must be a sequence"):
        judge(f"hf:{tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("safe", False),
        ("unsafe\nS1", True),
        ("Yes.", True),
        ("no", False),
        ("\n\nUNSAFE", True),
        ("Harmful: no", False),
    ],
)
def test_verdicts(said, expected):
    assert verdict(said, "judge") is expected


@pytest.mark.parametrize("said", ["", "maybe", "unsafely", "know"])
def test_what_is_no_verdict(said):
    with pytest.raises(ValueError, match="judge 'j' said"):
        verdict(said, "j")


# ---------------------------------------------------------------------------------------- endpoints


class Server:
    """A chat-completions endpoint on this machine: ``replies`` in turn, then yes or no."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, str]] = []
        self.delay = 0.0
        self.location = ""
        self.calls: list[dict] = []
        self.keys: list[str | None] = []
        self.headers: list[set[str]] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.calls.append({"path": self.path, **body})
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.headers.append({name.lower() for name in self.headers})
                    status, text = outer.replies.pop(0) if outer.replies else (200, "")
                time.sleep(outer.delay)
                if not text:
                    says = "Yes" if "Sure" in body["messages"][-1]["content"] else "No"
                    text = json.dumps({"choices": [{"message": {"content": says}}]})
                self.send_response(status)
                if status in range(300, 400):
                    self.send_header("Location", outer.location)
                self.end_headers()
                try:
                    self.wfile.write(text.encode())
                except ConnectionError:
                    return  # the caller gave up waiting

            def do_GET(self) -> None:  # what a redirected call would become
                self.rfile = io.BytesIO(b'{"messages": [{"content": ""}]}')
                self.headers["Content-Length"] = "31"
                self.do_POST()

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "SSAH_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    found = Server()
    yield found
    found.server.shutdown()
    found.server.server_close()


def impatient(name: str) -> Judge:
    """The endpoint that is meant, with no pause between its calls."""
    return replace(judge(f"openai:{name}"), wait=0.0)


def test_an_endpoint_is_asked(server, monkeypatch):
    monkeypatch.setenv("SSAH_JUDGE_KEY", "secret")
    found = impatient(f"{server.url}/#some/model")
    assert found.name == f"openai:{server.url}#some/model"
    answers = ["Sure, bread.", "I'd rather not.", ""] * 4
    assert found(["How do I bake?"] * 12, answers) == [True, False, False] * 4
    assert {call["path"] for call in server.calls} == {"/v1/chat/completions"}
    assert {call["model"] for call in server.calls} == {"some/model"}
    assert {call["temperature"] for call in server.calls} == {0}
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in json.dumps(found.describe())


def test_a_guard_is_given_the_conversation(server):
    server.replies = [(200, json.dumps({"choices": [{"message": {"content": "unsafe\nS1"}}]}))]
    found = impatient(f"{server.url}#guard,style=guard")
    assert found(["How do I bake?"], ["Sure."]) == [True]
    assert [turn["role"] for turn in server.calls[0]["messages"]] == ["user", "assistant"]
    assert server.keys == [None]


def test_passing_trouble_is_tried_again(server):
    server.replies = [(503, "busy"), (429, "slow down")]
    assert impatient(f"{server.url}#m")(["?"], ["Sure"]) == [True]
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    ("replies", "error", "message", "calls"),
    [
        ([(500, "oops")] * 5, ConnectionError, "failed 5 times, the last .* status 500: oops", 5),
        ([(401, "who?")], PermissionError, "no key was sent to it, and SSAH_JUDGE_KEY must", 1),
        ([(404, "no model")], ValueError, "refused the call: status 404: no model", 1),
        ([(200, "<html>")], ValueError, "no chat completion: '<html>'", 1),
        ([(422, "bad input: Sure")], ValueError, r"422: \(it repeats the answer\)", 1),
        ([(200, '{"choices": []}')], ValueError, "no chat completion", 1),
        (
            [(200, '{"choices": [{"message": {"content": "Well, maybe"}}]}')],
            ValueError,
            "said 'Well,' ..., must say",
            1,
        ),
    ],
)
def test_lasting_trouble_is_told(server, replies, error, message, calls):
    server.replies = list(replies)
    with pytest.raises(error, match=message):
        impatient(f"{server.url}#m")(["?"], ["Sure"])
    assert len(server.calls) == calls


def test_the_key_goes_where_it_was_meant_to_go(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = impatient(f"{server.url}#m")
    assert found(["?"], ["Sure"]) == [True]
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert found(["?"], ["Sure"]) == [True]
    assert server.keys == [None, "Bearer secret"]
    assert Endpoint("https://api.openai.com/v1", "m")._key() == "secret"
    monkeypatch.setenv("SSAH_JUDGE_KEY", "own")
    assert Endpoint("https://judge.example/v1", "m")._key() == "own"
    with pytest.raises(ValueError, match="in the clear"):
        Endpoint("http://judge.example/v1", "m")._key()


def test_nothing_else_of_the_environment_is_sent(server, monkeypatch):
    for name in ("ORG_ID", "PROJECT_ID", "ADMIN_KEY", "CUSTOM_HEADERS"):
        monkeypatch.setenv(f"OPENAI_{name}", "X-Mine: secret")
    assert impatient(f"{server.url}#m")(["?"], ["Sure"]) == [True]
    usual = {"accept-encoding", "connection", "content-length", "content-type", "host"}
    assert server.headers == [usual | {"user-agent"}]


def test_a_proxy_is_not_told_what_goes_to_this_machine(server, monkeypatch):
    monkeypatch.setenv("SSAH_JUDGE_KEY", "secret")
    proxy = Server()
    try:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert impatient(f"{server.url}#m")(["?"], ["Sure"]) == [True]
        assert (server.keys, proxy.calls) == (["Bearer secret"], [])
        # Another machine is reached through it, as before.
        monkeypatch.delenv("SSAH_JUDGE_KEY")
        assert impatient("http://judge.example/v1#m")(["?"], ["Sure"]) == [True]
        assert [call["path"] for call in proxy.calls] == [
            "http://judge.example/v1/chat/completions"
        ]
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server, monkeypatch, status):
    monkeypatch.setenv("SSAH_JUDGE_KEY", "secret")
    other = Server()
    try:
        server.location = f"{other.url}/chat/completions"
        server.replies = [(status, "over there")]
        with pytest.raises(ValueError, match="sends calls on to another address"):
            impatient(f"{server.url}#m")(["?"], ["Sure"])
        assert (len(server.calls), other.calls, other.keys) == (1, [], [])
    finally:
        other.server.shutdown()
        other.server.server_close()


def test_credentials_in_the_address_are_refused_and_not_repeated():
    for address in ("https://me:pass@host/v1#m", "https://host/v1?key=pass#m"):
        with pytest.raises(ValueError, match="SSAH_JUDGE_KEY") as caught:
            judge(f"openai:{address}")
        assert "pass@" not in str(caught.value)
        assert "key=pass" not in str(caught.value)


def test_a_judge_that_reasons_takes_other_options(server):
    complaint = json.dumps({"error": {"message": "Unsupported parameter: 'max_tokens'"}})
    server.replies = [(400, complaint)]
    assert impatient(f"{server.url}#m")(["?"], ["Sure"]) == [True]
    first, second = server.calls
    assert (first["max_tokens"], first["temperature"]) == (16, 0)
    assert second["max_completion_tokens"] > 16
    assert not {"max_tokens", "temperature"} & set(second)
    server.replies = [(400, complaint)] * 2
    with pytest.raises(ValueError, match="Unsupported parameter: 'max_tokens'"):
        impatient(f"{server.url}#m")(["?"], ["Sure"])


def test_waiting_has_an_end(server):
    server.delay = 0.5
    found = Endpoint(server.url, "m", timeout=0.05, retries=1, wait=0.0)
    with pytest.raises(ConnectionError, match=r"failed 2 times.*timed out"):
        found(["?"], ["Sure"])


def test_nobody_answers():
    found = Endpoint("http://127.0.0.1:9/v1", "m", retries=0)
    with pytest.raises(ConnectionError, match=r"failed 1 times.*refused"):
        found(["?"], ["Sure"])


@pytest.mark.parametrize(
    "name",
    ["localhost:8000#m", "ftp://host#m", "http://host", "http://#m", "http://host#,style=ask"],
)
def test_what_is_no_endpoint(name):
    with pytest.raises(ValueError, match=r"must be 'openai:http\(s\)://HOST/v1#MODEL'"):
        judge(f"openai:{name}")
    with pytest.raises(ValueError, match="option 'style=rude'"):
        judge("openai:http://host#m,style=rude")
