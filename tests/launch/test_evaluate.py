"""launch/evaluate.py as a user starts it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from data_samples import picture, row, write_media, write_parquet, write_rows
from tiny import TINY

from mmrlhf_jax.command import CommandError, run_command
from mmrlhf_jax.models.critique_reward.config import RewardSettings, read_template
from mmrlhf_jax.models.families import keys_of
from mmrlhf_jax.models.llava_onevision.weights import new_directory, save_directory
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import load_model, with_fresh_head
from mmrlhf_jax.training.recipe import INFERENCE

ROOT = Path(__file__).resolve().parents[2]


Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def main() -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location("launch_evaluate", ROOT / "launch" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_evaluate"] = module  # where tyro looks the types of flags up
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def evaluate(main, monkeypatch, capsys) -> Evaluate:
    """Runs the program in this process, since starting one takes longer than its work; -> exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        status = 0
        try:
            run_command(main)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def bench(tmp_path: Path) -> list[str]:
    rows = [
        row(id="a", image="mcq/1.png", chosen="longer", rejected="short"),
        row(id="a", image="mcq/1.png", chosen="longer", rejected="longest"),
    ]
    return ["reward_bench", "--input", write_rows(tmp_path / "b.jsonl", rows), "--output", str(tmp_path / "out")]


def test_without_a_model_the_baselines_are_printed_and_written_and_found_done(evaluate, bench, tmp_path):
    status, first, error = evaluate(*bench)
    assert (status, error) == (0, "")
    table = [line.split() for line in first.splitlines()]
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
    status, again, _ = evaluate(*bench)
    assert status == 0
    assert again.splitlines() == [f"done already: {tmp_path}/out", *first.splitlines()[:-1]]


def test_other_rows_in_the_same_output_are_refused(evaluate, bench, tmp_path):
    assert evaluate(*bench)[0] == 0
    write_rows(tmp_path / "b.jsonl", [row(image="mcq/1.png")])
    status, _, error = evaluate(*bench)
    assert status == 1
    assert "holds the results of other settings" in error
    assert "input_sha256" in error


def test_pictures_in_a_parquet_file_need_no_place(evaluate, tmp_path):
    one = {
        "id": "mmmu_1",
        "query": "Q",
        "response": ["a", "bc"],
        "human_ranking": [1, 0],
        "image": {"bytes": picture()},
    }
    file = write_parquet(tmp_path / "b.parquet", [one])
    status, table, error = evaluate("vl_reward_bench", "--input", file, "--output", str(tmp_path / "out"))
    assert (status, error) == (0, "")
    assert ["reasoning", "1", "1.000", "0.500"] in [line.split() for line in table.splitlines()]
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
def test_what_cannot_work_is_said_before_a_model_is_loaded(evaluate, bench, more, status, message):
    found, printed, error = evaluate(*bench, *more)
    assert (found, printed) == (status, "")
    assert message in error


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A critique reward model of random weights."""
    directory = tmp_path_factory.mktemp("models")
    new_directory(directory / "policy", dataclasses.replace(TINY, pinpoints=((42, 42),)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    policy = load_model(str(directory / "policy"), mesh, ShardingRules(), rates=INFERENCE)
    model = with_fresh_head(policy, "linear", mesh, ShardingRules(), 0)
    RewardSettings(template=read_template("")).write(directory / "policy")
    save_directory(model.params, directory / "policy", directory / "reward", keys=keys_of(model.config))
    return directory / "reward"


@pytest.fixture
def judged(tmp_path: Path, reward_model: Path) -> list[str]:
    """Three rows of two questions, one about a video; two rows share an answer, for which they give one reason each."""
    media = write_media(tmp_path / "media", mcq__1=picture(), video__c__1=picture(), video__c__2=picture())
    reasons = {"chosen_reason": "It is right.", "rejected_reason": "It is wrong."}
    rows = [
        row(id="a", image="mcq/1.png", chosen="longer", rejected="short", **reasons),
        row(id="a", image="mcq/1.png", chosen="longer", rejected="longest", **reasons | {"chosen_reason": "Fine."}),
        row(id="b", image=None, video="video/c", chosen="a", rejected="b", **reasons),
    ]
    return [
        *("reward_bench", "--input", write_rows(tmp_path / "b.jsonl", rows), "--media", str(media)),
        *("--model", str(reward_model), "--dtype", "float32", "--output", str(tmp_path / "out")),
    ]


@pytest.mark.parametrize(
    "mode",
    [
        ["--critiques", "human"],
        ["--critiques", "none"],
        ["--samples", "2", "--temperature", "1", "--max-new-tokens", "4"],
    ],
    ids=["human", "none", "generated"],
)
def test_a_model_scores_every_row_and_the_figures_are_those_of_its_rows(evaluate, judged, mode, tmp_path):
    status, table, error = evaluate(*judged, *mode)
    assert status == 0, error
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [one["line"] for one in rows] == [1, 2, 3]
    assert [one["right"] for one in rows] == [one["rewards"][0] > one["rewards"][1] for one in rows]
    assert {len(each) for one in rows for each in one["critiques"]} == {2 if "--samples" in mode else 1}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["systems"]["model"]["overall"]["acc"] == pytest.approx(sum(one["right"] for one in rows) / 3)
    # the shared answer has one score, but where each row brings a critique of its own
    assert (rows[0]["rewards"][0] == rows[1]["rewards"][0]) == ("human" not in mode)
    if "human" in mode:
        assert [one["critiques"][0] for one in rows] == [["It is right."], ["Fine."], ["It is right."]]
    status, again, _ = evaluate(*judged, *mode)
    assert status == 0
    assert again.splitlines() == [f"done already: {tmp_path}/out", *table.splitlines()[:-1]]
    status, _, error = evaluate(*judged, *mode, "--render.frames", "1")
    assert status == 1
    assert "renderer_fingerprint" in error


def test_what_was_scored_before_an_interruption_is_not_scored_again(evaluate, judged, monkeypatch, tmp_path):
    program = sys.modules["launch_evaluate"]

    def interrupted(*_: object) -> None:
        raise CommandError("interrupted", 75)

    with monkeypatch.context() as patch:
        patch.setattr(program, "_finish", interrupted)
        assert evaluate(*judged, "--critiques", "human")[0] == 75
    stored = list((tmp_path / "out").glob("annotations/reward-*/part-*.npz"))
    assert stored
    with monkeypatch.context() as patch:
        patch.setattr("mmrlhf_jax.inference.reward.rewards_of", interrupted)
        status, table, _ = evaluate(*judged, "--critiques", "human")
    assert status == 0
    assert "overall" in table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "rows.jsonl"]
