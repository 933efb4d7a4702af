"""Compute something for every response of a dataset and store it beside the data.

    python launch/annotate.py --dataset DATASET --model MODEL --with reference

The same command again resumes. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from mmrlhf_jax.command import run_command
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.inference.score import ScoreConfig, write_reference_logps
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import RenderOptions, load_renderer
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.data import REFERENCE, reference_key
from mmrlhf_jax.training.distributed import is_speaker, join_processes, say, wait_for_all
from mmrlhf_jax.training.model import load_model, model_fingerprint
from mmrlhf_jax.training.recipe import INFERENCE
from mmrlhf_jax.training.runtime import set_up_jax


@dataclass(frozen=True)
class Arguments:
    """Reference log-probs of every response under MODEL, stored beside DATASET, or beside each part of a mixture.
    The same command again resumes."""

    dataset: str
    """a directory made by launch/prepare.py, or a mixture file: of each of its parts the rows it takes"""
    model: str
    """a Hugging Face directory, a hub id, or a RUN"""
    what: Annotated[Literal["reference"], tyro.conf.arg(name="with")]
    """reference: per-token log-probs of every response"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of activations and matrix products; a run reads log-probs made with its own compute.dtype"""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    vocab_chunk: int = 8192
    """vocabulary rows whose logits exist at once"""
    render: RenderOptions = field(default_factory=RenderOptions)
    score: Annotated[ScoreConfig, tyro.conf.arg(name="")] = field(default_factory=ScoreConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="annotate.py")
    join_processes()
    set_up_jax(arguments.dtype)
    dataset = open_dataset(arguments.dataset)
    mesh = make_mesh(arguments.mesh)
    model = load_model(arguments.model, mesh, ShardingRules(), rates=INFERENCE)
    renderer = load_renderer(str(model.assets), arguments.render)
    compute = Compute(
        dtype=arguments.dtype,
        platform=mesh.devices.flat[0].platform,
        attention=arguments.attention,
        vocab_chunk=arguments.vocab_chunk,
        vocab_shards=mesh.shape["tensor"],
    )
    key = reference_key(model_fingerprint(model.config, model.params), renderer, arguments.dtype)
    for part, row_of in dataset.parts():
        rows = set(row_of.values())
        if is_speaker():
            AnnotationStore.open(part.path, REFERENCE, key)  # creates it: once
        wait_for_all("the store is there")
        store = AnnotationStore.open(part.path, REFERENCE, key)
        written = write_reference_logps(part, rows, renderer, model, store, mesh, compute, arguments.score)
        done = "done already" if not written else f"{written} groups scored"
        say(f"{done}: {len(rows)} stored in {store.directory}")


if __name__ == "__main__":
    run_command(main)
