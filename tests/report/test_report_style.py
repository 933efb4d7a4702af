"""What the style sheet promises to eyes: enough contrast for every colour that text has, in light and in dark."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from mmrlhf_jax.report.page import MOST_RUNS

SHEET = resources.files("mmrlhf_jax.report").joinpath("style.css").read_text()
LIGHT, DARK = (dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6})", block)) for block in SHEET.split("@media")[:2])
TEXT = ("ink", "soft", "faint", "wrong", "right", *(f"r{hue}" for hue in range(MOST_RUNS)))


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(colours):
    for name in TEXT:
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    assert contrast(colours["wrong"], colours["wrong-wash"]) >= 4.5
    assert contrast(colours["ink"], colours["differs"]) >= 4.5
    assert contrast(colours["focus"], colours["page"]) >= 3


def test_both_schemes_name_the_same_colours():
    assert LIGHT.keys() == DARK.keys()
    assert set(re.findall(r"var\(--([\w-]+)", SHEET)) - {"own"} == LIGHT.keys()
