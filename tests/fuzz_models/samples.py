"""What the cases begin from: the small files of a tiny MODEL directory, its parameters and a mesh of one device."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from fuzz_models.mutations import mutate_document


@cache
def tiny_config() -> Any:
    from tiny import TINY

    return dataclasses.replace(TINY, pinpoints=((42, 42), (42, 84), (84, 42)))  # else most changes would fall on them


@cache
def valid() -> dict[str, bytes]:
    """The small files of a tiny directory."""
    from mmrlhf_jax.models.llava_onevision.fresh import write_fresh_files

    with tempfile.TemporaryDirectory() as directory:
        write_fresh_files(directory, tiny_config())
        return {file.name: file.read_bytes() for file in Path(directory).iterdir()}


@cache
def document(name: str) -> Any:
    return json.loads(valid()[name])


def write_valid(directory: Path, *without: str) -> None:
    for name, data in valid().items():
        if name not in without:
            (directory / name).write_bytes(data)


def twice(rng: Random, given: Any) -> Any:
    return mutate_document(rng, given, rng.choice((0, 1, 1, 1, 2, 4)))


@cache
def weights_of() -> bytes:
    """model.safetensors of the tiny model."""
    from safetensors.numpy import save
    from tiny import random_params

    from mmrlhf_jax.models.key_table import export_tensors
    from mmrlhf_jax.models.llava_onevision.weights import KEYS

    return save({tensor.name: tensor.values() for tensor in export_tensors(random_params(), KEYS, "float32")})


@cache
def mesh() -> Any:
    import jax

    from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh

    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def file_of(module: ModuleType) -> str:
    return str(module.__file__)
