"""A file of answers grows in whole parts and appears when all are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath

from mmrlhf_jax.inference.answer_file import AnswerFile, AnswerFileError, Saving


@pytest.fixture
def file(tmp_path: Path) -> AnswerFile:
    return AnswerFile(epath.Path(tmp_path / "deep" / "answers.jsonl"), "line")


def record(line: int) -> dict:
    return {"id": str(line), "line": line, "prompt": "a\u2028b"}


def test_lines_come_in_order_however_they_were_done(file: AnswerFile) -> None:
    file.state({})
    file.write("answers", [record(3), record(1)])
    file.write("answers", [record(2)])
    assert file.done("answers") == {n: record(n) for n in (3, 1, 2)}
    assert not file.finished()
    file.finish("answers")
    assert file.read() == [record(1), record(2), record(3)]
    assert not file.parts.exists()


def test_kinds_of_parts_are_kept_apart(file: AnswerFile) -> None:
    file.state({})
    file.write("answers", [record(1)])
    file.write("scores", [record(1) | {"best": 0}])
    assert file.done("answers") == {1: record(1)}
    file.finish("scores")
    assert file.read() == [record(1) | {"best": 0}]


def test_what_is_done_is_saved_however_the_work_ends(file: AnswerFile) -> None:
    def work() -> None:
        with file.saving("answers", Saving(seconds=60, records=2)) as keep:
            for line in range(3):
                keep([record(line)])
            assert set(file.done("answers")) == {0, 1}
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert set(file.done("answers")) == {0, 1, 2}


def test_a_part_being_written_is_none(file: AnswerFile) -> None:
    file.write("answers", [record(1)])
    (file.parts / ".answers-2-1.jsonl.writing").write_text('{"line": 2')
    assert set(file.done("answers")) == {1}


def test_a_damaged_part_is_an_error_that_names_it(file: AnswerFile) -> None:
    file.write("answers", [record(1)])
    part = file.parts / "answers-1-1.jsonl"
    part.write_text(part.read_text()[:20])
    with pytest.raises(AnswerFileError, match=r"answers-1-1.jsonl is damaged .*: remove it"):
        file.done("answers")
    part.write_text("{}")
    with pytest.raises(AnswerFileError, match="a line without 'line'"):
        file.done("answers")


def test_a_line_in_two_parts_is_an_error(file: AnswerFile) -> None:
    file.write("answers", [record(1)])
    file.write("answers", [record(1), record(2)])
    with pytest.raises(AnswerFileError, match="line 1 is in another part too"):
        file.done("answers")


def test_settings_may_be_added_to_but_not_changed(file: AnswerFile) -> None:
    file.check({"seed": 0})
    file.state({"seed": 0, "shape": (1, 2)})
    file.check({"model": "m"})
    file.state({"model": "m"})
    file.check({"seed": 0, "shape": (1, 2)})
    with pytest.raises(AnswerFileError, match=r"model was \"m\", is \"n\"; seed was 0, is 1"):
        file.check({"model": "n", "seed": 1})
    assert json.loads(file.settings.read_text()) == {"format": 1, "seed": 0, "shape": [1, 2], "model": "m"}


def test_damaged_settings_are_an_error(file: AnswerFile) -> None:
    file.state({})
    file.settings.write_text("{")
    with pytest.raises(AnswerFileError, match="is damaged"):
        file.check({})


def test_parts_left_by_a_kill_are_cleared(file: AnswerFile) -> None:
    file.state({})
    file.write("answers", [record(1)])
    file.finish("answers")
    file.write("answers", [record(1)])  # as they were when the kill came between writing and clearing
    file.clear_parts()
    assert not file.parts.exists()
    assert file.read() == [record(1)]
