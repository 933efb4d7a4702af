"""Law 6: SIGKILL at random moments and re-run == uninterrupted, bit for bit; on another device count to rounding."""

import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from small_world import ROOT, command, environment, metrics, run, run_hosts, start_hosts, wait_for_hosts

from mmrlhf_jax.models.llava_onevision.config import read_config
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.run import Checkpoints

pytestmark = pytest.mark.slow
STEPS = 30
TIMES = ("seconds", "per_second")


def arguments(world, output):
    return (
        ROOT / "configs" / "tiny.py", "--model", world.model, "--dataset", world.dataset, "--output", output,
        "--reference", "online", "--data.max-steps", STEPS, "--data.groups-per-step", 4,
        "--checkpoint.every", 3, "--optimizer.learning-rate", 1e-3, "--data.max-buckets", 2,
    )  # fmt: skip


def final_params(world, output):
    checkpoints = Checkpoints(output / "checkpoints")
    assert checkpoints.latest() == STEPS
    mesh = make_mesh(MeshConfig())
    abstract = nn_params.abstract(declare(read_config(world.model)), mesh, ShardingRules())
    return {name: np.asarray(leaf) for name, leaf in nn_params.named_leaves(checkpoints.params(STEPS, abstract))}


def without_times(record):
    return {name: value for name, value in record.items() if not any(word in name for word in TIMES)}


@pytest.fixture(scope="module")
def undisturbed(small_world):
    output = small_world.directory / "law-6-undisturbed"
    run("train", *arguments(small_world, output))
    return output


def lines(output):
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def start_and_kill(world, output, *, step, delay, devices=1):
    """Starts the run and kills it with SIGKILL `delay` seconds after `step` was logged (0: after it started)."""
    process = subprocess.Popen(
        command("train", *arguments(world, output)),
        env=environment(devices), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while lines(output) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    time.sleep(delay)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_five_random_kills_change_no_bit(small_world, undisturbed):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    output = small_world.directory / "law-6-killed"
    start_and_kill(small_world, output, step=0, delay=moments.uniform(0.1, 4.0))
    for kill in range(4):
        step = 1 + 5 * kill + moments.randrange(5)
        start_and_kill(small_world, output, step=step, delay=moments.uniform(0, 0.2))
    run("train", *arguments(small_world, output))
    expected, got = final_params(small_world, undisturbed), final_params(small_world, output)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=f"seed {seed}: {name}")
    assert [without_times(r) for r in metrics(output)] == [without_times(r) for r in metrics(undisturbed)]


def test_every_group_is_seen_once_an_epoch(small_world, undisturbed):
    steps_an_epoch = small_world.groups // 4
    records = metrics(undisturbed)
    for start in range(0, STEPS, steps_an_epoch):
        rows = [row for record in records[start : start + steps_an_epoch] for row in record["rows"]]
        assert sorted(rows) == list(range(small_world.groups))


def test_a_run_goes_on_with_other_devices(small_world, undisturbed):
    output = small_world.directory / "law-6-moved"
    start_and_kill(small_world, output, step=10, delay=0)
    run("train", *arguments(small_world, output), devices=4)
    expected, got = final_params(small_world, undisturbed), final_params(small_world, output)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=2e-4, err_msg=name)


def wait_for_step(hosts, output, step):
    while lines(output) < step:
        assert all(host.process.poll() is None for host in hosts), [host.printed() for host in hosts]
        time.sleep(0.01)


def kill(hosts):
    for host in hosts:
        if host.process.poll() is None:
            os.killpg(host.process.pid, signal.SIGKILL)
        host.process.wait()


def test_a_run_moves_between_hosts_devices_and_meshes(small_world, undisturbed):
    """Two hosts whose machines die, then one with four devices, then two hosts again, split otherwise."""
    output = small_world.directory / "law-6-hosts"
    hosts = start_hosts("train", *arguments(small_world, output), "--mesh.data", 2, processes=2, devices=2)
    wait_for_step(hosts, output, 8)
    kill(hosts)
    start_and_kill(small_world, output, step=16, delay=0, devices=4)
    split = ("--mesh.fsdp", 1, "--mesh.tensor", 2)
    run_hosts("train", *arguments(small_world, output), *split, processes=2, devices=1)
    expected, got = final_params(small_world, undisturbed), final_params(small_world, output)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=2e-4, err_msg=name)
    assert [r["rows"] for r in metrics(output)] == [r["rows"] for r in metrics(undisturbed)]


def test_sigterm_on_one_host_stops_all_at_the_same_step(small_world):
    output = small_world.directory / "law-6-one-host"
    hosts = start_hosts("train", *arguments(small_world, output), processes=2, devices=1)
    wait_for_step(hosts, output, 1)
    hosts[1].process.terminate()  # not the host that speaks
    assert wait_for_hosts(hosts) == [75, 75], [host.printed() for host in hosts]
    done = Checkpoints(output / "checkpoints").latest()
    assert done < STEPS
    assert metrics(output)[-1]["step"] == done


def test_sigterm_leaves_a_checkpoint_and_asks_to_be_run_again(small_world):
    output = small_world.directory / "law-6-terminated"
    process = subprocess.Popen(
        command("train", *arguments(small_world, output)), env=environment(1), stderr=subprocess.PIPE, text=True
    )
    while not lines(output):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "run the same command to go on" in errors
    done = Checkpoints(output / "checkpoints").latest()
    assert done
    assert metrics(output)[-1]["step"] == done


def test_sigterm_to_every_process_of_a_job_is_the_parent_s_to_answer(small_world):
    """As a scheduler sends it: loader workers too."""
    output = small_world.directory / "law-6-job"
    process = subprocess.Popen(
        command("train", *arguments(small_world, output), "--data.workers", 2),
        env=environment(1), stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not lines(output):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
