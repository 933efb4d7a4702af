"""Many processes as one run: joining them, one that speaks, and agreement on what each decided for itself.

jax.distributed is JAX's own engine; what is here decides from the environment whether there is anything to join.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmrlhf_jax import storage
from mmrlhf_jax.command import CommandError, UsageError
from mmrlhf_jax.lease import lease
from mmrlhf_jax.nn.sharding import replicated
from mmrlhf_jax.training.peers import JAX_SILENT, PATIENCE_MS, client, end_together
from mmrlhf_jax.writing import explained_writing

T = TypeVar("T")
_turns = itertools.count()  # every process asks in the same order
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Call first in a program that runs on many hosts; does nothing where there is one process.

    Raises UsageError for a half-set environment, and RuntimeError when the other processes do not come.
    """
    arguments = how_to_join(os.environ, tpu_devices=bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))
    if arguments is not None:
        # CPUs alone run programs that do not depend on each other at once, and in another order on every host: their
        # collectives would meet the wrong partners
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        if "num_processes" in arguments:
            count, number, address = (arguments[k] for k in ("num_processes", "process_id", "coordinator_address"))
            print(f"process {number} of {count}, waiting for the others at {address}", file=sys.stderr, flush=True)
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=JAX_SILENT)


def how_to_join(environment: Mapping[str, str], *, tpu_devices: bool) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize, or None for a process on its own.

    In this order: the variables in EXPLICIT; a SLURM step or an Open MPI job of more than one task; a TPU virtual
    machine or GKE TPU pod, whose hosts jax finds by itself.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        if missing := [name for name in EXPLICIT if name not in given]:
            raise UsageError(f"{', '.join(given)} set but not {', '.join(missing)}: set all three, or none")
        address, count, number = (environment[name] for name in EXPLICIT)
        if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
            raise UsageError(f"JAX_PROCESS_ID {number} of JAX_NUM_PROCESSES {count} is not a process number")
        return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    # a batch script outside srun has SLURM_NTASKS too, yet is one process
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return _gpus_of_task(environment)
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return {}
    platforms = environment.get("JAX_PLATFORMS", "")
    on_tpu = tpu_devices and (not platforms or "tpu" in platforms.split(","))
    return {} if on_tpu and "TPU_SKIP_MDS_QUERY" not in environment else None


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _gpus_of_task(environment: Mapping[str, str]) -> dict[str, Any]:
    """The GPUs of a SLURM task, where there are any: an equal share of those its node's tasks see.

    jax by itself takes one GPU a task, which wastes the others of a node that runs one task, and counts wrongly where
    SLURM has shown each task only its own.
    """
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = len(visible) or _number(environment, "SLURM_GPUS_ON_NODE")
    if not gpus:
        return {}
    tasks = int(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0])  # "2(x4)": two on each of four
    if 0 < len(visible) < _number(environment, "SLURM_GPUS_ON_NODE"):  # SLURM has bound them to the task
        return {"local_device_ids": list(range(gpus))}
    each = gpus // tasks
    if not each or gpus % tasks:
        raise UsageError(f"{gpus} GPUs do not divide over {tasks} tasks of a node: ask for one task a node")
    first = _number(environment, "SLURM_LOCALID") * each
    return {"local_device_ids": list(range(first, first + each))}


def is_speaker() -> bool:
    """One process prints, logs and writes what all would write alike."""
    return jax.process_index() == 0


def say(*lines: str) -> None:
    """Printed once, by the speaker."""
    if is_speaker():
        print("\n".join(lines), flush=True)


def wait_for_all(what: str) -> None:
    """Returns when every process has come here: after the speaker wrote what the others read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def from_speaker(work: Callable[[], T]) -> T:
    """What `work` gives (JSON values) on every process; it is done by the speaker alone, and may take long.

    Raises on all what it raises there; elsewhere than there as a CommandError.
    """
    if jax.process_count() == 1:
        return work()
    place, connection = f"mmrlhf/speaker/{next(_turns)}", client()
    if is_speaker():
        try:
            value = work()
        except (CommandError, ValueError, OSError) as error:
            told = {"error": str(error), "status": getattr(error, "status", 1)}
            connection.key_value_set(place, json.dumps(told))
            raise
        connection.key_value_set(place, json.dumps({"value": value}))
        return value
    told = json.loads(connection.blocking_key_value_get(place, PATIENCE_MS))
    if "error" in told:
        raise CommandError(told["error"], told["status"])
    return told["value"]


@contextmanager
def job_lease(file: epath.Path, what: str) -> Iterator[None]:
    """`lease`, of which the speaker is the one that holds it. Raises on all processes where it is refused, and ends all
    of them within seconds where it is lost."""
    with ExitStack() as held:
        from_speaker(lambda: held.enter_context(lease(file, what, end=end_together)))
        with explained_writing(what):  # by the others
            yield


def check_agreement(what: str, value: str, cure: str = "give every host the same recipe, model and dataset") -> None:
    """Raises ValueError on every process when `value` is not the same on all, before they hang in a collective."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), -1)
    if strangers := np.flatnonzero((everyone != everyone[0]).any(axis=1)).tolist():
        raise ValueError(f"processes {', '.join(map(str, strangers))} have another {what} than process 0: {cure}")


def agree_on_view(place: storage.PathLike, seen: Any) -> None:
    """Raises ValueError on every process where what they have `seen` of a place (JSON values) is not the same."""
    check_agreement(
        f"view of {place}", json.dumps(seen), "it must be on storage that all hosts share; where it is, run again"
    )


def outcomes(mine: str, patience: float = PATIENCE_MS / 1000) -> dict[int, str]:
    """What each process says became of something that all of them did; in its absence those of which nothing was heard
    within `patience` seconds. No collective: a process that failed may ask while others still wait in one."""
    if jax.process_count() == 1:
        return {0: mine}
    place, connection, until = f"mmrlhf/outcome/{next(_turns)}", client(), time.monotonic() + patience
    connection.key_value_set(f"{place}/{jax.process_index()}", mine)
    found = {}
    for process in range(jax.process_count()):
        left = max(1, round(1000 * (until - time.monotonic())))
        with suppress(jax.errors.JaxRuntimeError):  # its deadline
            found[process] = connection.blocking_key_value_get(f"{place}/{process}", left)
    return found


class AgreedStop:
    """Whether any process was asked to stop, the same answer on all at the same step; asked once a step.

    Signals reach hosts at different moments, and a host that stopped alone would leave the others waiting in a
    collective. Among several processes the answer comes one step late, so that no device waits for a host.
    """

    def __init__(self, mesh: Mesh):
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._devices = mesh.size
        self._asked: jax.Array | None = None

    def __call__(self, here: bool) -> bool:
        if jax.process_count() == 1:
            return here
        flag = np.full(1, here, np.int32)
        flags = jax.make_array_from_callback((self._devices,), self._split, lambda _: flag)
        before, self._asked = self._asked, self._any(flags)
        return before is not None and bool(np.asarray(before))
