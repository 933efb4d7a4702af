"""Law 6 for every program that leaves something behind: killed at a random moment and run again, prepare, annotate,
train and export leave what an undisturbed run leaves, bit for bit, and nothing beside it.

    LAW_6_KILLS=25 LAW_6_SEED=1 python -m pytest -o addopts= -s -m slow tests/laws/test_06_every_program_killed.py
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from small_world import ROOT, SmallWorld, command, environment, metrics

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.models.llava_onevision.config import read_config
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.run import Checkpoints

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("LAW_6_KILLS", "2"))
SEED = int(os.environ.get("LAW_6_SEED", "0")) or random.randrange(1, 10**6)
STEPS = 6
TIMES = ("seconds", "per_second")


@dataclass(frozen=True)
class Job:
    """A program's command in a folder of its own, and what it leaves there: name -> value that must be equal."""

    prepare_folder: Callable[[SmallWorld, Path], None]
    arguments: Callable[[SmallWorld, Path], tuple]
    left: Callable[[SmallWorld, Path], dict[str, object]]


def nothing(world: SmallWorld, folder: Path) -> None:
    """The program starts from inputs outside its folder."""


def bytes_of(folder: Path) -> dict[str, object]:
    """Every file under `folder` and a digest of it."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def prepared(world: SmallWorld, folder: Path) -> dict[str, object]:
    """Every row with its pictures' bytes, and the files beside them. (An ArrayRecord's own bytes differ each time it is
    written, undisturbed too.)"""
    dataset = open_dataset(str(folder / "dataset"))
    rows = {f"row {row}": dataset.with_media(row) for row in range(len(dataset))}
    beside = {name: digest for name, digest in bytes_of(folder).items() if ".array_record" not in name}
    return {**rows, **beside}


def trained(world: SmallWorld, folder: Path) -> dict[str, object]:
    """The log without its times, and the parameters."""
    run = folder / "run"
    checkpoints = Checkpoints(run / "checkpoints")
    abstract = nn_params.abstract(declare(read_config(world.model)), make_mesh(MeshConfig()), ShardingRules())
    params = nn_params.named_leaves(checkpoints.params(STEPS, abstract))
    log = [{k: v for k, v in record.items() if not any(time in k for time in TIMES)} for record in metrics(run)]
    return {"log": log, "step": checkpoints.latest(), **{name: np.asarray(leaf).tobytes() for name, leaf in params}}


def annotated(world: SmallWorld, folder: Path) -> dict[str, object]:
    """Every row's log-probs."""
    (store,) = find(str(folder / "dataset"), "reference")
    rows = store.read(open_dataset(str(folder / "dataset")))  # raises where a row is stored twice
    return {f"row {row}": arrays["logp"].tobytes() for row, arrays in rows.items()}


def prepare_arguments(world: SmallWorld, folder: Path) -> tuple:
    return (
        "--source", "mm_rlhf", "--input", world.directory / "pairs.jsonl", "--media", world.directory / "media",
        "--margin-column", "margin", "--output", folder / "dataset",
    )  # fmt: skip


def train_arguments(world: SmallWorld, folder: Path) -> tuple:
    return (
        ROOT / "configs" / "tiny.py", "--model", world.model, "--dataset", world.dataset, "--output", folder / "run",
        "--reference", "online", "--data.max-steps", STEPS, "--data.groups-per-step", 4, "--checkpoint.every", 1,
        "--optimizer.learning-rate", 1e-3, "--data.max-buckets", 1,
    )  # fmt: skip


def annotate_arguments(world: SmallWorld, folder: Path) -> tuple:
    return (
        "--dataset", folder / "dataset", "--model", world.model, "--with", "reference", "--dtype", "float32",
        "--rows-per-part", 1, "--max-buckets", 1,
    )  # fmt: skip


def lora_run(world: SmallWorld, folder: Path) -> None:
    """A run whose adapter is exported, made once: it is an input."""
    output = world.directory / "killed-lora"
    if not (output / "complete.json").exists():
        arguments = (
            ROOT / "configs" / "tiny.py", "--model", world.model, "--dataset", world.dataset, "--output", output,
            "--reference", "lora_off", "--lora.rank", 4, "--data.max-steps", 1, "--data.groups-per-step", 4,
            "--data.max-buckets", 1,
        )  # fmt: skip
        finish("train", arguments)


# the first word of a name is the program
JOBS = {
    "prepare": Job(nothing, prepare_arguments, prepared),
    "annotate": Job(
        lambda world, folder: shutil.copytree(
            world.dataset, folder / "dataset", ignore=shutil.ignore_patterns("annotations")
        ),
        annotate_arguments,
        annotated,
    ),
    "train": Job(nothing, train_arguments, trained),
    "export": Job(
        nothing,
        lambda world, folder: (world.model, "--output", folder / "exported", "--dtype", "float32"),
        lambda _, folder: bytes_of(folder),
    ),
    "export adapter": Job(
        lora_run,
        lambda world, folder: (world.directory / "killed-lora", "--output", folder / "exported", "--adapter"),
        lambda _, folder: bytes_of(folder),
    ),
}


def start(program: str, arguments: tuple) -> subprocess.Popen:
    return subprocess.Popen(
        command(program, *arguments), env=environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(program: str, arguments: tuple) -> float:
    """Runs to the end; seconds it took."""
    began = time.monotonic()
    process = start(program, arguments)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return time.monotonic() - began


def killed(program: str, arguments: tuple, after: float) -> bool:
    """Whether the program was still at work when it was killed `after` seconds."""
    process = start(program, arguments)
    try:
        process.communicate(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


@pytest.mark.parametrize("name", JOBS)
def test_a_kill_at_any_moment_changes_nothing(name, small_world, tmp_path):
    program, job = name.partition(" ")[0], JOBS[name]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    job.prepare_folder(small_world, undisturbed)
    finish(program, job.arguments(small_world, undisturbed))  # compiles
    wanted = job.left(small_world, undisturbed)
    beside = sorted(path.name for path in undisturbed.iterdir())
    moments = random.Random(SEED)
    seconds, equal = 8.0, 0
    while equal < KILLS:
        folder = tmp_path / f"kill-{equal}"
        folder.mkdir()
        job.prepare_folder(small_world, folder)
        arguments = job.arguments(small_world, folder)
        if not killed(program, arguments, moments.uniform(0, seconds)):
            seconds *= 0.9  # it was done before: aim earlier
            shutil.rmtree(folder)
            continue
        finish(program, arguments)
        assert job.left(small_world, folder) == wanted, f"seed {SEED}, kill {equal}"
        assert sorted(path.name for path in folder.iterdir()) == beside, f"seed {SEED}, kill {equal}"
        shutil.rmtree(folder)
        equal += 1
    print(f"{name}: seed {SEED}, {equal} kills, {equal} results equal to the undisturbed run's")
