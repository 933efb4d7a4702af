"""How checkpoints spell LLaVA-OneVision's tensors. One key table (weights.py) holds llava-hf's names; every other
spelling is a renaming into it."""

from __future__ import annotations

TOWER = "vision_tower."
REWARD_HEAD = "rm_head."  # beside the policy's tensors in a reward model of MM-RLHF's released code

# lmms-lab, the original LLaVA code: https://github.com/LLaVA-VL/LLaVA-NeXT
_ORIGINAL = {
    "model.vision_tower.vision_tower.": TOWER,
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.image_newline": "image_newline",
    "model.embed_tokens.": "language_model.model.embed_tokens.",
    "model.layers.": "language_model.model.layers.",
    "model.norm.": "language_model.model.norm.",
    "lm_head.": "language_model.lm_head.",
}


def canonical(name: str) -> str:
    """The llava-hf hub's spelling of a name in lmms-lab's, or in transformers 5's, which also writes the tower without
    its `.vision_model`. A name that is none of them stays as it is."""
    for original, ours in _ORIGINAL.items():
        if name.startswith(original):
            name = ours + name.removeprefix(original)
            break
    if name.startswith(TOWER) and not name.startswith(f"{TOWER}vision_model."):
        return f"{TOWER}vision_model.{name.removeprefix(TOWER)}"
    return name
