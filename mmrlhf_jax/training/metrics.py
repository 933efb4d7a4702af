"""What a run says: one JSON line a step, a progress bar, TensorBoard when asked; and where its time went."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class MetricsLog:
    """Appends to metrics.jsonl; lines of steps that a resumed run will do again are dropped first."""

    def __init__(self, path: Path, *, first_step: int, steps: int, tensorboard: Path | None = None):
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a")
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._writer = _tensorboard(tensorboard) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """`record` holds "step" and numbers by name, in TRL's names where TRL has one."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        shown = {"loss": record["loss"], "acc": record.get("rewards/accuracies"), "grad": record["grad_norm"]}
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None and math.isfinite(v)})
        self._bar.update(1)
        if self._writer:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._bar.close()
        if self._writer:
            self._writer.close()


def _whole_lines(path: Path) -> list[str]:
    """A run that was killed may have left half a line at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().split("\n")[:-1] if line]


def _tensorboard(path: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("log.tensorboard needs the `tensorboard` extra, or: pip install tensorboardX") from error
    return SummaryWriter(str(path))


class Clock:
    """Seconds since the last step, and how many of them went into waiting for data and into compiling."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._last = time.perf_counter()
        self._wait = self._compile = 0.0

    def waiting(self, source: Iterable[T]) -> Iterator[T]:
        """`source`, timed: what it takes to hand out an item is waiting for data."""
        items = iter(source)
        while True:
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._wait += time.perf_counter() - began
            yield item

    @contextmanager
    def compiling(self, program: Any) -> Iterator[None]:
        """The first call with a `program` compiles it, and a call that only dispatches takes no time."""
        began = time.perf_counter()
        yield
        if program not in self._seen:
            self._seen.add(program)
            self._compile += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """The metrics of the step that ends now."""
        now = time.perf_counter()
        lap = {"seconds": now - self._last, "seconds/data_wait": self._wait, "seconds/compile": self._compile}
        self._last, self._wait, self._compile = now, 0.0, 0.0
        return lap
