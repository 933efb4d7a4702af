"""What the programs on the digit boards share: the small model they start from, and how they count pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmrlhf_jax.data.digit_boards.boards import CELL
from mmrlhf_jax.groups import Group


def new_model(directory: Path, side: int, texts: Iterable[str], seed: int) -> None:
    """A LLaVA-OneVision of under a million parameters whose patches are the cells of a board, `side` x `side` of them.

    Its tokens are learned from `texts`. Random weights; starts a jax backend.
    """
    from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
    from mmrlhf_jax.models.llava_onevision.model import declare
    from mmrlhf_jax.models.llava_onevision.weights import new_directory
    from mmrlhf_jax.models.qwen2.config import Qwen2Config
    from mmrlhf_jax.models.siglip.config import SiglipConfig
    from mmrlhf_jax.nn.params import count

    pixels = side * CELL
    made = new_directory(
        directory,
        LlavaOnevisionConfig(
            tower=SiglipConfig(embed=96, layers=1, heads=2, mlp=256, image_size=pixels, patch_size=CELL),
            decoder=Qwen2Config(
                embed=128, layers=3, heads=2, kv_heads=2, head_dim=64, mlp=256, rope_theta=1e4, tied=True,
                max_positions=256,
            ),
            pinpoints=((pixels, pixels),),
        ),
        texts=[*texts, "user", "assistant"],  # the chat template's words are tokens of their own too
        seed=seed,
    )  # fmt: skip
    print(f"  {count(declare(made)):,} parameters, {made.decoder.vocab} rows of vocabulary")


def pair_accuracy(groups: Sequence[Group], values: Sequence[Sequence[float]]) -> float:
    """Share of the annotated pairs whose better response has the higher of the groups' values [K]; equal is wrong."""
    right = [
        value[p.chosen] > value[p.rejected] for group, value in zip(groups, values, strict=True) for p in group.pairs
    ]
    return float(sum(right) / len(right))
