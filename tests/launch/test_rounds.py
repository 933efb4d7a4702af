"""Online rounds, made small: every stage runs, a killed run ends as an undisturbed one, and another job is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from another_job import held
from small_world import ROOT, command, environment, run

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.digit_boards.world import MAPPING, WorldConfig, write_world
from mmrlhf_jax.lease import beside
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.quickstart import model_of_world
from mmrlhf_jax.training.model import load_model, model_fingerprint
from mmrlhf_jax.training.recipe import INFERENCE

RECIPES = ROOT / "configs"
DECODING = ("--decode.multiple", 16, "--decode.max-buckets", 1, "--sampling.max-new-tokens", 20)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A world, a policy that has learned to end what it says, and a reward model that knows nothing."""
    directory = tmp_path_factory.mktemp("rounds")
    world, model, data = directory / "world", directory / "model", directory / "data"
    config = WorldConfig(16, 4)
    write_world(world, config)
    template = RECIPES / "quickstart" / "critique_template.txt"
    model_of_world(model, world, template, config.side, 0, heads=4)
    run("prepare", "--source", "mapped", "--input", world / "train.jsonl", "--media", world / "media",
        "--map", *MAPPING, "--output", data)  # fmt: skip
    for name, start, steps in (("sft", model, 60), ("critique_reward", directory / "sft", 1)):
        run("train", RECIPES / "quickstart" / f"{name}_tasks.py", "--model", start, "--dataset", data,
            "--output", directory / name, "--data.max-steps", steps, "--data.max-buckets", 1)  # fmt: skip
    return directory


def rounds(base: Path, output: Path, *flags: object) -> list[str]:
    """The command; its stages run in one process."""
    words = command("rounds", "--policy", base / "sft", "--world", base / "world", "--output", output, "--rounds", 2,
                    "--samples", 3, "--steps", 2, *DECODING, *flags)  # fmt: skip
    return [sys.executable, str(ROOT / "tests" / "one_process.py"), *words[1:]]


def done(words: list[str]) -> str:
    ended = subprocess.run(words, env=environment(1), capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def fingerprint(model: Path) -> str:
    loaded = load_model(str(model), make_mesh(MeshConfig()), ShardingRules(), rates=INFERENCE)
    return model_fingerprint(loaded.config, loaded.params)


def test_a_run_killed_between_stages_ends_as_an_undisturbed_one(base, tmp_path):
    flags = ("--reward", base / "critique_reward", "--recipe", RECIPES / "rounds" / "mm_dpo.py", "--select",
             "all_pairs", "--reference", "fixed", "--critique.max-new-tokens", 8)  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = done(rounds(base, whole, *flags))
    process = subprocess.Popen(
        rounds(base, killed, *flags), env=environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not (killed / "stages" / "round_1_ranked.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (killed / "results.json").exists()
    resumed = done(rounds(base, killed, *flags))
    assert "[round_1_answers] done already" in resumed
    found = [json.loads((output / "results.json").read_text())["rounds"] for output in (whole, killed)]
    assert found[0] == found[1]
    for number in (1, 2):
        policies = [fingerprint(output / f"round_{number}" / "policy") for output in (whole, killed)]
        assert policies[0] == policies[1]
    assert fingerprint(whole / "round_1" / "policy") != fingerprint(whole / "round_2" / "policy")
    # the second round's reference is the start, and its margins are the scores' differences
    began = json.loads((whole / "round_2" / "policy" / "recipe.json").read_text())
    assert began["reference_model"] == str(base / "sft")
    scored = [json.loads(line) for line in (whole / "round_2" / "scored.jsonl").read_text().splitlines()]
    score = {(line["id"], answer["text"]): answer["score"] for line in scored for answer in line["answers"]}
    groups = list(open_dataset(str(whole / "round_2" / "data")).groups())
    assert groups
    for group in groups:
        texts = [response.text for response in group.responses]
        for pair in group.pairs:
            gap = score[group.id, texts[pair.chosen]] - score[group.id, texts[pair.rejected]]
            assert pair.margin == pytest.approx(gap, abs=1e-6)
    assert found[0][2]["counted"]["pairs"] == sum(len(group.pairs) for group in groups)
    for row in ("| 0 (before) |", "| 1          |", "| 2          |"):
        assert row in said
    asked = [{json.loads(line)["id"] for line in (whole / f"round_{n}" / "prompts.jsonl").open()} for n in (1, 2)]
    assert not asked[0] & asked[1]
    _refuses_what_it_was_not_asked(base, whole, flags)


def _refuses_what_it_was_not_asked(base: Path, output: Path, flags: tuple[object, ...]) -> None:
    for more, code, message in (
        (("--seed", 7), 2, "was made with other options"),
        (("--polite",), 2, "polite"),
        (("--few-claims", 3), 2, "--few-claims is for --score claims"),
    ):
        ended = subprocess.run(
            rounds(base, output, *flags, *more), env=environment(1), capture_output=True, text=True, timeout=200
        )
        assert ended.returncode == code, ended.stderr
        assert message in ended.stderr
    with held(beside(output)):
        ended = subprocess.run(
            rounds(base, output, *flags), env=environment(1), capture_output=True, text=True, timeout=200
        )
    assert ended.returncode == 1
    assert "is being written by another job" in ended.stderr


def test_best_of_k_along_a_direction_steered_and_by_a_program_of_the_users(base, tmp_path):
    """What needs no reward model: DPA's selection on the true claims, SteerLM's prompts, attributes of a program."""
    program = tmp_path / "polite.py"
    program.write_text(
        "import json, sys\n"
        "found, out = sys.argv[2], sys.argv[4]\n"
        "rows = [json.loads(line) for line in open(found)]\n"
        "with open(out, 'w') as file:\n"
        "    for row in rows:\n"
        "        known = [{'words': len(text.split())} for text in row['responses']]\n"
        "        file.write(json.dumps({'attributes': known}) + chr(10))\n"
    )
    recipe = ("--recipe", RECIPES / "rounds" / "best.py", "--prompts-per-round", 8)
    direction = ("--score", "direction", "--attributes", program, "--direction", "supported=3", "words=-4")
    done(rounds(base, tmp_path / "best", *recipe, "--select", "best", *direction))
    for line in (tmp_path / "best" / "round_1" / "scored.jsonl").read_text().splitlines():
        for answer in json.loads(line)["answers"]:
            known = answer["attributes"]
            assert answer["score"] == pytest.approx(0.6 * known["supported"] - 0.8 * known["words"])
    (first, *_) = open_dataset(str(tmp_path / "best" / "round_1" / "data")).groups()
    assert len(first.responses) == 1

    done(rounds(base, tmp_path / "steer", *recipe, "--select", "steer", "--score", "claims", "--direction", "wrong=-1"))
    prompts = [
        [json.loads(line)["prompt"] for line in (tmp_path / "steer" / f"round_{n}" / "prompts.jsonl").open()]
        for n in (1, 2)
    ]
    assert not any("wrong" in prompt for prompt in prompts[0])  # nobody taught it yet
    assert all(prompt.endswith(" wrong 0") for prompt in prompts[1])


def test_generation_moves_parameters_and_says_the_same(base, tmp_path):
    """On 8 devices: split as they trained, and moved to where each device has all of them."""
    prompts = base / "world" / "prompts.jsonl"
    rows = [json.loads(line) for line in (base / "world" / "held_out.jsonl").open()]
    kept = [{"id": row["id"], "prompt": row["question"], "image": row["image"]} for row in rows if "image" in row]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in kept))
    asked = ("--model", base / "sft", "--input", prompts, "--media", base / "world" / "media", "--dtype", "float32",
             "--max-new-tokens", 12, "--decode.multiple", 16, "--decode.max-buckets", 1)  # fmt: skip
    said = {}
    for layout in ("split", "whole"):
        output = tmp_path / f"{layout}.jsonl"
        said[layout] = run("generate", *asked, "--output", output, "--layout", layout, devices=8)
    assert "parameters moved from split over fsdp 8 to whole" in said["whole"]
    assert "parameters moved" not in said["split"]
    assert (tmp_path / "whole.jsonl").read_text() == (tmp_path / "split.jsonl").read_text()
