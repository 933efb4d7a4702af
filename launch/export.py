"""Write a RUN as a Hugging Face directory: python launch/export.py RUN --output HF_DIR"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from etils import epath

from mmrlhf_jax.command import run_command
from mmrlhf_jax.models.llava_onevision.weights import RECORD, save_directory
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.recipe import PartRates
from mmrlhf_jax.training.run import RunDirectory, load_model, model_fingerprint
from mmrlhf_jax.training.runtime import set_up_jax


@dataclass(frozen=True)
class Export:
    """Write a RUN (or any MODEL) as a Hugging Face directory that transformers, vLLM and lmms-eval load."""

    model: Annotated[str, tyro.conf.Positional]
    """a RUN, a Hugging Face directory or a hub id, in llava-hf's layout or lmms-lab's"""
    output: str
    """the directory to make; it appears only when whole"""
    step: int | None = None
    """the RUN's checkpoint to export; its latest by default"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """of the written weights; bfloat16 rounds away part of a small learning rate's work, float32 keeps it all"""


def main() -> None:
    command = tyro.cli(Export, prog="export.py")
    set_up_jax("float32")
    whole = PartRates(decoder=1.0, projector=1.0, tower=1.0)  # every value as it was trained, before rounding
    model = load_model(
        command.model, make_mesh(MeshConfig()), ShardingRules(), rates=whole, dtype="float32", step=command.step
    )
    record = {"weights": model_fingerprint(model.config, model.params), "step": model.step, "dtype": command.dtype}
    written = epath.Path(command.output) / RECORD
    if written.exists() and json.loads(written.read_text()) == record:
        print(f"{command.output} is written already")
        return
    save_directory(model.params, model.assets, command.output, command.dtype, record=record)
    print(f"wrote {command.output} ({command.dtype}){_source(command.model, model.step)}")


def _source(model: str, step: int | None) -> str:
    if step is None:
        return ""
    unfinished = "" if RunDirectory(Path(model)).complete.exists() else " of a run that is not finished"
    return f" from checkpoint {step}{unfinished}"


if __name__ == "__main__":
    run_command(main)
