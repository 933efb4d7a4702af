"""A newest checkpoint that is torn or altered: the run goes back to the one before, says so, and ends as if nothing had
happened. Where none is sound it says that, and changes nothing."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from small_world import ROOT, metrics

from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import Supervised
from mmrlhf_jax.training import manifest
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.recipe import INFERENCE, CheckpointConfig, read_recipe
from mmrlhf_jax.training.run import Checkpoints, RunDirectory
from mmrlhf_jax.training.train import train


def recipe(world):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    return dataclasses.replace(
        tiny,
        objective=Supervised(),
        model=world.model,
        dataset=world.dataset,
        data=dataclasses.replace(tiny.data, max_steps=4, max_buckets=1, responses="best", groups_per_step=4),
        checkpoint=CheckpointConfig(every=1),
    )


@pytest.fixture(scope="module")
def whole(small_world):
    """A run of four steps that has the checkpoints 3 and 4."""
    output = small_world.directory / "damaged-whole"
    train(recipe(small_world), output)
    return output


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it whose job was killed right after its last checkpoint was whole."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "complete.json").unlink()
    return output


def largest(checkpoint):
    return max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(checkpoint):
    file = largest(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(checkpoint):
    file = largest(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_file(checkpoint):
    largest(checkpoint).unlink()


def data_of(checkpoint):
    """All of an item's: tensorstore writes nodes of its tree anew while it writes, and of a file on its own half may be
    such as nobody reads any more."""
    found = [f for f in (checkpoint / "params").rglob("*") if f.is_file() and f.parent.name == "d"]
    assert found
    return found


def truncate_data(checkpoint):
    for file in data_of(checkpoint):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_data(checkpoint):
    for file in data_of(checkpoint):
        file.unlink()


def lose_item(checkpoint):
    shutil.rmtree(checkpoint / "optimizer")


def lose_position(checkpoint):
    largest(checkpoint / "position").write_text("")


METADATA = "_CHECKPOINT_METADATA"  # orbax' own, of a checkpoint as a whole; it reads them of all steps when it opens


def tear_metadata(checkpoint):
    file = checkpoint / METADATA
    file.write_bytes(file.read_bytes()[:100])


def spoil_tree_metadata(checkpoint):
    """Of the item, which says what arrays there are."""
    file = checkpoint / "params" / "_METADATA"
    file.write_bytes(b"[" * file.stat().st_size)


DAMAGE = [(truncate, "bytes of"), (flip, "has other content"), (lose_file, "is missing"), (lose_item, "is missing"),
          (lose_position, "has 0 bytes of"), (tear_metadata, f"{METADATA} has 100 bytes of"),
          (spoil_tree_metadata, "params/_METADATA has other content")]  # fmt: skip


def params(world, output):
    model = load_model(str(output), make_mesh(MeshConfig()), ShardingRules(), rates=INFERENCE)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(model.params)}


def check_same_end(world, output, whole):
    expected, got = params(world, whole), params(world, output)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    assert [r["rows"] for r in metrics(output)] == [r["rows"] for r in metrics(whole)]


def test_every_checkpoint_gets_a_manifest_of_all_its_files(whole):
    for step in ("3", "4"):
        checkpoint = whole / "checkpoints" / step
        document = json.loads((checkpoint / "manifest.json").read_text())
        files = {f.relative_to(checkpoint).as_posix() for f in checkpoint.rglob("*") if f.is_file()}
        assert document["files"].keys() | {"manifest.json"} == files
        assert document["bytes"] == sum(size for size, _ in document["files"].values())
        assert document["seconds"] > 0
    assert Checkpoints(whole / "checkpoints").steps() == [3, 4]


@pytest.mark.parametrize(("harm", "told"), DAMAGE, ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_resumed(
    small_world, whole, stopped, harm, told, capsys
):
    harm(stopped / "checkpoints" / "4")
    train(recipe(small_world), stopped)
    said = capsys.readouterr().out
    assert "checkpoint 4 is damaged (" in said
    assert told in said
    assert f"moved to {stopped}/damaged/4; going back to checkpoint 3\nresuming after step 3" in said
    assert (stopped / "damaged" / "4").exists()
    check_same_end(small_world, stopped, whole)


@pytest.mark.parametrize("harm", [truncate_data, lose_data, lose_item, lose_position, spoil_tree_metadata])
def test_without_a_manifest_what_cannot_be_read_is_damaged(small_world, whole, stopped, harm, capsys):
    """A machine that dies may lose the manifest with the rest."""
    harm(stopped / "checkpoints" / "4")
    (stopped / "checkpoints" / "4" / "manifest.json").write_text("")
    train(recipe(small_world), stopped)
    assert "going back to checkpoint 3\nresuming after step 3" in capsys.readouterr().out
    check_same_end(small_world, stopped, whole)


def test_a_sound_checkpoint_needs_no_manifest(small_world, stopped, capsys):
    for step in ("3", "4"):
        (stopped / "checkpoints" / step / "manifest.json").unlink()
    train(recipe(small_world), stopped)
    assert "resuming after step 4" in capsys.readouterr().out


def test_where_no_checkpoint_is_sound_nothing_is_started_and_nothing_moved(small_world, stopped):
    flip(stopped / "checkpoints" / "4")
    lose_item(stopped / "checkpoints" / "3")
    message = r"no checkpoint can be read\. Nothing was changed: put back a copy"
    with pytest.raises(ValueError, match=message) as refused:
        train(recipe(small_world), stopped)
    assert "\n  checkpoint 4: " in str(refused.value)
    assert "\n  checkpoint 3: optimizer/" in str(refused.value)
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"3", "4"}
    assert len(metrics(stopped)) == 4


def test_a_run_whose_checkpoints_all_lie_aside_does_not_start_again(small_world, stopped):
    (stopped / "damaged").mkdir()
    for step in ("3", "4"):
        (stopped / "checkpoints" / step).rename(stopped / "damaged" / step)
    with pytest.raises(ValueError, match=r"no checkpoint can be read; earlier ones lie in .*damaged"):
        train(recipe(small_world), stopped)


def test_a_program_that_reads_a_damaged_checkpoint_refuses_and_names_another(small_world, stopped):
    flip(stopped / "checkpoints" / "4")
    message = r"checkpoint 4 is damaged \(.* has other content .*: name another, such as .*@3"
    with pytest.raises(ValueError, match=message):
        params(small_world, stopped)
    assert params(small_world, f"{stopped}@3")
    assert (stopped / "checkpoints" / "4").exists()


def test_torn_metadata_of_one_checkpoint_keep_no_program_from_another(small_world, stopped):
    tear_metadata(stopped / "checkpoints" / "4")
    message = rf"checkpoint 4 is damaged \({METADATA} has 100 bytes of \d+\): name another, such as .*@3"
    with pytest.raises(ValueError, match=message):
        params(small_world, stopped)
    assert params(small_world, f"{stopped}@3")


def test_torn_metadata_without_a_manifest_cost_nothing_where_all_arrays_read(small_world, whole, stopped, capsys):
    tear_metadata(stopped / "checkpoints" / "4")
    (stopped / "checkpoints" / "4" / "manifest.json").unlink()
    train(recipe(small_world), stopped)
    assert "resuming after step 4" in capsys.readouterr().out
    check_same_end(small_world, stopped, whole)


def test_torn_metadata_of_older_checkpoints_cost_nothing(small_world, whole, stopped, capsys):
    tear_metadata(stopped / "checkpoints" / "3")
    train(recipe(small_world), stopped)
    assert "resuming after step 4" in capsys.readouterr().out
    check_same_end(small_world, stopped, whole)


def test_a_run_copied_from_a_bucket_is_checked_by_sizes(stopped):
    checkpoint = RunDirectory.at(stopped).checkpoints / "4"
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace("crc32:", "crc32c:"))
    assert manifest.damage(checkpoint) is None
    truncate(stopped / "checkpoints" / "4")
    assert "bytes of" in manifest.damage(checkpoint)


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(stopped):
    directory = RunDirectory.at(stopped)
    assert manifest.set_aside(directory.checkpoints / "4", directory.damaged).name == "4"
    shutil.copytree(stopped / "checkpoints" / "3", stopped / "checkpoints" / "4")
    assert manifest.set_aside(directory.checkpoints / "4", directory.damaged).name == "4-2"


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside_too(small_world, gs, capsys):
    train(recipe(small_world), f"{gs}/run")
    run = RunDirectory.at(f"{gs}/run")
    run.complete.unlink()
    torn = max((run.checkpoints / "4" / "position").iterdir(), key=lambda f: f.stat().length)
    torn.write_bytes(b"{}" + b" " * (torn.stat().length - 2))  # as many bytes as before
    train(recipe(small_world), f"{gs}/run")
    said = capsys.readouterr().out
    assert "checkpoint 4 is damaged (position/" in said
    assert "has other content (crc32c:" in said
    assert "resuming after step 3" in said
    assert (run.damaged / "4" / "manifest.json").exists()
    assert Checkpoints(run.checkpoints).steps() == [3, 4]
