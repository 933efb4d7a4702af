"""Whatever numbers a run logged, its charts are drawn, within their frame and without a number that is none."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest

from mmrlhf_jax.objectives import MMDPO, MMDPOReleasedFactor
from mmrlhf_jax.report.beta_map import Rule, beta_chart
from mmrlhf_jax.report.charts import Chart, Line, describe, line_chart
from mmrlhf_jax.report.curves import curve
from mmrlhf_jax.report.runs import Series

ODD = (
    0, 1, -1, 3, 1e308, -1e308, 5e-324, -5e-324, 1e-300, 1e-9, 1e9, 1e16, 1e16 + 2, 0.1, 0.1 + 1e-17, 2.0**53,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
PLACE = re.compile(r' (x|y|x1|x2|y1|y2|cx|cy|width|height|d)="([^"]*)"')


def line(values, tag: str = "", dots: bool = False) -> Line:
    found = curve(Series(np.arange(1, len(values) + 1), np.array(values, float)))
    assert found is not None
    return Line(tag, tag, 0, found, dots=dots)


def check_places(html: str) -> None:
    for name, text in PLACE.findall(html):
        assert "nan" not in text, name
        assert "inf" not in text, name
        for number in re.findall(r"-?\d+\.?\d*", text):
            assert -60 <= float(number) <= 420, (name, number)


@pytest.mark.parametrize("seed", range(150))
def test_odd_numbers_are_drawn_within_the_frame(seed):
    dice = random.Random(seed)
    own = dice.sample(ODD, dice.randint(1, 5))
    values = [dice.choice(own) for _ in range(dice.choice([1, 2, 3, 149, 150, 151, 1000]))]
    steps = np.cumsum([dice.choice([1, 1, 1, 5, 1000]) for _ in values]) - 1
    found = curve(Series(steps, np.array(values, float)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if found is not None:
            options = {"percent": dice.random() < 0.3, "log": dice.random() < 0.5, "within": dice.choice([(), (0, 1)])}
            check_places(line_chart(Chart("T", [Line("", "A", 0, found)], **options)).html)
        margins = np.array([value for value in values if abs(value) < 1e100])
        if len(margins):
            check_places(beta_chart([Rule(0, MMDPO()), Rule(1, MMDPOReleasedFactor())], margins, "T").html)


def test_a_chart_in_words_says_where_it_began_ended_and_went():
    said = describe(Chart("Loss", [line([4, 1, 9, 2], "A")]))
    assert said == "Loss by step. A: from 4 at step 1 to 2 at step 4, between 1 and 9."
    assert describe(Chart("Loss", [line([4])])) == "Loss by step. 4 at step 1."


def test_the_table_has_every_point_of_every_line_and_blanks_where_one_has_none():
    html = line_chart(Chart("Loss", [line([4, 1, 9]), line([5], "held-out", dots=True)])).html
    assert '<th scope="row">1</th><td>4</td><td>5</td>' in html
    assert '<th scope="row">2</th><td>1</td><td></td>' in html


def test_a_gap_splits_the_line_and_a_point_alone_is_a_dot():
    html = line_chart(Chart("Loss", [line([1, 2, float("nan"), 3])])).html
    (path,) = re.findall(r'<path d="([^"]*)" class="line"', html)
    assert path.count("M") == 2
    assert html.count('class="dot"') == 1
    assert "1 value is NaN, infinite or beyond 1e100, the first at step 3." in html


def test_an_axis_is_logarithmic_only_where_positive_values_are_far_apart():
    for values, logarithmic in (([1, 2], False), ([1, 20], True), ([0, 20], False), ([-1, 20], False)):
        assert ("Logarithmic axis." in line_chart(Chart("Loss", [line(values)], log=True)).html) == logarithmic
