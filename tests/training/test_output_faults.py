"""An output that fails under a run: one message, exit code 1, earlier checkpoints intact, and the same command goes on
once it is mended."""

import errno
import logging
import os
import resource
import shutil
import subprocess
import tempfile
import time

import pytest
from small_world import ROOT, command, environment, metrics, run

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.training import manifest
from mmrlhf_jax.training.run import Checkpoints, RunDirectory
from mmrlhf_jax.writing import explain, explained_writing


def arguments(world, output, steps=6):
    return (
        ROOT / "configs" / "tiny.py", "--model", world.model, "--dataset", world.dataset, "--output", output,
        "--reference", "online", "--data.max-steps", steps, "--data.groups-per-step", 4, "--data.max-buckets", 1,
        "--checkpoint.every", 2,
    )  # fmt: skip


def fails(world, output, **options):
    """The one message of a run that ends with 1."""
    done = subprocess.run(
        command("train", *arguments(world, output)), env=environment(1), capture_output=True, text=True, timeout=300,
        **options,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    return said[0]


def sound_steps(output):
    run_directory = RunDirectory.at(output)
    steps = Checkpoints(run_directory.checkpoints).steps()
    assert [manifest.damage(run_directory.checkpoints / str(step)) for step in steps] == [None] * len(steps)
    return steps


def mount(folder, options):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
        pytest.skip("needs leave to mount a small disk")


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for one checkpoint and a half."""
    mount(tmp_path, "size=1500k")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(small_world, small_disk, tmp_path):
    said = fails(small_world, small_disk / "run")
    assert said.startswith(f"error: {small_disk}/run: No space left on device (")
    assert "Earlier checkpoints and parts are as they were: make room there" in said
    kept = sound_steps(small_disk / "run")
    assert kept
    assert max(kept) < 6
    remount(small_disk, "size=50m")
    assert f"resuming after step {max(kept)}" in run("train", *arguments(small_world, small_disk / "run"))
    assert [record["step"] for record in metrics(small_disk / "run")] == [1, 2, 3, 4, 5, 6]
    assert 6 in sound_steps(small_disk / "run")


@pytest.mark.slow
def test_a_disk_that_became_read_only_is_told_before_any_work(small_world, small_disk):
    remount(small_disk, "size=50m")
    run("train", *arguments(small_world, small_disk / "run"))
    (small_disk / "run" / "complete.json").unlink()
    remount(small_disk, "ro")
    said = fails(small_world, small_disk / "run")
    assert said.startswith(f"error: {small_disk}/run: Read-only file system (")
    assert "give this user leave to write there" in said
    remount(small_disk, "rw")
    assert sound_steps(small_disk / "run") == [4, 6]


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_named(small_world, tmp_path):
    """As a quota would, it meets the writers of checkpoints, which are not Python's."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    said = fails(small_world, tmp_path / "run", preexec_fn=limit)
    assert said.startswith(f"error: {tmp_path}/run: File too large (")
    assert "raise the limit on the size of files (ulimit -f)" in said
    assert sound_steps(tmp_path / "run") == []
    assert "done: 6 steps" in run("train", *arguments(small_world, tmp_path / "run"))


@pytest.mark.slow
def test_an_output_that_vanishes_under_a_run_is_not_made_anew(small_world, tmp_path):
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    process = subprocess.Popen(
        command("train", *arguments(small_world, output, steps=4000)), env=environment(1), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while not (output / "checkpoints" / "4" / "manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    output.rename(elsewhere)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert f"error: {output}: " in errors
    assert "Traceback" not in errors
    assert sound_steps(output) == [] if output.exists() else True  # a write under way may make half a checkpoint anew
    shutil.rmtree(output, ignore_errors=True)
    kept = sound_steps(elsewhere)
    assert kept
    elsewhere.rename(output)
    went_on = subprocess.Popen(
        command("train", *arguments(small_world, output, steps=4000)), env=environment(1), stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    said = ""
    while f"resuming after step {kept[-1]}" not in said:
        line = went_on.stdout.readline()
        assert line, said
        said += line
    went_on.kill()
    went_on.communicate()


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "raise the quota"), (errno.EROFS, "leave to write"),
     (errno.ENOENT, "mount or restore"), (errno.ESTALE, "mount or restore"), (errno.EIO, "look at the disk")],
)  # fmt: skip
def test_a_failure_to_write_says_what_where_and_what_to_do(number, cure):
    with pytest.raises(CommandError) as told, explained_writing("/runs/mine"):
        raise OSError(number, os.strerror(number), "/runs/mine/metrics.jsonl")
    assert str(told.value).startswith(f"/runs/mine: {os.strerror(number)} (")
    assert cure in str(told.value)
    assert "run the same command to go on" in str(told.value)
    assert told.value.status == 1


def test_the_disk_that_was_full_is_the_one_that_is_named():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/x")
    assert explain(full, "/runs/mine").startswith("/cache/x: No space left")
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), full):
        assert "gs://b/run: No space" not in explain(error, "gs://b/run")
    assert tempfile.gettempdir() in explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "gs://b/run")


def test_a_cause_is_found_behind_other_errors():
    behind = RuntimeError("could not save")
    behind.__cause__ = ValueError("RESOURCE_EXHAUSTED: Failed to write 7 bytes: No space left on device")
    assert "make room there" in explain(behind, "/runs/mine")


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file or directory", "/models/x.json"), ValueError("Permission denied"),
     PermissionError(errno.EACCES, "Permission denied", "/media/1.png"), RuntimeError("device lost")],
)  # fmt: skip
def test_errors_about_other_files_pass(error):
    with pytest.raises(type(error)) as passed, explained_writing("/runs/mine"):
        raise error
    assert passed.value is error


def test_writes_that_fail_beside_the_first_are_not_told_again(caplog):
    """asyncio logs an error nobody waited for when its task is dropped, which is at any time."""
    import mmrlhf_jax.training.run  # noqa: F401 - it has the filters

    for file, told in (("site-packages/orbax/checkpoint/serialization.py", False), ("elsewhere.py", True)):
        try:
            exec(compile("raise ValueError('NO SPACE')", file, "exec"))
        except ValueError as error:
            logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
        assert bool(caplog.records) == told
