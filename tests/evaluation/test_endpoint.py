"""Judges behind an endpoint: what is sent where, and what is done about trouble."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ssah.evaluation import Judge, judge
from ssah.evaluation.judges.endpoint import Endpoint


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
