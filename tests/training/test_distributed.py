"""How a process finds out that it is one of many, and what it feeds of a batch."""

import jax
import numpy as np
import pytest
from etils import epath

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.nn.sharding import BatchShare, MeshConfig, batch_share, make_mesh
from mmrlhf_jax.training import distributed
from mmrlhf_jax.training.distributed import how_to_join
from mmrlhf_jax.training.setup import _read_by_all


class Coordinator:
    """jax's key-value store, in which process 0 of three looks for what the others said."""

    def __init__(self, monkeypatch, *others):
        self.told = {str(number): said for number, said in enumerate(others, 1) if said is not None}
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(distributed, "client", lambda: self)

    def key_value_set(self, key, value):
        self.told[key.rpartition("/")[2]] = value

    def blocking_key_value_get(self, key, milliseconds):
        if (number := key.rpartition("/")[2]) not in self.told:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.told[number]


def test_outcomes_are_heard_of_all_that_tell_in_time(monkeypatch):
    Coordinator(monkeypatch, "well", None)
    assert distributed.outcomes("ill", 1.0) == {0: "ill", 1: "well"}


@pytest.mark.parametrize(("mine", "others", "read"), [(None, ("", ""), True), ("torn", ("torn", "gone"), False)])
def test_a_checkpoint_that_all_or_none_can_read_is_read_or_not(monkeypatch, mine, others, read):
    Coordinator(monkeypatch, *others)
    assert _read_by_all(epath.Path("/run/7"), mine) == read


@pytest.mark.parametrize(
    ("mine", "others", "named"),
    [
        ("torn", ("", ""), "process 0: torn"),
        (None, ("", "stale"), "process 2: stale"),
        ("stale", (None, None), "0: stale"),
    ],
)
def test_a_checkpoint_that_only_some_can_read_ends_the_job(monkeypatch, mine, others, named):
    """Those that do not tell wait for this one inside of orbax."""
    Coordinator(monkeypatch, *others)
    with pytest.raises(ValueError, match=f"/run/7 reads on some processes and not on others .*{named}"):
        _read_by_all(epath.Path("/run/7"), mine)


def test_hosts_that_see_different_work_are_told_what_they_must_share(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine ^ np.uint32(1)])
    )
    with pytest.raises(ValueError, match=r"processes 1 have another view of /data/store than process 0: it must be on"):
        distributed.agree_on_view("/data/store", [1, 2])


SLURM = {"SLURM_STEP_NUM_TASKS": "8"}


def gpus(ids):
    return {"local_device_ids": list(ids)}


ALONE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("environment", "tpu_devices", "joins"),
    [
        (ALONE, False, None),
        ({"SLURM_NTASKS": "8"}, False, None),  # a batch script outside srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, False, {}),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, False, gpus(range(8))),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "3"},
            False,
            gpus([6, 7]),
        ),
        (
            {
                **SLURM,
                "SLURM_STEP_TASKS_PER_NODE": "8",
                "SLURM_GPUS_ON_NODE": "8",
                "SLURM_LOCALID": "3",
                "CUDA_VISIBLE_DEVICES": "3",
            },
            False,
            gpus([0]),
        ),  # --gpus-per-task: each sees its own
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, {}),
        (ALONE, True, {}),  # a TPU virtual machine
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            False,
            {"coordinator_address": "host0:1234", "num_processes": 4, "process_id": 3},
        ),
    ],
)
def test_the_environment_says_whether_there_is_anything_to_join(environment, tpu_devices, joins):
    assert how_to_join(environment, tpu_devices=tpu_devices) == joins


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8"}, "8 GPUs do not divide over 3 tasks"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host0:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID 2 of JAX_NUM_PROCESSES 2 is not a process number",
        ),
    ],
)
def test_a_half_set_environment_is_refused(environment, message):
    with pytest.raises(UsageError, match=message):
        how_to_join(environment, tpu_devices=False)


def test_one_process_feeds_the_whole_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert batch_share(mesh) == BatchShare((0, 1, 2, 3), 4)


def test_a_share_names_its_groups_in_order():
    assert BatchShare((1, 3), 4).rows(8) == [2, 3, 6, 7]


def test_slices_hold_whole_replicas():
    """The slow network between two islands carries gradients of `data` only."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, slices=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    first = {device.id for device in jax.devices()[:4]}
    assert set(ids[:2].ravel()) == first
    assert not set(ids[2:].ravel()) & first


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=1, fsdp=8, slices=2), "mesh.data 1 does not divide over 2 slices.*--mesh.data 2"),
        (MeshConfig(data=3, fsdp=-1, slices=3), "does not multiply to the 8 devices"),
        (MeshConfig(data=8, fsdp=1, slices=-1), "mesh.slices is -1"),
    ],
)
def test_a_mesh_that_would_split_a_layer_over_the_slow_network_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)
