"""Write a RUN as a Hugging Face directory: python launch/export.py RUN --output HF_DIR"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from etils import epath

from mmrlhf_jax.command import run_command
from mmrlhf_jax.lease import beside, lease
from mmrlhf_jax.models.families import is_reward, keys_of
from mmrlhf_jax.models.llava_onevision.adapter import is_adapter_directory, save_adapter
from mmrlhf_jax.models.llava_onevision.lmms_lab import is_original
from mmrlhf_jax.models.llava_onevision.weights import RECORD, save_directory
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import base_of, is_run, load_adapters, load_model, model_fingerprint, split_model
from mmrlhf_jax.training.recipe import INFERENCE, PartRates
from mmrlhf_jax.training.run import RunDirectory
from mmrlhf_jax.training.runtime import set_up_jax


@dataclass(frozen=True)
class Export:
    """Write a RUN (or any MODEL) as a Hugging Face directory that transformers, vLLM and lmms-eval load; of a reward
    model with its head (rm_head.*) and reward.json, which these programs leave unread."""

    model: Annotated[str, tyro.conf.Positional]
    """a RUN (RUN@best, RUN@STEP: another than its latest checkpoint), a Hugging Face directory or a hub id, in
    llava-hf's layout or lmms-lab's"""
    output: str
    """the directory to make; it appears only when whole"""
    adapter: bool = False
    """of a LoRA run, write the adapter alone, as a PEFT directory, instead of merged weights"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """of the written weights; bfloat16 rounds away part of a small learning rate's work, float32 keeps it all. An
    adapter is always float32"""


def main() -> None:
    command = tyro.cli(Export, prog="export.py")
    set_up_jax("float32")
    if command.adapter:
        _export_adapter(command)
        return
    whole = PartRates(decoder=1.0, projector=1.0, tower=1.0, head=1.0)  # every value as it was trained, before rounding
    model = load_model(command.model, make_mesh(MeshConfig()), ShardingRules(), rates=whole, dtype="float32")
    record = {"weights": model_fingerprint(model.config, model.params), "step": model.step, "dtype": command.dtype}
    written = epath.Path(command.output) / RECORD
    if written.exists() and json.loads(written.read_text()) == record:
        print(f"{command.output} is written already")
        return
    keys = keys_of(model.config)
    with lease(beside(command.output), command.output):
        save_directory(model.params, model.assets, command.output, command.dtype, record=record, keys=keys)
    print(f"wrote {command.output} ({command.dtype}){_source(command.model, model.step)}")


def _export_adapter(command: Export) -> None:
    model = load_adapters(command.model, make_mesh(MeshConfig()), ShardingRules(), rates=INFERENCE)
    if model is None:
        raise ValueError(
            f"{command.model} has no adapter: it is no LoRA run. Leave out --adapter to export its weights"
        )
    if is_reward(model.config):
        raise ValueError(f"{command.model} is a reward model, whose head no PEFT directory holds: leave out --adapter")
    base = base_of(command.model)
    with lease(beside(command.output), command.output):
        written = save_adapter(model.params, command.output, base=base)
    if not written:
        print(f"{command.output} is written already")
        return
    print(f"wrote the adapter {command.output}{_source(command.model, model.step)}")
    if not _loads_in_peft(base):
        print(
            f"note: its base {base} is no Hugging Face directory in the llava-hf layout; for peft export that too and "
            f"put the new directory into base_model_name_or_path of {command.output}/adapter_config.json"
        )


def _loads_in_peft(base: str) -> bool:
    """Whether `base` is what transformers loads: a hub id, or a directory in the llava-hf layout."""
    if is_run(split_model(base)[0]) or is_adapter_directory(base):
        return False
    config = epath.Path(base) / "config.json"
    return not config.exists() or not is_original(json.loads(config.read_text()))


def _source(model: str, step: int | None) -> str:
    if step is None:
        return ""
    unfinished = "" if RunDirectory.at(split_model(model)[0]).complete.exists() else " of a run that is not finished"
    return f" from checkpoint {step}{unfinished}"


if __name__ == "__main__":
    run_command(main)
