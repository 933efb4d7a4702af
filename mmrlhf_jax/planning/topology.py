"""Chips that a plan is for: a TPU topology as Google Cloud names it, or so many GPUs."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jax.sharding import Mesh

from mmrlhf_jax.command import CommandError, UsageError
from mmrlhf_jax.nn.devices import ACCELERATORS, Accelerator
from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh

# shapes that are sold as one slice and hold at most 256 chips, smallest first (docs.cloud.google.com/tpu/docs)
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_TPU_SHAPES = {"v4": _CUBES, "v5p": _CUBES, "v5e": _FLAT, "v6e": _FLAT}
_GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Target:
    """`slices` times `chips` chips; `shape` is a slice's topology, empty for GPUs."""

    chip: Accelerator
    chips: int
    slices: int = 1
    shape: str = ""

    @property
    def platform(self) -> str:
        return "tpu" if self.shape else "gpu"

    @property
    def total(self) -> int:
        return self.chips * self.slices

    def __str__(self) -> str:
        one = f"{self.chip.name}:{self.shape or self.chips}"
        return one if self.slices == 1 else f"{self.slices} slices of {one}"


def read_target(topology: str, device: str, slices: int) -> Target:
    """`--topology v5p:8x8x4` or `--device h100:8`. Raises UsageError for anything else."""
    if bool(topology) == bool(device):
        raise UsageError("say what to plan for: --topology v5p:2x2x2 (TPUs) or --device h100:8 (GPUs)")
    if slices < 1:
        raise UsageError(f"--slices {slices} is not positive")
    flag, text = ("--topology", topology) if topology else ("--device", device)
    name, _, size = text.partition(":")
    chip = ACCELERATORS.get(name)
    listed = ", ".join(one.name for one in ACCELERATORS.values() if one.is_tpu == bool(topology))
    if chip is None or chip.is_tpu != bool(topology):
        raise UsageError(f"{flag} {text}: {name!r} is none of {listed}")
    if not topology:
        if not re.fullmatch(r"[1-9]\d{0,4}", size):
            raise UsageError(f"--device {text}: write NAME:COUNT, as in h100:8")
        return Target(chip, int(size), slices)
    dimensions = 3 if _TPU_SHAPES[name] is _CUBES else 2
    if not re.fullmatch("x".join([r"[1-9]\d{0,2}"] * dimensions), size):
        raise UsageError(f"--topology {text}: {name} slices have {dimensions} sides, as in {_TPU_SHAPES[name][-1]}")
    return Target(chip, math.prod(map(int, size.split("x"))), slices, size)


def candidates(chip: Accelerator) -> Iterator[Target]:
    """The sizes in which a kind of chip is had, smallest first."""
    if chip.is_tpu:
        for shape in _TPU_SHAPES[chip.name]:
            yield Target(chip, math.prod(map(int, shape.split("x"))), 1, shape)
    else:
        for count in _GPU_COUNTS:
            yield Target(chip, count)


def over(config: MeshConfig, slices: int) -> MeshConfig:
    """`config` with as many slices as are planned for."""
    return dataclasses.replace(config, slices=slices if slices > 1 else 0)


def tpu_mesh(target: Target, config: MeshConfig) -> Mesh:
    """The recipe's mesh over TPUs that are not here. Raises CommandError where libtpu is missing or knows no such
    topology, ValueError where the mesh does not fit."""
    # or libtpu asks Google Cloud what machine this is, for minutes, and complains that it learns nothing
    for name, value in (
        ("SKIP_MDS_QUERY", "1"),
        ("ACCELERATOR_TYPE", "v5litepod-4"),
        ("WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(f"TPU_{name}", value)
    try:
        import libtpu
    except ImportError as error:
        raise CommandError(
            "compiling for TPUs needs their compiler, which runs on any x86-64 Linux machine: pip install "
            '"libtpu==0.0.42.*". Or add --estimate, which compiles nothing'
        ) from error
    del libtpu
    from jax.experimental import topologies

    asked = {"num_slices": target.slices} if target.slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(f"{target.chip.name}:{target.shape}", platform="tpu", **asked).devices
    except Exception as error:  # whatever libtpu raises
        if "lockfile" in str(error):
            raise CommandError("libtpu serves one process at a time, and another one has it: wait for that") from error
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CommandError(f"libtpu makes no topology of {target}: {first[:300]}") from error
    if len(devices) != target.total:  # v4, whose two cores libtpu takes for devices of their own
        raise CommandError(f"libtpu sees {len(devices)} devices in {target}, not {target.total}: add --estimate")
    return make_mesh(over(config, target.slices), devices)
