"""A run's own log when the run goes on: lines of steps that are done again are cut off, whatever size it has."""

import json

import pytest
from etils import epath

from mmrlhf_jax.training.metrics import JsonLines
from mmrlhf_jax.training.run import RunDirectory, read_lines


def log_of(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    return RunDirectory(epath.Path(tmp_path))


def lines(*steps):
    return "".join(json.dumps({"step": step, "rows": [step]}) + "\n" for step in steps)


@pytest.mark.parametrize("tail", ["", '{"step": 4, "ro', lines(5), lines(5)[:-1]])
def test_it_is_cut_behind_the_checkpoint(tmp_path, tail):
    run = log_of(tmp_path, lines(1, 2, 3, 4) + tail)
    log = JsonLines(run, 3)
    log.step({"step": 4, "rows": [9]})
    log.close()
    assert [(record["step"], record["rows"]) for record in read_lines(run.metrics)] == [
        (1, [1]),
        (2, [2]),
        (3, [3]),
        (4, [9]),
    ]
    assert not run.evaluation.exists()


@pytest.mark.parametrize("line", ["{", '{"rows": [1]}', "[]", '{"step": "x"}'])
def test_a_line_that_is_none_is_named_and_nothing_is_cut(tmp_path, line):
    text = lines(1) + f"{line}\n" + lines(2)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no line of a run's log"):
        JsonLines(log_of(tmp_path, text), 1)
    assert (tmp_path / "metrics.jsonl").read_text() == text
