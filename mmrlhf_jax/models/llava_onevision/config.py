"""Shape of a LLaVA-OneVision model (arXiv 2408.03326) and how it is read from a Hugging Face directory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from transformers import LlavaOnevisionConfig as HFConfig

from mmrlhf_jax.models.files import is_number, read_json, shown, size_problems
from mmrlhf_jax.models.llava_onevision import bounds
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


# all that is taken from a config.json. What else it says is not shown to transformers, whose classes make lists as
# long as some numbers say
_WHOLE = (
    "image_grid_pinpoints", "vision_aspect_ratio", "vision_feature_select_strategy", "vision_feature_layer",
    "projector_hidden_act", "multimodal_projector_bias", "image_token_index", "image_token_id", "video_token_index",
    "video_token_id", "tie_word_embeddings",
)  # fmt: skip
_TEXT = (
    "model_type", *bounds.DECODER, "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "use_sliding_window", "tie_word_embeddings",
)  # fmt: skip
_VISION = ("model_type", *bounds.TOWER, "hidden_act", "layer_norm_eps")
_TOKEN_NAMES = ("image_token_index", "image_token_id", "video_token_index", "video_token_id")


def read_config(directory: str) -> LlavaOnevisionConfig:
    """The configuration of a local Hugging Face directory in the llava-hf layout.

    Raises ValueError naming every setting this implementation does not serve, so that no checkpoint is run as something
    it is not, and every size beyond `bounds`, before anything is made of it. Format: transformers'
    LlavaOnevisionConfig and its (pre)processor_config.json.
    """
    path = epath.Path(directory)
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{directory}: no config.json there; a MODEL is a Hugging Face directory, a hub id or a RUN"
        )
    raw = read_json(file)
    if raw.get("model_type") != "llava_onevision":
        raise ValueError(
            f"{file}: model_type is {shown(raw.get('model_type'))}; supported: 'llava_onevision' "
            "(llava-hf's layout), and lmms-lab's with the architecture LlavaQwenForCausalLM"
        )
    hf = _as_transformers_reads(file, raw)
    text, vision = hf.text_config, hf.vision_config
    # as transformers: either place ties, also when the other says no
    tied = any(part.get("tie_word_embeddings", False) for part in (raw, raw.get("text_config", {})))
    if problems := _unserved(hf):
        raise ValueError(f"{file}: " + "; ".join(problems))
    processor = _image_processor(path, vision.image_size, hf.image_grid_pinpoints)
    return LlavaOnevisionConfig(
        tower=SiglipConfig(
            embed=vision.hidden_size,
            layers=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            mlp=vision.intermediate_size,
            image_size=vision.image_size,
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
            rope_theta=float(text.rope_parameters["rope_theta"]),
            norm_eps=text.rms_norm_eps,
            tied=tied,
            max_positions=text.max_position_embeddings,
        ),
        image_token=hf.image_token_id,
        video_token=hf.video_token_id,
        pinpoints=tuple((int(h), int(w)) for h, w in hf.image_grid_pinpoints),
        max_tiles=int(hf.vision_aspect_ratio.removeprefix("anyres_max_")),
        pixel_mean=tuple(processor["image_mean"]),
        pixel_std=tuple(processor["image_std"]),
    )


def _as_transformers_reads(file: epath.Path, raw: dict[str, Any]) -> Any:
    """transformers' LlavaOnevisionConfig of a config.json whose sizes are sane: it fills in what is not stated."""
    parts = {name: raw.get(name, {}) for name in ("text_config", "vision_config")}
    problems = [f"{name} is not an object" for name, part in parts.items() if not isinstance(part, dict)]
    if not problems:
        wanted = {"text_config": (_TEXT, bounds.DECODER), "vision_config": (_VISION, bounds.TOWER)}
        for name, (keys, sizes) in wanted.items():
            parts[name] = {key: parts[name][key] for key in keys if key in parts[name]}
            may_be_null = ("num_key_value_heads", "head_dim")
            stated = {key: value for key, value in parts[name].items() if value is not None or key not in may_be_null}
            problems += size_problems(stated, sizes, f"{name}.")
        problems += size_problems(raw, dict.fromkeys(_TOKEN_NAMES, (0, bounds.DECODER["vocab_size"][1])))
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    try:
        return HFConfig.from_dict({**{key: raw[key] for key in _WHOLE if key in raw}, **parts})
    except Exception as error:  # of transformers, huggingface_hub's validation, or where neither expected such a value
        raise ValueError(f"{file}: not a configuration that transformers reads: {shown(str(error))}") from error


def _unserved(hf: Any) -> list[str]:
    """Every setting of a configuration that this implementation does not serve."""
    text, vision, rope = hf.text_config, hf.vision_config, hf.text_config.rope_parameters
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
    problems = [f"{name} = {shown(have)}, supported: {want!r}" for name, (have, want) in wanted.items() if have != want]
    aspect = hf.vision_aspect_ratio
    if not isinstance(aspect, str) or not re.fullmatch(r"anyres_max_[1-9][0-9]{0,3}", aspect):
        problems.append(f"vision_aspect_ratio = {shown(aspect)}, supported: 'anyres_max_N'")
    numbers = {
        "text_config rope_theta": (rope.get("rope_theta"), bounds.ROPE_THETA),
        "text_config.rms_norm_eps": (text.rms_norm_eps, bounds.NORM_EPS),
        "vision_config.layer_norm_eps": (vision.layer_norm_eps, bounds.NORM_EPS),
    }
    problems += [
        f"{name} = {shown(have)}, a number from {low:g} to {high:g} is needed"
        for name, (have, (low, high)) in numbers.items()
        if not is_number(have, low, high)
    ]
    if problems:
        return problems
    head_dim = getattr(text, "head_dim", None)
    shape = (text.hidden_size, text.num_attention_heads, text.num_key_value_heads)
    side = vision.image_size
    tower = (vision.hidden_size, vision.num_attention_heads, side, vision.patch_size)
    return [
        *bounds.shape_problems(*shape, head_dim, "text_config."),
        *bounds.tower_problems(*tower, "vision_config."),
        *bounds.canvas_problems(hf.image_grid_pinpoints, side),
        *(
            f"{name}_token_index = {token}, but the vocabulary has {text.vocab_size} rows"
            for name, token in (("image", hf.image_token_id), ("video", hf.video_token_id))
            if token >= text.vocab_size
        ),
    ]


def _image_processor(path: epath.Path, side: int, pinpoints: list[list[int]]) -> dict[str, Any]:
    """The image processor's settings, checked against what `tiles.py` computes.

    transformers 5 nests them in processor_config.json; earlier releases write preprocessor_config.json.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = path / name
        raw = read_json(file) if file.exists() else {}
        if found := raw.get("image_processor", raw if "image_mean" in raw else None):
            break
    else:
        raise ValueError(
            f"{path}: no image processor in processor_config.json or preprocessor_config.json; how the model's pixels "
            "are normalised is not known"
        )
    if not isinstance(found, dict):
        raise ValueError(f"{file}: image_processor is not an object")
    wanted = {
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
        "image_grid_pinpoints": pinpoints,
    }
    problems = [
        f"{key} = {shown(found[key])}, supported: {shown(want)}"
        for key, want in wanted.items()
        if found.get(key, want) != want
    ]
    problems += bounds.colour_problems(found)
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    return found
