"""Shape of a Qwen2 decoder (arXiv 2407.10671)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Qwen2Config:
    """Defaults are Qwen2-7B as LLaVA-OneVision ships it."""

    vocab: int = 152064
    embed: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    mlp: int = 18944
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False  # the unembedding is the embedding table
    max_positions: int = 32768
