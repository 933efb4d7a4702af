"""Law 7: stored reference log-probs == online reference; and stored ones are never mixed up."""

import dataclasses

import numpy as np
import pytest
from small_world import ROOT, metrics, run

from mmrlhf_jax.data.annotations import AnnotationStore, find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.training.recipe import read_recipe
from mmrlhf_jax.training.train import train


@pytest.fixture(scope="module")
def annotated(small_world):
    run("annotate", "--dataset", small_world.dataset, "--model", small_world.model, "--with", "reference",
        "--dtype", "float32", "--max-buckets", 1)  # fmt: skip
    return small_world


def recipe(world, **changes):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    data = dataclasses.replace(tiny.data, max_steps=2, max_buckets=1)
    return dataclasses.replace(tiny, model=world.model, dataset=world.dataset, data=data, **changes)


def test_a_run_on_stored_log_probs_is_a_run_beside_a_frozen_copy(annotated):
    for reference in ("stored", "online"):
        train(recipe(annotated, reference=reference), annotated.directory / f"law-7-{reference}")
    stored, online = (metrics(annotated.directory / f"law-7-{name}") for name in ("stored", "online"))
    for a, b in zip(stored, online, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    # the policy starts as its reference
    assert stored[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-5)


def test_annotating_again_finds_the_work_done(annotated):
    said = run("annotate", "--dataset", annotated.dataset, "--model", annotated.model, "--with", "reference",
               "--dtype", "float32", "--max-buckets", 1)  # fmt: skip
    assert "done already: 12 stored" in said


def test_an_interrupted_annotation_is_finished_not_doubled(annotated):
    (store,) = find(annotated.dataset, "reference")
    before = AnnotationStore.open(annotated.dataset, "reference", store.key).read(open_dataset(annotated.dataset))
    for part in store.directory.glob("part-*.npz"):
        part.unlink()
    half = sorted(before)[:5]
    groups = list(open_dataset(annotated.dataset).groups())
    AnnotationStore.open(annotated.dataset, "reference", store.key).write(
        half, [groups[row].content_hash() for row in half], {"logp": [before[row]["logp"] for row in half]}
    )
    said = run("annotate", "--dataset", annotated.dataset, "--model", annotated.model, "--with", "reference",
               "--dtype", "float32", "--max-buckets", 1)  # fmt: skip
    assert f"{annotated.groups - 5} groups scored" in said
    after = AnnotationStore.open(annotated.dataset, "reference", store.key).read(open_dataset(annotated.dataset))
    assert after.keys() == before.keys()
    for row in before:  # other groups shared its batch, so equal to rounding
        np.testing.assert_allclose(after[row]["logp"], before[row]["logp"], atol=1e-5)


def test_log_probs_of_another_rendering_are_not_taken(annotated):
    other = recipe(annotated, render=RenderOptions(two_newlines=True))
    with pytest.raises(ValueError, match=r"no reference log-probs .* differs in renderer") as caught:
        train(other, annotated.directory / "law-7-other")
    command = str(caught.value).split("Make them: ")[1]  # and it is the command that makes just these
    assert command.endswith("--with reference --dtype float32 --render.two-newlines")


def test_log_probs_of_nearly_the_same_weights_are_not_taken(annotated, tmp_path):
    """A bf16 export of fp32 weights is another model, however close."""
    run("export", annotated.model, "--output", tmp_path / "rounded", "--dtype", "bfloat16")
    close = dataclasses.replace(recipe(annotated), model=str(tmp_path / "rounded"))
    with pytest.raises(ValueError, match=r"no reference log-probs .* differs in model"):
        train(close, annotated.directory / "law-7-rounded")
