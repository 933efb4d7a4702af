"""What the project takes from others: bounded versions, a lock, known licences, and no network unless asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from dependencies import ROOT, all_requirements, closure, families, requirements, stated_licence
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from small_world import command, environment
from test_quickstart import TINY, check_all_is_there


def pins(name: str) -> dict[str, str]:
    """{package: version} of a file of `package==version` lines."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("requirement", all_requirements(), ids=str)
def test_every_requirement_states_the_versions_it_is_known_to_work_with(requirement: Requirement) -> None:
    kinds = {one.operator for one in requirement.specifier}
    assert kinds == {"=="} or kinds == {">=", "<"}, f"{requirement}: state >= and <, or =="


@pytest.mark.parametrize("requirement", all_requirements(), ids=str)
def test_what_is_installed_here_is_within_them(requirement: Requirement) -> None:
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        pytest.skip("not installed here")
    assert requirement.specifier.contains(installed, prereleases=True)


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    """.ci/lowest.txt is what `pip install -c .ci/lowest.txt` tries the lower bounds with."""
    stated = {}
    for requirement in requirements("test"):
        low = [one.version for one in requirement.specifier if one.operator == ">="]
        stated[canonicalize_name(requirement.name)] = low[0]
    lowest = pins(".ci/lowest.txt")
    assert lowest.keys() == stated.keys()
    wrong = [name for name, low in stated.items() if Version(lowest[name]).release[: len(Version(low).release)] !=
             Version(low).release]  # fmt: skip
    assert not wrong


def test_the_lock_holds_every_requirement_within_its_bounds() -> None:
    lock = pins("requirements.lock")
    for requirement in [*requirements("test", "parity", "browser")]:
        locked = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(locked), f"{requirement}: locked at {locked}"


def test_lock_and_bounds_name_no_index_path_or_build() -> None:
    for name in ("requirements.lock", ".ci/lowest.txt"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?:|--(extra-)?index|--find-links|file:|@ |\+cpu|\+cu", text)


def test_every_dependency_has_a_licence_that_is_allowed() -> None:
    found = closure(all_requirements())
    assert {"jax", "transformers", "orbax-checkpoint"} <= found.keys()
    unknown = {name: stated_licence(one) for name, one in found.items() if not families(name, one)}
    assert not unknown


# notes and refuses every connection of the process and its children to anything but this machine
GUARD = """
import os, sys
def _hook(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        return
    where = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
    host = where[0] if isinstance(where, tuple) else where
    if host in (None, "", "localhost", "127.0.0.1", "::1") or not isinstance(where, (tuple, str)):
        return
    if isinstance(where, str) and where.startswith("/"):
        return  # a socket of this machine
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{event} {where}\\n")
    raise OSError("the network is cut")
sys.addaudithook(_hook)
"""


def cut_off(directory: Path) -> tuple[list[str], dict[str, str]]:
    """What stands before a command without a network, and its environment: a network of its own where the kernel
    lets one make it, and always a note of each attempt in `directory`/attempts."""
    (directory / "sitecustomize.py").write_text(GUARD)
    path = os.pathsep.join([str(directory), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    known = {**environment(1), "PYTHONPATH": path, "ATTEMPTS": str(directory / "attempts")}
    known.pop("HF_HUB_OFFLINE", None)  # it would keep the hub's client from trying
    unshare = [found, "-r", "-n"] if (found := shutil.which("unshare")) else []
    if unshare and subprocess.run([*unshare, "true"], capture_output=True).returncode:
        unshare = []
    return unshare, known


def test_the_guard_sees_an_attempt(tmp_path: Path) -> None:
    before, known = cut_off(tmp_path)
    program = "import socket; socket.create_connection(('192.0.2.1', 9), 1)"
    done = subprocess.run([*before, sys.executable, "-c", program], env=known, capture_output=True, text=True)
    assert "the network is cut" in done.stderr
    assert "192.0.2.1" in (tmp_path / "attempts").read_text()


@pytest.mark.slow
def test_the_quickstart_runs_its_programs_with_the_network_cut_and_they_try_nothing(tmp_path: Path) -> None:
    """As a user starts it: every stage is a program of its own."""
    pytest.importorskip("sklearn")
    before, known = cut_off(tmp_path)
    words = [*before, *command("quickstart", "--output", tmp_path / "out", *TINY)]
    done = subprocess.run(words, env=known, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    check_all_is_there(tmp_path / "out", done.stdout)
