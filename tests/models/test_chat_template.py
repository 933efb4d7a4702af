"""A chat template is a program of a stranger: it writes what it writes in transformers, and does nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from fuzz_models.templates import BOMBS, ESCAPES
from transformers.utils.chat_template_utils import render_jinja_template

from mmrlhf_jax.models.llava_onevision import template_process
from mmrlhf_jax.models.llava_onevision.fresh import CHAT_TEMPLATE
from mmrlhf_jax.models.llava_onevision.template_process import TemplateRefused, render_template

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief.\n"}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Größe <b>?</b> \U0001f600"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "'quoted'"}]},
]
VARIABLES = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True, "eos_token": "</s>"}
TEMPLATES = [
    CHAT_TEMPLATE,
    "{% for m in messages %}\n  {{ m | tojson }}\n{% if loop.index == 2 %}{% break %}{% endif %}\n{% endfor %}",
    "{% generation %}{{ eos_token }}{% endgeneration %}{{ messages | tojson(indent=2) }}{{ tools is none }}",
    "{% set n = namespace(a=1, b=dict(c=2)) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ n.b['c'] }}{{ undefined }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[1].content[1].text) }}{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_writes_what_it_writes_in_transformers(template: str) -> None:
    theirs, _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, eos_token="</s>")
    assert render_template(template, VARIABLES) == theirs[0]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_within_seconds(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateRefused, match=r"takes more than 2 sec|more than 1024 MB|calls itself|\d{3} characters"):
        render_template(BOMBS[bomb], VARIABLES)
    assert time.monotonic() - began < 30  # 2 s of CPU; other processes may hold it
    assert render_template("{{ 1 }}", {}) == "1"


@pytest.mark.parametrize("escape", [text for text in ESCAPES if "__" in text or "/etc" in text or "append" in text])
def test_nothing_outside_the_sandbox_is_reached(escape: str) -> None:
    try:
        written = render_template(escape, VARIABLES)
    except TemplateRefused:
        return
    assert "class" not in written
    assert "root:" not in written


def test_what_a_template_raises_is_the_message() -> None:
    with pytest.raises(TemplateRefused, match="only two turns"):
        render_template("{{ raise_exception('only two turns') }}", VARIABLES)


def test_a_process_that_somebody_ends_is_started_again() -> None:
    render_template("{{ 1 }}", {})
    process = template_process._child.process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert render_template("{{ 2 }}", {}) == "2"


def test_a_process_that_ends_while_it_is_written_to_is_started_again() -> None:
    """A conversation larger than a pipe holds: what was not read any more is no failure of ours."""
    pipe = subprocess.PIPE
    template_process._child.process = subprocess.Popen(["sleep", "0.5"], stdin=pipe, stdout=pipe)
    text = "x" * 2**20
    assert render_template("{{ text }}", {"text": text}) == text


def test_a_forked_process_has_one_of_its_own() -> None:
    render_template("{{ 1 }}", {})
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        own = template_process._child.process is None
        os.write(writes, render_template("{{ 'a' * 3 }}", {}).encode() + b" own" * own)
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reads, 100) == b"aaa own"
    assert render_template("{{ 3 }}", {}) == "3"
