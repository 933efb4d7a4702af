"""Write a RUN as a Hugging Face directory: python launch/export.py RUN --output HF_DIR"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mmrlhf_jax.command import run_command


@dataclass(frozen=True)
class Export:
    """Write a RUN (or any MODEL) as a Hugging Face directory that transformers, vLLM and lmms-eval load."""

    model: Annotated[str, tyro.conf.Positional]
    """a RUN, a Hugging Face directory or a hub id"""
    output: str
    """the directory to make; it appears only when whole"""
    step: int | None = None
    """the RUN's checkpoint to export; its latest by default"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """of the written weights; bfloat16 rounds away part of a small learning rate's work, float32 keeps it all"""


def main() -> None:
    command = tyro.cli(Export)
    from mmrlhf_jax.models.llava_onevision.weights import save_directory
    from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
    from mmrlhf_jax.training.recipe import PartRates
    from mmrlhf_jax.training.run import load_model
    from mmrlhf_jax.training.runtime import set_up_jax

    set_up_jax("float32")
    whole = PartRates(decoder=1.0, projector=1.0, tower=1.0)  # every value as it was trained, before rounding
    model = load_model(
        command.model, make_mesh(MeshConfig()), ShardingRules(), rates=whole, dtype="float32", step=command.step
    )
    save_directory(model.params, model.assets, command.output, command.dtype)
    print(f"wrote {command.output} ({command.dtype})")


if __name__ == "__main__":
    run_command(main)
