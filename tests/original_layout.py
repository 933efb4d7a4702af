"""A directory as the original LLaVA code writes it (lmms-lab on the hub), made from one in llava-hf's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file
from tiny import TINY

SPELLING = {
    "vision_tower.": "model.vision_tower.vision_tower.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def original_config() -> dict[str, Any]:
    """TINY's config.json; the keys are those of the released models, and vision_config."""
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "hidden_act": "silu",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-tiny",
        "use_mm_proj": True,
        "use_pos_skipping": False,
        "vision_config": {"num_attention_heads": 2, "image_size": 42},
    }


def original_name(name: str) -> str:
    ours = next(ours for ours in SPELLING if name.startswith(ours))
    return SPELLING[ours] + name.removeprefix(ours)


def write_original(llava_hf: Path, output: Path) -> Path:
    """TINY's `llava_hf` directory in the original layout: no processor, no template, a tokenizer without media."""
    output.mkdir(parents=True)
    tensors = load_file(llava_hf / "model.safetensors")
    save_file({original_name(name): tensor for name, tensor in tensors.items()}, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(original_config()))
    tokenizer = json.loads((llava_hf / "tokenizer.json").read_text())
    media = {TINY.image_token, TINY.video_token}
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] not in media]
    (output / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (output / "tokenizer_config.json").write_text(json.dumps(settings))
    return output
