"""Reward models of random weights in every layout they come in, small enough for a CPU test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from original_layout import write_original
from safetensors.numpy import load_file, save_file
from tiny import TINY, random_params, write_tiny_directory

from mmrlhf_jax.models.critique_reward.config import RewardSettings, read_template
from mmrlhf_jax.models.critique_reward.model import LinearHead, TanhHead, with_head
from mmrlhf_jax.models.critique_reward.weights import KEYS
from mmrlhf_jax.models.families import reward_config
from mmrlhf_jax.models.llava_onevision.weights import save_directory


def random_head(kind: str, seed: int = 1, outputs: int = 1) -> LinearHead | TanhHead:
    """Of weights large enough that answers differ."""
    rng, d = np.random.default_rng(seed), TINY.decoder.embed

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 2 / np.sqrt(d), shape).astype(np.float32)

    out, bias = draw(d, outputs), draw(outputs)
    return LinearHead(out, bias) if kind == "linear" else TanhHead(draw(d, d), draw(d), out, bias)


def write_reward_model(path: Path, settings: RewardSettings | None = None, seed: int = 0) -> Path:
    """TINY under a head as `path`, a directory as ours are exported; a linear critique model by default."""
    settings = settings or RewardSettings("linear", True, read_template(""))
    assets = path.with_name(f"{path.name}-assets")
    write_tiny_directory(assets)
    settings.write(assets)
    outputs = reward_config(TINY, settings.head, settings.attributes, settings.quantiles).outputs
    head = random_head(settings.head, outputs=outputs)
    save_directory(with_head(random_params(seed=seed), head), assets, path, keys=KEYS)
    return path


def write_released(path: Path) -> Path:
    """TINY under the released head as MM-RLHF's code writes it: lmms-lab's names, rm_head.*, is_rm, no template."""
    ours = write_reward_model(path.with_name(f"{path.name}-twin"), RewardSettings("tanh", True, read_template("")))
    tensors = load_file(ours / "model.safetensors")
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("rm_head.")}
    save_file({name: tensor for name, tensor in tensors.items() if name not in head}, ours / "model.safetensors")
    write_original(ours, path)
    save_file(tensors, ours / "model.safetensors")
    save_file({**load_file(path / "model.safetensors"), **head}, path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "is_rm": True}))
    return path
