"""Chat templates, which are programs of strangers, rendered in a process of their own that the kernel bounds.

jinja2's sandbox keeps a template from files and code, not from looping for ever, doubling a text until memory ends or
computing 9**9**9, and no check inside this process can stop one operation of the interpreter. So one child process
serves all templates of this one, with a bound on its memory and, for every rendering, on its CPU time; a template that
exceeds them ends the child, not the run. It has the variables and functions that transformers gives to templates. What
goes to it and back are lines of JSON.

This file is the parent's side and, run as a script, the child: it imports nothing of the project, and the child
nothing but jinja2.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

CPU_SECONDS = 2.0  # of one rendering; a usual one takes 0.0001
MEMORY_BYTES = 2**30  # of the child, all its addresses
MOST_CHARACTERS = 16 * 2**20  # of what a template writes
REAL_SECONDS = 120.0  # a child that gets no CPU in this time
_BLOCK = 2**16


class TemplateRefused(ValueError):
    """The template raised an error, or exceeded a bound; the message says which."""


class _Child:
    """The process and the pipe to it; `process` None: not started, or ended by a template."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()


_child = _Child()


def _forget() -> None:
    """A forked process has its parent's pipe; two would read each other's answers."""
    global _child
    _child = _Child()


os.register_at_fork(after_in_child=_forget)


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """What a chat template writes. Raises TemplateRefused."""
    request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
    with _child.lock:
        for attempt in (1, 2):
            answer, code = _ask(request)
            if answer is not None:
                break
            if code == -signal.SIGPROF:
                raise TemplateRefused(f"it takes more than {CPU_SECONDS:g} seconds to write one conversation")
            if attempt == 2 or code is None:  # the first may have been ended by somebody else, such as a tired kernel
                how = f"in {REAL_SECONDS:g} seconds" if code is None else f"(its process ended with {code})"
                raise TemplateRefused(f"it does not write the conversation {how}")
    document = json.loads(answer or b"")  # there is one here
    if "refused" in document:
        raise TemplateRefused(document["refused"])
    return str(document["text"])


def _ask(request: bytes) -> tuple[bytes | None, int | None]:
    """The child's answer; without one, the code it ended with, None where it had to be killed."""
    if _child.process is None or _child.process.poll() is not None:
        _child.process = _start()
    process = _child.process
    assert process.stdin
    assert process.stdout
    with suppress(BrokenPipeError):
        process.stdin.write(request)
        process.stdin.flush()
    parts: list[bytes] = []
    until = time.monotonic() + REAL_SECONDS
    while not parts or not parts[-1].endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        part = os.read(process.stdout.fileno(), _BLOCK) if ready else b""
        if not part:
            _child.process = None
            if not ready:
                process.kill()
            with suppress(BrokenPipeError):  # what of the request it did not read any more
                process.stdin.close()
            process.stdout.close()
            code = process.wait()
            return None, code if ready else None
        parts.append(part)
    return b"".join(parts), None


def _start() -> subprocess.Popen[bytes]:
    """Out of the terminal's reach: Ctrl-C is for the parent, and the child ends when its input does."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


def serve() -> None:
    """The child: renders until its input ends."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    with suppress(ValueError, OSError):  # macOS has no such bound; time and output are bounded there too
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is computing
    for kind in (signal.SIGINT, signal.SIGTERM):  # a run that is asked to stop still renders what it has begun
        signal.signal(kind, signal.SIG_IGN)
    compiled: dict[str, Any] = {}
    environment = _environment()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(environment, compiled, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(environment: Any, compiled: dict[str, Any], line: bytes) -> dict[str, str]:
    try:
        request = json.loads(line)
        template = request["template"]
        if template not in compiled:
            compiled.clear()  # a process renders one model's template, seldom two
            compiled[template] = environment.from_string(template)
        text = compiled[template].render(**request["variables"])
    except MemoryError:
        return {"refused": f"it needs more than {MEMORY_BYTES // 2**20} MB of memory"}
    except RecursionError:
        return {"refused": "it calls itself without an end, or is nested too deeply"}
    except Exception as error:  # a template may raise anything
        return {"refused": (str(error) or type(error).__name__)[:500]}
    if len(text) > MOST_CHARACTERS:
        return {"refused": f"it writes {len(text):,} characters; {MOST_CHARACTERS:,} are the most"}
    return {"text": text}


def _environment() -> Any:
    """transformers' (utils/chat_template_utils.py): a sandbox in which nothing that exists can be changed."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant said; it is written as it stands."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's way to declare them

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **fields: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **fields)
            for name in attributes:
                _check_public(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: Any, value: Any) -> None:
            _check_public(name)
            super().__setitem__(name, value)

    def _check_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")

    class Dict:
        """`dict` without its attributes, by which a sandbox is left."""

        def __call__(self, *args: Any, **fields: Any) -> Any:
            return dict(*args, **fields)

        def fromkeys(self, *args: Any) -> Any:
            return dict.fromkeys(*args)

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: Any) -> str:
        return datetime.now().strftime(form)

    def tojson(x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    names = {"raise_exception": raise_exception, "strftime_now": strftime_now, "dict": Dict(), "namespace": Namespace}
    environment.globals.update(names)
    return environment


if __name__ == "__main__":
    serve()
