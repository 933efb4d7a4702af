"""LLaVA-OneVision (arXiv 2408.03326) over groups: tower once a picture, prompt once a group, log-probs of every
response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmrlhf_jax.batch import GroupBatch
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.qwen2 import model as qwen2
from mmrlhf_jax.models.siglip import model as siglip
from mmrlhf_jax.nn.attention import Backend, GroupRule
from mmrlhf_jax.nn.lora import project
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.nn.remat import RematRung
from mmrlhf_jax.nn.sharding import BATCH_AXES, constrain
from mmrlhf_jax.nn.token_logps import TokenLogps, log_collisions, summed_distribution, token_logps


@struct.dataclass
class Projector:
    """Two linear layers with an exact GELU between them: tower features -> decoder embeddings."""

    in_kernel: Any  # [D_tower, D]
    in_bias: Any
    out_kernel: Any  # [D, D]
    out_bias: Any


@struct.dataclass
class LlavaOnevision:
    tower: siglip.Siglip
    projector: Projector
    newline: Any  # [D], stands at the end of every row of an any-res grid
    decoder: qwen2.Qwen2


@dataclass(frozen=True)
class Compute:
    """How the forward runs, not what it computes. Static under jit."""

    dtype: str = "float32"
    """dtype of activations and matrix products: bfloat16 on accelerators"""
    platform: str = "cpu"
    attention: Backend = "auto"
    remat: RematRung = "full"
    vocab_chunk: int = 8192
    vocab_shards: int = 1
    """devices that split the vocabulary axis: the mesh's `tensor`"""


def declare(config: LlavaOnevisionConfig) -> LlavaOnevision:
    """All parameters, as `Param` declarations."""
    t, d = config.tower.embed, config.decoder.embed
    return LlavaOnevision(
        tower=siglip.declare(config.tower),
        projector=Projector(
            in_kernel=Param((t, d), (None, "embed"), fan_in=t),
            in_bias=Param((d,), ("embed",), "zeros"),
            out_kernel=Param((d, d), ("embed", None), fan_in=d),
            out_bias=Param((d,), ("embed",), "zeros"),
        ),
        newline=Param((d,), ("embed",), fan_in=d),
        decoder=qwen2.declare(config.decoder),
    )


def picture_features(
    params: LlavaOnevision,
    config: LlavaOnevisionConfig,
    tiles: jax.Array,
    compute: Compute,
    features: jax.Array | None = None,
) -> jax.Array:
    """tiles u8 [N, I, H, W, 3] -> [N, I * tokens_per_tile + 1, D]: every patch of every tile, then the newline.
    `features`: those of `tower_features`, where another model with the same tower has seen these tiles."""
    if tiles.shape[1] == 0:
        return _newline(params, len(tiles), jnp.dtype(compute.dtype))
    if features is None:
        features = tower_features(params, config, tiles, compute)
    return project_features(params, features)


def tower_features(
    params: LlavaOnevision, config: LlavaOnevisionConfig, tiles: jax.Array, compute: Compute
) -> jax.Array:
    """tiles u8 [N, I, H, W, 3] -> [N, I, tokens_per_tile, D_tower]."""
    n, i = tiles.shape[:2]
    pixels = tiles.reshape(n * i, *tiles.shape[2:]).astype(jnp.float32) / 255
    pixels = (pixels - jnp.asarray(config.pixel_mean)) / jnp.asarray(config.pixel_std)
    x = siglip.encode(params.tower, config.tower, pixels.astype(jnp.dtype(compute.dtype)), rung=compute.remat)
    return x.reshape(n, i, *x.shape[1:])


def project_features(params: LlavaOnevision, features: jax.Array) -> jax.Array:
    """The tower's features [N, I, T, D_tower] as decoder inputs [N, I * T + 1, D], the newline last."""
    n, i, t, _ = features.shape
    x = features.reshape(n * i, t, -1)
    with jax.named_scope("projector"):
        w = jax.tree.map(lambda p: p.astype(x.dtype), params.projector)
        x = jax.nn.gelu(project("ite,ed->itd", x, w.in_kernel) + w.in_bias, approximate=False)
        x = project("itd,de->ite", x, w.out_kernel) + w.out_bias
    x = constrain(x.reshape(n, i * t, -1), BATCH_AXES, None, None)
    return jnp.concatenate([x, _newline(params, n, x.dtype)], axis=1)


def _newline(params: LlavaOnevision, rows: int, dtype: Any) -> jax.Array:
    return jnp.broadcast_to(params.newline.astype(dtype), (rows, 1, params.newline.shape[-1]))


def embed(
    params: LlavaOnevision,
    config: LlavaOnevisionConfig,
    batch: GroupBatch,
    compute: Compute,
    features: jax.Array | None = None,
) -> jax.Array:
    """Decoder inputs [N, P+S, D]: token embeddings, with picture features where a prompt slot has taps."""
    dtype = jnp.dtype(compute.dtype)
    x = qwen2.embed(params.decoder, batch.token, dtype)
    return with_pictures(x, picture_features(params, config, batch.tiles, compute, features), batch)


def with_pictures(x: jax.Array, rows: jax.Array, batch: GroupBatch) -> jax.Array:
    """Token embeddings x [N, P+S, D] with `rows`, as `picture_features` gives them, mixed in where there are taps."""
    p = batch.tap_index.shape[1]

    def tap(t: int) -> jax.Array:  # one at a time: four copies of the prompt would be the step's largest temporary
        picked = jnp.take_along_axis(rows, batch.tap_index[:, :, t, None], axis=1)
        return picked.astype(jnp.float32) * batch.tap_weight[:, :, t, None]

    picture = (tap(0) + tap(1) + tap(2) + tap(3)).astype(x.dtype)
    is_picture = jnp.any(batch.tap_weight != 0, axis=-1, keepdims=True)
    prompt = jnp.where(is_picture, picture, x[:, :p])
    return constrain(jnp.concatenate([prompt, x[:, p:]], axis=1), BATCH_AXES, None, None)


def hidden_states(
    params: LlavaOnevision,
    config: LlavaOnevisionConfig,
    batch: GroupBatch,
    compute: Compute,
    features: jax.Array | None = None,
) -> jax.Array:
    """Final normalised hidden states [N, P+S, D]; `features` as in `picture_features`."""
    x = embed(params, config, batch, compute, features)
    rule = GroupRule(batch.position, batch.branch, batch.prompt_length, prompt=batch.tap_index.shape[1])
    return qwen2.decode(
        params.decoder,
        config.decoder,
        x,
        rule,
        backend=compute.attention,
        platform=compute.platform,
        rung=compute.remat,
    )


def prefill(
    params: LlavaOnevision, config: LlavaOnevisionConfig, batch: GroupBatch, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, N, G, P+S, H] of every token of prompts and branches: what decoding goes on from."""
    x = embed(params, config, batch, compute)
    rule = GroupRule(batch.position, batch.branch, batch.prompt_length, prompt=batch.tap_index.shape[1])
    return qwen2.prefill(params.decoder, config.decoder, x, rule, backend=compute.attention, platform=compute.platform)


def response_logps(
    params: LlavaOnevision,
    config: LlavaOnevisionConfig,
    batch: GroupBatch,
    compute: Compute,
    features: jax.Array | None = None,
) -> TokenLogps:
    """Log-probability f32 [N, S] of every response token given prompt and its own branch; padding holds garbage.
    `features` as in `picture_features`."""
    return logps_of(params, hidden_states(params, config, batch, compute, features), batch, compute)


def logps_of(params: LlavaOnevision, hidden: jax.Array, batch: GroupBatch, compute: Compute) -> TokenLogps:
    """`response_logps` from hidden states [N, P+S, D]. Only response positions reach the unembedding: `predictor`
    gathers their hidden states first."""
    p = batch.tap_index.shape[1]
    picked = jnp.take_along_axis(hidden, batch.predictor[:, :, None], axis=1)
    with jax.named_scope("token_logps"):
        return token_logps(
            picked,
            qwen2.unembedding(params.decoder, picked.dtype),
            batch.token[:, p:],
            chunk=compute.vocab_chunk,
            shards=compute.vocab_shards,
        )


def collisions_of(params: LlavaOnevision, hidden: jax.Array, batch: GroupBatch, compute: Compute) -> jax.Array:
    """log sum_v p(v)^2 f32 [N, S] of the distribution each response token was predicted from, without gradient."""
    picked = jnp.take_along_axis(hidden, batch.predictor[:, :, None], axis=1)
    with jax.named_scope("log_collisions"):
        return log_collisions(
            picked,
            qwen2.unembedding(params.decoder, picked.dtype),
            chunk=compute.vocab_chunk,
            shards=compute.vocab_shards,
        )


def summed_distribution_of(params: LlavaOnevision, hidden: jax.Array, batch: GroupBatch, compute: Compute) -> jax.Array:
    """sum of loss_weight * distribution f32 [V] over all response tokens of a batch, with gradient."""
    picked = jnp.take_along_axis(hidden, batch.predictor[:, :, None], axis=1)
    with jax.named_scope("summed_distribution"):
        return summed_distribution(
            picked,
            qwen2.unembedding(params.decoder, picked.dtype),
            batch.loss_weight,
            chunk=compute.vocab_chunk,
            shards=compute.vocab_shards,
        )


def branch_sums(values: jax.Array, batch: GroupBatch) -> jax.Array:
    """Sums of values f32 [N, S] over each response: [B, K]. Rows of separate branches fold back into their group."""
    p, (groups, k) = batch.tap_index.shape[1], batch.response_mask.shape
    mine = batch.branch[:, None, p:] == jnp.arange(batch.branch_end.shape[1])[None, :, None]
    return jnp.sum(jnp.where(mine, values[:, None, :], 0.0), axis=-1).reshape(groups, k)
