"""Final answers: how each kind is read, exact match, and the guard against what a model lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from answered import judged, questions_of
from data_samples import write_rows

from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.final_answer import benchmark, extract, read_baseline, sign_test, turned


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("number", "First 3, then 4. #### 1,234.50", "2469/2"),
        ("number", "The answer is $18.00, not 19", "18"),
        ("number", r"so \boxed{\frac{1}{2} = 0.5} of 7", "1/2"),  # the first number in it
        ("number", r"\boxed{-\dfrac{ 3 }{4}}", "-3/4"),
        ("number", r"it is 2\frac{1}{2}", "5/2"),
        ("number", r"\boxed{\frac{1}{0}}", None),
        ("number", "5e-05", "1/20000"),
        ("number", "0.00005", "1/20000"),
        ("number", "1e+16", "1" + "0" * 16),
        ("number", r"5 \times 10^{-5}", "1/20000"),
        ("number", "3 × 10^2 metres", "300"),
        ("number", "1e999999999", None),
        ("number", "\N{MINUS SIGN}5", "-5"),
        ("number", "he owes -$5", "-5"),
        ("number", "$-5", "-5"),
        ("number", "from $10-$20", "20"),
        ("number", "3 + 4 = 7.", "7"),
        ("number", "Answer: 3/4 of it", "3/4"),
        ("number", "about -5%", "-5"),
        ("number", "1/0", None),
        ("number", "9" * 5000, None),
        ("number", "none", None),
        ("choice", "The answer is (B).", "B"),
        ("choice", "C", "C"),
        ("choice", "D. because (A) is wrong", "D"),
        ("choice", "Either (A) or rather (C)", "C"),
        ("choice", "I think so", None),
        ("yes_no", "Hm. No, yes", "no"),
        ("yes_no", "No wonder: the answer is yes", "yes"),
        ("yes_no", "nothing", None),
        ("text", "Let me see.\nThe Eiffel-Tower!", "eiffel tower"),
        ("text", "Answer: a red bus\nreally", "red bus"),
        ("text", "  ", None),
    ],
)
def test_what_is_read(kind, text, found):
    assert extract(text, kind) == found


def test_figures_by_hand(tmp_path: Path):
    """Numbers: 1/2 = 0.5 right, 8 wrong; a choice of which nothing is read: 1/3 right, 2/3 found."""
    rows = [
        {"prompt": "?", "answer": 0.5, "kind": "number"},
        {"prompt": "?", "answer": "9", "kind": "number"},
        {"prompt": "?", "answer": "B", "kind": "choice"},
    ]
    bench = benchmark()
    found = bench.measure(judged(bench, questions_of(bench, tmp_path, rows), ["It is 1/2", "8", "none of these"]))
    assert (found["overall"]["accuracy"], found["overall"]["found"]) == (1 / 3, 2 / 3)
    assert (found["number"]["accuracy"], found["choice"]["accuracy"]) == (1 / 2, 0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "?", "answer": "many", "kind": "number"}, "'answer' 'many' holds no number"),
        ({"prompt": "?", "answer": "1"}, "'kind' is None; number, choice, yes_no or text was expected"),
        ({"prompt": "?", "kind": "text"}, "column 'answer' is missing"),
    ],
)
def test_a_bad_row_is_named(row, reason, tmp_path: Path):
    with pytest.raises(BenchmarkError, match=f"rows.jsonl:1: {reason}"):
        questions_of(benchmark(), tmp_path, [row])


def test_the_sign_test_by_hand():
    """0 of 5 turned right: 2 / 2^5 = 1/16; 1 of 4: 2 (1 + 4) / 16 = 5/8; even, or nothing turned: 1."""
    assert (sign_test(5, 0), sign_test(1, 3), sign_test(2, 2), sign_test(0, 0)) == (1 / 16, 5 / 8, 1, 1)


def test_a_baseline_is_of_the_same_rows(tmp_path: Path):
    bench = benchmark("yes_no")
    questions = questions_of(bench, tmp_path, [{"id": name, "prompt": "?", "answer": "yes"} for name in "abc"])
    before, now = (judged(bench, questions, answers) for answers in (["yes", "yes", "no"], ["no", "yes", "yes"]))
    write_rows(tmp_path / "rows.jsonl", [before[2], before[0], before[1]])
    assert read_baseline(str(tmp_path), now) == before
    assert turned(before, now) == "1 rows became wrong and 1 right since the baseline; sign test p = 1"
    for name, other in (("kind", "text"), ("category", "else")):
        write_rows(tmp_path / "rows.jsonl", [{**before[0], name: other}, *before[1:]])
        with pytest.raises(BenchmarkError, match="is of other rows"):
            read_baseline(str(tmp_path), now)
    write_rows(tmp_path / "rows.jsonl", before[:2])
    with pytest.raises(BenchmarkError, match="is of other rows"):
        read_baseline(str(tmp_path), now)
    write_rows(tmp_path / "rows.jsonl", [{"id": "a"}])
    with pytest.raises(BenchmarkError, match="is not of final_answer"):
        read_baseline(str(tmp_path), now)
