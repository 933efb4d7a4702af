"""A small prepared dataset with pictures, a video and text, a tiny model, and the programs run as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data_samples import write_rows
from PIL import Image
from tiny import TINY

from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.models.llava_onevision.weights import new_directory

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("red", "cat", "sits", "on", "two", "blue", "mats", "under", "a", "green", "lamp", "today")


@dataclass(frozen=True)
class SmallWorld:
    directory: Path
    dataset: str
    model: str
    groups: int


def make_small_world(directory: Path, groups: int = 12) -> SmallWorld:
    """Ranked groups of 2 to 4 responses with a margin column; every fourth group is text only, one is a video."""
    rng = np.random.default_rng(0)
    media = directory / "media"
    rows = [row for i in range(groups) for row in _rows(i, rng, media)]
    dataset, model = str(directory / "dataset"), str(directory / "model")
    prepare(
        PrepareOptions(
            source="mm_rlhf",
            inputs=(write_rows(directory / "pairs.jsonl", rows),),
            output=dataset,
            media=str(media),
            source_options=SourceOptions(margin_column="margin"),
        )
    )
    new_directory(model, TINY)
    return SmallWorld(directory, dataset, model, groups)


def _rows(i: int, rng: np.random.Generator, media: Path) -> list[dict]:
    base: dict = {"id": f"q{i}", "prompt": f"What is in picture {i}?"}
    if i == 1:
        folder = media / "clip"
        for frame in range(3):
            _picture(rng, folder / f"{frame}.png", (60, 40))
        base["video"] = "clip"
    elif i % 4:
        _picture(rng, media / f"{i}.png", tuple(int(x) for x in rng.integers(30, 130, 2)))
        base["image"] = f"{i}.png"
    answers = [" ".join(rng.choice(WORDS, rng.integers(2, 12))) + f" {k}." for k in range(2 + i % 3)]
    words = np.random.default_rng(i)  # of its own: reasons leave the pictures' sizes, hence the buckets, as they are
    reasons = [" ".join(words.choice(WORDS, words.integers(2, 7))) + "." for _ in answers]
    return [
        {
            **base,
            "chosen": answers[a],
            "rejected": answers[b],
            "margin": float(b - a),
            "chosen_reason": reasons[a],
            "rejected_reason": reasons[b],
        }
        for a in range(len(answers))
        for b in range(a + 1, len(answers))
    ]


def _picture(rng: np.random.Generator, path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(path)


def environment(devices: int) -> dict[str, str]:
    """A process with this many virtual CPU devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *flags])}


def command(program: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / f"{program}.py"), *map(str, arguments)]


def run(program: str, *arguments: object, devices: int = 1) -> str:
    """Runs a program of launch/ to its end; raises with its output when it fails."""
    done = subprocess.run(
        command(program, *arguments), env=environment(devices), capture_output=True, text=True, timeout=500
    )
    if done.returncode:
        raise AssertionError(f"{program} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    """One virtual host: its process, and a file of what it prints (pipes read in turn would block each other)."""

    process: subprocess.Popen
    output: Path

    def printed(self) -> str:
        return self.output.read_text()


def in_order(python: list[str]) -> list[str]:
    """A command of `command`, through tests/in_order.py: what a program needs on more than one virtual host."""
    return [python[0], str(ROOT / "tests" / "in_order.py"), *python[1:]]


def free_port() -> int:
    """Below those that the system hands out by itself: it stays free until somebody takes it by number."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_hosts(program: str, *arguments: object, processes: int, devices: int) -> list[Host]:
    """The program on `processes` virtual hosts of `devices` each, joined over the loopback; not waited for."""
    address = f"127.0.0.1:{free_port()}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    here = environment(devices)
    here.pop("NPROC", None)  # conftest's cure for many devices in one process; these have a few each
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    hosts = []
    for number in range(processes):
        with (folder / f"{number}.txt").open("w") as output:
            process = subprocess.Popen(
                in_order(command(program, *arguments)),
                env={**here, **joined, "JAX_PROCESS_ID": str(number)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        hosts.append(Host(process, Path(output.name)))
    return hosts


def wait_for_hosts(hosts: list[Host], timeout: float = 300) -> list[int]:
    """Exit codes. Kills what is left after `timeout` seconds."""
    try:
        return [host.process.wait(timeout) for host in hosts]
    finally:
        for host in hosts:
            if host.process.poll() is None:
                os.killpg(host.process.pid, signal.SIGKILL)
                host.process.wait()


def run_hosts(program: str, *arguments: object, processes: int, devices: int) -> list[str]:
    """Runs a program on several virtual hosts to its end; what each printed. Raises when one fails."""
    hosts = start_hosts(program, *arguments, processes=processes, devices=devices)
    for number, code in enumerate(wait_for_hosts(hosts)):
        if code:
            printed = "\n\n".join(host.printed()[-4000:] for host in hosts)
            raise AssertionError(f"host {number} of {program} ended with {code}\n{printed}")
    return [host.printed() for host in hosts]


def metrics(run_directory: Path) -> list[dict]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
