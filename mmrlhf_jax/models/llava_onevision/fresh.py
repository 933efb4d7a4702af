"""Everything of a LLaVA-OneVision directory but the weights, made from a configuration: for tests, for the quickstart
and for models that start from nothing. The formats are transformers' (config, processor, generation) and tokenizers'.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
DEFAULT_VOCAB = 1024
ROW_MULTIPLE = 64  # embedding tables split evenly over devices; rows without a token are usual (Qwen2 has hundreds)

# ChatML as LLaVA-OneVision was trained on it: media first, each on its own line, then the text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- for kind in ('image', 'video') -%}
        {%- for part in message.content if part.type == kind -%}
            {{- '<' + kind + '>\\n' -}}
        {%- endfor -%}
    {%- endfor -%}
    {%- for part in message.content if part.type == 'text' -%}
        {{- part.text -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_fresh_files(
    directory: str, config: LlavaOnevisionConfig, *, texts: Iterable[str] = (), vocab: int | None = None
) -> LlavaOnevisionConfig:
    """Writes config, tokenizer, chat template, processor and generation config of a new model into `directory`.

    The tokenizer is a byte-level BPE: the 256 bytes and five special tokens, and merges learned from `texts` until it
    has `vocab` tokens (default 1,024, or as many as the texts allow). Returns `config` with the vocabulary's size,
    rounded up to a multiple of 64 rows, and the media tokens filled in; that is the configuration the directory holds.
    Raises ValueError for a vocab that cannot hold the bytes and the special tokens.
    """
    tokenizer = _tokenizer(list(texts), vocab)
    rows = math.ceil(tokenizer.get_vocab_size() / ROW_MULTIPLE) * ROW_MULTIPLE
    ids = tokenizer.get_vocab()
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, vocab=rows),
        image_token=ids["<image>"],
        video_token=ids["<video>"],
    )
    path = epath.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    documents = {
        "config.json": hf_config(config),
        "tokenizer_config.json": _tokenizer_config(config),
        "processor_config.json": processor_config(config),
        "generation_config.json": generation_config(ids),
    }
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document, indent=2) + "\n")
    return config


def hf_config(config: LlavaOnevisionConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model: read by `read_config` and by transformers' LlavaOnevisionForConditionalGeneration.

    `dtype` names the type its weights are stored in.
    """
    tower, decoder = config.tower, config.decoder
    vision = transformers.SiglipVisionConfig(
        hidden_size=tower.embed,
        intermediate_size=tower.mlp,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        layer_norm_eps=tower.norm_eps,
        vision_use_head=False,
    )
    text = transformers.Qwen2Config(
        vocab_size=decoder.vocab,
        hidden_size=decoder.embed,
        intermediate_size=decoder.mlp,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        max_position_embeddings=decoder.max_positions,
        rms_norm_eps=decoder.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
        tie_word_embeddings=decoder.tied,
    )
    whole = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=config.image_token,
        video_token_index=config.video_token,
        image_grid_pinpoints=[list(canvas) for canvas in config.pinpoints],
        vision_aspect_ratio=f"anyres_max_{config.max_tiles}",
        tie_word_embeddings=decoder.tied,
        architectures=["LlavaOnevisionForConditionalGeneration"],
        dtype=dtype,
    )
    document = json.loads(whole.to_json_string())
    document["text_config"] |= {
        "head_dim": decoder.head_dim,  # transformers' Qwen2 honours it without declaring it
        "rope_theta": decoder.rope_theta,  # where readers older than transformers 5 look
    }
    return document


def processor_config(config: LlavaOnevisionConfig) -> dict[str, Any]:
    """The processor_config.json of a model, as transformers 5's LlavaOnevisionProcessor saves it."""
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": config.tower.image_size, "width": config.tower.image_size},
    }
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_pad": True,
        "image_grid_pinpoints": [list(canvas) for canvas in config.pinpoints],
    }
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": False}
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": shared | image,
        "video_processor": shared | video,
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": config.tokens_per_tile,
        "vision_aspect_ratio": f"anyres_max_{config.max_tiles}",
        "vision_feature_select_strategy": "full",
    }


def _tokenizer(texts: list[str], vocab: int | None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab is not None and vocab < least:
        raise ValueError(f"vocab is {vocab}; bytes and special tokens alone are {least}")
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        size = (vocab or DEFAULT_VOCAB) - len(SPECIAL_TOKENS)
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _tokenizer_config(config: LlavaOnevisionConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaOnevisionProcessor",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": config.decoder.max_positions,
        "clean_up_tokenization_spaces": False,
    }


def generation_config(ids: Mapping[str, int]) -> dict[str, Any]:
    """The generation_config.json of a model whose tokenizer has these token ids: where an answer ends."""
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    return {"eos_token_id": [end, pad], "pad_token_id": pad, "transformers_version": transformers.__version__}
