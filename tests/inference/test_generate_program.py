"""launch/generate.py: prompts in, answers out, in order, resumable; with a reward model the best of n."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from data_samples import picture, write_media, write_rows
from small_world import ROOT, command, environment, run, run_hosts, start_hosts, wait_for_hosts
from tiny import TINY

from mmrlhf_jax.command import CommandError, UsageError
from mmrlhf_jax.data.media import MediaRoot, read_media
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.rewards import GroupReward
from mmrlhf_jax.groups import Group, Media, Response, Turn
from mmrlhf_jax.inference.answers import scored
from mmrlhf_jax.inference.engine import DecodeConfig
from mmrlhf_jax.inference.generate import answers_in_order, generate
from mmrlhf_jax.inference.reward import RewardModel, Scoring, score_groups
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models.critique_reward.config import RewardSettings, read_template
from mmrlhf_jax.models.critique_reward.render import load_reward_renderer
from mmrlhf_jax.models.families import declare, keys_of, reward_config
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.models.llava_onevision.weights import copy_assets, new_directory, save_directory
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.recipe import INFERENCE

SMALL = dataclasses.replace(TINY, pinpoints=((42, 42), (42, 84)))
DECODE = DecodeConfig(branches_per_device=2, max_buckets=1, multiple=64)
DRAWN = SamplingConfig(max_new_tokens=5, temperature=1.0)


def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_program", ROOT / "launch" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


program = load_program()


@dataclasses.dataclass(frozen=True)
class World:
    directory: Path
    model: str
    critic: str
    scalar: str
    prompts: str
    media: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("generate-program")
    media = write_media(directory / "media", a=picture(), b=picture(size=(60, 30)))
    write_media(media / "clip", **{str(i): picture(size=(40, 20 + i)) for i in range(2)})
    rows: list[Any] = [
        {"id": "a", "prompt": "<image>\nWhat is it?", "image": "a.png", "unread": 1},
        "",
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
        {"id": 7, "prompt": "And here?", "video": "clip"},
        {"id": "both", "prompt": "Which is larger?", "image": ["a.png", "b.png"]},
        {"id": "again", "prompt": "What is it?", "image": "a.png"},
    ]
    names = {name: str(directory / name) for name in ("model", "critic", "scalar")}
    new_directory(names["model"], SMALL, seed=1)
    new_reward_directory(directory / "critic", names["model"], critique=True)
    new_reward_directory(directory / "scalar", names["model"], critique=False)
    return World(directory, **names, prompts=write_rows(directory / "prompts.jsonl", rows), media=str(media))


def new_reward_directory(path: Path, policy: str, *, critique: bool) -> None:
    """A reward model of random weights on the assets of `policy`."""
    assets = path.with_name(f"{path.name}-assets")
    copy_assets(policy, assets)
    RewardSettings("linear", critique, read_template("") if critique else None).write(assets)
    config = reward_config(SMALL, "linear")
    params = nn_params.initialise(declare(config), 3, one_device(), ShardingRules())
    save_directory(params, assets, path, keys=keys_of(config))


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def arguments(world: World, output: Path | str, **more: Any) -> Any:
    given: dict[str, Any] = {"input": world.prompts, "media": world.media, "sampling": DRAWN, "samples": 2} | more
    return program.Arguments(
        model=given.pop("model", world.model), output=str(output), dtype="float32", decode=DECODE, **given
    )


def answer(given: Any, folder: Path, asked: Any = None) -> list[dict[str, Any]]:
    """The program behind its command line, in this process and on one device."""
    program.check(given)
    program.answer(given, one_device(), asked or threading.Event(), str(folder))
    return lines_of(given.output)


def lines_of(output: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(output).read_text().split("\n") if line]


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return answer(arguments(world, world.directory / "undisturbed.jsonl"), folder)


@pytest.fixture(scope="module")
def judged(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("judged")
    return answer(arguments(world, world.directory / "judged.jsonl", **judging(world)), folder)


def judging(world: World) -> dict[str, Any]:
    return {"reward": world.critic, "critique": SamplingConfig(max_new_tokens=4)}


class AskedAfter:
    """Stands for the event of a signal that comes at the given look."""

    def __init__(self, looks: int):
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_line_a_prompt_in_order(world: World, undisturbed: list[dict[str, Any]]) -> None:
    assert [(line["id"], line["line"]) for line in undisturbed] == [
        ("a", 1), ("3", 3), ("7", 4), ("both", 5), ("again", 6),
    ]  # fmt: skip
    assert undisturbed[0]["prompt"] == "What is it?"
    assert undisturbed[1]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]
    assert set(undisturbed[0]) == {"id", "line", "prompt", "responses"}
    assert all(len(line["responses"]) == 2 for line in undisturbed)
    assert {name for line in undisturbed for r in line["responses"] for name in r} == {"text", "tokens", "ended"}
    left = sorted(path.name for path in world.directory.glob("undisturbed*"))
    assert left == ["undisturbed.jsonl", "undisturbed.jsonl.settings.json"]


def test_the_same_prompt_is_given_the_same_answers(undisturbed: list[dict[str, Any]]) -> None:
    assert undisturbed[0]["responses"] == undisturbed[4]["responses"]
    first, second = undisturbed[0]["responses"]
    assert first != second


def test_answers_are_those_of_the_model(world: World, tmp_path: Path) -> None:
    greedy = SamplingConfig(max_new_tokens=5)
    lines = answer(arguments(world, tmp_path / "o.jsonl", sampling=greedy, samples=1), tmp_path)
    groups = [
        Group("", (Turn("user", "What is it?"),), (seen(world, "image", "a.png"),), (), (), ()),
        Group("", (Turn("system", "Be brief."), Turn("user", "Why?")), (), (), (), ()),
        Group("", (Turn("user", "And here?"),), (seen(world, "video", "clip"),), (), (), ()),
    ]
    model = load_model(world.model, one_device(), ShardingRules(), rates=INFERENCE)
    found = answers_in_order(
        generate(groups, load_renderer(world.model), model, one_device(), Compute(), greedy, DECODE)
    )
    for line, (expected,) in zip(lines, found, strict=False):
        assert line["responses"] == [{"text": expected.text, "tokens": len(expected.token), "ended": expected.ended}]


def seen(world: World, kind: Any, path: str) -> Media:
    return read_media(Media(kind, path), MediaRoot(world.media))


@pytest.mark.parametrize("looks", [1, 3])
def test_interrupted_and_run_again_it_answers_as_if_nothing_had_happened(
    world: World, undisturbed: list[dict[str, Any]], tmp_path: Path, looks: int
) -> None:
    output = tmp_path / "o.jsonl"
    with pytest.raises(CommandError, match="run the same command to go on") as stopped:
        answer(arguments(world, output), tmp_path, AskedAfter(looks))
    assert stopped.value.status == 75
    assert not output.exists()
    kept = [line for part in (tmp_path / "o.jsonl.parts").iterdir() for line in lines_of(part)]
    assert 0 < len(kept) < 5
    assert all(line in undisturbed for line in kept)
    assert answer(arguments(world, output), tmp_path) == undisturbed


def test_a_finished_file_is_left_alone(
    world: World, undisturbed: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = world.directory / "undisturbed.jsonl"
    before = output.stat().st_mtime_ns
    assert answer(arguments(world, output), tmp_path) == undisturbed
    assert output.stat().st_mtime_ns == before
    assert "done already" in capsys.readouterr().out


def test_other_settings_than_it_was_begun_with_are_refused(
    world: World, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = world.directory / "undisturbed.jsonl"
    hotter = dataclasses.replace(DRAWN, temperature=2.0, seed=1)
    with pytest.raises(ValueError, match=r"temperature was 1\.0, is 2\.0; seed was 0, is 1"):
        answer(arguments(world, output, sampling=hotter), tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(samples was 2, is 3\)"):
        answer(arguments(world, output, samples=3), tmp_path)
    with pytest.raises(ValueError, match="reward was null"):
        answer(arguments(world, output, **judging(world)), tmp_path)
    other = write_rows(tmp_path / "other.jsonl", [{"id": "a", "prompt": "Who?"}])
    with pytest.raises(ValueError, match="prompts was"):
        answer(arguments(world, output, input=other, media=None), tmp_path)
    new_directory(tmp_path / "other", SMALL, seed=5)
    with pytest.raises(ValueError, match="model was"):
        answer(arguments(world, output, model=str(tmp_path / "other")), tmp_path)
    assert lines_of(output) == undisturbed


def test_a_file_of_someone_else_is_not_overwritten(world: World, tmp_path: Path) -> None:
    theirs = [tmp_path / name for name in ("o.jsonl", "o.jsonl.rejected.jsonl")]
    for path in theirs:
        path.write_text("precious")
    with pytest.raises(ValueError, match="choose another --output"):
        answer(arguments(world, tmp_path / "o.jsonl"), tmp_path)
    assert [path.read_text() for path in theirs] == ["precious"] * 2


BAD = [
    {"id": "good", "prompt": "Who?"},
    {"id": "gone", "prompt": "What?", "image": "gone.png"},
    "{",
    {"id": "long", "prompt": "x" * 5000},
]
REASONS = (
    "2: 'gone.png' is not under the media root",
    "3: invalid JSON",
    "4: 5019 prompt tokens and --max-new-tokens 5 exceed the model's 4096 positions",
)


def test_bad_rows_are_listed_before_any_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "load_model", None)
    given = arguments(world, tmp_path / "o.jsonl", input=write_rows(tmp_path / "bad.jsonl", BAD))
    with pytest.raises(CommandError, match="3 of 4 prompts cannot be answered") as refused:
        answer(given, tmp_path)
    listed = [f"{row['line']}: {row['reason']}" for row in lines_of(tmp_path / "o.jsonl.rejected.jsonl")]
    assert len(listed) == 3
    for reason, row in zip(REASONS, listed, strict=True):
        assert reason in str(refused.value)
        assert row.startswith(reason)


def test_bad_rows_may_be_skipped(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(world, tmp_path / "o.jsonl", input=write_rows(tmp_path / "bad.jsonl", BAD), skip_bad=True)
    assert [line["id"] for line in answer(given, tmp_path)] == ["good"]
    assert "3 of 4 prompts cannot be answered" in capsys.readouterr().out
    assert len(lines_of(tmp_path / "o.jsonl.rejected.jsonl")) == 3


def test_the_best_has_the_highest_score_of_a_reward_model(
    world: World, undisturbed: list[dict[str, Any]], judged: list[dict[str, Any]]
) -> None:
    plain = [
        {name: value for name, value in line.items() if name != "best"}
        | {"responses": [{name: r[name] for name in ("text", "tokens", "ended")} for r in line["responses"]]}
        for line in judged
    ]
    assert plain == undisturbed
    for line in judged:
        scores = [response["score"] for response in line["responses"]]
        assert line["best"] == int(np.argmax(scores))

    texts = [tuple(dict.fromkeys(r["text"] for r in line["responses"])) for line in judged[:1]]
    media = (seen(world, "image", "a.png"),)
    group = Group("", (Turn("user", "What is it?"),), media, tuple(Response(text) for text in texts[0]), (), ())
    model = load_model(world.critic, one_device(), ShardingRules(), rates=INFERENCE)
    judge = RewardModel(model, load_reward_renderer(world.critic), one_device(), Compute())
    (expected,) = score_groups([group], judge, Scoring(sampling=SamplingConfig(max_new_tokens=4), decode=DECODE))
    for response, score, critiques in zip(judged[0]["responses"], expected.score, expected.critiques, strict=True):
        assert response["score"] == pytest.approx(score, abs=1e-5)
        assert tuple(response["critiques"]) == critiques
        assert response["scores"] == [response["score"]]


@pytest.mark.parametrize(("scores", "best"), [((0.5, 0.1), 0), ((0.1, 0.5), 1), ((0.5, 0.5), 0)])
def test_the_first_of_equals_is_best(scores: tuple[float, float], best: int) -> None:
    record = {"responses": [{"text": text} for text in ("a", "b", "a")]}
    reward = GroupReward(np.array(scores, np.float32)[:, None], (("good",), ("bad",)), np.ones((2, 1), bool))
    line = scored(record, reward, critiques=True)
    assert line["best"] == best
    assert [response["critiques"] for response in line["responses"]] == [["good"], ["bad"], ["good"]]


def test_equal_answers_are_scored_alike_and_the_first_is_best(world: World, tmp_path: Path) -> None:
    cold = SamplingConfig(max_new_tokens=3, temperature=1e-6)  # draws the likeliest, as good as always
    lines = answer(arguments(world, tmp_path / "o.jsonl", sampling=cold, samples=3, **judging(world)), tmp_path)
    for line in lines:
        assert len({json.dumps(response) for response in line["responses"]}) == 1
        assert line["best"] == 0


def test_scoring_too_goes_on_where_it_was(world: World, judged: list[dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    parts = tmp_path / "o.jsonl.parts"
    given = arguments(world, output, save_every=1e-9, **judging(world))
    for looks in (5, 4):  # at the end of the first stage, then in the middle of the second
        with pytest.raises(CommandError, match="interrupted"):
            answer(given, tmp_path, AskedAfter(looks))
    kept = [line for part in parts.glob("scores-*") for line in lines_of(part)]
    assert 0 < len(kept) < 5
    assert answer(given, tmp_path) == judged


def test_a_scalar_model_scores_without_critiques(world: World, tmp_path: Path) -> None:
    lines = answer(arguments(world, tmp_path / "o.jsonl", reward=world.scalar), tmp_path)
    for line in lines:
        assert all(set(response) == {"text", "tokens", "ended", "score"} for response in line["responses"])
        assert line["best"] == int(np.argmax([response["score"] for response in line["responses"]]))


def test_models_of_the_other_kind_are_refused_before_they_are_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "load_model", None)
    output = tmp_path / "o.jsonl"
    with pytest.raises(ValueError, match="a policy is asked for here"):
        answer(arguments(world, output, model=world.critic), tmp_path)
    with pytest.raises(ValueError, match="a reward model is asked for here"):
        answer(arguments(world, output, reward=world.model), tmp_path)
    with pytest.raises(ValueError, match="a scalar reward model reads no critiques"):
        answer(arguments(world, output, reward=world.scalar, critiques="generated"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prompt_whose_longest_answer_could_not_be_scored_is_a_bad_one(world: World, tmp_path: Path) -> None:
    long = SamplingConfig(max_new_tokens=4000)
    with pytest.raises(CommandError, match=r"--critique\.max-new-tokens 4000 exceed the reward model"):
        answer(arguments(world, tmp_path / "o.jsonl", reward=world.critic, critique=long), tmp_path)


def test_the_prompts_of_a_dataset_are_answered_as_those_of_its_file(
    world: World, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    base = {"chosen": "good", "rejected": "bad"}
    rows = [
        {"id": "other", "prompt": "Who?", **base},
        {"id": "a", "prompt": "What is it?", "image": "a.png", **base},
    ]
    dataset = str(tmp_path / "dataset")
    inputs = (write_rows(tmp_path / "pairs.jsonl", rows),)
    prepare(PrepareOptions(source="mm_rlhf", inputs=inputs, output=dataset, media=world.media))
    given = arguments(world, tmp_path / "o.jsonl", input=None, media=None, dataset=dataset)
    lines = answer(given, tmp_path)
    assert [(line["row"], line["id"]) for line in lines] == [(0, "other"), (1, "a")]
    assert "line" not in lines[1]
    assert lines[1]["responses"] == undisturbed[0]["responses"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dataset": "d"}, "one of --input and --dataset"),
        ({"input": None}, "one of --input and --dataset"),
        ({"input": None, "dataset": "d"}, "a dataset holds its pictures"),
        ({"samples": 0}, "--samples 0 is not positive"),
        ({"save_every": math.nan}, "--save-every nan is not positive"),
        ({"sampling": SamplingConfig()}, "2 greedy answers are the same"),
        ({"critique_samples": 2}, r"--critique-samples .* is for --reward"),
        ({"critiques": "none"}, r"--critiques .* is for --reward"),
    ],
)
def test_contradictions_are_bad_usage(world: World, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        program.check(arguments(world, tmp_path / "o.jsonl", **wrong))


def test_answers_may_lie_in_a_bucket(world: World, undisturbed: list[dict[str, Any]], gs: str, tmp_path: Path) -> None:
    from etils import epath

    output = f"{gs}/deep/o.jsonl"
    given = arguments(world, output)
    program.check(given)
    with pytest.raises(CommandError, match="interrupted"):
        program.answer(given, one_device(), AskedAfter(4), str(tmp_path))
    program.answer(given, one_device(), threading.Event(), str(tmp_path))
    whole = [json.loads(line) for line in epath.Path(output).read_text().split("\n") if line]
    assert whole == undisturbed
    names = sorted(path.name for path in epath.Path(f"{gs}/deep").iterdir())
    assert names == ["o.jsonl", "o.jsonl.settings.json"]


# As users run it.

TWO_HOSTS = ("--mesh.data", 2, "--mesh.fsdp", 1)


def typed(world: World, output: Path) -> tuple[Any, ...]:
    return (
        "--model", world.model, "--input", world.prompts, "--media", world.media, "--output", output,
        "--samples", 2, "--temperature", 1, "--max-new-tokens", 300, "--dtype", "float32", "--save-every", 0.001,
        "--decode.max-buckets", 1, "--decode.multiple", 64, "--decode.branches-per-device", 2, "--decode.steps", 8,
        "--reward", world.critic, "--critique.max-new-tokens", 200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def typed_undisturbed(world: World) -> list[dict[str, Any]]:
    output = world.directory / "typed.jsonl"
    run("generate", *typed(world, output))
    return lines_of(output)


def start(world: World, output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command("generate", *typed(world, output)),
        env=environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_parts(process: subprocess.Popen, output: Path, count: int, kind: str = "*") -> bool:
    """Whether there came to be so many before the program ended."""
    while process.poll() is None:
        if len(list(output.with_name(f"{output.name}.parts").glob(f"{kind}-*.jsonl"))) >= count:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.slow
def test_sigkills_lose_and_double_nothing(world: World, typed_undisturbed: list[dict[str, Any]]) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    output = world.directory / "killed.jsonl"
    for parts in (0, 1, 3, 5, 6, 8):  # the first five are answers, then come scores
        process = start(world, output)
        if not wait_for_parts(process, output, parts):
            break
        time.sleep(moments.uniform(0, 4.0 if not parts else 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print("killed with", len(list(output.with_name("killed.jsonl.parts").glob("*.jsonl"))), "parts")
    run("generate", *typed(world, output))
    assert lines_of(output) == typed_undisturbed, f"seed {seed}"


@pytest.mark.slow
def test_sigterm_ends_with_75_and_keeps_what_is_done(world: World, typed_undisturbed: list[dict[str, Any]]) -> None:
    output = world.directory / "terminated.jsonl"
    process = start(world, output)
    assert wait_for_parts(process, output, 1)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "run the same command to go on" in errors
    run("generate", *typed(world, output))
    assert lines_of(output) == typed_undisturbed


@pytest.mark.slow
def test_sigterm_on_one_host_stops_both(world: World, typed_undisturbed: list[dict[str, Any]]) -> None:
    output = world.directory / "one-host.jsonl"
    hosts = start_hosts("generate", *typed(world, output), *TWO_HOSTS, processes=2, devices=1)
    assert wait_for_parts(hosts[0].process, output, 1)
    hosts[1].process.terminate()  # not the one that writes
    assert wait_for_hosts(hosts) == [75, 75], [host.printed() for host in hosts]
    run("generate", *typed(world, output))
    assert texts_of(lines_of(output)) == texts_of(typed_undisturbed)


@pytest.mark.slow
def test_two_hosts_that_score_without_critiques_store_what_is_theirs(world: World, tmp_path: Path) -> None:
    given = typed(world, tmp_path / "o.jsonl")[:-4]
    scalar = ("--reward", world.scalar, "--forward.max-buckets", 1, "--forward.slots-per-device", 700)
    run_hosts("generate", *given, *scalar, *TWO_HOSTS, processes=2, devices=1)
    lines = lines_of(tmp_path / "o.jsonl")
    assert [line["line"] for line in lines] == [1, 3, 4, 5, 6]
    assert all("score" in response for line in lines for response in line["responses"])


@pytest.mark.slow
def test_two_hosts_answer_as_one(world: World, typed_undisturbed: list[dict[str, Any]]) -> None:
    output = world.directory / "hosts.jsonl"
    printed = run_hosts("generate", *typed(world, output), *TWO_HOSTS, processes=2, devices=1)
    assert [text.count("10 answers to 5 prompts") for text in printed] == [1, 0]
    assert texts_of(lines_of(output)) == texts_of(typed_undisturbed)


def texts_of(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [[response["text"] for response in line["responses"]] for line in lines]
