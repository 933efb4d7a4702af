"""launch/evaluate.py as a user starts it, without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import picture, row, write_parquet, write_rows

ROOT = Path(__file__).resolve().parents[2]


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def bench(tmp_path: Path) -> list[str]:
    rows = [
        row(id="a", image="mcq/1.png", chosen="longer", rejected="short"),
        row(id="a", image="mcq/1.png", chosen="longer", rejected="longest"),
    ]
    return ["reward_bench", "--input", write_rows(tmp_path / "b.jsonl", rows), "--output", str(tmp_path / "out")]


def test_without_a_model_the_baselines_are_printed_and_written_and_found_done(bench, tmp_path):
    first = evaluate(*bench)
    assert first.returncode == 0, first.stderr
    table = [line.split() for line in first.stdout.splitlines()]
    assert ["overall", "2", "1", "0.500", "0.000", "0.500", "0.333"] in table
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["systems"]["random"]["mcq"] == {
        "pairs": 2,
        "groups": 1,
        "acc": 0.5,
        "acc_plus": pytest.approx(1 / 3),
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert rows == [
        {"id": "a", "line": 1, "category": "mcq", "lengths": [6, 5]},
        {"id": "a", "line": 2, "category": "mcq", "lengths": [6, 7]},
    ]
    again = evaluate(*bench)
    assert again.returncode == 0
    assert again.stdout.splitlines()[0] == f"done already: {tmp_path}/out"
    assert again.stdout.splitlines()[1:] == first.stdout.splitlines()[:-1]


def test_other_rows_in_the_same_output_are_refused(bench, tmp_path):
    assert evaluate(*bench).returncode == 0
    write_rows(tmp_path / "b.jsonl", [row(image="mcq/1.png")])
    refused = evaluate(*bench)
    assert refused.returncode == 1
    assert "holds the results of other settings" in refused.stderr
    assert "input_sha256" in refused.stderr


def test_pictures_in_a_parquet_file_need_no_place(tmp_path):
    one = {
        "id": "mmmu_1",
        "query": "Q",
        "response": ["a", "bc"],
        "human_ranking": [1, 0],
        "image": {"bytes": picture()},
    }
    file = write_parquet(tmp_path / "b.parquet", [one])
    done = evaluate("vl_reward_bench", "--input", file, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert ["reasoning", "1", "1.000", "0.500"] in [line.split() for line in done.stdout.splitlines()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.parquet", "out"]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--samples", "0"], 2, "--samples 0 is not positive"),
        (["--critiques", "none"], 2, "--critiques (or one of its fields) is for --model"),
        (["--temperature", "1"], 2, "--sampling (or one of its fields) is for --model"),
        (["--media", "there"], 2, "--media (or one of its fields) is for --model"),
        (["--model", "m", "--critiques", "human"], 1, "no chosen_reason"),
        (["--model", "m"], 1, "give their root with --media"),
        (["--model", "m", "--media", "nowhere"], 1, "nowhere is not a directory: correct --media"),
        (["--input", "gone.jsonl"], 1, "gone.jsonl does not exist: correct --input"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(bench, more, status, message):
    found = evaluate(*bench, *more)
    assert (found.returncode, found.stdout) == (status, "")
    assert message in found.stderr
    assert "Traceback" not in found.stderr
