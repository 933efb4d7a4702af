"""Long training on the built-in world, once undisturbed and once under random SIGKILLs, side by side: memory and open
files of both while they run, and whether they end in the same state.

    python tests/soak.py --output runs/soak --minutes 45 --seed 1

It measures the rate of a step first and takes as many steps as fill the minutes. Every moment of a kill comes from the
seed. Prints a line a lifetime (from a start to its kill or its end): seconds, steps, memory and descriptors at both
ends, and the slope of each with its standard error; exit 1 where a state differs or a slope is no noise. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
RECIPES = ROOT / "configs" / "quickstart"
EVERY = 2.0  # seconds between two looks at a process
WARM = 120.0  # first seconds of a lifetime left out: compiling, first buffers, the loader's read-ahead
COOL = 20.0  # last seconds left out: a run that ends closes its files and frees its memory
FEWEST = 150  # looks a slope is taken from, five minutes: a shorter life is still warming up on a busy machine
GROWTH = 0.02  # of a lifetime's memory: what a slope may add over the whole soak and still be called flat
TIMES = ("seconds", "per_second")
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
"""glibc's: memory that is freed goes back to the system. By default the heap keeps some tens of MiB more after every
checkpoint, whose fragments look like a leak over an hour, while what is in use (mallinfo2) stays where it was."""


@dataclasses.dataclass
class Life:
    """One process of a run, from its start to its kill or its end."""

    run: str
    first_step: int
    started: float = dataclasses.field(default_factory=time.monotonic)
    looks: list[tuple[float, float, int]] = dataclasses.field(default_factory=list)
    """(seconds since the start, resident MiB, open descriptors), every two seconds"""
    last_step: int = 0
    ended: str = ""

    def slopes(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Of memory in MiB and of descriptors, an hour: (slope, its standard error) each; None of a short life."""
        looks = np.array([look for look in self.looks if WARM <= look[0] <= self.looks[-1][0] - COOL])
        if len(looks) < FEWEST:
            return None
        return _slope(looks[:, 0], looks[:, 1]), _slope(looks[:, 0], looks[:, 2])


def _slope(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least squares an hour, and its standard error, from means of ten blocks: neighbours are alike."""
    blocks = [
        (t.mean(), v.mean()) for t, v in zip(np.array_split(seconds, 10), np.array_split(values, 10), strict=True)
    ]
    t, v = np.array(blocks).T
    slope, level = np.polyfit(t, v, 1)
    residual = v - slope * t - level
    error = np.sqrt((residual**2).sum() / (len(t) - 2) / ((t - t.mean()) ** 2).sum())
    return float(3600 * slope), float(3600 * error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    given.output.mkdir(parents=True)
    dataset, model = _world(given.output, given.seed)
    steps = _steps_that_fill(given, dataset, model)
    print(f"{steps} steps a run, two runs side by side, {given.kills} kills of one, seed {given.seed}", flush=True)
    moments = random.Random(given.seed)
    kills = sorted(moments.uniform(0.05, 0.95) * 60 * given.minutes for _ in range(given.kills))
    lives = _soak(given.output, dataset, model, steps, kills)
    return _report(given, lives, steps)


def _world(output: Path, seed: int) -> tuple[Path, Path]:
    """Boards as a prepared dataset, and a new model."""
    from mmrlhf_jax.data.digit_boards.world import MAPPING, WorldConfig, write_world
    from mmrlhf_jax.quickstart import model_of_world

    config = WorldConfig(400, 20, seed=seed)
    world, model, dataset = output / "world", output / "model", output / "dataset"
    write_world(world, config)
    model_of_world(model, world, RECIPES / "critique_template.txt", config.side, seed, heads=4)
    _program("prepare", "--source", "mapped", "--input", world / "train.jsonl", "--media", world / "media",
             "--map", *MAPPING, "--model", model, "--output", dataset)  # fmt: skip
    return dataset, model


def _program(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, LAUNCH / f"{name}.py", *map(str, arguments)], check=True)


def _train(run: Path, dataset: Path, model: Path, steps: int) -> list[str]:
    flags = (
        "--model", model, "--dataset", dataset, "--output", run, "--reference", "online", "--data.max-steps", steps,
        "--checkpoint.every", 200, "--checkpoint.keep", 2, "--optimizer.learning-rate", 1e-5,
    )  # fmt: skip
    return [sys.executable, *map(str, (LAUNCH / "train.py", RECIPES / "dpo.py", *flags))]


def _steps_that_fill(given: argparse.Namespace, dataset: Path, model: Path) -> int:
    """Steps of two runs side by side that take `given.minutes`, from sixty steps of each."""
    runs = [given.output / f"rate_{number}" for number in range(2)]
    with (given.output / "rate.log").open("w") as log:
        processes = [subprocess.Popen(_train(run, dataset, model, 60), stdout=log, stderr=log) for run in runs]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"training fails: see {given.output / 'rate.log'}")
    seconds = [record["seconds"] for run in runs for record in _log(run)[20:]]
    return max(1, int(60 * given.minutes / np.mean(seconds)))


def _soak(output: Path, dataset: Path, model: Path, steps: int, kills: list[float]) -> list[Life]:
    """Both runs to their ends; the second is killed `kills` seconds after the start of all, and started again."""
    began, lives = time.monotonic(), []
    running = {}
    for name in ("undisturbed", "killed"):
        running[name] = _start(output, name, dataset, model, steps)
        lives.append(running[name][1])
    while running:
        time.sleep(EVERY)
        for name, (process, life) in list(running.items()):
            if process.poll() is not None:
                life.last_step, life.ended = len(_log(output / name)), f"exit {process.returncode}"
                del running[name]
                continue
            life.looks.append(_look(process.pid, life.started))
        if "killed" in running and kills and time.monotonic() - began >= kills[0]:
            kills.pop(0)
            process, life = running["killed"]
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            life.last_step, life.ended = len(_log(output / "killed")), "SIGKILL"
            running["killed"] = _start(output, "killed", dataset, model, steps)
            lives.append(running["killed"][1])
    return lives


def _start(output: Path, name: str, dataset: Path, model: Path, steps: int) -> tuple[subprocess.Popen, Life]:
    with (output / f"{name}.log").open("a") as log:
        command = _train(output / name, dataset, model, steps)
        environment = {**os.environ, **GIVES_BACK}
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    return process, Life(name, first_step=len(_log(output / name)))


def _look(pid: int, started: float) -> tuple[float, float, int]:
    """(seconds since the start, resident MiB, descriptors) of a process and its children."""
    pages = descriptors = 0
    for member in (pid, *_children(pid)):
        try:
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
            descriptors += len(os.listdir(f"/proc/{member}/fd"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return time.monotonic() - started, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, descriptors


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _log(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _report(given: argparse.Namespace, lives: list[Life], steps: int) -> int:
    """Prints the table and the verdict; the exit code."""
    print(f"{'run':<12} {'ended':<8} {'steps':>13} {'seconds':>8} {'MiB':>12} {'descriptors':>12}  slopes an hour")
    flat = True
    for life in lives:
        seconds, last, left = life.looks[-1]
        warm = [look for look in life.looks if look[0] >= WARM] or life.looks[-1:]
        slopes = life.slopes()
        said = "too short for one"
        if slopes is not None:
            (memory, error), (files, files_error) = slopes
            flat &= _is_noise(memory, error, GROWTH * warm[0][1] * 60 / given.minutes)
            flat &= _is_noise(files, files_error, 1.0)
            said = f"{memory:+.1f} (s.e. {error:.1f}) MiB, {files:+.2f} (s.e. {files_error:.2f}) descriptors"
        print(
            f"{life.run:<12} {life.ended:<8} {f'{life.first_step}-{life.last_step}':>13} {seconds:>8.0f} "
            f"{f'{warm[0][1]:.0f}-{last:.0f}':>12} {f'{warm[0][2]}-{left}':>12}  {said}"
        )
    runs = [given.output / name for name in ("undisturbed", "killed")]
    records = [[{k: v for k, v in r.items() if not any(t in k for t in TIMES)} for r in _log(run)] for run in runs]
    ended = [len(record) == steps for record in records]
    same_log = records[0] == records[1]
    same_state = _state(runs[0], steps) == _state(runs[1], steps) if all(ended) else False
    once = all(_once_an_epoch([r["rows"] for r in record]) for record in records)
    print(
        f"both runs ended with {steps} steps: {all(ended)}; logs equal but for times: {same_log}; parameters equal bit "
        f"for bit: {same_state}; every group once an epoch, by the logged rows: {once}; slopes within noise: {flat}"
    )
    return 0 if all((*ended, same_log, same_state, once, flat)) else 1


def _is_noise(slope: float, error: float, allowed: float) -> bool:
    """Within two standard errors of none, or within what is `allowed` an hour."""
    return abs(slope) <= max(2 * error, allowed)


def _state(run: Path, step: int) -> dict[str, bytes]:
    """The parameters of a checkpoint."""
    from mmrlhf_jax.models.llava_onevision.config import read_config
    from mmrlhf_jax.models.llava_onevision.model import declare
    from mmrlhf_jax.nn import params as nn_params
    from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
    from mmrlhf_jax.training.run import Checkpoints

    config = read_config(str(run.parent / "model"))
    abstract = nn_params.abstract(declare(config), make_mesh(MeshConfig()), ShardingRules())
    params = Checkpoints(run / "checkpoints").params(step, abstract)
    return {name: np.asarray(leaf).tobytes() for name, leaf in nn_params.named_leaves(params)}


def _once_an_epoch(steps: list[list[int]]) -> bool:
    """Whether the rows come in rounds: none a second time before all have come."""
    everything = {row for rows in steps for row in rows}
    seen: set[int] = set()
    for rows in steps:
        for row in rows:
            if len(seen) == len(everything):
                seen = set()
            if row in seen:
                return False
            seen.add(row)
    return True


if __name__ == "__main__":
    sys.exit(main())
