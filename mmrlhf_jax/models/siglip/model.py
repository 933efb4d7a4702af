"""SigLIP's vision transformer (arXiv 2303.15343) up to its last block: patch features, no pooling.

LLaVA-OneVision reads the output of the last block before the post-norm; that norm is carried only so that a checkpoint
leaves as complete as it came.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmrlhf_jax.models.siglip.config import SiglipConfig
from mmrlhf_jax.nn.layers import layer_norm
from mmrlhf_jax.nn.params import Param, stack
from mmrlhf_jax.nn.remat import RematRung, remat, tag
from mmrlhf_jax.nn.sharding import BATCH_AXES, constrain


@struct.dataclass
class Block:
    """One transformer block; every leaf gains a leading layers axis when stacked."""

    attention_norm_scale: Any
    attention_norm_bias: Any
    query_kernel: Any  # [D, N, H]
    query_bias: Any
    key_kernel: Any
    key_bias: Any
    value_kernel: Any
    value_bias: Any
    out_kernel: Any  # [N, H, D]
    out_bias: Any
    mlp_norm_scale: Any
    mlp_norm_bias: Any
    up_kernel: Any  # [D, F]
    up_bias: Any
    down_kernel: Any  # [F, D]
    down_bias: Any


@struct.dataclass
class Siglip:
    patch_kernel: Any  # [patch, patch, 3, D]
    patch_bias: Any
    position: Any  # [grid * grid, D]
    blocks: Block
    post_norm_scale: Any
    post_norm_bias: Any


def declare(config: SiglipConfig) -> Siglip:
    """The tower's parameters, as `Param` declarations."""
    d, n, h, f = config.embed, config.heads, config.head_dim, config.mlp
    vector, heads = ("tower_embed",), ("tower_heads", "head_dim")
    into = Param((d, n, h), ("tower_embed", *heads), fan_in=d)
    block = Block(
        attention_norm_scale=Param((d,), vector, "ones"),
        attention_norm_bias=Param((d,), vector, "zeros"),
        query_kernel=into,
        query_bias=Param((n, h), heads, "zeros"),
        key_kernel=into,
        key_bias=Param((n, h), heads, "zeros"),
        value_kernel=into,
        value_bias=Param((n, h), heads, "zeros"),
        out_kernel=Param((n, h, d), (*heads, "tower_embed"), fan_in=n * h),
        out_bias=Param((d,), vector, "zeros"),
        mlp_norm_scale=Param((d,), vector, "ones"),
        mlp_norm_bias=Param((d,), vector, "zeros"),
        up_kernel=Param((d, f), ("tower_embed", "tower_mlp"), fan_in=d),
        up_bias=Param((f,), ("tower_mlp",), "zeros"),
        down_kernel=Param((f, d), ("tower_mlp", "tower_embed"), fan_in=f),
        down_bias=Param((d,), vector, "zeros"),
    )
    patch = config.patch_size
    return Siglip(
        patch_kernel=Param((patch, patch, 3, d), (None, None, None, "tower_embed"), fan_in=patch * patch * 3),
        patch_bias=Param((d,), vector, "zeros"),
        position=Param((config.grid**2, d), (None, "tower_embed"), fan_in=d),
        blocks=stack(block, config.layers),
        post_norm_scale=Param((d,), vector, "ones"),
        post_norm_bias=Param((d,), vector, "zeros"),
    )


def encode(params: Siglip, config: SiglipConfig, pixels: jax.Array, *, rung: RematRung = "full") -> jax.Array:
    """pixels [I, S, S, 3], normalised, in the compute dtype -> patch features [I, grid^2, D] in the same dtype."""
    with jax.named_scope("siglip"):
        x = _patches(params, config, pixels)

        block = remat(lambda block, x: _block(block, config, x), rung)
        return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params.blocks)[0]


def _patches(params: Siglip, config: SiglipConfig, pixels: jax.Array) -> jax.Array:
    side, patch = config.grid, config.patch_size
    seen = pixels[:, : side * patch, : side * patch]
    cut = seen.reshape(-1, side, patch, side, patch, 3)
    x = jnp.einsum("iyaxbc,abcd->iyxd", cut, params.patch_kernel.astype(pixels.dtype))
    offset = params.patch_bias.astype(jnp.float32) + params.position.astype(jnp.float32)
    x = x.reshape(-1, side * side, config.embed) + offset.astype(pixels.dtype)
    return constrain(x, BATCH_AXES, None, None)


def _block(block: Block, config: SiglipConfig, x: jax.Array) -> jax.Array:
    w = jax.tree.map(lambda p: p.astype(x.dtype), block)
    y = layer_norm(x, block.attention_norm_scale, block.attention_norm_bias, config.norm_eps)
    q = tag(jnp.einsum("itd,dnh->itnh", y, w.query_kernel) + w.query_bias, "query")
    k = tag(jnp.einsum("itd,dnh->itnh", y, w.key_kernel) + w.key_bias, "key")
    v = tag(jnp.einsum("itd,dnh->itnh", y, w.value_kernel) + w.value_bias, "value")
    scores = jnp.einsum("itnh,isnh->ints", q * config.head_dim**-0.5, k, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    attended = tag(jnp.einsum("ints,isnh->itnh", weight, v), "attention_out")
    x = x + jnp.einsum("itnh,nhd->itd", attended, w.out_kernel) + w.out_bias
    y = layer_norm(x, block.mlp_norm_scale, block.mlp_norm_bias, config.norm_eps)
    hidden = tag(jnp.einsum("itd,df->itf", y, w.up_kernel) + w.up_bias, "mlp_hidden")
    x = x + jnp.einsum("itf,fd->itd", jax.nn.gelu(hidden, approximate=True), w.down_kernel) + w.down_bias
    return constrain(x, BATCH_AXES, None, None)
