"""A LLaVA-OneVision small enough for a CPU test, in which every branch of the any-res layout still runs."""

from __future__ import annotations

from pathlib import Path

from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.fresh import write_fresh_files
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.siglip.config import SiglipConfig

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
