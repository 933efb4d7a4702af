"""A reference that is another model than the one training starts from, as in online rounds that keep to their first."""

import dataclasses

import pytest
from small_world import ROOT, metrics, run
from tiny import TINY

from mmrlhf_jax.models.llava_onevision.weights import new_directory
from mmrlhf_jax.training.recipe import read_recipe
from mmrlhf_jax.training.train import train

BEFORE = read_recipe(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def other(small_world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("other") / "model"
    new_directory(str(directory), TINY, seed=1)
    return str(directory)


def recipe(world, **changes):
    data = dataclasses.replace(BEFORE.data, max_steps=2, max_buckets=1)
    return dataclasses.replace(BEFORE, model=world.model, dataset=world.dataset, data=data, **changes)


def test_stored_and_online_reference_are_one_and_not_the_start(small_world, other, tmp_path):
    run("annotate", "--dataset", small_world.dataset, "--model", other, "--with", "reference",
        "--dtype", "float32", "--max-buckets", 1)  # fmt: skip
    runs = {}
    frozen = dataclasses.replace(BEFORE.optimizer.rates, tower=0.0)  # and yet no tower is shared
    optimizer = dataclasses.replace(BEFORE.optimizer, rates=frozen)
    for name in ("stored", "online"):
        asked = recipe(small_world, reference=name, reference_model=other, optimizer=optimizer)
        train(asked, tmp_path / name)
        runs[name] = metrics(tmp_path / name)
    for a, b in zip(runs["stored"], runs["online"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-5)
    assert abs(runs["stored"][0]["rewards/margins"]) > 1e-3  # a policy that started as its reference would have none
    with pytest.raises(ValueError, match=r"reference_model: was .*, now ''"):
        train(recipe(small_world, reference="online", optimizer=optimizer), tmp_path / "online")


def test_log_probs_of_the_start_are_not_taken_for_the_references(small_world, tmp_path):
    third = tmp_path / "model"
    new_directory(str(third), TINY, seed=2)
    with pytest.raises(ValueError, match=rf"no reference log-probs .*--model {third} --with reference"):
        train(recipe(small_world, reference="stored", reference_model=str(third)), tmp_path / "run")


def test_a_reference_of_another_shape_is_refused(small_world, tmp_path):
    decoder = dataclasses.replace(TINY.decoder, layers=1)
    new_directory(str(tmp_path / "model"), dataclasses.replace(TINY, decoder=decoder))
    with pytest.raises(ValueError, match=r"differ in config\.json"):
        train(recipe(small_world, reference="online", reference_model=str(tmp_path / "model")), tmp_path / "run")


def test_recipes_that_would_not_read_it_are_refused():
    supervised = read_recipe(ROOT / "configs" / "rounds" / "best.py")
    with pytest.raises(ValueError, match="reads no reference log-probs"):
        dataclasses.replace(supervised, reference_model="m")
    adapted = dataclasses.replace(BEFORE.lora, rank=2)
    with pytest.raises(ValueError, match="lora_off"):
        dataclasses.replace(BEFORE, reference="lora_off", lora=adapted, reference_model="m")
