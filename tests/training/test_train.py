"""What a user meets when training: refusals that name the cure, a NaN that names rows, worker processes, pairs mode."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_world import ROOT, metrics, run

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.pipeline import MissingMargin, check_margins
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import DPO, MMDPO, MMDPOReleasedBatch, Supervised
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.recipe import (
    INFERENCE,
    CheckpointConfig,
    LogConfig,
    PartRates,
    differences,
    flatten,
    read_recipe,
)
from mmrlhf_jax.training.run import Checkpoints
from mmrlhf_jax.training.train import NonFiniteStep, train


def recipe(world, objective=None, data=None, **changes):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    fields = {"max_steps": 2, "max_buckets": 1, **(data or {})}
    return dataclasses.replace(
        tiny,
        objective=objective or DPO(),
        model=world.model,
        dataset=world.dataset,
        reference="online" if not isinstance(objective, Supervised) else "stored",
        data=dataclasses.replace(tiny.data, **fields),
        **changes,
    )


@pytest.mark.parametrize("objective", [Supervised(), MMDPO()], ids=["supervised", "mm_dpo"])
def test_every_stage_trains_and_finds_itself_complete(small_world, objective, capsys):
    output = small_world.directory / f"train-{type(objective).__name__}"
    run_recipe = recipe(small_world, objective)
    train(run_recipe, output)
    first, second = metrics(output)
    assert first["step"] == 1
    assert second["learning_rate"] < first["learning_rate"]
    assert {"loss", "grad_norm", "seconds", "seconds/compile", "groups_per_second", "rows"} <= first.keys()
    assert {"tokens_per_second", "model_tflops_per_second"} <= first.keys()
    train(run_recipe, output)
    assert "is complete already" in capsys.readouterr().out


def test_tensorboard_is_written_when_asked(small_world, tmp_path):
    train(recipe(small_world, log=LogConfig(tensorboard=True)), tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"rewards/margins" in events.read_bytes()


def test_pairs_mode_is_the_same_step(small_world):
    """One step over the whole dataset: same loss and gradient, whether pairs share a group's forward or not."""
    pairs = sum(len(group.pairs) for group in open_dataset(small_world.dataset).groups())
    out = {}
    for pairing, count in (("groups", small_world.groups), ("pairs", pairs)):
        output = small_world.directory / f"train-{pairing}"
        train(recipe(small_world, MMDPO(), {"pairing": pairing, "groups_per_step": count, "max_steps": 1}), output)
        out[pairing] = metrics(output)[0]
    for name in ("loss", "loss/preference", "loss/nll", "rewards/margins", "beta/mean", "margin/mean", "grad_norm"):
        assert out["pairs"][name] == pytest.approx(out["groups"][name], rel=1e-5, abs=1e-6), name


def test_worker_processes_bring_the_same_batches(small_world):
    for workers in (0, 2):
        output = small_world.directory / f"train-workers-{workers}"
        run(
            "train", ROOT / "configs" / "tiny.py", "--model", small_world.model, "--dataset", small_world.dataset,
            "--output", output, "--reference", "online", "--data.max-steps", 2, "--data.max-buckets", 1,
            "--data.workers", workers,
        )  # fmt: skip
    alone, helped = (metrics(small_world.directory / f"train-workers-{n}") for n in (0, 2))
    assert [r["loss"] for r in helped] == [r["loss"] for r in alone]
    assert [r["rows"] for r in helped] == [r["rows"] for r in alone]


def test_a_nan_names_step_and_rows_and_is_never_saved(small_world, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    for file in (small_world.directory / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["image_newline"] = np.full_like(weights["image_newline"], np.nan)  # only groups with a picture see it
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    groups = list(open_dataset(small_world.dataset).groups())
    pictured = {row for row, group in enumerate(groups) if group.media}
    with pytest.raises(NonFiniteStep, match=r"step 1: .* dataset rows ([\d, ]+)\. ") as caught:
        train(dataclasses.replace(recipe(small_world), model=str(broken)), tmp_path / "run")
    named = {int(n) for n in str(caught.value).split("rows ")[1].split(".")[0].split(", ")}
    assert named <= pictured
    assert named
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() is None


def poisoned(step):
    """make_accumulate, whose parameters are NaN in one step of a run of one micro-batch a step."""
    from mmrlhf_jax.training import train as module

    real, count = module.make_accumulate, iter(range(1, 100))
    broken = jax.jit(lambda tree: jax.tree.map(lambda x: x * jnp.nan, tree))

    def make(*arguments, **named):
        accumulate = real(*arguments, **named)

        def poisoned_accumulate(trainable, *others):
            return accumulate(broken(trainable) if next(count) == step else trainable, *others)

        return poisoned_accumulate

    return make


@pytest.mark.parametrize("every", [1, 2])
def test_a_nan_in_mid_run_leaves_the_checkpoint_before_it(small_world, tmp_path, monkeypatch, capsys, every):
    from mmrlhf_jax.training import train as module

    data = {"max_steps": 6, "groups_per_step": 4}
    run_recipe = recipe(small_world, data=data, checkpoint=CheckpointConfig(every=every))
    with monkeypatch.context() as patched:
        patched.setattr(module, "make_accumulate", poisoned(step=3))
        with pytest.raises(NonFiniteStep, match=r"step 3: loss nan, .* dataset rows \d+, \d+, \d+, \d+\. The last"):
            train(run_recipe, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest() == 2
    model = load_model(str(tmp_path / "run"), make_mesh(MeshConfig()), ShardingRules(), rates=INFERENCE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))
    train(run_recipe, tmp_path / "run")
    assert "resuming after step 2" in capsys.readouterr().out
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_only_what_has_a_rate_moves(small_world):
    output = small_world.directory / "train-projector"
    optimizer = dataclasses.replace(
        recipe(small_world).optimizer, rates=PartRates(decoder=0.0, projector=1.0, tower=0.0), warmup=0.0
    )
    train(recipe(small_world, optimizer=optimizer), output)
    run("export", output, "--output", output / "hf", "--dtype", "float32")
    before = load_file(small_world.directory / "model" / "model.safetensors")
    after = load_file(output / "hf" / "model.safetensors")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("multi_modal_projector", "image_newline"))}


def test_mm_dpo_without_margins_names_rows_and_cure(small_world):
    groups = [
        dataclasses.replace(g, pairs=tuple(dataclasses.replace(p, margin=None) for p in g.pairs))
        for g in open_dataset(small_world.dataset).groups()
    ]
    with pytest.raises(MissingMargin, match=r"12 of 12 groups .*pairs\.jsonl:1.*--margin-column"):
        check_margins(groups)


def test_step_wide_statistics_refuse_accumulation(small_world, tmp_path):
    data = {"groups_per_step": 12, "slots_per_device": 256}
    with pytest.raises(ValueError, match=r"12 groups must fit one micro-batch: set data\.max_buckets to 1"):
        train(recipe(small_world, MMDPOReleasedBatch(), {**data, "max_buckets": 3}), tmp_path / "run")


def test_a_resumed_run_may_change_how_but_not_what(small_world):
    run_recipe = recipe(small_world)
    saved = json.loads(json.dumps(flatten(run_recipe)))
    assert differences(saved, dataclasses.replace(run_recipe, log=dataclasses.replace(run_recipe.log))) == []
    other = dataclasses.replace(run_recipe, seed=1, objective=DPO(beta=0.2))
    assert differences(saved, other) == ["objective.beta: was 0.1, now 0.2", "seed: was 0, now 1"]


def test_a_directory_with_something_else_is_left_alone(small_world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no run; use another --output"):
        train(recipe(small_world), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_complete_run_is_not_taken_for_one_on_other_data(small_world, tmp_path):
    done = recipe(small_world)
    train(done, tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a run of another recipe.*\n  dataset: was '.*', now 'elsewhere'"):
        train(dataclasses.replace(done, dataset="elsewhere"), tmp_path / "run")


def test_a_start_that_came_to_nothing_leaves_the_directory_free(small_world, tmp_path, monkeypatch):
    """A run that stopped before its first checkpoint may be started again with another recipe."""
    from mmrlhf_jax.training import train as module

    def broken(*_, **__):
        raise RuntimeError("no device left")

    with monkeypatch.context() as patched:
        patched.setattr(module, "make_accumulate", broken)
        with pytest.raises(RuntimeError, match="no device left"):
            train(recipe(small_world), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.json").exists()
    (tmp_path / "run" / "model" / "chat_template.json").write_text("{}")  # as another model might have had
    corrected = dataclasses.replace(recipe(small_world), seed=1)
    train(corrected, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 1
    assert not (tmp_path / "run" / "model" / "chat_template.json").exists()
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_reads_and_states_its_command_and_hardware(file):
    found = read_recipe(file)
    text = file.read_text()
    assert jnp.dtype(found.compute.dtype)
    assert "Hardware" in text
    path = file.relative_to(ROOT)
    assert f"launch/train.py {path}" in text or ("launch/rounds.py" in text and f"--recipe {path}" in text)


def test_a_frozen_part_leaves_a_run_as_it_came(small_world, tmp_path):
    """A tower stored in fp16 is exported to the bit, whatever dtype the run computed in."""
    half = tmp_path / "model"
    half.mkdir()
    for file in (small_world.directory / "model").iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    before = {n: w.astype(np.float16) for n, w in load_file(half / "model.safetensors").items()}
    save_file(before, half / "model.safetensors", metadata={"format": "pt"})
    changed = dataclasses.replace(recipe(small_world), model=str(half))
    train(
        dataclasses.replace(changed, compute=dataclasses.replace(changed.compute, dtype="bfloat16")), tmp_path / "run"
    )
    run("export", tmp_path / "run", "--output", tmp_path / "hf", "--dtype", "float32")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    for name, weight in before.items():
        if name.startswith("vision_tower"):
            np.testing.assert_array_equal(after[name], weight.astype(np.float32), err_msg=name)
    embedding = "language_model.model.embed_tokens.weight"
    assert not np.array_equal(after[embedding], before[embedding].astype(np.float32))


def test_a_group_beyond_the_models_positions_is_refused_before_training(small_world, tmp_path):
    short = tmp_path / "model"
    short.mkdir()
    for file in (small_world.directory / "model").iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    raw = json.loads((short / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = 100
    (short / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"model's 100 positions .*: up to \d+, .*--model and --max-tokens"):
        train(dataclasses.replace(recipe(small_world), model=str(short)), tmp_path / "run")


def test_a_recipe_without_model_or_data_says_what_to_add(tmp_path):
    with pytest.raises(UsageError, match=r"names no model and no dataset: add --model \.\.\. --dataset"):
        train(read_recipe(ROOT / "configs" / "tiny.py"), tmp_path / "run")


def test_a_broken_recipe_is_bad_usage_in_one_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from mmrlhf_jax.objectives import MMDPO\nrecipe = MMDPO(gama=1)\n")
    with pytest.raises(UsageError, match=r"mine\.py: TypeError: .*gama"):
        read_recipe(file)


def test_exporting_again_finds_the_work_done_and_overwrites_nothing(small_world, tmp_path):
    arguments = (small_world.model, "--output", tmp_path / "hf", "--dtype", "float32")
    assert "wrote" in run("export", *arguments)
    assert "is written already" in run("export", *arguments)
    with pytest.raises(AssertionError, match="exists already; name another --output"):
        run("export", *arguments[:-1], "bfloat16")
