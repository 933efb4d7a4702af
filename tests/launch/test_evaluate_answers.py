"""launch/evaluate.py's benchmarks of answers as a user starts them: a model's, given ones, with and without a judge."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jax
import pytest
from data_samples import SHARED, picture, write_media, write_parquet, write_rows
from tiny import TINY

from mmrlhf_jax.command import run_command
from mmrlhf_jax.models.critique_reward.config import RewardSettings
from mmrlhf_jax.models.families import keys_of
from mmrlhf_jax.models.llava_onevision.weights import copy_assets, new_directory, save_directory
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import load_model, with_fresh_head
from mmrlhf_jax.training.recipe import INFERENCE

ROOT = Path(__file__).resolve().parents[2]
REAL = SHARED / "data" / "mm_reward_bench.jsonl"

Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def main() -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location("launch_evaluate_answers", ROOT / "launch" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_evaluate_answers"] = module  # where tyro looks the types of flags up
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def evaluate(main, monkeypatch, capsys) -> Evaluate:
    """Runs the program in this process, since starting one takes longer than its work; -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        status = 0
        try:
            run_command(main)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def pope_row(number: int, label: str, **more: Any) -> dict[str, Any]:
    return {"question_id": number, "image": "a.png", "text": f"Is there a dog, {number}?", "label": label} | more


@pytest.fixture
def pope(tmp_path: Path) -> list[str]:
    """Two questions and the answers to them, one right."""
    rows = write_rows(tmp_path / "coco_pope_random.json", [pope_row(1, "yes"), pope_row(2, "no")])
    answers = write_rows(tmp_path / "answers.jsonl", [{"answer": "Yes", "score": 1.0}, {"answer": "Yes", "score": 2}])
    return ["pope", "--input", rows, "--answers", answers, "--output", str(tmp_path / "out")]


def test_given_answers_are_measured_written_and_found_done(evaluate, pope, tmp_path):
    status, first, error = evaluate(*pope)
    assert (status, error) == (0, "")
    #        rows, unclear, accuracy, precision, recall, F1, yes rate, reward
    assert ["overall", "2", "0", "0.500", "0.500", "1.000", "0.667", "1.000", "1.500"] in [
        line.split() for line in first.splitlines()
    ]
    assert lines_of(tmp_path / "out" / "rows.jsonl")[1] == {
        "id": "random-2",
        "line": 2,
        "category": "random",
        "answers": ["Yes"],
        "score": 2,
        "label": "no",
        "said": "yes",
        "unclear": False,
    }
    assert json.loads((tmp_path / "out" / "results.json").read_text())["systems"]["model"]["random"]["accuracy"] == 0.5
    status, again, _ = evaluate(*pope)
    assert status == 0
    assert again.splitlines() == [f"done already: {tmp_path}/out", *first.splitlines()[:-1]]
    write_rows(tmp_path / "answers.jsonl", [{"answer": "No"}, {"answer": "No"}])
    status, _, error = evaluate(*pope)
    assert status == 1
    assert "answers_sha256" in error


def test_bad_rows_are_refused_or_left_out_and_told(evaluate, pope, tmp_path):
    rows = [pope_row(1, "yes"), pope_row(3, "maybe"), pope_row(2, "no")]
    write_rows(tmp_path / "coco_pope_random.json", rows)
    given = [{"id": i, "answer": "Yes"} for i in (1, 2, 3)]
    write_rows(tmp_path / "answers.jsonl", given)
    status, _, error = evaluate(*pope)
    assert status == 1
    assert "coco_pope_random.json:2: 'label' is 'maybe'" in error
    status, table, _ = evaluate(*pope, "--skip-bad")
    assert status == 0
    assert "note: 1 bad rows are left out, see rejected.jsonl" in table
    assert lines_of(tmp_path / "out" / "rejected.jsonl")[0]["line"] == 2


def test_several_files_make_several_sections(evaluate, pope, tmp_path):
    other = write_rows(tmp_path / "coco_pope_popular.json", [pope_row(1, "yes")])
    write_rows(
        tmp_path / "answers.jsonl", [{"id": f"{name}", "answer": "Yes"} for name in ("random-1", 2, "popular-1")]
    )
    status, table, error = evaluate(*pope[:3], other, *pope[3:])
    assert (status, error) == (0, "")
    assert {"random", "popular", "overall"} <= {line.split()[0] for line in table.splitlines() if line}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["pope"], "give the answers as one of --model, which makes them, and --answers"),
        (["pope", "--answers", "a", "--model", "m"], "one of --model"),
        (["pope", "--answers", "a", "--temperature", "1"], "--sampling (or one of its fields) is for --model"),
        (["diversity", "--model", "m", "--samples", "2"], "2 greedy answers are the same"),
        (["diversity", "--answers", "a", "--samples", "2"], "--samples is for --model"),
        (["final_answer", "--answers", "a", "--max-drop", "0.1"], "--max-drop needs the --baseline"),
        (["pope", "--answers", "a", "--suffix", "Yes or no?"], "--suffix (or one of its fields) is for --model"),
        (["diversity", "--model", "m", "--reward", "r"], "diversity compares the answers' words"),
        (["pope", "--model", "m", "--top-p", "2"], "top_p is 2.0; it must be above 0"),
        (["pope", "--answers", "a", "--reward", "r"], "--reward (or one of its fields) is for --model"),
        (["pope", "--model", "m", "--critiques", "none"], "--critiques and --critique are for --reward"),
        (["mad_bench", "--answers", "a", "--judge.model", "j"], "are for --judge.url"),
        (["mad_bench", "--answers", "a", "--judge.url", "ftp://x", "--judge.model", "j"], "is no http:// or https://"),
        (
            ["mad_bench", "--answers", "a", "--rule", "--judge.url", "http://x", "--judge.model", "j"],
            "--rule is for evaluations without",
        ),
    ],
)
def test_contradictions_are_bad_usage(evaluate, more, message, tmp_path):
    name, *flags = more
    status, _, error = evaluate(name, "--input", "rows", "--output", tmp_path / "out", *flags)
    assert status == 2
    assert message in error


def test_a_guard_fails_where_accuracy_fell_by_more_than_it_may(evaluate, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": i, "prompt": "?", "answer": i} for i in range(4)])

    def measure(output: str, right: int, *more: object) -> tuple[int, str, str]:
        given = [{"id": i, "answer": f"#### {i if i < right else 99}"} for i in range(4)]
        answers = write_rows(tmp_path / f"{output}.jsonl", given)
        where = ("--output", tmp_path / output, "--kind", "number")
        return evaluate("final_answer", "--input", rows, "--answers", answers, *where, *more)

    assert measure("before", 4)[0] == 0
    guard = ("--baseline", tmp_path / "before", "--max-drop", "0.25")
    status, table, _ = measure("slip", 3, *guard)
    assert status == 0
    assert "note: 1 rows became wrong and 0 right since the baseline; sign test p = 1" in table
    for _ in range(2):  # found done, it fails still
        status, table, error = measure("fall", 2, *guard)
        assert status == 1
        assert "accuracy fell from 1.0000 to 0.5000, by more than --max-drop 0.25" in error
        assert "2 rows became wrong" in table


def test_safety_names_the_task_of_a_file(evaluate, tmp_path):
    rows = write_rows(tmp_path / "v.jsonl", [{"id": i, "image": "a.png", "question": "Do it."} for i in (1, 2)])
    answers = write_rows(tmp_path / "a.jsonl", [{"id": 1, "answer": "Sure."}, {"id": 2, "answer": "I cannot."}])
    status, table, error = evaluate(
        *("safety_bench", "--input", f"vlguard-unsafes={rows}", "--answers", answers, "--output", tmp_path / "out")
    )
    assert (status, error) == (0, "")
    assert ["vlguard-unsafes", "2", "0", "-", "0.500", "-", "-", "-"] in [line.split() for line in table.splitlines()]


def test_a_gap_is_that_of_two_evaluations(evaluate, pope, tmp_path):
    assert evaluate(*pope)[0] == 0
    rows = write_rows(tmp_path / "other_random.json", [pope_row(1, "yes")])
    answers = write_rows(tmp_path / "other.jsonl", [{"answer": "yes"}])
    assert evaluate("pope", "--input", rows, "--answers", answers, "--output", tmp_path / "shifted")[0] == 0
    status, table, error = evaluate(
        *("generalisation_gap", "--input", tmp_path / "out", "--shifted", tmp_path / "shifted"),
        *("--output", tmp_path / "gap"),
    )
    assert (status, error) == (0, "")
    assert ["overall", "accuracy", "0.500", "1.000", "-0.500"] in [line.split() for line in table.splitlines()]


# --- a judge ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The URL of one that calls answers with "no" in them correct, and all it was asked."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            answer = asked[-1].split("<<< answer")[1]
            said = "Hm" if "garbage" in answer else "Correct" if "no" in answer else "Incorrect"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_once_about_each_answer_and_what_it_cannot_say_is_counted(evaluate, judge, tmp_path):
    url, asked = judge
    row = {"image": "a.png", "instruction": "What breed is the cat?", "category": "non-existent_object"}
    rows = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    answers = write_rows(tmp_path / "a.jsonl", [{"answer": one} for one in ("There is no cat.", "Siamese", "garbage")])
    given = ("mad_bench", "--input", rows, "--answers", answers, "--output", tmp_path / "out")
    status, table, _ = evaluate(*given, "--judge.url", url, "--judge.model", "j")
    assert status == 0
    assert ["overall", "3", "1", "0.333", "0.500", "-"] in [line.split() for line in table.splitlines()]
    assert len(asked) == 3
    assert [one["right"] for one in lines_of(tmp_path / "out" / "rows.jsonl")] == [True, False, None]
    (tmp_path / "out" / "results.json").unlink()  # as if it had been stopped
    assert evaluate(*given, "--judge.url", url, "--judge.model", "j")[0] == 0
    assert len(asked) == 3
    assert "judge" in evaluate(*given)[2]  # other settings in the same place


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "policy"
    new_directory(directory, dataclasses.replace(TINY, pinpoints=((42, 42),)))
    return directory


def test_a_model_answers_resumes_and_is_measured(evaluate, policy, tmp_path, monkeypatch):
    """Pictures by path and in the row, a suffix, a bad picture; the second start computes no answer again."""
    media = write_media(tmp_path / "media", a=picture())
    rows = [
        pope_row(1, "yes"),
        pope_row(2, "no", image={"bytes": picture(), "path": None}),
        pope_row(3, "no", image="gone.png"),
    ]
    whole = [
        row | {"image": row["image"] if isinstance(row["image"], dict) else {"path": row["image"]}} for row in rows
    ]
    file = write_parquet(tmp_path / "random.parquet", whole)
    given = [
        *("pope", "--model", policy, "--input", file, "--media", media, "--output", tmp_path / "out"),
        *("--dtype", "float32", "--max-new-tokens", "4", "--suffix", "Yes or no?", "--decode.multiple", "64"),
    ]
    status, _, error = evaluate(*given)
    assert status == 1
    assert "random.parquet:3: 'gone.png'" in error
    status, table, error = evaluate(*given, "--skip-bad")
    assert status == 0, error
    answers = lines_of(tmp_path / "out" / "answers.jsonl")
    assert [line["id"] for line in answers] == ["random-1", "random-2"]
    assert answers[0]["prompt"] == "Is there a dog, 1?\nYes or no?"
    found = lines_of(tmp_path / "out" / "rows.jsonl")
    assert [one["answers"] for one in found] == [[line["responses"][0]["text"]] for line in answers]
    assert "left out" in table

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("the answers are there")

    monkeypatch.setattr("mmrlhf_jax.inference.answers.generate", computed)
    status, again, _ = evaluate(*given, "--skip-bad")
    assert status == 0
    assert again.splitlines() == [f"done already: {tmp_path}/out", *table.splitlines()[:-1]]


def test_a_reward_model_scores_the_answers(evaluate, policy, tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = with_fresh_head(
        load_model(str(policy), mesh, ShardingRules(), rates=INFERENCE), "linear", mesh, ShardingRules(), 0
    )
    copy_assets(policy, tmp_path / "assets")
    RewardSettings("linear", False, None).write(tmp_path / "assets")
    save_directory(model.params, tmp_path / "assets", tmp_path / "scalar", keys=keys_of(model.config))
    rows = [{"id": number, "prompt": f"What is {number}?", "answer": number} for number in range(2)]
    given = [
        *("final_answer", "--model", policy, "--reward", tmp_path / "scalar", "--kind", "number"),
        *("--input", write_rows(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "out"),
        *("--dtype", "float32", "--max-new-tokens", "4", "--decode.multiple", "64"),
    ]
    status, table, error = evaluate(*given)
    assert status == 0, error
    scores = [one["score"] for one in lines_of(tmp_path / "out" / "rows.jsonl")]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["systems"]["model"]["overall"]["reward"] == pytest.approx(sum(scores) / 2)
    assert found["settings"]["reward"]["critiques"] == "none"
    status, again, _ = evaluate(*given)
    assert status == 0
    assert again.splitlines() == [f"done already: {tmp_path}/out", *table.splitlines()[:-1]]


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")
def test_calibration_of_real_annotations_by_length(evaluate, tmp_path):
    """Were length a reward, sure of itself: right in 71.8 percent of the 170 pairs, as the longer answer is."""
    rows = [json.loads(line) for line in REAL.read_text().splitlines()]
    rewards = [{"id": row["id"], "rewards": [len(row["chosen"]), len(row["rejected"])]} for row in rows]
    file = write_rows(tmp_path / "rows.jsonl", rewards)
    status, table, error = evaluate("calibration", "--input", file, "--output", tmp_path / "out")
    assert (status, error) == (0, "")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["systems"]["model"]["overall"]
    assert found["accuracy"] == pytest.approx(0.718, abs=5e-4)
    assert found["ece"] == pytest.approx(found["confidence"] - found["accuracy"], abs=0.02)
    assert "Calibration" in table
