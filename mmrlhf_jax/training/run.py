"""A RUN on disk: what a training run writes, and its checkpoints. Local, or gs://: the hosts of a pod share no disk.

RUN/recipe.json       the resolved recipe
RUN/start.json        fingerprints of what the run started from
RUN/environment.jsonl what it ran on: one line a start or resumption
RUN/model/            config, tokenizer, templates of the model it started from
RUN/checkpoints/N/    parameters, optimizer, averages over steps and data position after N steps; of a LoRA run only
                      what trains
RUN/damaged/N/        checkpoints that turned out not to be what was written
RUN/lease.json        who writes here, while somebody does
RUN/metrics.jsonl     one line a step
RUN/evaluation.jsonl  one line an evaluation on held-out groups
RUN/profile/          traces, when asked for
RUN/complete.json     written last
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.models.files import read_text
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.training import manifest
from mmrlhf_jax.training.distributed import from_speaker, is_speaker
from mmrlhf_jax.training.peers import PATIENCE_MS, tell_failure
from mmrlhf_jax.training.recipe import CheckpointConfig
from mmrlhf_jax.training.state import TrainState, combine
from mmrlhf_jax.writing import explain


def _is_ours_to_say(record: logging.LogRecord) -> bool:
    """Orbax logs every error with its traceback, and raises it too; it is told once, when it is raised. And asyncio
    logs those of its other writes, which nobody waits for when one has failed."""
    if record.levelno < logging.ERROR:
        return True
    files = [record.pathname]
    if record.name == "asyncio" and record.exc_info:
        files += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
    return not any("orbax" in file for file in files)


def _say_once(unraisable: sys.UnraisableHookArgs) -> None:
    """For sys.unraisablehook: when a checkpoint fails, each of tensorstore's writes that are still under way prints
    that orbax' event loop no longer waits for it."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        _hook_before(unraisable)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_ours_to_say)
_hook_before, sys.unraisablehook = sys.unraisablehook, _say_once
warnings.filterwarnings("ignore", r"coroutine '.*write_fragment' was never awaited", RuntimeWarning)  # likewise


@dataclass(frozen=True)
class RunDirectory:
    path: epath.Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> RunDirectory:
        return cls(storage.to_path(path))

    recipe = property(lambda self: self.path / "recipe.json")
    start = property(lambda self: self.path / "start.json")
    environment = property(lambda self: self.path / "environment.jsonl")
    model = property(lambda self: self.path / "model")
    checkpoints = property(lambda self: self.path / "checkpoints")
    damaged = property(lambda self: self.path / "damaged")
    lease = property(lambda self: self.path / "lease.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    evaluation = property(lambda self: self.path / "evaluation.jsonl")
    complete = property(lambda self: self.path / "complete.json")

    def exists(self) -> bool:
        return self.recipe.exists()

    def has_begun(self) -> bool:
        """Whether there is work in it: a run that failed before its first checkpoint may be started anew."""
        return self.complete.exists() or any(
            place.exists() and any(step.name.partition("-")[0].isdigit() for step in place.iterdir())
            for place in (self.checkpoints, self.damaged)
        )


def write_text(path: epath.Path, text: str) -> None:
    """A reader sees no file or all of it."""
    storage.write_whole(path, text.encode())


class Checkpoints:
    """Orbax checkpoints of a run: parameters and optimizer by name, and the position in the data.

    A checkpoint appears under its step number only when whole; saving runs beside training, and so does noting its
    manifest; `written` says what the latest one took. With several processes every call is made by all of them. Opened
    for reading where there is no `config`; `best` tells which step, beside the latest ones, is kept.
    """

    def __init__(
        self,
        directory: epath.Path,
        config: CheckpointConfig | None = None,
        best: Callable[[], int | None] = lambda: None,
    ):
        writes = config is not None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_KeepLatestAndBest(config.keep, best) if config else None,
            step_name_format=_Listing(),
            cleanup_tmp_directories=writes,
            enable_async_checkpointing=writes,
            async_options=ocp.AsyncOptions(timeout_secs=PATIENCE_MS // 1000, barrier_sync_fn=_barrier()),
            create=writes,
        )
        self.directory = directory if storage.is_remote(directory) else directory.absolute()
        self.manager = ocp.CheckpointManager(self.directory, options=options)
        latest = self.latest()
        self.written = None if latest is None else manifest.written(self.directory / str(latest))
        self._beside = ThreadPoolExecutor(1, "seal")
        self._sealing: Future[None] | None = None

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, state: TrainState, position: Mapping[str, Any], *, whole: bool = True) -> None:
        """`whole`: frozen parameters too; a LoRA run leaves them with the model it started from. Raises what went wrong
        with the checkpoint before."""
        self._settle()
        if not storage.is_remote(self.directory) and not self.directory.exists():
            # orbax would make it anew, on the disk under a mount that has gone
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(self.directory))
        step = int(position["step"])
        if step in self.manager.all_steps():
            return
        held = combine(state.trainable, state.frozen) if whole else state.trainable
        dtypes = {name: leaf.dtype.name for name, leaf in _by_name(held).items()}
        began = time.monotonic()
        kept = {"averages": ocp.args.StandardSave(dict(state.averages))} if state.averages else {}
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(_by_name(held)),
                optimizer=ocp.args.StandardSave(_by_name(state.optimizer)),
                position=ocp.args.JsonSave({**position, "dtypes": dtypes}),
                **kept,
            ),
            force=True,
        )
        self._sealing = self._beside.submit(self._seal, step, began)
        self._sealing.add_done_callback(self._tell)

    def _seal(self, step: int, began: float) -> None:
        self.manager.wait_until_finished()
        seconds = time.monotonic() - began
        if is_speaker():
            self.written = manifest.seal(self.directory / str(step), seconds)

    def _tell(self, sealing: Future[None]) -> None:
        """The others may not come to where this process raises it: they may wait for it, or it for them."""
        if (error := sealing.exception()) is not None:
            tell_failure(explain(error, os.fspath(self.directory.parent)) or str(error))

    def check(self) -> None:
        """Raises what went wrong with a checkpoint beside training, as soon as it has."""
        if self._sealing is not None and self._sealing.done():
            self._settle()

    def _settle(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, by its manifest: the same answer on every process."""
        return from_speaker(lambda: manifest.damage(self.directory / str(step)))

    def has_manifest(self, step: int) -> bool:
        return from_speaker(lambda: manifest.written(self.directory / str(step)) is not None)

    def set_aside(self, step: int, place: epath.Path) -> str:
        """Moves a checkpoint into `place`; returns where it is."""
        moved = from_speaker(lambda: os.fspath(manifest.set_aside(self.directory / str(step), place)))
        self.manager.reload()
        return moved

    def position(self, step: int) -> dict[str, Any]:
        return self.manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

    def params(self, step: int, abstract: Any) -> Any:
        """The parameters of a checkpoint that `abstract` has, in its shardings and dtypes."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_by_name(abstract)))
        return _from_names(self.manager.restore(step, args=args)["params"], abstract)

    def optimizer(self, step: int, abstract: Any) -> Any:
        args = ocp.args.Composite(optimizer=ocp.args.StandardRestore(_by_name(abstract)))
        return _from_names(self.manager.restore(step, args=args)["optimizer"], abstract)

    def averages(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """What the objective keeps over steps; {} where `abstract` is, for most keep nothing."""
        if not abstract:
            return {}
        args = ocp.args.Composite(averages=ocp.args.StandardRestore(dict(abstract)))
        return dict(self.manager.restore(step, args=args)["averages"])

    def close(self) -> None:
        """Waits for the checkpoint being written. Raises what went wrong with it."""
        try:
            self._settle()
        finally:
            self._beside.shutdown()
            self.manager.close()


def _barrier() -> ocp.multihost.BarrierSyncFn:
    """Orbax' barrier between processes, for threads. Who comes to it with an error does not wait: of a write that
    failed on some processes, orbax has these wait at its last barrier and the others at an earlier one, and the error
    would be told when both give up."""
    wait = ocp.multihost.get_barrier_sync_fn()

    def barrier(*, key: str, timeout_ms: int) -> None:
        if sys.exc_info()[1] is None:
            wait(key=key, timeout_ms=timeout_ms)

    return barrier


@dataclass(frozen=True)
class _KeepLatestAndBest:
    """Orbax' PreservationPolicy: which checkpoints stay when a new one is whole."""

    keep: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        latest = {info.step for info in checkpoints[-self.keep :]}
        return [info.step in latest or info.step == self.best() for info in checkpoints]


class _Listed(ocp.path.step.Metadata):
    """A step that is there, whatever is in it."""

    commit_timestamp = datetime.fromtimestamp(0, UTC)  # nobody here asks for it


class _Listing(ocp.path.step.NameFormat[_Listed]):
    """Orbax' NameFormat: steps by their directories' names. Orbax' own reads a metadata file in each of them for the
    time it was made, and one that is torn would keep the manager from opening, and the other checkpoints from being
    reached."""

    plain = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self.plain.build_name(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[_Listed]:
        return (_Listed(found.step, found.path) for found in self.plain.find_all(base_path))

    def find_step(self, base_path: epath.PathLike, step: int) -> _Listed:
        found = self.plain.find_step(base_path, step)
        return _Listed(found.step, found.path)


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(nn_params.named_leaves(tree))


def _from_names(leaves: Mapping[str, Any], like: Any) -> Any:
    return nn_params.map_named(lambda name, _: leaves[name], like)


def read_lines(path: epath.Path, most: int = 2**30) -> list[dict[str, Any]]:
    """The records of a .jsonl file of a run; a run that was killed may have left half a line at the end. Raises
    ValueError for one of more than `most` bytes."""
    if not path.exists():
        return []
    return [json.loads(line) for line in read_text(path, most).split("\n")[:-1] if line]


def abstract_of(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays that exist."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
