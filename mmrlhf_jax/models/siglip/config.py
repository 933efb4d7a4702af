"""Shape of a SigLIP vision tower (arXiv 2303.15343), as LLaVA-OneVision uses it: no class token, no pooling head."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SiglipConfig:
    """Defaults are SigLIP so400m/14-384 with its last layer removed, the tower of LLaVA-OneVision."""

    embed: int = 1152
    layers: int = 26
    heads: int = 16
    mlp: int = 4304
    image_size: int = 384
    patch_size: int = 14
    norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along one side of a tile; pixels beyond grid * patch_size are not seen ("valid" convolution)."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads
