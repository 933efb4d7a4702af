"""A LLaVA-OneVision small enough for a CPU test, in which every branch of the any-res layout still runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.fresh import write_fresh_files
from mmrlhf_jax.models.llava_onevision.model import LlavaOnevision, declare
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.siglip.config import SiglipConfig
from mmrlhf_jax.nn.params import Param, map_params

# 3 patches a side: video pooling 3 -> 2 is a real interpolation; canvases up to 6 x 6 tiles reach the reduction.
TINY = LlavaOnevisionConfig(
    tower=SiglipConfig(embed=32, layers=2, heads=2, mlp=64, image_size=42, patch_size=14),
    decoder=Qwen2Config(
        vocab=320, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, rope_theta=1e6, max_positions=4096
    ),
    image_token=259,
    video_token=260,
    pinpoints=tuple((42 * i, 42 * j) for i in range(1, 7) for j in range(1, 7)),
)


def write_tiny_directory(path: str | Path) -> LlavaOnevisionConfig:
    """A directory with everything but weights; returns its configuration, equal to TINY."""
    return write_fresh_files(str(path), TINY)


def random_params(config: LlavaOnevisionConfig = TINY, seed: int = 0) -> LlavaOnevision:
    """Random weights as numpy arrays; biases and norms too, since one left at its start could be dropped unseen."""
    rng = np.random.default_rng(seed)

    def draw(param: Param) -> np.ndarray:
        scale = 0.1 if param.init != "normal" else 1 / math.sqrt(param.fan_in or param.shape[-1])
        return (rng.normal(0, scale, param.shape) + (param.init == "ones")).astype(np.float32)

    return map_params(draw, declare(config))
