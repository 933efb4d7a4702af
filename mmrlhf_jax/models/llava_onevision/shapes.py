"""Published LLaVA-OneVision sizes by name, for what needs shapes and no weights.

Decoders: config.json of Qwen/Qwen2-0.5B, -7B and -72B-Instruct, which lmms-lab/llava-onevision-qwen2-{0.5b,7b,72b}-ov
start from. Tower: google/siglip-so400m-patch14-384 without its last layer.
"""

from __future__ import annotations

from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.qwen2.config import Qwen2Config

SHAPES: dict[str, LlavaOnevisionConfig] = {
    "0.5b": LlavaOnevisionConfig(
        decoder=Qwen2Config(vocab=151936, embed=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, tied=True)
    ),
    "7b": LlavaOnevisionConfig(
        decoder=Qwen2Config(vocab=152064, embed=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp=18944)
    ),
    "72b": LlavaOnevisionConfig(
        decoder=Qwen2Config(vocab=152064, embed=8192, layers=80, heads=64, kv_heads=8, head_dim=128, mlp=29568)
    ),
}
