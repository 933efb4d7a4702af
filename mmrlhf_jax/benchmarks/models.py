"""The random models a step is timed on: their shapes, and directories that both sides load.

Tensors are drawn and written one at a time, so that a 7B takes the host about twice its largest tensor.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.models.key_table import Expected, expected_tensors
from mmrlhf_jax.models.llava_onevision import fresh
from mmrlhf_jax.models.llava_onevision.adapter import save_adapter
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.shapes import SHAPES
from mmrlhf_jax.models.llava_onevision.weights import KEYS
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.safetensors_files import DTYPES, Outgoing, write_safetensors
from mmrlhf_jax.models.siglip.config import SiglipConfig
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.lora import Adapted, adapter_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.recipe import LoraConfig

Shape = Literal["pinned", "0.5b", "7b"]
PINNED = {"decoder_layers": 8, "embed": 512, "vocab": 32000, "tower_layers": 6}
LORA_SCALE = 2.0  # of the update: alpha is twice the rank
B_SIZE = 0.1  # of an adapter's B sqrt(rank): with B zero, as training starts, nothing would reach A


@dataclass(frozen=True)
class Models:
    """Directories in the llava-hf layout. With `adapter`, a PEFT directory over `policy`, the reference is the policy
    without it and `reference` is None."""

    policy: str
    reference: str | None
    adapter: str | None


def shape_config(shape: Shape, sizes: dict[str, int | None]) -> LlavaOnevisionConfig:
    """The configuration of a shape; `sizes` are flags that change the pinned one, None where not given. Raises
    UsageError for one given with another shape."""
    given = {name: size for name, size in sizes.items() if size is not None}
    if shape == "pinned":
        return pinned_config(**{**PINNED, **given})
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{flags} change the pinned shape; {shape} has sizes of its own")
    return SHAPES[shape]


def pinned_config(decoder_layers: int, embed: int, vocab: int, tower_layers: int) -> LlavaOnevisionConfig:
    """LLaVA-OneVision's parts at a size CPUs can train: heads of 64, four query heads a key head, tied embeddings; a
    tower of width 256 on tiles of 384 pixels; the 36 any-res canvases of the real one."""
    heads = embed // 64
    return LlavaOnevisionConfig(
        tower=SiglipConfig(embed=256, layers=tower_layers, heads=4, mlp=1024),
        decoder=Qwen2Config(
            vocab=vocab,
            embed=embed,
            layers=decoder_layers,
            heads=heads,
            kv_heads=max(1, heads // 4),
            head_dim=64,
            mlp=3 * embed,
            tied=True,
        ),
        image_token=vocab - 2,
        video_token=vocab - 1,
    )


def write_models(config: LlavaOnevisionConfig, work: Path, dtype: str, lora_rank: int) -> Models:
    """Two random models of one shape, a policy and a reference, stored in `dtype`; with `lora_rank` one, and an
    adapter for it."""
    assets = work / "assets"
    fresh.write_fresh_files(str(assets), config)
    # the tokenizer of 261 tokens is only there to be loaded: prompts are drawn as ids from the whole vocabulary
    policy = _write_model(config, assets, work / "policy", dtype, seed=0)
    if lora_rank:
        return Models(policy, None, _write_adapter(config, work / "adapter", policy, lora_rank))
    return Models(policy, _write_model(config, assets, work / "reference", dtype, seed=1), None)


def _write_model(config: LlavaOnevisionConfig, assets: Path, output: Path, dtype: str, *, seed: int) -> str:
    output.mkdir()
    for file in assets.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    (output / "config.json").write_text(json.dumps(fresh.hf_config(config, dtype)))
    write_safetensors([_random(item, seed, dtype) for item in expected_tensors(declare(config), KEYS)], output)
    return str(output)


def _random(item: Expected, seed: int, dtype: str) -> Outgoing:
    return Outgoing(item.name, item.key.their_shape(item.layer_shape), dtype, partial(_values, item, seed, dtype))


def _values(item: Expected, seed: int, dtype: str) -> np.ndarray:
    if item.key.ours.startswith("tower."):
        seed = 0  # the tower is frozen: policy and reference have the same one, as in training
    drawn = nn_params.draw(item.key.ours, item.param, seed, item.layer)
    return item.key.export_array(drawn.astype(DTYPES[dtype], copy=False))


def _write_adapter(config: LlavaOnevisionConfig, output: Path, base: str, rank: int) -> str:
    """Both A and B random, on every kernel that LoRA runs adapt by default."""
    declared = declare(config)
    drawn = {
        name: (a, dataclasses.replace(b, init="normal", fan_in=round(rank / B_SIZE**2)))
        for name, (a, b) in adapter_params(declared, LoraConfig().targets, rank).items()
    }
    values = nn_params.initialise(drawn, 2, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), ShardingRules())
    tree = nn_params.map_named(
        lambda name, _: Adapted(None, *values[name], LORA_SCALE) if name in values else None, declared
    )
    save_adapter(tree, str(output), base=base)
    return str(output)
