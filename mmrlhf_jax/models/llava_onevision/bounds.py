"""How large a LLaVA-OneVision may say it is: far above any that exists (72B: 8,192 wide, 80 layers), far below what
exhausts a machine before a single weight is read."""

from __future__ import annotations

from typing import Any

from mmrlhf_jax.models.files import is_number, shown

DECODER = {
    "vocab_size": (1, 4_000_000),
    "hidden_size": (1, 131_072),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (1, 1_024),
    "num_attention_heads": (1, 4_096),
    "num_key_value_heads": (1, 4_096),
    "head_dim": (2, 4_096),
    "max_position_embeddings": (1, 16_777_216),
}
TOWER = {
    "hidden_size": (1, 131_072),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (1, 1_024),
    "num_attention_heads": (1, 4_096),
    "image_size": (1, 4_096),
    "patch_size": (1, 4_096),
}
PATCHES = 128  # a side of a tile
CANVASES, CANVAS_TILES = 4_096, 64  # how many any-res may choose from, and tiles a side of one
ROPE_THETA = (1.0, 1e12)
NORM_EPS = (1e-12, 0.1)


def shape_problems(embed: int, heads: int, kv_heads: int, head_dim: int | None, within: str) -> list[str]:
    """What of a decoder's sizes does not go together; `head_dim` None: the width is shared out among the heads."""
    problems = []
    if heads % kv_heads:
        problems.append(f"{within}num_attention_heads = {heads} does not divide into num_key_value_heads = {kv_heads}")
    if head_dim is None and embed % heads:
        problems.append(f"{within}hidden_size = {embed} does not divide into num_attention_heads = {heads}")
    elif (head_dim or embed // heads) % 2:
        problems.append(f"{within}head_dim = {head_dim or embed // heads} is odd; rotary embeddings turn pairs")
    return problems


def tower_problems(embed: int, heads: int, side: int, patch: int, within: str) -> list[str]:
    problems = []
    if embed % heads:
        problems.append(f"{within}hidden_size = {embed} does not divide into num_attention_heads = {heads}")
    if not 1 <= side // patch <= PATCHES:
        problems.append(f"{within}image_size = {side} makes {side // patch} patches a side; 1 to {PATCHES} are served")
    return problems


def canvas_problems(canvases: Any, side: int) -> list[str]:
    """What is wrong with `image_grid_pinpoints` [[height, width], ...] for tiles of `side` pixels."""
    name = "image_grid_pinpoints"
    if not isinstance(canvases, list) or not 1 <= len(canvases) <= CANVASES:
        return [f"{name} = {shown(canvases)}, a list of 1 to {CANVASES:,} pairs is needed"]
    most = CANVAS_TILES * side
    odd = [p for p in canvases if not (isinstance(p, (list, tuple)) and len(p) == 2 and all(type(n) is int for n in p))]
    if odd or (odd := [p for p in canvases if not all(1 <= n <= most for n in p)]):
        return [f"{name} {shown(odd[0])} is no pair of whole numbers from 1 to {most:,} ({CANVAS_TILES} tiles)"]
    if bad := [p for p in canvases if p[0] % side or p[1] % side]:
        return [f"{name} {shown(bad)} are not multiples of the tile size {side}"]
    return []


def colour_problems(found: dict[str, Any]) -> list[str]:
    """What is wrong with an image processor's image_mean and image_std."""
    problems = [f"{key} is missing" for key in ("image_mean", "image_std") if key not in found]
    for key, low in (("image_mean", -1e3), ("image_std", 1e-6)):
        value = found.get(key, [1, 1, 1])
        if not isinstance(value, list) or len(value) != 3 or not all(is_number(x, low, 1e3) for x in value):
            problems.append(f"{key} = {shown(value)}, three numbers from {low:g} to 1,000 are needed")
    return problems
