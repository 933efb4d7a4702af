"""LLaVA-OneVision checkpoints in and out: read in the layouts of llava-hf (the table's) and lmms-lab, written in
llava-hf's."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mmrlhf_jax import storage
from mmrlhf_jax.models import key_table
from mmrlhf_jax.models.files import check_file, check_model_name, shown
from mmrlhf_jax.models.key_table import Key, export_tensors, load, prefixed
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.fresh import write_fresh_files
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.names import canonical
from mmrlhf_jax.models.qwen2.weights import KEYS as QWEN2_KEYS
from mmrlhf_jax.models.safetensors_files import DTYPES, INDEX, SafetensorsDirectory, write_safetensors
from mmrlhf_jax.models.siglip.weights import KEYS as SIGLIP_KEYS
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

Tree = TypeVar("Tree")

KEYS = [
    *prefixed(SIGLIP_KEYS, ours="tower.", theirs="vision_tower.vision_model."),
    Key("projector.in_kernel", "multi_modal_projector.linear_1.weight", "e d -> d e"),
    Key("projector.in_bias", "multi_modal_projector.linear_1.bias"),
    Key("projector.out_kernel", "multi_modal_projector.linear_2.weight", "e d -> d e"),
    Key("projector.out_bias", "multi_modal_projector.linear_2.bias"),
    Key("newline", "image_newline"),
    *prefixed(QWEN2_KEYS, ours="decoder.", theirs="language_model."),
]

EMBEDDING, UNEMBEDDING = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
RECORD = "mmrlhf_jax_export.json"
ASSET_BYTES = 64 * 2**20  # of one file beside the weights
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")

# what makes a directory usable beside its weights; copied from the model a run started from
ASSETS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "reward.json",  # of a reward model: critique_reward/config.py
)  # fmt: skip


def resolve(model: str) -> epath.Path:
    """A directory, local or remote (gs://), or the local copy of a hub id, which is downloaded only because the user
    named it."""
    if "://" in check_model_name(model) or os.path.isdir(model):
        return epath.Path(model)
    if not _HUB_ID.fullmatch(model) or "--" in model or ".." in model:
        raise FileNotFoundError(f"{shown(model)}: no such directory (and not a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return epath.Path(snapshot_download(model, allow_patterns=["*.safetensors", INDEX, *ASSETS]))
    except Exception as error:  # the client's own errors, and those of three network libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{model}: no such directory, and no hub id that can be fetched ({reason})") from error


def stored_dtypes(directory: epath.PathLike, declared: Any, keys: Sequence[Key] = KEYS) -> dict[str, str]:
    """The dtype each parameter has in a model directory, by name."""
    return key_table.stored_dtypes(SafetensorsDirectory(directory, canonical), declared, keys)


def load_params(
    directory: epath.PathLike,
    declared: Tree,
    config: LlavaOnevisionConfig,
    mesh: Mesh,
    rules: ShardingRules,
    keys: Sequence[Key] = KEYS,
) -> Tree:
    """Weights of a directory, in any spelling, straight into their shards. Raises ValueError listing all that does not
    fit. A model with more than the policy's tensors brings its own declaration and `keys`."""
    tied = config.decoder.tied
    with SafetensorsDirectory(directory, canonical) as source:
        twice = tied and UNEMBEDDING in source.where and EMBEDDING in source.where
        if twice and not np.array_equal(source.read(EMBEDDING), source.read(UNEMBEDDING)):
            raise ValueError(
                f"{directory}: config.json ties the embeddings, yet {UNEMBEDDING} differs from {EMBEDDING}"
            )
        return load(source, declared, keys, mesh, rules, ignored=lambda name: tied and name == UNEMBEDDING)


def save_directory(
    params: Any,
    assets: epath.PathLike,
    output: epath.PathLike,
    dtype: str = "float32",
    *,
    record: Mapping[str, Any] | None = None,
    keys: Sequence[Key] = KEYS,
) -> None:
    """A complete Hugging Face directory: weights in the hub's spelling beside the assets of the model they came from.

    `record` says what it was made from, in a file of its own. A local `output` appears only when whole; a remote one is
    written locally, then uploaded with config.json, without which it is no model, and the record last. Raises
    FileExistsError when it is already there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {sorted(DTYPES)}")
    output = epath.Path(output)
    if output.exists():
        unfinished = "" if (output / "config.json").exists() else " (without config.json: an upload that was cut off?)"
        raise FileExistsError(f"{output} exists already{unfinished}; name another --output or remove it")
    with storage.new_directory(output, last=("config.json", RECORD)) as partial:
        _write_whole(params, assets, partial, dtype, record, keys)


def _write_whole(
    params: Any,
    assets: epath.PathLike,
    output: Path,
    dtype: str,
    record: Mapping[str, Any] | None,
    keys: Sequence[Key],
) -> None:
    copy_assets(assets, output)
    raw: dict[str, Any] = json.loads((output / "config.json").read_text())
    raw.pop("torch_dtype", None)
    raw["dtype"] = dtype
    (output / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    write_safetensors(export_tensors(params, keys, dtype), output)
    if record is not None:
        (output / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")


def copy_assets(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies tokenizer, templates, processor and configs; raises FileNotFoundError when there is no config.json."""
    source, target = epath.Path(source), epath.Path(target)
    if not (source / "config.json").exists():
        raise FileNotFoundError(f"{source}: no config.json there; this is not a Hugging Face model directory")
    target.mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        if (source / name).exists():
            check_file(source / name, ASSET_BYTES)
            (source / name).copy(target / name, overwrite=True)


def new_directory(
    output: str | Path,
    config: LlavaOnevisionConfig,
    *,
    texts: Iterable[str] = (),
    vocab: int | None = None,
    seed: int = 0,
) -> LlavaOnevisionConfig:
    """A model made from nothing: random weights, a byte-level tokenizer trained on `texts`, all files transformers
    wants.

    Returns the configuration as written, with the tokenizer's vocabulary. Raises FileExistsError like `save_directory`.
    """
    with tempfile.TemporaryDirectory() as assets:
        config = write_fresh_files(assets, config, texts=texts, vocab=vocab)
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        params = nn_params.initialise(declare(config), seed, mesh, ShardingRules())
        save_directory(params, assets, output, "float32")
    return config
