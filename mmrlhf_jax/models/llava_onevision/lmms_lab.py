"""Model directories of the original LLaVA code (lmms-lab on the hub; MM-RLHF's released code): their config.json and a
bare Qwen2 tokenizer are turned into the files a llava-hf directory has beside its weights. No torch, no jax.

The weights stay where they are; only names differ (names.py). Format: LlavaQwenForCausalLM's config in
https://github.com/LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from etils import epath
from transformers import AddedToken, PreTrainedTokenizerBase

from mmrlhf_jax.models.files import is_number, read_json, shown, size_problems
from mmrlhf_jax.models.llava_onevision import bounds, fresh
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.names import REWARD_HEAD, TOWER, canonical
from mmrlhf_jax.models.llava_onevision.tokenizer import load_tokenizer
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.safetensors_files import SafetensorsDirectory
from mmrlhf_jax.models.siglip.config import SiglipConfig

ARCHITECTURE = "LlavaQwenForCausalLM"
TOWER_NAME = "siglip-so400m-patch14-384"
MEDIA_TOKENS = ("<image>", "<video>")
SYSTEM = "You are a helpful assistant."
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# What decides the function of the model, and all of it this implementation serves. "absent" means what the original
# code then does is the same.
_ABSENT = "absent"
_SERVED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_spatial_pool_mode": ("bilinear",),  # frames, 27 x 27 -> 14 x 14
    "mm_newline_position": ("one_token", None, _ABSENT),  # one newline after a video
    "mm_vision_select_layer": (-2, _ABSENT),  # the tower comes without its last layer, whatever this says
    "mm_vision_select_feature": ("patch", _ABSENT),
    "mm_resampler_type": (None, _ABSENT),
    "mm_use_im_start_end": (False, _ABSENT),
    "mm_use_im_patch_token": (False, _ABSENT),
    "add_faster_video": (False, None, _ABSENT),
    "use_pos_skipping": (False, None, _ABSENT),
    "hidden_act": ("silu", _ABSENT),
    "use_sliding_window": (False, _ABSENT),
    "rope_scaling": (None, _ABSENT),
    "rope_parameters": (None, _ABSENT),  # newer than the original code
    "head_dim": (None, _ABSENT),
    "quantization_config": (None, _ABSENT),
}


def assets_directory(model: epath.PathLike) -> epath.Path:
    """The directory of a model's config, tokenizer, template and processor: itself in the llava-hf layout, a derived
    one for the original layout, with a reward.json where the model has the released reward head.

    The derived one depends on config.json, tokenizer and tensor shapes alone. It is a temporary directory of this
    process, since the model's own may be read-only, remote or shared by many hosts, and a cache would be one more
    thing to trust; whoever keeps a model (a run, an export) copies the files. Raises ValueError naming every setting
    that is not served.
    """
    directory = epath.Path(model)
    config = directory / "config.json"
    if not config.exists() or not is_original(raw := read_json(config)):
        return directory
    derived = Path(tempfile.mkdtemp(prefix="mmrlhf-assets-"))
    atexit.register(shutil.rmtree, derived, ignore_errors=True)
    derive_assets(directory, raw, derived)
    return epath.Path(derived)


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json is the original code's. model_type "llava" alone is not: LLaVA-1.5's files share it."""
    if raw.get("model_type") in ("llava_qwen", "llava_qwen2"):
        return True
    return raw.get("model_type") == "llava" and raw.get("architectures") == [ARCHITECTURE]


def derive_assets(directory: epath.Path, raw: dict[str, Any], output: Path) -> None:
    """Writes what a llava-hf directory has beside its weights."""
    tokenizer = _tokenizer(directory)
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in (*CONTROL_TOKENS, *MEDIA_TOKENS)}
    with SafetensorsDirectory(directory, canonical) as source:
        config = read_original(directory, raw, source, ids)
        dtype = source.dtype("image_newline") if "image_newline" in source.where else "float32"
        reward = _reward_settings(directory, raw, source)
    tokenizer.save_pretrained(output)
    (output / "chat_template.jinja").write_text(fresh.CHAT_TEMPLATE)
    documents = {
        "config.json": fresh.hf_config(config, dtype),
        "processor_config.json": fresh.processor_config(config),
        "generation_config.json": fresh.generation_config(ids),
        **({"reward.json": reward} if reward else {}),
    }
    for name, document in documents.items():
        (output / name).write_text(json.dumps(document, indent=2) + "\n")


def _reward_settings(directory: epath.Path, raw: dict[str, Any], source: SafetensorsDirectory) -> dict[str, Any] | None:
    """reward.json (critique_reward/config.py) of MM-RLHF's released reward model, None of a policy. The template is not
    in the directory, and the original code's system turn is part of what the model was trained on."""
    if f"{REWARD_HEAD}dense.weight" not in source.where:
        if raw.get("is_rm"):
            raise ValueError(f"{directory}: config.json says is_rm, but {REWARD_HEAD}dense.weight is not there")
        return None  # a stray tensor of another head is a surplus one, and named as such when weights are read
    return {"head": "tanh", "critique": True, "template": None, "system": SYSTEM}


def read_original(
    directory: epath.Path, raw: dict[str, Any], source: SafetensorsDirectory, ids: dict[str, int]
) -> LlavaOnevisionConfig:
    """The configuration of an original directory; `ids` are the media tokens' in its extended tokenizer."""
    file = directory / "config.json"
    aspect = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", str(raw.get("image_aspect_ratio")))
    problems = [
        f"{name} = {shown(raw.get(name, _ABSENT))}, supported: {' or '.join(map(repr, served))}"
        for name, served in _SERVED.items()
        if raw.get(name, _ABSENT) not in served
    ]
    if problems or aspect is None:
        if aspect is None:
            problems.append(f"image_aspect_ratio = {shown(raw.get('image_aspect_ratio'))}, supported: 'anyres_max_N'")
        raise ValueError(f"{file}: " + "; ".join(problems))
    tower = _tower(file, raw, source)
    decoder = _decoder(file, raw)
    if (needed := max(ids.values()) + 1) > decoder.vocab:
        media = " and ".join(f"{token} would be id {ids[token]}" for token in MEDIA_TOKENS)
        raise ValueError(f"{file}: vocab_size is {decoder.vocab}, but {media}: {needed} rows are needed")
    return LlavaOnevisionConfig(
        tower=tower,
        decoder=decoder,
        image_token=ids["<image>"],
        video_token=ids["<video>"],
        pinpoints=_pinpoints(file, raw.get("image_grid_pinpoints"), tower.image_size),
        max_tiles=int(aspect[1]),
    )


def _decoder(file: epath.Path, raw: dict[str, Any]) -> Qwen2Config:
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings",
    )  # fmt: skip
    if problems := size_problems({name: raw.get(name) for name in names}, bounds.DECODER):
        raise ValueError(f"{file}: " + "; ".join(problems))
    numbers = {"rope_theta": bounds.ROPE_THETA, "rms_norm_eps": bounds.NORM_EPS}
    problems = [
        f"{name} = {shown(raw.get(name))}, a number from {low:g} to {high:g} is needed"
        for name, (low, high) in numbers.items()
        if not is_number(raw.get(name), low, high)
    ]
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    shape = (raw["hidden_size"], raw["num_attention_heads"], raw["num_key_value_heads"])
    if problems := bounds.shape_problems(*shape, None, ""):
        raise ValueError(f"{file}: " + "; ".join(problems))
    return Qwen2Config(
        vocab=raw["vocab_size"],
        embed=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"],
        mlp=raw["intermediate_size"],
        rope_theta=float(raw["rope_theta"]),
        norm_eps=float(raw["rms_norm_eps"]),
        tied=raw.get("tie_word_embeddings", False) is True,
        max_positions=raw["max_position_embeddings"],
    )


def _tower(file: epath.Path, raw: dict[str, Any], source: SafetensorsDirectory) -> SiglipConfig:
    """The tower's shape: that of so400m/14-384 by its name, or as the tensors show it with the two numbers they do not
    show, `num_attention_heads` and `image_size`, in a `vision_config` of config.json (ours; the original code has one
    tower only)."""
    name, stated = str(raw.get("mm_vision_tower")), raw.get("vision_config")
    if "siglip" not in name.lower() or (stated is None and TOWER_NAME not in name):
        raise ValueError(f"{file}: mm_vision_tower = {shown(name)}, supported: {TOWER_NAME!r}")
    prefix = f"{TOWER}vision_model."
    patch, mlp = (f"{prefix}embeddings.patch_embedding.weight", f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if missing := [tensor for tensor in (patch, mlp) if tensor not in source.where]:
        raise ValueError(f"{file.parent}: the tower's tensors are not there ({', '.join(missing)})")
    layers = {found[1] for n in source.where if (found := re.match(rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.", n))}
    known = SiglipConfig()
    numbers = {"num_attention_heads": known.heads, "image_size": known.image_size} if stated is None else stated
    keys = ("num_attention_heads", "image_size")
    heads, side = (numbers.get(key) if isinstance(numbers, dict) else None for key in keys)
    if type(heads) is not int or type(side) is not int or heads < 1 or side < 1:
        raise ValueError(f"{file}: vision_config must state num_attention_heads and image_size")
    shape = source.shape(patch)
    if len(shape) != 4 or len(source.shape(mlp)) != 2:
        raise ValueError(f"{file.parent}: {patch} is {shape}, {mlp} {source.shape(mlp)}: no SigLIP tower")
    sizes = (shape[0], len(layers), heads, source.shape(mlp)[0], side, shape[-1])
    named = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), sizes))
    named |= {"image_size": side, "patch_size": shape[-1]}
    problems = size_problems(named, bounds.TOWER) or bounds.tower_problems(shape[0], heads, side, shape[-1], "")
    if problems:
        raise ValueError(f"{file.parent}: the tower that tensors and vision_config make: " + "; ".join(problems))
    tower = SiglipConfig(*sizes)
    if stated is None and tower != known:
        raise ValueError(f"{file.parent}: the tensors are not those of {name}: they make {tower}")
    return tower


def _pinpoints(file: epath.Path, given: Any, side: int) -> tuple[tuple[int, int], ...]:
    """(height, width) canvases. The original's are (width, height): a list in pixels, or "(1x1),...,(6x6)": all from
    the first to the last, in tiles.

    Where all heights come with all widths the order cannot matter, since no two canvases serve a picture equally well
    without a smaller one that does; it is then llava-hf's.
    """
    if isinstance(given, str) and (ends := re.findall(r"\((\d{1,2})x(\d{1,2})\)", given)):
        (w0, h0), (w1, h1) = ([int(n) for n in end] for end in (ends[0], ends[-1]))
        given = [[side * w, side * h] for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    if problems := bounds.canvas_problems(given, side):
        raise ValueError(f"{file}: {'; '.join(problems)}; supported: '(1x1),...,(6x6)' or a list of [width, height]")
    canvases = [(h, w) for w, h in given]
    heights, widths = {h for h, _ in canvases}, {w for _, w in canvases}
    return tuple(sorted(canvases) if len(set(canvases)) == len(heights) * len(widths) else canvases)


def _tokenizer(directory: epath.Path) -> PreTrainedTokenizerBase:
    """The directory's tokenizer with the two media tokens, at the next free ids where it lacks them."""
    tokenizer = load_tokenizer(directory)
    have = tokenizer.get_vocab()
    if missing := [token for token in CONTROL_TOKENS if token not in have]:
        raise ValueError(f"{directory}: the tokenizer has no {', '.join(missing)}; it is not Qwen2's")
    media: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in MEDIA_TOKENS]
    tokenizer.add_tokens(media, special_tokens=True)
    tokenizer.chat_template = fresh.CHAT_TEMPLATE  # Qwen2's own, if it brings one, knows no pictures
    return tokenizer
