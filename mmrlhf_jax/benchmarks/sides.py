"""The two sides of the step benchmark, each in a process of its own, so that neither's memory or threads count for the
other: ours, as a group or as separate pairs, and TRL's DPOTrainer on the same weights and tokens."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

from mmrlhf_jax.benchmarks.machine import measured_bandwidth, measured_peak
from mmrlhf_jax.benchmarks.models import Models
from mmrlhf_jax.benchmarks.workload import Case
from mmrlhf_jax.command import CommandError
from mmrlhf_jax.training.recipe import ComputeConfig

Form = Literal["group", "pairs", "trl", "trl default"]


@dataclass(frozen=True)
class Settings:
    """What a side loads and how it computes. `lora_rank` 0: the parameters themselves train. `pairs_at_once`: pairs TRL
    forwards in one batch."""

    models: Models
    lora_rank: int
    compute: ComputeConfig
    beta: float
    pairs_at_once: int


class Measured(NamedTuple):
    """One step: its seconds; before it, seconds of making its batches from what a renderer yields and moving them to
    the device; mean loss of the pairs, global norm of the gradients, most bytes held at once."""

    seconds: float
    data_seconds: float
    loss: float
    gradient_norm: float
    peak_bytes: int


class Side:
    """A worker process: it is told what to load, given a case, then takes one step a call."""

    def __init__(self, form: Form):
        context = multiprocessing.get_context("spawn")
        self.form = form
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, form), daemon=True)
        self._process.start()
        there.close()

    def device(self) -> tuple[str, str]:
        """What this side computes on: "cpu", "gpu" or "tpu", and its name."""
        return self._ask("device")

    def load(self, settings: Settings) -> None:
        self._ask("load", settings)

    def prepare(self, case: Case, pairs: Sequence[tuple[int, int]]) -> float:
        """Takes up a case; seconds until a first step was done, compilation included."""
        return self._ask("prepare", case, tuple(pairs))

    def step(self) -> Measured:
        return self._ask("step")

    def speeds(self, dtype: str) -> tuple[float, float]:
        """FLOP/s of large matrix products and bytes a second of memory, in jax, on this side's device."""
        return self._ask("speeds", dtype)

    def parts(self, repeats: int) -> list[dict[str, Any]]:
        """The case's step by part, each timed by itself: ops.py. Of our side only."""
        return self._ask("parts", repeats)

    def close(self) -> None:
        self._here.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            self._here.send((what, arguments))
            done, answer = self._here.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise CommandError(
                f"the side {self.form!r} ended with exit code {self._process.exitcode}, as a process that asks for "
                "more memory than there is does; try a smaller case"
            ) from error
        if not done:
            raise CommandError(f"the side {self.form!r} {_how_it_failed(answer)}:\n{answer}")
        return answer


def _how_it_failed(told: str) -> str:
    if "RESOURCE_EXHAUSTED" in told or "OutOfMemoryError" in told:  # jax's and torch's words
        return (
            "ran out of the device's memory, which both sides share; try --lora-rank, --compute.remat full, "
            "--against trl-default or a smaller case"
        )
    return "failed"


def _serve(connection: Connection, form: Form) -> None:
    # the sides share a GPU, of which jax would take three quarters at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    worker = _Worker(form)
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(worker, what)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class _Worker:
    """What a side's process answers."""

    def __init__(self, form: Form):
        self._form = form
        self._side: Any = None

    def device(self) -> tuple[str, str]:
        if self._form in ("trl", "trl default"):
            import torch

            return ("gpu", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "cpu")
        import jax

        return jax.default_backend(), jax.devices()[0].device_kind

    def speeds(self, dtype: str) -> tuple[float, float]:
        return measured_peak(dtype), measured_bandwidth()

    def load(self, settings: Settings) -> None:
        if self._form in ("trl", "trl default"):
            from mmrlhf_jax.benchmarks.trl_side import TrlSide

            self._side = TrlSide(settings, checkpointing=self._form == "trl default")
        else:
            from mmrlhf_jax.benchmarks.our_side import OurSide

            self._side = OurSide(settings, as_pairs=self._form == "pairs")

    def prepare(self, case: Case, pairs: tuple[tuple[int, int], ...]) -> float:
        began = time.perf_counter()
        self._side.prepare(case, pairs)
        self._side.make_batches()
        self._side.step()
        return time.perf_counter() - began

    def step(self) -> Measured:
        _forget_peak()
        began = time.perf_counter()
        self._side.make_batches()
        data_seconds = time.perf_counter() - began
        seconds, loss, norm = self._side.step()
        return Measured(seconds, data_seconds, loss, norm, self._side.device_peak() or _peak())

    def parts(self, repeats: int) -> list[dict[str, Any]]:
        return self._side.parts(repeats)


def _forget_peak() -> None:
    """The process's peak counts from here on (Linux; elsewhere it is of the whole process)."""
    if (trim := _malloc_trim()) is not None:
        trim(0)  # what was freed is no longer held
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


def _peak() -> int:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
