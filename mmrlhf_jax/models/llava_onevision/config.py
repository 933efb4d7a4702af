"""Shape of a LLaVA-OneVision model (arXiv 2408.03326) and how it is read from a Hugging Face directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from transformers import LlavaOnevisionConfig as HFConfig

from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.siglip.config import SiglipConfig


@dataclass(frozen=True)
class LlavaOnevisionConfig:
    """A SigLIP tower, a two-layer projector and a Qwen2 decoder.

    `pinpoints` are the (height, width) canvases any-res may choose, in pixels; `max_tiles` is the 9 of `anyres_max_9`:
    beyond that many tiles' worth of features the grid is reduced bilinearly.
    """

    tower: SiglipConfig = field(default_factory=SiglipConfig)
    decoder: Qwen2Config = field(default_factory=Qwen2Config)
    image_token: int = 151646
    video_token: int = 151647
    pinpoints: tuple[tuple[int, int], ...] = tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7))
    max_tiles: int = 9
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def tokens_per_tile(self) -> int:
        return self.tower.grid**2

    @property
    def tile_cost(self) -> float:
        """Matrix-product work of one tile through a frozen tower, in trained decoder tokens (forward, recomputation and
        backward: four forwards)."""
        t, d, n = self.tower, self.decoder, self.tokens_per_tile
        tile = t.layers * n * (8 * t.embed**2 + 4 * t.embed * t.mlp + 4 * n * t.embed)
        token = d.layers * (4 * d.embed * (d.heads + d.kv_heads) * d.head_dim + 6 * d.embed * d.mlp)
        return tile / (4 * token)


def read_config(directory: str) -> LlavaOnevisionConfig:
    """The configuration of a local Hugging Face directory in the llava-hf layout.

    Raises ValueError naming every setting this implementation does not serve, so that no checkpoint is run as something
    it is not. Format: transformers' LlavaOnevisionConfig and its (pre)processor_config.json.
    """
    path = epath.Path(directory)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{directory}: no config.json there; a MODEL is a Hugging Face directory, a hub id or a RUN"
        )
    raw = json.loads((path / "config.json").read_text())
    if raw.get("model_type") != "llava_onevision":
        raise ValueError(
            f"{path / 'config.json'}: model_type is {raw.get('model_type')!r}; supported: 'llava_onevision' "
            "(llava-hf's layout), and lmms-lab's with the architecture LlavaQwenForCausalLM"
        )
    hf: Any = HFConfig.from_dict(raw)
    text, vision = hf.text_config, hf.vision_config
    rope = text.rope_parameters
    # as transformers: either place ties, also when the other says no
    tied = any(part.get("tie_word_embeddings", False) for part in (raw, raw.get("text_config", {})))
    wanted = {
        "vision_feature_select_strategy": (hf.vision_feature_select_strategy, "full"),
        "vision_feature_layer": (hf.vision_feature_layer, -1),
        "projector_hidden_act": (hf.projector_hidden_act, "gelu"),
        "multimodal_projector_bias": (hf.multimodal_projector_bias, True),
        "text_config.model_type": (text.model_type, "qwen2"),
        "text_config.hidden_act": (text.hidden_act, "silu"),
        "text_config.use_sliding_window": (text.use_sliding_window, False),
        "text_config rope type": (rope.get("rope_type", "default"), "default"),
        "vision_config.model_type": (vision.model_type, "siglip_vision_model"),
        "vision_config.hidden_act": (vision.hidden_act, "gelu_pytorch_tanh"),
    }
    problems = [f"{name} = {have!r}, supported: {want!r}" for name, (have, want) in wanted.items() if have != want]
    aspect = hf.vision_aspect_ratio
    if not aspect.startswith("anyres_max_") or not aspect.removeprefix("anyres_max_").isdigit():
        problems.append(f"vision_aspect_ratio = {aspect!r}, supported: 'anyres_max_N'")
    side = vision.image_size
    if bad := [p for p in hf.image_grid_pinpoints if p[0] % side or p[1] % side]:
        problems.append(f"image_grid_pinpoints {bad} are not multiples of the tile size {side}")
    if problems:
        raise ValueError(f"{path / 'config.json'}: " + "; ".join(problems))
    processor = _image_processor(path, side, hf.image_grid_pinpoints)
    return LlavaOnevisionConfig(
        tower=SiglipConfig(
            embed=vision.hidden_size,
            layers=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            mlp=vision.intermediate_size,
            image_size=side,
            patch_size=vision.patch_size,
            norm_eps=vision.layer_norm_eps,
        ),
        decoder=Qwen2Config(
            vocab=text.vocab_size,
            embed=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            mlp=text.intermediate_size,
            rope_theta=float(rope["rope_theta"]),
            norm_eps=text.rms_norm_eps,
            tied=tied,
            max_positions=text.max_position_embeddings,
        ),
        image_token=hf.image_token_id,
        video_token=hf.video_token_id,
        pinpoints=tuple((int(h), int(w)) for h, w in hf.image_grid_pinpoints),
        max_tiles=int(aspect.removeprefix("anyres_max_")),
        pixel_mean=tuple(processor["image_mean"]),
        pixel_std=tuple(processor["image_std"]),
    )


def _image_processor(path: epath.Path, side: int, pinpoints: list[list[int]]) -> dict[str, Any]:
    """The image processor's settings, checked against what `tiles.py` computes.

    transformers 5 nests them in processor_config.json; earlier releases write preprocessor_config.json.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = path / name
        raw = json.loads(file.read_text()) if file.exists() else {}
        if found := raw.get("image_processor", raw if "image_mean" in raw else None):
            break
    else:
        raise ValueError(
            f"{path}: no image processor in processor_config.json or preprocessor_config.json; how the model's pixels "
            "are normalised is not known"
        )
    wanted = {
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
        "image_grid_pinpoints": pinpoints,
    }
    problems = [
        f"{key} = {found[key]!r}, supported: {want!r}" for key, want in wanted.items() if found.get(key, want) != want
    ]
    problems += [f"{key} is missing" for key in ("image_mean", "image_std") if key not in found]
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    return found
