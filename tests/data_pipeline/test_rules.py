"""Rewards by rule: conversations whose answers are to agree, as arrays, as texts, and beside a dataset."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import write_rows

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.rewards import read_rewards, stored_scores
from mmrlhf_jax.data.rules import UNREAD, RuleError, Weights, read_rule, symbolic_consistency
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.groups import Group, Origin, Response, Turn

RULE: dict[str, Any] = {
    "questions": [
        {"cells": ["yes", "there are cells"], "none": ["no", "no cells"]},
        {"healthy": ["healthy"], "ill": ["cancer", "ill"], "unclear": ["not healthy enough to say"]},
        {"treat": ["treat"], "wait": ["wait", "do nothing"]},
    ],
    "combinations": [["cells", "ill", "treat"], ["cells", "healthy", "wait"], ["none", "unclear", "*"]],
}


def rule(tmp_path: Path, **changes: Any):
    (tmp_path / "rule.json").write_text(json.dumps({**RULE, **changes}))
    return read_rule(str(tmp_path / "rule.json"))[0]


def conversation(*answers: str, last: tuple[str, ...], facts: tuple[str, ...] = ()) -> Group:
    turns = [Turn("user", "Question 1?")]
    for n, answer in enumerate(answers, 2):
        turns += [Turn("assistant", answer), Turn("user", f"Question {n}?")]
    responses = tuple(Response(text) for text in last)
    return Group("c", tuple(turns), (), responses, (), (Origin("talk.jsonl", 4),), facts)


def test_the_reward_is_a_sum_over_answers_and_over_neighbours() -> None:
    """Every conversation of three answers out of three, unread ones among them, beside a loop over what it says."""
    rng = np.random.default_rng(0)
    valid = rng.random((2, 3, 3)) < 0.5
    weights = Weights(right=2.0, wrong=-0.25, unread=-1.0, consistent=0.75, inconsistent=-0.125)
    answers = np.array(list(itertools.product(range(-1, 3), repeat=3)))
    truth = np.array([1, UNREAD, 0])
    expected = []
    for said in answers:
        total = 0.0
        for one, right in zip(said, truth, strict=True):
            total += weights.unread if one < 0 else 0 if right < 0 else weights.right if one == right else weights.wrong
        for q, (one, other) in enumerate(itertools.pairwise(said)):
            agree = one >= 0 and other >= 0 and valid[q, one, other]
            total += weights.consistent if agree else weights.inconsistent
        expected.append(total)
    np.testing.assert_allclose(symbolic_consistency(answers, truth, valid, weights), expected)
    assert symbolic_consistency(np.array([0]), np.array([0]), valid[:0]).tolist() == 1.0


def test_the_table_says_which_neighbours_go_together(tmp_path: Path) -> None:
    assert np.argwhere(rule(tmp_path).valid).tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 0, 1], [1, 1, 0], [1, 2, 0], [1, 2, 1]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("q", "text", "option"),
    [
        (0, "Yes, I think.", 0),
        (0, "There are cells: yes!", 0),
        (0, "No cells.", 1),
        (0, "I do not know", UNREAD),  # 'no' within a word is none
        (0, "yes and no", UNREAD),
        (1, "HEALTHY", 0),
        (1, "It is not healthy enough to say.", 2),  # the longest phrase, not the one within
        (1, "", UNREAD),
    ],
)
def test_an_answer_is_the_option_whose_phrase_it_holds(tmp_path: Path, q: int, text: str, option: int) -> None:
    assert rule(tmp_path).read(q, text) == option


def test_responses_are_judged_as_the_last_answer_of_their_conversation(tmp_path: Path) -> None:
    asked = conversation("Yes.", last=("Cancer.", "Healthy.", "not healthy enough to say", "Perhaps."))
    assert rule(tmp_path).judge(asked).score == (1.0, 1.0, 0.0, -0.5)
    told = conversation("Yes.", "Cancer.", last=("Treat.", "Wait."), facts=("yes", "ill", "treat"))
    assert rule(tmp_path).judge(told).score == (2.0, 1.0)
    assert rule(tmp_path, truth=True).judge(told).score == (5.0, 3.0)
    mild = rule(tmp_path, truth=True, weights={"right": 0.5, "consistent": 0.25})
    assert mild.judge(told).score == (2.0, 1.25)


def test_a_conversation_that_a_rule_cannot_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"talk\.jsonl:4: 4 answers, and the rule has 3 questions"):
        rule(tmp_path).judge(conversation("a", "b", "c", last=("d",)))
    with pytest.raises(RuleError, match=r"talk\.jsonl:4: 1 facts for 2 answers, .*--map facts=FIELD"):
        rule(tmp_path, truth=True).judge(conversation("yes", last=("ill",), facts=("yes",)))
    with pytest.raises(RuleError, match=r"talk\.jsonl:4: fact 2, 'rain', is none of the options of question 2"):
        rule(tmp_path, truth=True).judge(conversation("yes", last=("ill",), facts=("yes", "rain")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": 3}, "questions is no list"),
        ({"questions": []}, "a rule has questions"),
        ({"questions": [{"a": ["x"]}] * 3}, "question 1 is no object of 2 to 256 options"),
        ({"questions": [{"a": ["x"], "b": []}] * 3}, "question 1: every option has phrases"),
        ({"questions": [{"a": ["x"], "b": [1]}] * 3}, "question 1: every option has phrases"),
        ({"questions": [{"a": ["x"], "b": "y"}] * 3}, "question 1: an option's phrases is no list"),
        ({"questions": [{"a": ["x"], "b": ["X"]}] * 3}, "question 1: a phrase stands under two options"),
        ({"questions": [{"a": ["x"], "*": ["y"]}] * 3}, "stands for every option"),
        ({"combinations": []}, "1 to 10000 combinations"),
        ({"combinations": [["cells", "ill"]]}, "combination 1 is no list of 3 answers"),
        ({"combinations": [["cells", "rain", "*"]]}, "combination 1: 'rain' is no option of question 2"),
        ({"truth": 1}, "truth is true or false"),
        ({"weights": {"unread": float("nan")}}, "weight unread is no finite number"),
        ({"weights": {"loud": 1}}, "unexpected keyword argument 'loud'"),
        ({"weights": {"right": 2}}, "read with truth only"),
        ({"length": 3}, "nothing but combinations, questions, truth, weights"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message) as error:
        rule(tmp_path, **changes)
    assert "rule.json" in str(error.value)
    with pytest.raises(RuleError, match="no such rule file"):
        read_rule(str(tmp_path / "none.json"))


def test_scores_by_rule_lie_beside_the_data_and_serve_as_margins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rule.json").write_text(json.dumps({**RULE, "truth": True}))
    rows = [
        {"q": f"Any {n}?", "a": ["yes", "no cells", "hm"], "o": [1, 2, 3], "f": ["yes" if n else "no"]}
        for n in range(2)
    ]
    dataset = str(tmp_path / "data")
    prepare(
        PrepareOptions(
            source="mapped",
            inputs=(write_rows(tmp_path / "in.jsonl", rows),),
            output=dataset,
            source_options=SourceOptions({"prompt": "q", "responses": "a", "rank": "o", "facts": "f"}),
        )
    )
    program = str(Path(__file__).resolve().parents[2] / "launch" / "annotate.py")
    spec = importlib.util.spec_from_file_location("annotate", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "annotate", module)  # where its dataclasses' annotations are looked up
    spec.loader.exec_module(module)
    main = module.main
    arguments = ["--dataset", dataset, "--with", "rule", "--rule", str(tmp_path / "rule.json")]
    for said in ("2 groups scored", "done already"):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        main()
        assert said in capsys.readouterr().out
    (store,) = find(dataset, "reward")
    rewards = read_rewards(store, open_dataset(dataset))
    assert [rewards[row].score for row in (0, 1)] == [(0.0, 1.0, -0.5), (1.0, 0.0, -0.5)]
    assert stored_scores(open_dataset(dataset), "reward", "")[1] == (1.0, 0.0, -0.5)
    for wrong, message in (
        (["--dataset", dataset, "--with", "rule"], "--with rule needs --rule FILE"),
        ([*arguments, "--model", "m"], "reads --dataset and --rule alone"),
        (["--dataset", dataset, "--with", "reward"], "--with reward needs --model"),
        (["--dataset", dataset, "--with", "reward", "--model", "m", "--rule", "r"], "--rule is for --with rule"),
    ):
        monkeypatch.setattr(sys, "argv", [program, *wrong])
        with pytest.raises(UsageError, match=message):
            main()
