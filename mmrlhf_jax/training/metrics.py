"""What a run says: one JSON line a step and an evaluation, a progress bar, TensorBoard and Weights & Biases when asked;
and where its time went."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

from etils import epath

from mmrlhf_jax.command import progress_line
from mmrlhf_jax.storage import is_remote
from mmrlhf_jax.training.peers import STEP, doing, meanwhile, step_took
from mmrlhf_jax.training.recipe import LogConfig
from mmrlhf_jax.training.run import RunDirectory, read_lines, write_text

T = TypeVar("T")
Record = Mapping[str, Any]
UPLOAD_SECONDS = 60.0  # between two uploads of a log to a bucket, whose objects cannot be appended to


class Sink(Protocol):
    """Somewhere records go. A step's record holds "step" and numbers by name, in TRL's names where TRL has one; an
    evaluation's names begin with "eval/"."""

    def step(self, record: Record) -> None: ...
    def evaluation(self, record: Record) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Hands every record to all sinks; without sinks (a process that does not speak) it is silent."""

    def __init__(self, sinks: Iterable[Sink] = ()):
        self._sinks = tuple(sinks)

    def step(self, record: Record) -> None:
        for sink in self._sinks:
            sink.step(record)

    def evaluation(self, record: Record) -> None:
        for sink in self._sinks:
            sink.evaluation(record)

    def flush(self) -> None:
        """What was logged survives the process from here on; called before a checkpoint is saved."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """All of them, even where one raises: a progress bar that is left open swallows the line of the error."""
        with ExitStack() as closing:
            for sink in self._sinks:
                closing.callback(sink.close)


def check_log(run: RunDirectory, config: LogConfig) -> None:
    """Raises ValueError, before hours of work, for a sink that cannot be opened."""
    if config.tensorboard and is_remote(run.path):
        raise ValueError(f"log.tensorboard writes local files, {run.path} is a bucket: use log.wandb or metrics.jsonl")
    for asked, package, extra in (
        (config.tensorboard, "tensorboardX", "tensorboard"),
        (config.wandb, "wandb", "wandb"),
    ):
        if asked and not _installed(package):
            raise ValueError(f"log.{extra} needs the `{extra}` extra, or: pip install {package}")


def _installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def open_log(run: RunDirectory, config: LogConfig, settings: Record, *, first_step: int, steps: int) -> MetricsLog:
    """The log of a run that goes on after `first_step`; `settings` is its flattened recipe."""
    sinks: list[Sink] = [JsonLines(run, first_step), ProgressBar(first_step, steps)]
    if config.tensorboard:
        sinks.append(TensorBoard(run.path / "tensorboard"))
    if config.wandb:
        sinks.append(Wandb(config.wandb, run.path, settings))
    return MetricsLog(sinks)


class JsonLines:
    """RUN/metrics.jsonl and RUN/evaluation.jsonl; lines of steps that a resumed run will do again are dropped first."""

    def __init__(self, run: RunDirectory, first_step: int):
        self._steps = _LineFile(run.metrics, first_step)
        self._evaluations = _LineFile(run.evaluation, first_step)

    def step(self, record: Record) -> None:
        self._steps.append(record)

    def evaluation(self, record: Record) -> None:
        self._evaluations.append(record)

    def flush(self) -> None:
        self._steps.flush()
        self._evaluations.flush()

    def close(self) -> None:
        self._steps.close()
        self._evaluations.close()


class _LineFile:
    """A file that grows by lines: appended to on disk; on a bucket, written anew now and then."""

    def __init__(self, path: epath.Path, last_step: int):
        self._path, self._remote, self._text = path, is_remote(path), ""
        if self._remote:
            kept = [record for record in read_lines(path) if record["step"] <= last_step]
            self._text = "".join(json.dumps(record) + "\n" for record in kept)
            if kept or path.exists():
                write_text(path, self._text)
        elif path.exists():
            _cut_after(path, last_step)
        self._uploaded = time.monotonic()
        self._file = None if self._remote else open(path, "a")  # noqa: SIM115 - kept open for the whole run

    def append(self, record: Record) -> None:
        line = json.dumps(record) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._remote and self._text:
            with meanwhile("uploading its log"):
                write_text(self._path, self._text)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            if not self._path.stat().length:
                self._path.unlink()  # a run without evaluations leaves no empty file
        self.flush()


def _cut_after(path: epath.Path, last_step: int) -> None:
    """Cuts a file of lines before the first of a later step, or that is not whole. A long run's has gigabytes: it is
    read a line at a time.

    Raises ValueError naming a line that is none of a run's.
    """
    end = 0
    with open(path, "rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # of a run that was killed
                break
            try:
                later = json.loads(line)["step"] > last_step
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number} is no line of a run's log ({error}): put back a whole copy"
                ) from error
            if later:
                break
            end += len(line)
        file.truncate(end)


class ProgressBar:
    def __init__(self, first_step: int, steps: int):
        self._bar = progress_line(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, record: Record) -> None:
        shown = {"loss": record["loss"], "acc": record.get("rewards/accuracies"), "grad": record["grad_norm"]}
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None and math.isfinite(v)})
        self._bar.update(1)

    def evaluation(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if name.startswith("eval/")}
        shown = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/loss/nll")
        said = ", ".join(f"{name.removeprefix('eval/')} {numbers[name]:.4g}" for name in shown if name in numbers)
        self._bar.write(f"step {record['step']}, {record['groups']} held-out groups: {said}")

    def flush(self) -> None:
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class TensorBoard:
    def __init__(self, directory: epath.Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def step(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    evaluation = step

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One W&B run a RUN directory, gone on with when the RUN is."""

    def __init__(self, project: str, path: epath.Path, settings: Record):
        import wandb

        identity = path / "wandb.json"
        known = json.loads(identity.read_text())["id"] if identity.exists() else None
        self._run = wandb.init(
            project=project,
            id=known,
            resume="allow",
            name=path.name,
            config=dict(settings),
            dir=None if is_remote(path) else str(path),
        )
        write_text(identity, json.dumps({"id": self._run.id}) + "\n")
        # lines of steps done again after a crash carry their own step, W&B's counter only ever rises
        self._run.define_metric("*", step_metric="step")

    def step(self, record: Record) -> None:
        self._run.log({"step": record["step"], **_numbers(record)})

    evaluation = step

    def flush(self) -> None: ...

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}


class Clock:
    """Seconds since the last step, and how many of them went into waiting for data and into compiling; tells the other
    processes of the job which of them it is."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self.restart()

    def restart(self) -> None:
        """What went before belongs to no step: nothing is learnt from it of how long one takes."""
        self._last = time.perf_counter()
        self._wait = self._compile = 0.0

    def waiting(self, source: Iterable[T]) -> Iterator[T]:
        """`source`, timed: what it takes to hand out an item is waiting for data."""
        items = iter(source)
        while True:
            began = time.perf_counter()
            doing("waiting for data", bounded=True)
            try:
                item = next(items)
            except StopIteration:
                return
            doing(STEP, bounded=True)
            self._wait += time.perf_counter() - began
            yield item

    @contextmanager
    def compiling(self, program: Any) -> Iterator[None]:
        """The first call with a `program` compiles it, and a call that only dispatches takes no time."""
        began, new = time.perf_counter(), program not in self._seen
        if new:
            doing("compiling")
        yield
        if new:
            self._seen.add(program)
            self._compile += time.perf_counter() - began
            doing(STEP, bounded=True)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Time that belongs to no step: evaluation and checkpoints."""
        began = time.perf_counter()
        doing("evaluating or saving")
        yield
        self._last += time.perf_counter() - began
        doing(STEP, bounded=True)

    def lap(self, work: float) -> dict[str, float]:
        """The metrics of the step that ends now; `work`: how much it computed, as `step_begins` has it."""
        now = time.perf_counter()
        lap = {"seconds": now - self._last, "seconds/data_wait": self._wait, "seconds/compile": self._compile}
        if not self._compile:  # with it comes what else a first time takes
            step_took(lap["seconds"], work)
        self.restart()
        return lap
