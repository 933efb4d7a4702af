from __future__ import annotations

import json

import pytest
from report_samples import write_lines

from mmrlhf_jax.report.answers import Said, Wrong, in_all, read_answers
from mmrlhf_jax.report.examples import drawn, marked, wrong_share
from mmrlhf_jax.report.runs import ReportError


def line(name: str = "q", prompt="What?", **response) -> dict:
    return {"id": name, "row": 0, "prompt": prompt, "responses": [{"text": "3 cats sit", **response}]}


def test_what_generate_writes_is_read_and_the_best_is_shown(tmp_path):
    scored = {"text": "b", "tokens": 1, "ended": False, "score": 1.5, "scores": [1.5], "critiques": ["fine"]}
    file = write_lines(
        tmp_path / "a.jsonl",
        [{"id": "q", "line": 4, "prompt": "What?", "responses": [{"text": "a"}, scored], "best": 1}],
    )
    (found,) = read_answers([str(file)])
    assert found.label == "a"
    (answered,) = found.answers.values()
    assert answered.key == ("q", "line 4")
    assert answered.shown == Said("b", ended=False, score=1.5, critiques=("fine",))


def test_a_conversation_is_a_prompt_too(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    (found,) = read_answers([str(write_lines(tmp_path / "a.jsonl", [line(prompt=turns)]))])
    assert found.answers["q", "row 0"].prompt == (("system", "Be brief."), ("user", "What?"))


def test_wrong_claims_are_ranges_of_the_text_with_or_without_what_is_right(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [line(wrong=[[0, 1, "2"], [7, 10]], missing=["on a mat"], claims=4)])
    (found,) = read_answers([str(file)])
    said = found.answers["q", "row 0"].shown
    assert said.wrong == (Wrong(0, 1, "2"), Wrong(7, 10))
    assert said.faults == 3
    assert wrong_share(found, list(found.answers)) == (3, 4, 1)
    assert marked(said).html == (
        '<mark title="right: 2"><span class="heard">wrong: </span>3</mark>'
        '<ins><span class="heard"> right: </span>2</ins> cats <mark><span class="heard">wrong: </span>sit</mark>'
    )


def test_a_mark_cannot_open_an_element():
    said = Said("<b>x</b>", wrong=(Wrong(0, 4, "<i>"),))
    assert "<b" not in marked(said).html
    assert "<i>" not in marked(said).html


def test_a_long_text_is_cut_and_says_by_how_much():
    assert marked(Said("x" * 1501)).html.endswith("x … and 1 more characters")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wrong": [[5, 3]]}, "ranges follow each other"),
        ({"wrong": [[0, 11]]}, "within the 10 characters"),
        ({"wrong": [[2, 4], [3, 5]]}, "ranges follow each other"),
        ({"wrong": [[1, 1]]}, "none is empty"),
        ({"wrong": [[-1, 1]]}, "not [start, end]"),
        ({"wrong": [[0.0, 1]]}, "not [start, end]"),
        ({"wrong": [[True, 2]]}, "not [start, end]"),
        ({"wrong": "all"}, "not [start, end]"),
        ({"wrong": [[0, 1, 2]]}, "not a string"),
        ({"missing": "cats"}, "'missing' is not a list of strings"),
        ({"wrong": [[0, 1]], "claims": 0}, "at least the 1"),
        ({"claims": 1.5}, "'claims' is 1.5"),
        ({"score": "high"}, "'score' is"),
        ({"critiques": [1]}, "'critiques' is not a list"),
        ({"text": None}, "string 'text'"),
    ],
)
def test_nonsense_is_refused_with_file_line_and_response(tmp_path, fields, message):
    file = write_lines(tmp_path / "a.jsonl", [line(name="good"), line(**fields)])
    with pytest.raises(ReportError) as refused:
        read_answers([str(file)])
    assert str(refused.value).startswith(f"{file}:2: response 0")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ":1: not JSON"),
        ("[1]", ":1: a line is an object"),
        ('{"id": "q", "prompt": "?", "responses": []}', ":1: 'responses'"),
        ('{"id": "q", "responses": [{"text": ""}]}', ":1: 'prompt'"),
        ('{"id": "q", "prompt": "?", "responses": [{"text": ""}], "best": 1}', ":1: 'best' is 1"),
        (json.dumps(line()) + "\n" + json.dumps(line()), ":2: 'q' is on"),
        ("\n", "holds no answers"),
        ("[" * 100_000, ":1: not JSON"),
    ],
)
def test_a_line_that_is_no_answer_is_refused(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ReportError, match=r"a\.jsonl") as refused:
        read_answers([str(tmp_path / "a.jsonl")])
    assert message in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ReportError, match="does not exist"):
        read_answers([str(tmp_path / "none.jsonl")])


def test_files_are_joined_by_prompt_and_named_by_the_user(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [line("one"), line("two")])
    second = write_lines(tmp_path / "b.jsonl", [line("two"), line("three")])
    files = read_answers([f"before={first}", str(second)])
    assert [file.label for file in files] == ["before", "b"]
    assert in_all(files) == [("two", "row 0")]


def test_different_prompts_under_one_name_are_refused(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [line()])
    second = write_lines(tmp_path / "b.jsonl", [line(prompt="Who?")])
    with pytest.raises(ReportError, match=r"b\.jsonl:1: the prompt of 'q' is not that of .*a\.jsonl:1"):
        in_all(read_answers([str(first), str(second)]))
    third = write_lines(tmp_path / "c.jsonl", [line("other")])
    with pytest.raises(ReportError, match="no prompt is answered in all"):
        in_all(read_answers([str(first), str(third)]))
    with pytest.raises(ReportError, match="two files of answers are called"):
        read_answers([f"x={first}", f"x={second}"])


def test_prompts_are_drawn_alike_each_time_in_their_order():
    keys = [(f"q{i}", f"row {i}") for i in range(100)]
    found = drawn(keys, 10)
    assert len(found) == 10
    assert found == drawn(keys, 10) == sorted(found, key=keys.index)
    assert {keys.index(key) % 2 for key in found} == {0, 1}
    assert drawn(keys[:3], 10) == keys[:3]
