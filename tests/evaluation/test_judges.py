"""A judge over HTTP, against a server on this machine: what is sent, tried again, counted, kept, and what ends it."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmrlhf_jax.command import INTERRUPTED, CommandError, UsageError
from mmrlhf_jax.evaluation.judges import Ask, Endpoint, JudgeError, check_endpoint, replies_of

Step = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Judge:
    """A server that does its `steps` one after the other, the last one for good."""

    steps: list[Step]
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""


def say(text: Any) -> Step:
    return send(json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def send(body: bytes, status: int = 200, **headers: str) -> Step:
    def step(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return step


def drip(request: BaseHTTPRequestHandler) -> None:
    """A byte every 50 ms, for ever."""
    request.send_response(200)
    request.end_headers()
    try:
        for _ in range(200):
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass  # the other side has had enough


def hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    told = Judge([say("fine")])
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                told.seen.append(body)
                told.headers.append(dict(self.headers))
                told.paths.append(self.path)
                step = told.steps.pop(0) if len(told.steps) > 1 else told.steps[0]
            step(self)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield told
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(judge: Judge) -> Endpoint:
    return Endpoint(judge.url, "j", timeout=5, retries=2, backoff=0.01, workers=1)


def ask(endpoint: Endpoint, folder: Path, *prompts: str) -> list[str | None]:
    asks = [Ask(prompt, 7) for prompt in prompts]
    return [reply.text for reply in replies_of(asks, endpoint, str(folder / "kept"), bool)]


def test_one_message_is_sent_and_the_first_choice_is_the_reply(judge, endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_TEST", "secret")
    assert ask(replace(endpoint, key_env="KEY_OF_TEST"), tmp_path, "Well?") == ["fine"]
    messages = [{"role": "user", "content": "Well?"}]
    assert judge.seen == [{"model": "j", "messages": messages, "temperature": 0, "max_tokens": 7}]
    assert judge.headers[0]["Authorization"] == "Bearer secret"
    assert judge.paths == ["/v1/chat/completions"]
    assert not any("secret" in file.read_text() for file in (tmp_path / "kept").iterdir())


def test_replies_are_kept_by_content(judge, endpoint, tmp_path):
    judge.steps = [say("one"), say("two"), say("three")]
    assert ask(endpoint, tmp_path, "a", "b", "a") == ["one", "two", "one"]  # the same is asked once
    assert ask(endpoint, tmp_path, "b", "c", "a") == ["two", "three", "one"]
    assert len(judge.seen) == 3
    ask(replace(endpoint, model="k"), tmp_path, "a")  # another judge says something else
    assert len(judge.seen) == 4


def test_a_damaged_kept_reply_is_asked_for_again(judge, endpoint, tmp_path):
    ask(endpoint, tmp_path, "a")
    (kept,) = (tmp_path / "kept").iterdir()
    for text in ("{", "[]", '{"reply": 3}'):
        kept.write_text(text)
        assert ask(endpoint, tmp_path, "a") == ["fine"]
    assert len(judge.seen) == 4


@pytest.mark.parametrize(
    "step",
    [send(b"busy", 429), send(b"", 503, Retry_After="0"), send(b"", 500, Retry_After="Wed, 21 Oct"), hang_up],
    ids=["429", "503", "500", "hang up"],
)
def test_what_passes_is_tried_again(step, judge, endpoint, tmp_path):
    judge.steps = [step, step, say("at last")]
    assert ask(endpoint, tmp_path, "a") == ["at last"]
    assert len(judge.seen) == 3


@pytest.mark.parametrize("step", [send(b"busy", 503), hang_up], ids=["503", "hang up"])
def test_a_server_that_stays_away_ends_the_run_and_what_it_said_before_is_kept(step, judge, endpoint, tmp_path):
    judge.steps = [say("one"), step]
    with pytest.raises(JudgeError, match=r"\(3 tries\); the replies so far are kept: run the same command to go on"):
        ask(endpoint, tmp_path, "a", "b", "c")
    judge.steps = [say("later")]
    assert ask(endpoint, tmp_path, "a", "b") == ["one", "later"]


def test_nobody_there(tmp_path, judge, endpoint):
    nobody = replace(endpoint, url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(JudgeError, match=r"127.0.0.1:9/v1: .*(refused|[Cc]onnect).*\(2 tries\)"):
        ask(nobody, tmp_path, "a")


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (send(b"wrong \x1b[31mkey", 401), r"HTTP 401: wrong \[31mkey"),
        (send(b'{"error": "no such model"}', 404), "no such model"),
        (send(b"", 302, Location="http://127.0.0.1:9/elsewhere"), "HTTP 302"),
    ],
    ids=["401", "404", "redirect"],
)
def test_what_another_try_cannot_mend_ends_the_run_at_once(step, reason, judge, endpoint, tmp_path):
    judge.steps = [step]
    with pytest.raises(JudgeError, match=reason):
        ask(endpoint, tmp_path, "a")
    assert len(judge.seen) == 1


@pytest.mark.parametrize(
    "step",
    [
        send(b"<html>"),
        send(b"\xff\xfe"),
        send(b"[]"),
        send(b'{"choices": []}'),
        send(b'{"choices": [{"message": {"content": "cut'),
        send(b"[" * 100_000),
        say(None),
        say(" \n"),
        send(b" " * 300_000),
    ],
    ids=["html", "bytes", "list", "no choice", "cut", "nested", "null", "blank", "long"],
)
def test_garbage_is_tried_again_then_counted_and_never_kept(step, judge, endpoint, tmp_path):
    judge.steps = [say("one"), step, step, step, say("two")]
    short = replace(endpoint, max_bytes=200_000)
    assert ask(short, tmp_path, "a", "b", "c") == ["one", None, "two"]
    assert len(list((tmp_path / "kept").iterdir())) == 2
    judge.steps = [step]
    assert ask(short, tmp_path, "a", "b", "c") == ["one", None, "two"]  # one that stays garbage blocks no other run
    judge.steps = [say("now")]
    assert ask(short, tmp_path, "b") == ["now"]


def test_nothing_but_garbage_is_no_judge(judge, endpoint, tmp_path):
    judge.steps = [send(b"<html>")]
    with pytest.raises(JudgeError, match=r"none of 2 replies could be used; the first: no chat completion: '<html>'"):
        ask(endpoint, tmp_path, "a", "b")


def test_a_slow_reply_counts_as_none_however_it_drips(judge, endpoint, tmp_path):
    judge.steps = [drip]
    began = time.monotonic()
    with pytest.raises(JudgeError, match=r"timed out \(2 tries\)"):
        ask(replace(endpoint, timeout=0.2, retries=1), tmp_path, "a")
    assert time.monotonic() - began < 3


def test_when_asked_to_stop_it_stops(judge, endpoint, tmp_path):
    with pytest.raises(CommandError) as stopped:
        replies_of([Ask("a", 1)], endpoint, str(tmp_path), lambda: True)
    assert stopped.value.status == INTERRUPTED


def test_workers_ask_at_the_same_time(judge, endpoint, tmp_path):
    together = threading.Barrier(3, timeout=5)

    def meet(request: BaseHTTPRequestHandler) -> None:
        together.wait()
        say("met")(request)

    judge.steps = [meet]
    assert ask(replace(endpoint, workers=3), tmp_path, "a", "b", "c") == ["met"] * 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"url": "file:///etc/passwd"}, "is no http:// or https:// URL"),
        ({"url": "http://"}, "is no http:// or https:// URL"),
        ({"url": "http://me:key@host/v1"}, "a key belongs into --judge.key-env"),
        ({"url": "http://host/v1?key=1"}, "a key belongs into --judge.key-env"),
        ({"model": ""}, "needs --judge.model"),
        ({"timeout": 0}, "--judge.timeout 0 is not positive"),
        ({"timeout": math.inf}, "--judge.timeout inf is not positive and finite"),
        ({"timeout": math.nan}, "--judge.timeout nan is not positive and finite"),
        ({"backoff": math.nan}, "--judge.backoff nan is no finite number"),
        ({"retries": -1}, "--judge.retries -1 is no finite number from 0 on"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "the environment variable NO_SUCH_VARIABLE holds no key"),
    ],
)
def test_what_cannot_be_asked_is_bad_usage(changes, reason):
    with pytest.raises(UsageError, match=reason):
        check_endpoint(replace(Endpoint("http://host/v1", "j"), **changes))
