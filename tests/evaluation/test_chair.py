"""CHAIR: mentions found as the released script finds them, and its figures by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from answered import judged, questions_of

from mmrlhf_jax.evaluation.chair import Synonyms, benchmark, mentions, read_synonyms
from mmrlhf_jax.evaluation.comparisons import BenchmarkError

FILE = """person, man, woman, baby, passenger
dog, puppy
train, locomotive
airplane, jet
chair, seat
toilet, potty
tie, bow tie
dining table, table
knife
hot dog
bus,
"""


@pytest.fixture
def synonyms(tmp_path: Path) -> Synonyms:
    (tmp_path / "synonyms.txt").write_text(FILE)
    return read_synonyms(str(tmp_path / "synonyms.txt"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A man walks two dogs and a Puppy.", ["person", "dog", "dog"]),
        ("women, men, knives and buses", ["person", "person", "knife", "bus"]),
        ("a dining table beside another table", ["dining table", "dining table"]),
        ("He eats hot dogs", ["hot dog"]),  # no dog
        ("a baby dog in a passenger train", ["dog", "train"]),  # neither baby nor passenger is a person
        ("a passenger jet over train tracks", ["airplane"]),  # nor is a track a train
        ("a bow tie on a toilet seat", ["tie", "toilet"]),
        ("a seat next to the toilet", ["toilet"]),
        ("a seat next to the table", ["chair", "dining table"]),
        ("the man's dogs' dog\N{RIGHT SINGLE QUOTATION MARK}s", ["person", "dog", "dog"]),
        ("There is a train. Track lights", ["train"]),  # a sign parts words
        ("the train's track", ["train"]),
        ("a bow, tie, hot (dog)", ["tie", "dog"]),
        ("doggedly trained", []),
        ("", []),
    ],
)
def test_mentions(text, found, synonyms):
    assert mentions(text, synonyms) == found


def test_figures_by_hand(tmp_path: Path, synonyms: Synonyms):
    """In the pictures: {dog, person}, {dining table, knife}, {bus}. Mentioned: dog, dog, train | table | nothing.

    CHAIRs 1/3 (the train), CHAIRi 1/4, recall (dog + table) / (2 + 2 + 1) = 2/5, of the two that mention anything 1/2.
    """
    rows = [
        {"id": "a", "image": "a.jpg", "objects": ["puppy"], "captions": ["A man and his dog."]},
        {"id": "b", "image": "b.jpg", "objects": ["dining table", "Knife"]},
        {"id": "c", "image": "c.jpg", "objects": ["bus"], "prompt": "What is it?"},
    ]
    bench = benchmark(synonyms)
    questions = questions_of(bench, tmp_path, rows)
    records = judged(bench, questions, ["A dog, a dog and a train.", "A table.", "Nice weather"])
    assert records[0]["hallucinated"] == ["train"]
    assert records[0]["recalled"] == ["dog"]
    found = bench.measure(records)["overall"]
    assert (found["chair_s"], found["chair_i"], found["recall"], found["response"]) == (1 / 3, 1 / 4, 2 / 5, 1 / 2)
    assert (found["rows"], found["mentions"]) == (3, 4)
    assert [each.prompt for each in questions[1:]] == ["Please describe this image in detail.", "What is it?"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg"}, "neither 'objects' nor 'captions'"),
        ({"image": "a.jpg", "objects": ["unicorn"]}, "'unicorn' is not in the file of synonyms"),
        ({"image": "a.jpg", "objects": "dog"}, "'objects' is not a list of strings"),
        ({"objects": ["dog"]}, "column 'image' is missing"),
    ],
)
def test_a_bad_row_is_named(row, reason, tmp_path: Path, synonyms: Synonyms):
    with pytest.raises(BenchmarkError, match=f"rows.jsonl:1: .*{reason}"):
        questions_of(benchmark(synonyms), tmp_path, [row])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dog, puppy\ncat, puppy\n", r"s.txt:2: 'puppy' is a synonym of 'dog' and of 'cat'"),
        ("\n,,\n", "holds no names"),
    ],
)
def test_a_strange_file_of_synonyms_is_refused(text, reason, tmp_path: Path):
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(BenchmarkError, match=reason):
        read_synonyms(str(tmp_path / "s.txt"))
    with pytest.raises(BenchmarkError, match="is no file: correct --synonyms"):
        read_synonyms(str(tmp_path / "gone.txt"))
