"""The report itself: what stands around its sections.

A page holds no script. Its policy forbids all loading but of embedded pictures, and all styles but its own sheet.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

import numpy as np

from mmrlhf_jax.report.markup import Children, Markup, element, style
from mmrlhf_jax.report.metrics import ended, key_of
from mmrlhf_jax.report.runs import Run
from mmrlhf_jax.report.scales import duration, figure
from mmrlhf_jax.report.sections import Material, Section, sections_of

GENERATOR = "mmrlhf_jax report"
MOST_RUNS = 8  # as many as there are hues that are told apart


def page(material: Material) -> str:
    """The whole document."""
    sections = sections_of(material)
    shown = [section for section in sections if section.body is not None]
    absent = [sentence for section in sections for sentence in section.absent]
    sheet = resources.files("mmrlhf_jax.report").joinpath("style.css").read_text()
    title = "Report: " + ", ".join(run.name for run in material.runs)
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        _header(material, shown),
        element("main", [_section(each) for each in shown], _not_shown(absent), id="content"),
        element("footer", element("p", f"Written by {GENERATOR}. One file: it loads nothing and runs nothing.")),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(sheet)),
        element("meta", name="generator", content=GENERATOR),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        style(sheet),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en').html}\n"


def _policy(sheet: str) -> str:
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _header(material: Material, shown: Sequence[Section]) -> Markup:
    runs = material.runs
    return element(
        "header",
        element("p", GENERATOR, class_="kicker"),
        element("h1", runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"),
        element("div", [_card(run, hue, len(runs)) for hue, run in enumerate(runs)], class_="cards"),
        element("nav", [element("a", each.title, href=f"#{each.anchor}") for each in shown], aria_label="Sections"),
    )


def _card(run: Run, hue: int, count: int) -> Markup:
    facts = [(name, value) for name, value in _facts(run) if value]
    key = element("span", key_of(hue), class_=f"key r{hue}") if count > 1 else None
    return element(
        "section",
        element("h2", key, run.name) if count > 1 else None,
        element("p", f"{run.kind}, {_state(run)}", class_="lead"),
        element("dl", [element("div", element("dt", name), element("dd", value)) for name, value in facts]),
        class_=f"card r{hue}",
    )


def _state(run: Run) -> str:
    done = int(run.steps.step[-1]) if len(run.steps) else 0
    if run.complete is None:
        return f"not finished: {done:,} steps logged"
    steps, planned = run.complete.get("steps", done), run.complete.get("planned", done)
    return f"{steps:,} steps" if steps == planned else f"stopped early after {steps:,} of {planned:,} steps"


def _facts(run: Run) -> list[tuple[str, str]]:
    log = run.steps
    seconds = log.total("seconds")

    def course(name: str, *, percent: bool = False) -> str:
        values = log.values(name)[np.isfinite(log.values(name))]
        if not len(values):
            return ""
        return f"{figure(float(values[0]), percent=percent)} → {figure(ended(log, name), percent=percent)}"

    return [
        ("loss", course("loss")),
        ("reward accuracy", course("rewards/accuracies", percent=True)),
        ("β", course("beta/mean")),
        ("time in steps", duration(seconds) if seconds else ""),
        ("waiting for data", figure(log.total("seconds/data_wait") / seconds, percent=True) if seconds else ""),
        ("compiling", duration(log.total("seconds/compile")) if log.total("seconds/compile") else ""),
        ("groups a second", figure(ended(log, "groups_per_second")) if len(log.values("groups_per_second")) else ""),
    ]


def _section(each: Section) -> Markup:
    return element(
        "section",
        element("h2", each.title, id=f"{each.anchor}-title"),
        each.body,
        id=each.anchor,
        aria_labelledby=f"{each.anchor}-title",
    )


def _not_shown(absent: Sequence[Children]) -> Markup | None:
    if not absent:
        return None
    return element(
        "section",
        element("h2", "Not in this report", id="absent-title"),
        element("ul", [element("li", sentence) for sentence in absent]),
        id="absent",
        aria_labelledby="absent-title",
    )
