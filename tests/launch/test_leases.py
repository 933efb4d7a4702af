"""Every program refuses an output that another job is writing, and leaves it as it is."""

import subprocess

import pytest
from another_job import held
from small_world import command, environment, run

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.lease import LeaseError


def refused(program, *arguments):
    done = subprocess.run(command(program, *arguments), env=environment(1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "is being written by another job: process 7 on elsewhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_prepare(small_world, tmp_path):
    options = PrepareOptions(
        source="mm_rlhf",
        inputs=(str(small_world.directory / "pairs.jsonl"),),
        output=str(tmp_path / "out"),
        media=str(small_world.directory / "media"),
        source_options=SourceOptions(margin_column="margin"),
    )
    (tmp_path / ".out.pictures").mkdir()  # the other job's
    with held(tmp_path / ".out.lease"), pytest.raises(LeaseError, match="by another job: process 7 on elsewhere"):
        prepare(options)
    assert [path.name for path in tmp_path.iterdir()] == [".out.pictures"]
    prepare(options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_export_generate_and_annotate(small_world, tmp_path):
    with held(tmp_path / ".hf.lease"):
        refused("export", small_world.model, "--output", tmp_path / "hf")
    with held(tmp_path / "answers.jsonl.lease"):
        refused("generate", "--model", small_world.model, "--dataset", small_world.dataset,
                "--output", tmp_path / "answers.jsonl")  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    annotation = ("--dataset", small_world.dataset, "--model", small_world.model, "--with", "reference",
                  "--dtype", "float32")  # fmt: skip
    run("annotate", *annotation)
    (store,) = find(small_world.dataset, "reference")
    assert not store.lease.exists()
    with held(store.lease):
        refused("annotate", *annotation)
