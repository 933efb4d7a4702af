"""Two virtual hosts, one of which dies, hangs, is stuck or fails: the other ends within a minute and says what
happened. Hosts that share a run have one lease and one view of its checkpoints."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from another_job import held
from small_world import ROOT, make_small_world, metrics, run, run_hosts, start_hosts, wait_for_hosts

from mmrlhf_jax.training.run import Checkpoints

pytestmark = pytest.mark.slow
MINUTE = 60.0


def arguments(world, output, steps=6):
    return (
        ROOT / "configs" / "tiny.py", "--model", world.model, "--dataset", world.dataset, "--output", output,
        "--reference", "online", "--data.max-steps", steps, "--data.groups-per-step", 4, "--data.max-buckets", 1,
        "--checkpoint.every", 2,
    )  # fmt: skip


def at_work(world, output, *more, processes=2):
    """Two hosts in the midst of a run that has a checkpoint."""
    words = (*arguments(world, output, steps=100_000), *more)
    hosts = start_hosts("train", *words, processes=processes, devices=1)
    while not (output / "checkpoints" / "2" / "manifest.json").exists():
        assert all(host.process.poll() is None for host in hosts), [host.printed() for host in hosts]
        time.sleep(0.02)
    return hosts


def bury(hosts):
    for host in hosts:
        if host.process.poll() is None:
            os.killpg(host.process.pid, signal.SIGKILL)
        host.process.wait()


def codes_of(hosts):
    """What both end with, within a minute."""
    began = time.monotonic()
    try:
        return [host.process.wait(MINUTE) for host in hosts]
    finally:
        bury(hosts)
        print([host.printed()[-1500:] for host in hosts], time.monotonic() - began)


HARMS = [(harm, victim) for harm in (signal.SIGKILL, signal.SIGSTOP) for victim in (1, 0)]


@pytest.fixture(scope="module")
def harmed(small_world, tmp_path_factory):
    """By what was done to which of two hosts: how the other ended, after how many seconds, what it printed, and the
    run. While one waits for its end, the next job starts."""

    def end_of(host, began):
        try:
            return host.process.wait(MINUTE), time.monotonic() - began
        except subprocess.TimeoutExpired:
            return None, MINUTE

    ends, jobs = {}, []
    try:
        with ThreadPoolExecutor(len(HARMS)) as waiting:
            for harm, victim in HARMS:
                output = tmp_path_factory.mktemp("harmed") / "run"
                hosts = at_work(small_world, output)
                jobs.append(hosts)
                os.kill(hosts[victim].process.pid, harm)
                end = waiting.submit(end_of, hosts[1 - victim], time.monotonic())
                ends[harm, victim] = (end, hosts[1 - victim], output)
    finally:
        for hosts in jobs:
            bury(hosts)
    return {case: (*end.result(), other.printed(), output) for case, (end, other, output) in ends.items()}


@pytest.mark.parametrize(("harm", "victim"), HARMS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_host_that_dies_or_hangs_ends_the_other_within_a_minute(harmed, harm, victim):
    code, took, said, output = harmed[harm, victim]
    print(f"{harm.name} of process {victim}: process {1 - victim} ended with {code} after {took:.0f} s")
    print(said[-1500:])
    assert took < MINUTE
    assert code not in (0, 75, None)
    if victim == 1:
        assert "error: process 1 on " in said
        assert "it died or hangs" in said
    elif harm == signal.SIGSTOP:
        assert "error: process 0, through which all talk, has not answered for" in said
    else:  # jax notices at once that its coordinator's connection has gone, and lets nobody else speak
        assert "another task died" in said or "error: process 0" in said
    assert Checkpoints(output / "checkpoints").latest()


def descendants(pid):
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            children += [int(number) for number in (task / "children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


@pytest.fixture(scope="module")
def stuck(small_world, tmp_path_factory):
    """By the number of a job's hosts, of which the last one's data loader was stopped: the codes they ended with, the
    seconds since the last step, the hosts and the run. While one waits for its end, the next job starts."""

    def end_of(hosts, output):
        codes = [host.process.wait(2 * MINUTE) for host in hosts]
        return codes, time.time() - (output / "metrics.jsonl").stat().st_mtime  # what was loaded before still trains

    ends, jobs, stopped = {}, [], []
    try:
        with ThreadPoolExecutor(2) as waiting:
            for processes in (2, 1):
                output = tmp_path_factory.mktemp("stuck") / "run"
                hosts = at_work(small_world, output, "--data.workers", 1, processes=processes)
                jobs.append(hosts)
                while len(metrics(output)) < 20:  # by now it is known how long a step takes
                    assert all(host.process.poll() is None for host in hosts), [host.printed() for host in hosts]
                    time.sleep(0.2)
                loaders = descendants(hosts[-1].process.pid)
                stopped += loaders
                for pid in loaders:
                    os.kill(pid, signal.SIGSTOP)
                ends[processes] = (waiting.submit(end_of, hosts, output), hosts, output)
    finally:
        for hosts in jobs:
            bury(hosts)
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return {processes: (*end.result(), hosts, output) for processes, (end, hosts, output) in ends.items()}


@pytest.mark.parametrize("processes", [2, 1])
def test_a_host_that_is_stuck_in_a_step_is_named_within_a_minute(stuck, processes):
    """The process that loads its data stops, say on a network disk: it lives, and waits for ever. A host on its own
    tells of itself."""
    codes, took, hosts, output = stuck[processes]
    print([host.printed()[-3000:] for host in hosts])
    print(f"ended with {codes} after {took:.0f} s")
    assert took < MINUTE
    assert 0 not in codes
    assert 75 not in codes
    named = rf"error: process {processes - 1} on {socket.gethostname()}, step \d+: waiting for data for \d+ s"
    named += r" while others wait \(process 0 on " if processes == 2 else r"\. It is stuck"
    assert re.search(named, hosts[0].printed())
    assert "run the same command to go on" in hosts[0].printed()
    assert 'pipeline.py", line ' in hosts[-1].printed()  # its stack
    assert Checkpoints(output / "checkpoints").latest()


def test_a_host_that_is_stuck_while_annotating_is_named_too(tmp_path):
    world = make_small_world(tmp_path / "world", groups=200)
    store, loaders = Path(world.dataset) / "annotations", []
    hosts = start_hosts(
        "annotate", "--dataset", world.dataset, "--model", world.model, "--with", "reference", "--stuck.step", 12,
        "--workers", 1, "--slots-per-device", 1, "--rows-per-part", 8, "--max-buckets", 1, processes=2, devices=1,
    )  # fmt: skip
    try:
        while not list(store.rglob("*.npz")):
            assert all(host.process.poll() is None for host in hosts), [host.printed() for host in hosts]
            time.sleep(0.02)
        loaders = descendants(hosts[1].process.pid)
        for pid in loaders:
            os.kill(pid, signal.SIGSTOP)
        codes = [host.process.wait(MINUTE) for host in hosts]
    finally:
        bury(hosts)
        for pid in loaders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    print([host.printed()[-3000:] for host in hosts])
    assert codes == [1, 1]
    for host in hosts:
        assert re.search(r"error: process 1 on .*, step \d+: waiting for data for \d+ s while others", host.printed())
    assert 'pipeline.py", line ' in hosts[1].printed()


def test_a_host_that_fails_takes_the_other_along_with_its_message(small_world, tmp_path):
    """Its disk is full, say; the other waits in a collective."""
    hosts = at_work(small_world, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "gone")
    assert codes_of(hosts) == [1, 1]
    assert any(f"error: {tmp_path}/run: " in host.printed() for host in hosts)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_checkpoint_that_one_host_cannot_write_ends_both_at_the_next_step(small_world, tmp_path, victim):
    """Of a write that failed on some hosts orbax by itself tells after twenty minutes, when its barriers give up."""
    hosts = at_work(small_world, tmp_path / "run")
    resource.prlimit(hosts[victim].process.pid, resource.RLIMIT_FSIZE, (12_000, 12_000))  # more than it prints
    assert codes_of(hosts) == [1, 1]
    for host in hosts:
        assert re.search(rf"error: .*{tmp_path}/run: File too large ", host.printed())
        assert "raise the limit on the size of files (ulimit -f)" in host.printed()
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest()


def test_hosts_whose_lease_is_lost_end_together_and_each_says_why(small_world, tmp_path):
    hosts = at_work(small_world, tmp_path / "run")
    lease = tmp_path / "run" / "lease.json"
    stranger = json.loads(lease.read_text()) | {"token": "another", "host": "elsewhere", "pid": 7}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(stranger).ljust(lease.stat().st_size))
    other.replace(lease)
    try:
        while "taken over" not in hosts[0].printed():
            assert hosts[0].process.poll() is None, hosts[0].printed()
            time.sleep(0.01)
        steps = len(metrics(tmp_path / "run"))
        codes = [host.process.wait(MINUTE) for host in hosts]
    finally:
        bury(hosts)
    print([host.printed()[-1500:] for host in hosts])
    assert codes == [1, 1]
    for host in hosts:
        assert f"error: {tmp_path}/run: its lease was taken over by process 7 on elsewhere" in host.printed()
    assert "another" in lease.read_text()  # which is not theirs to remove
    assert len(metrics(tmp_path / "run")) <= steps + 5  # process 0 takes no step more, though it is the last to go


def test_hosts_are_refused_together_what_another_job_writes(small_world, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with held(output / "lease.json"):
        hosts = start_hosts("train", *arguments(small_world, output), processes=2, devices=1)
        assert wait_for_hosts(hosts, 2 * MINUTE) == [1, 1]
    for host in hosts:
        assert f"error: {output} is being written by another job: process 7 on elsewhere" in host.printed()
    assert list(output.iterdir()) == []


def test_hosts_go_back_to_the_same_checkpoint(small_world, tmp_path):
    output = tmp_path / "run"
    run("train", *arguments(small_world, output))
    expected = metrics(output)
    (output / "complete.json").unlink()
    shutil.rmtree(output / "checkpoints" / "6" / "optimizer")
    printed = run_hosts("train", *arguments(small_world, output), processes=2, devices=1)
    assert "checkpoint 6 is damaged (optimizer/" in printed[0]
    assert "going back to checkpoint 4\nresuming after step 4" in printed[0]
    assert Checkpoints(output / "checkpoints").steps() == [4, 6]
    assert [r["rows"] for r in metrics(output)] == [r["rows"] for r in expected]
