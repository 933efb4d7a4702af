"""One job at a time writes an output: the second is refused, a stale lease is taken over, a lost one ends the job."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from mmrlhf_jax import lease as leases
from mmrlhf_jax import storage
from mmrlhf_jax.lease import Holder, LeaseError, lease
from mmrlhf_jax.storage import create_whole, write_whole

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from etils import epath
from mmrlhf_jax import lease as leases
leases.BEAT = float(sys.argv[2])
with leases.lease(epath.Path(sys.argv[1]), "RUN", say=lambda line: print(line, flush=True)):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(file, beat=0.05):
    """Another process that holds the lease; what it printed until it did."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), str(beat)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = ""
    while not said.endswith("held\n"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said += line
    return process, said


def end(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    process.stderr.close()


def write(file, **changes):
    """A lease as another host would have left it."""
    now = time.time()
    holder = Holder("theirs", "elsewhere", 7, "another boot", 1, now - 400, now)
    write_whole(file, json.dumps(dataclasses.asdict(dataclasses.replace(holder, **changes))).encode())


@pytest.fixture
def file(tmp_path):
    return epath.Path(tmp_path / "run" / "lease.json")


def test_a_lease_is_there_while_held_and_leaves_no_trace(file):
    with lease(file, "RUN"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.parent.exists()
    with contextlib.suppress(RuntimeError), lease(file, "RUN"):
        (file.parent / "work").write_text("done")
        raise RuntimeError
    assert [p.name for p in file.parent.iterdir()] == ["work"]


def test_a_second_job_is_refused_with_host_process_and_age(file):
    other, _ = hold(file)
    try:
        with pytest.raises(LeaseError) as refused, lease(file, "RUN"):
            pass
    finally:
        end(other)
    assert f"RUN is being written by another job: process {other.pid} on {os.uname().nodename}, which" in str(
        refused.value
    )
    assert "heard of 0 s ago" in str(refused.value)
    assert "or write somewhere else" in str(refused.value)


def test_a_job_is_refused_what_its_own_process_holds(file):
    with lease(file, "RUN"), pytest.raises(LeaseError, match="another job"), lease(file, "RUN"):
        pass


def test_a_killed_job_s_lease_is_taken_over_at_once(file):
    other, _ = hold(file)
    end(other)
    assert file.exists()
    began, said = time.monotonic(), []
    with lease(file, "RUN", said.append):
        assert time.monotonic() - began < 1
    assert said == [f"RUN: taking over the lease of process {other.pid} on {os.uname().nodename}, which is gone"]


def test_a_dead_process_that_nobody_has_buried_holds_nothing(file):
    other, _ = hold(file)
    other.kill()
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with lease(file, "RUN", lambda line: None):
        pass
    end(other)


def test_another_process_under_the_same_number_is_not_the_holder(file):
    file.parent.mkdir()
    me = leases._myself()
    write(file, host=me.host, space=me.space, pid=os.getppid(), born=1)
    with lease(file, "RUN", lambda line: None):
        pass


@contextlib.contextmanager
def alive_elsewhere(file, ahead=0.0):
    """Another host renews its lease, by a clock that is `ahead`."""
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            write(file, heartbeat=time.time() + ahead)

    write(file, heartbeat=time.time() + ahead)
    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.4)
    monkeypatch.setattr(leases, "STALE", 2.0)


@pytest.mark.parametrize("ahead", [0.0, 7200.0, -7200.0], ids=["right", "fast", "slow"])
def test_another_host_s_lease_holds_while_its_heart_beats_whatever_its_clock_says(file, monkeypatch, ahead):
    monkeypatch.setattr(leases, "BEAT", 2.0)
    monkeypatch.setattr(leases, "STALE", 10.0)
    file.parent.mkdir()
    refused = pytest.raises(LeaseError, match=r"process 7 on elsewhere, which runs for 7 min and was heard of \d+ s")
    with alive_elsewhere(file, ahead), refused, lease(file, "RUN", lambda line: None):
        pass
    assert "theirs" in file.read_text()


@pytest.mark.parametrize(
    ("silent", "waits"), [(70.0, 0.6), (0.0, 0.6), (-7200.0, 2.0)], ids=["old", "new", "fast clock"]
)
def test_another_host_s_lease_is_taken_over_once_it_is_silent(file, quick, silent, waits):
    file.parent.mkdir()
    write(file, heartbeat=time.time() - silent)
    began, said = time.monotonic(), []
    with lease(file, "RUN", said.append):
        assert time.monotonic() - began > waits
    assert said[0] == "RUN: waiting to see whether process 7 on elsewhere still writes it"
    assert said[1].startswith("RUN: taking over the lease of process 7 on elsewhere, which was not heard of for ")


def test_a_file_of_a_job_killed_while_making_it_is_free(file):
    file.parent.mkdir()
    file.write_text("")
    with lease(file, "RUN"):
        pass


def test_of_many_that_find_a_stale_lease_one_gets_it(file, quick):
    file.parent.mkdir()
    write(file, heartbeat=0)
    start, done, got = threading.Barrier(8), threading.Barrier(8), []

    def job():
        start.wait()
        try:
            with lease(file, "RUN", lambda line: None):
                got.append("held")
                done.wait()
        except LeaseError:
            got.append("refused")
            done.wait()

    jobs = [threading.Thread(target=job) for _ in range(8)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    assert sorted(got) == ["held"] + ["refused"] * 7


@pytest.mark.parametrize("change", ["removed", "taken over"])
def test_a_job_that_loses_its_lease_ends_and_says_why(file, change):
    other, _ = hold(file)
    if change == "removed":
        file.unlink()
    else:
        write(file)
    _, errors = other.communicate(timeout=10)
    assert other.returncode == 1
    assert errors.startswith("error: RUN: its lease ")
    assert {"removed": "lease.json has gone: was the output removed", "taken over": "process 7 on elsewhere"}[
        change
    ] in errors
    assert file.exists() == (change != "removed")


def test_a_heartbeat_moves_on(file):
    other, _ = hold(file)
    try:
        first = json.loads(file.read_text())
        time.sleep(0.5)
        later = json.loads(file.read_text())
    finally:
        end(other)
    assert later["heartbeat"] > first["heartbeat"]
    assert later["started"] == first["started"]


def test_a_lease_in_a_bucket(gs, monkeypatch):
    monkeypatch.setattr(leases, "SETTLE", 0.01)  # and no heartbeat meanwhile, which would find the stranger, and end us
    file = epath.Path(gs) / "run" / "lease.json"
    with lease(file, "RUN"):
        with pytest.raises(LeaseError, match="another job: process"), lease(file, "RUN"):
            pass
        mine = leases._read(file)
        time.sleep(0.01)
        assert leases._renew(file, mine) is None
        assert leases._read(file).heartbeat > mine.heartbeat
        write(file)
        assert "taken over by process 7 on elsewhere" in leases._renew(file, mine)
    assert "theirs" in file.read_text()  # not ours to remove
    monkeypatch.setattr(leases, "BEAT", 0.4)
    monkeypatch.setattr(leases, "STALE", 2.0)
    write(file, heartbeat=0)
    said = []
    with lease(file, "RUN", said.append):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()
    assert said[1].startswith("RUN: taking over the lease of process 7 on elsewhere")


def test_a_store_that_does_not_answer_now_does_not_end_the_heartbeat(gs, monkeypatch, quick):
    """Its errors are no OSErrors; the lease would be anybody's once its thread had ended with one."""
    monkeypatch.setattr(leases, "BEAT", 0.05)
    file, asked, pipe_file = epath.Path(gs) / "lease.json", [], storage._file_system(gs)[0].pipe_file

    def unwilling(*arguments, **options):
        asked.append(arguments)
        if len(asked) < 3:
            raise RuntimeError("503")
        return pipe_file(*arguments, **options)

    with lease(file, "RUN"):
        began = leases._read(file).heartbeat
        monkeypatch.setattr(storage._file_system(gs)[0], "pipe_file", unwilling)
        with pytest.raises(OSError, match="other: 503"):
            write_whole(file.parent / "other", b"")
        until = time.monotonic() + 20
        while leases._read(file).heartbeat == began and time.monotonic() < until:
            time.sleep(0.05)
        assert leases._read(file).heartbeat > began


def test_a_lease_that_was_made_though_the_answer_was_lost_is_ours(gs, monkeypatch):
    """The store is asked again, and says that there is one already."""

    def asked_twice(path, data):
        create_whole(path, data)
        return create_whole(path, data)

    monkeypatch.setattr(storage, "create_whole", asked_twice)
    file = epath.Path(gs) / "lease.json"
    with lease(file, "RUN"):
        assert leases._read(file).pid == os.getpid()
    assert not file.exists()


def test_of_two_that_create_a_bucket_s_lease_at_once_one_does(gs):
    file = epath.Path(gs) / "lease"
    assert create_whole(file, b"first")
    assert not create_whole(file, b"second")
    assert file.read_bytes() == b"first"
