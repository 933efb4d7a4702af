"""What is said where a checkpoint cannot be whole between SIGTERM and SIGKILL: nothing unless it cannot."""

import dataclasses

from small_world import ROOT

from mmrlhf_jax.objectives import Supervised
from mmrlhf_jax.training.grace import too_slow
from mmrlhf_jax.training.manifest import Written
from mmrlhf_jax.training.recipe import CheckpointConfig, read_recipe
from mmrlhf_jax.training.train import train

LARGE = 84_000_000_000  # a 7B model's parameters and moments


def test_before_anything_was_written_a_good_disk_is_assumed():
    assert too_slow(LARGE, None, CheckpointConfig(), processes=4) is None
    assert too_slow(LARGE, None, CheckpointConfig(), processes=1) == (
        "note: a checkpoint holds 84.0 GB. To be whole 30 s after SIGTERM (checkpoint.grace) it takes 2.80 GB/s; 1.00 "
        "GB/s assumed here, that is 84 s. Where the machine waits no longer, an interrupted run goes back up to 500 "
        "steps (checkpoint.every)"
    )


def test_a_measured_checkpoint_outweighs_what_is_assumed():
    quick, slow = Written(LARGE, 20.0), Written(LARGE, 120.0)
    assert too_slow(LARGE, quick, CheckpointConfig(), processes=1) is None
    assert "0.70 GB/s measured here, that is 120 s" in too_slow(LARGE, slow, CheckpointConfig(), processes=64)
    assert too_slow(LARGE, slow, CheckpointConfig(grace=300.0), processes=1) is None


def test_a_run_says_it_once_it_has_measured_and_its_resumption_at_the_start(small_world, tmp_path, capsys):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    data = dataclasses.replace(tiny.data, max_steps=6, max_buckets=1, responses="best", groups_per_step=4)
    recipe = dataclasses.replace(
        tiny, objective=Supervised(), model=small_world.model, dataset=small_world.dataset, data=data,
        checkpoint=CheckpointConfig(every=1, grace=0.005),
    )  # fmt: skip
    train(recipe, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("note: a checkpoint holds 0.0 GB.") == said.count("measured here") == 1
    (tmp_path / "run" / "complete.json").unlink()
    train(recipe, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.index("resuming after step 6") < said.index("measured here")
