"""The table that rounds end in, from figures as they are stored."""

import json

from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.rounds.figures import held_out_figures, judge_accuracy, run_figures, stage_name, table
from mmrlhf_jax.rounds.loop import flags_of


def answer(name, text, tokens=3, ended=True):
    return {"id": name, "responses": [{"text": text, "tokens": tokens, "ended": ended}]}


def scored(score):
    return {"answers": [{"text": "x", "attributes": {}, "score": score}]}


def test_held_out_answers_are_counted_against_the_truth():
    board = [[3, None, 7], [1, 1, 1], [2, 2, 2]]
    row = {"question": "Which digits are in row 1?", "board": board}
    answers = [answer("a", "3 empty 7.", 4), answer("b", "3 0 7.", 6, ended=False)]
    found = held_out_figures(answers, [scored(1.5)], {"a": row, "b": row})
    assert found["hallucination"] == {"all": 1 / 6, "row": 1 / 6}
    assert (found["score"], found["tokens"], found["cut"], found["length"]) == (1.5, 5, 0.5, 3)
    assert held_out_figures(answers, [], None)["score"] is None


def test_the_judge_is_held_against_the_truth_where_answers_differ():
    def said(*answers):
        return {"answers": [{"text": "x", "attributes": {"wrong": wrong}, "score": score} for wrong, score in answers]}

    # right: 0 wrong above 2; wrong: 1 above 0, 2 level with 1; equally wrong answers are no pair
    assert (
        judge_accuracy([said((0, 1.0), (2, 0.0)), said((1, 3.0), (0, 2.0)), said((2, 1.0), (1, 1.0), (1, 5.0))]) == 0.5
    )
    assert judge_accuracy([said((1, 0.0), (1, 1.0))]) is None
    assert judge_accuracy([scored(1.0)]) is None


def test_a_runs_figures_are_those_of_its_last_tenth(tmp_path):
    steps = [{"loss": float(i), "rewards/margins": 2.0 * i, "rewards/accuracies": 0.5} for i in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert run_figures(tmp_path) == {"steps": 20, "loss": 18.5, "margin": 37.0, "accuracy": 0.5}


def test_the_table_has_a_row_a_round_and_all_seconds():
    held_out = {"hallucination": {"all": 0.512}, "score": -1.25, "tokens": 6.0, "cut": 0.0}
    counted = {"used": 7, "tied": 2, "near": 1, "pairs": 30, "repeated": 10, "answers": 40}
    rounds = [
        {"held_out": held_out},
        {"held_out": held_out, "counted": counted, "judge": 0.8, "run": {"margin": 0.5, "accuracy": 0.75}},
    ]
    seconds = {"answers": 10.0, "score_reward": 20.0, "held_out_score_reward": 5.0, "policy": 30.0}
    lines = table(rounds, {stage_name(1, name): value for name, value in seconds.items()})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[2] == ["0 (before)", "51.2%", "-1.250", "6.0", "0.0%", *"--------"]
    assert rows[3] == ["1", "51.2%", "-1.250", "6.0", "0.0%", "7", "2", "1", "30", "25.0%", "80.0%", "0.50", "75.0%"]
    assert rows[-1] == ["1", "10", "20", "0", "30", "5", "65"]


def test_only_what_differs_becomes_a_flag():
    assert flags_of(SamplingConfig(), SamplingConfig()) == []
    drawn = SamplingConfig(max_new_tokens=9, temperature=0.5)
    assert flags_of(drawn, SamplingConfig(), "critique.") == [
        "--critique.max-new-tokens", 9, "--critique.temperature", 0.5
    ]  # fmt: skip
