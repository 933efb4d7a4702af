"""A judge behind an OpenAI-compatible endpoint that the user names, and its replies kept on disk.

Nothing here runs unless a URL is given. A request is POST URL/chat/completions with one user message, temperature 0.
Replies are kept by content (URL, model, message, length), one file each, so that an interrupted run asks nothing twice
and a change of one answer asks one question.

What is tried again, with growing pauses: no connection, no reply in time, HTTP 408, 409, 425, 429 and 5xx, and a reply
that is no chat completion. A server that stays unreachable ends the run; replies that stay unusable are counted as
such, and no verdict is made of them. Other HTTP errors (a wrong key, an unknown model) end the run at once. Redirects
are not followed, since the key would go with them. A reply is read up to a bound of bytes and seconds.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.command import INTERRUPTED, CommandError, UsageError, one_line, progress_line

LONGEST_PAUSE = 60.0  # seconds; what a server asks for beyond this is not waited for
RETRIED = (408, 409, 425, 429)
_FORMAT = 1  # raised whenever the same request would be kept otherwise


class JudgeError(CommandError):
    """The judge cannot be used: what it said, and what to do."""


@dataclass(frozen=True)
class Endpoint:
    """A judge that answers over HTTP."""

    url: str = ""
    """of an OpenAI-compatible API, such as http://localhost:8000/v1; nothing is asked of anyone without it"""
    model: str = ""
    """the name the server knows the judge by"""
    key_env: str = ""
    """environment variable that holds the key, if one is needed; the key is never written anywhere"""
    cache: str = ""
    """directory of replies; default: OUTPUT/replies. Runs may share one"""
    timeout: float = 60.0
    """seconds a reply may take"""
    retries: int = 4
    """times a request is repeated"""
    backoff: float = 1.0
    """seconds before the first repetition; doubled for each further one"""
    workers: int = 4
    """requests at a time"""
    max_bytes: int = 2**20
    """longest reply that is read"""


@dataclass(frozen=True, slots=True)
class Ask:
    """One message to a judge, and how many tokens it may answer with."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What the judge said; `text` None: nothing that could be used, for `reason`."""

    text: str | None
    reason: str = ""


class _Refused(Exception):
    """A try that failed; `unusable`: there was a reply, and it was no chat completion; `pause`: seconds to wait."""

    def __init__(self, reason: str, *, unusable: bool = False, pause: float = 0.0):
        super().__init__(reason)
        self.reason, self.unusable, self.pause = reason, unusable, pause


def check_endpoint(endpoint: Endpoint) -> None:
    """Raises UsageError for one that cannot be asked."""
    parts = urlsplit(endpoint.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--judge.url {endpoint.url!r} is no http:// or https:// URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError("--judge.url holds a user, query or fragment: a key belongs into --judge.key-env")
    if not endpoint.model:
        raise UsageError("--judge.url needs --judge.model, the name the server knows the judge by")
    for name in ("timeout", "workers", "max_bytes"):
        if not 0 < getattr(endpoint, name) < math.inf:
            raise UsageError(f"--judge.{name.replace('_', '-')} {getattr(endpoint, name)} is not positive and finite")
    for name in ("retries", "backoff"):
        if not 0 <= getattr(endpoint, name) < math.inf:
            raise UsageError(f"--judge.{name} {getattr(endpoint, name)} is no finite number from 0 on")
    _key(endpoint)


def _key(endpoint: Endpoint) -> str:
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(f"--judge.key-env: the environment variable {endpoint.key_env} holds no key")
    return key


def replies_of(asks: Sequence[Ask], endpoint: Endpoint, cache: str, stopped: Callable[[], bool]) -> list[Reply]:
    """The reply to each of `asks`; those that `cache` has are not asked for.

    Raises:
        CommandError: `stopped` said so.
        JudgeError: the endpoint cannot be reached or refuses, or not one reply to `asks` can be used.
    """
    check_endpoint(endpoint)
    directory = storage.to_path(cache)
    directory.mkdir(parents=True, exist_ok=True)
    names = [_name(endpoint, ask) for ask in asks]
    found = {name: reply for name in dict.fromkeys(names) if (reply := _kept(directory, name)) is not None}
    todo = {name: ask for name, ask in zip(names, asks, strict=True) if name not in found}
    with progress_line(total=len(todo), desc="judge", unit="reply", disable=not todo) as bar:
        for name, reply in _ask_all(todo, endpoint, stopped):
            if reply.text is not None:  # what could not be used may be usable next time
                _keep(directory, name, endpoint, reply.text)
            found[name] = reply
            bar.update()
    unusable = [found[name].reason for name in todo if found[name].text is None]
    if unusable and len(unusable) == len(found):  # kept replies count: one stubborn request blocks no run
        raise JudgeError(f"{endpoint.url}: none of {len(found)} replies could be used; the first: {unusable[0]}")
    return [found[name] for name in names]


def _name(endpoint: Endpoint, ask: Ask) -> str:
    stated = [_FORMAT, endpoint.url.rstrip("/"), endpoint.model, ask.prompt, ask.max_tokens]
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def _kept(directory: epath.Path, name: str) -> Reply | None:
    """A kept reply; a damaged file is asked for again."""
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    try:
        text = json.loads(path.read_text())["reply"]
    except (ValueError, KeyError, TypeError):
        return None
    return Reply(text) if isinstance(text, str) else None


def _keep(directory: epath.Path, name: str, endpoint: Endpoint, text: str) -> None:
    kept = {"model": endpoint.model, "reply": text}
    storage.write_whole(directory / f"{name}.json", (json.dumps(kept) + "\n").encode())


def _ask_all(todo: dict[str, Ask], endpoint: Endpoint, stopped: Callable[[], bool]) -> Any:
    """Yields (name, reply) as they come. The first request that cannot be made ends it."""
    halt = threading.Event()
    with ThreadPoolExecutor(endpoint.workers) as pool:
        pending: dict[Future[Reply], str] = {pool.submit(_answered, ask, endpoint, halt): n for n, ask in todo.items()}
        try:
            while pending:
                if stopped():
                    raise CommandError("interrupted; replies are kept: run the same command to go on", INTERRUPTED)
                for future in wait(pending, 0.5, FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        finally:
            halt.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _answered(ask: Ask, endpoint: Endpoint, halt: threading.Event) -> Reply:
    """The reply, after as many tries as are allowed."""
    failed = _Refused("")
    for tried in range(endpoint.retries + 1):
        if tried:
            halt.wait(min(LONGEST_PAUSE, max(failed.pause, endpoint.backoff * 2 ** (tried - 1))))
        if halt.is_set():
            raise JudgeError("stopped")  # nobody reads it: another request has ended the run
        try:
            return Reply(_fetch(ask, endpoint))
        except _Refused as error:
            failed = error
    if failed.unusable:
        return Reply(None, failed.reason)
    raise JudgeError(
        f"{endpoint.url}: {failed.reason} ({endpoint.retries + 1} tries); the replies so far are kept: run the same "
        "command to go on"
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None makes an error of the redirect."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def _fetch(ask: Ask, endpoint: Endpoint) -> str:
    base = endpoint.url.rstrip("/")
    url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": ask.prompt}],
        "temperature": 0,
        "max_tokens": ask.max_tokens,
    }
    headers = {"Content-Type": "application/json"}
    if key := _key(endpoint):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    until = time.monotonic() + endpoint.timeout
    try:
        with _OPENER.open(request, timeout=endpoint.timeout) as response:
            return _text_of(_read(response, endpoint.max_bytes, until))
    except urllib.error.HTTPError as error:
        with error:
            said = one_line(error.read(2000).decode("utf-8", "replace"))[:300]
        if error.code in RETRIED or error.code >= 500:
            raise _Refused(f"HTTP {error.code} {said}", pause=_seconds(error.headers.get("Retry-After"))) from None
        raise JudgeError(f"{url} answers HTTP {error.code}: {said or error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Refused(str(getattr(error, "reason", "") or error) or type(error).__name__) from None


def _read(response: Any, most: int, until: float) -> bytes:
    """The body. A server may send a byte now and then: the time counts for all of it."""
    body = b""
    while block := response.read1(65536):
        body += block
        if len(body) > most:
            raise _Refused(f"the reply has more than {most} bytes", unusable=True)
        if time.monotonic() > until:
            raise _Refused("timed out")
    return body


def _text_of(body: bytes) -> str:
    """What the first choice of a chat completion says."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        said = one_line(body[:200].decode("utf-8", "replace"))
        raise _Refused(f"no chat completion: {said!r}", unusable=True) from None
    if not isinstance(text, str) or not text.strip():
        raise _Refused("the judge said nothing", unusable=True)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate could not be written


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; a date in it, which is rare, is passed over."""
    try:
        return max(0.0, min(LONGEST_PAUSE, float(header or 0)))
    except ValueError:
        return 0.0
