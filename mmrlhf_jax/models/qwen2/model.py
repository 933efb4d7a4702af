"""The Qwen2 decoder (arXiv 2407.10671) over a group: grouped-query attention with q/k/v biases, SwiGLU, RMSNorm,
RoPE."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import struct

from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.nn.attention import Backend, GroupRule, group_attention
from mmrlhf_jax.nn.branch_attention import BranchCache, BranchRule, branch_attention
from mmrlhf_jax.nn.layers import rms_norm, rotate
from mmrlhf_jax.nn.lora import project
from mmrlhf_jax.nn.params import Param, stack
from mmrlhf_jax.nn.remat import RematRung, remat, tag
from mmrlhf_jax.nn.sharding import BATCH_AXES, constrain


@struct.dataclass
class Layer:
    """One decoder layer; every leaf gains a leading layers axis when stacked."""

    attention_norm: Any
    query_kernel: Any  # [D, N, H]
    query_bias: Any
    key_kernel: Any  # [D, G, H]
    key_bias: Any
    value_kernel: Any
    value_bias: Any
    out_kernel: Any  # [N, H, D]
    mlp_norm: Any
    gate_kernel: Any  # [D, F]
    up_kernel: Any
    down_kernel: Any  # [F, D]


@struct.dataclass
class Qwen2:
    embedding: Any  # [V, D]
    layers: Layer
    norm: Any
    unembedding: Any  # [V, D]; None when tied to the embedding


def declare(config: Qwen2Config) -> Qwen2:
    """The decoder's parameters, as `Param` declarations."""
    d, n, g, h, f = config.embed, config.heads, config.kv_heads, config.head_dim, config.mlp
    key = Param((d, g, h), ("embed", "kv_heads", "head_dim"), fan_in=d)
    layer = Layer(
        attention_norm=Param((d,), ("embed",), "ones"),
        query_kernel=Param((d, n, h), ("embed", "heads", "head_dim"), fan_in=d),
        query_bias=Param((n, h), ("heads", "head_dim"), "zeros"),
        key_kernel=key,
        key_bias=Param((g, h), ("kv_heads", "head_dim"), "zeros"),
        value_kernel=key,
        value_bias=Param((g, h), ("kv_heads", "head_dim"), "zeros"),
        out_kernel=Param((n, h, d), ("heads", "head_dim", "embed"), fan_in=n * h),
        mlp_norm=Param((d,), ("embed",), "ones"),
        gate_kernel=Param((d, f), ("embed", "mlp"), fan_in=d),
        up_kernel=Param((d, f), ("embed", "mlp"), fan_in=d),
        down_kernel=Param((f, d), ("mlp", "embed"), fan_in=f),
    )
    table = Param((config.vocab, d), ("vocab", "embed"), fan_in=d)
    return Qwen2(
        embedding=table,
        layers=stack(layer, config.layers),
        norm=Param((d,), ("embed",), "ones"),
        unembedding=None if config.tied else table,
    )


def embed(params: Qwen2, token: jax.Array, dtype: Any) -> jax.Array:
    """token i32 [B, T] -> [B, T, D]."""
    return constrain(params.embedding[token].astype(dtype), BATCH_AXES, None, None)


def unembedding(params: Qwen2, dtype: Any) -> jax.Array:
    """[V, D]: the table logits are read from."""
    table = params.embedding if params.unembedding is None else params.unembedding
    return table.astype(dtype)


def decode(
    params: Qwen2,
    config: Qwen2Config,
    x: jax.Array,
    rule: GroupRule,
    *,
    backend: Backend = "auto",
    platform: str = "cpu",
    rung: RematRung = "full",
) -> jax.Array:
    """Embeddings x [B, P+S, D] of a group -> final hidden states [B, P+S, D], normalised, in x's dtype."""
    attend = partial(group_attention, backend=backend, platform=platform)
    with jax.named_scope("qwen2"):
        return rms_norm(run_layers(params, config, x, rule, attend, rung=rung), params.norm, config.norm_eps)


def run_layers(
    params: Qwen2, config: Qwen2Config, x: jax.Array, rule: GroupRule, attend: Callable[..., jax.Array], *,
    rung: RematRung,
) -> jax.Array:  # fmt: skip
    """x [B, T, D] through every layer, `attend(q, k, v, rule=rule)` being what its attention does."""

    def forward(layer: Layer, x: jax.Array, rule: GroupRule) -> jax.Array:
        return _layer(layer, config, x, rule.position, partial(attend, rule=rule))[0]

    layer = remat(forward, rung)
    return jax.lax.scan(lambda x, weights: (layer(weights, x, rule), None), x, params.layers)[0]


def prefill(
    params: Qwen2, config: Qwen2Config, x: jax.Array, rule: GroupRule, *, backend: Backend, platform: str
) -> tuple[jax.Array, jax.Array]:
    """Embeddings x [B, P+S, D] of a group -> the keys and the values of every layer, [L, B, G, P+S, H] each."""
    attend = partial(group_attention, rule=rule, backend=backend, platform=platform)

    def forward(x: jax.Array, layer: Layer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x, k, v = _layer(layer, config, x, rule.position, attend)
        return x, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    with jax.named_scope("qwen2_prefill"):
        return jax.lax.scan(forward, x, params.layers)[1]


def step(
    params: Qwen2, config: Qwen2Config, x: jax.Array, cache: BranchCache, rule: BranchRule
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token of each of W branches, x [B, W, D], against `cache`, whose leaves have a leading layers axis.

    Returns final hidden states [B, W, D], normalised, and the tokens' keys and values of every layer,
    [L, B, G, W, H] each, for the caller to write: inside the loop over layers the cache is only read.
    """

    def forward(x: jax.Array, part: tuple[Layer, BranchCache]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer, mine = part
        x, k, v = _layer(layer, config, x, rule.position, partial(branch_attention, cache=mine, rule=rule))
        return x, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    with jax.named_scope("qwen2_step"):
        x, (k, v) = jax.lax.scan(forward, x, (params.layers, cache))
        return rms_norm(x, params.norm, config.norm_eps), k, v


def _layer(
    layer: Layer, config: Qwen2Config, x: jax.Array, position: jax.Array, attend: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, D] -> x, and the keys and values [B, T, G, H] of its tokens. `attend(q, k, v)` says who sees what."""
    w = jax.tree.map(lambda p: p.astype(x.dtype), layer)
    with jax.named_scope("attention"):
        y = rms_norm(x, layer.attention_norm, config.norm_eps)
        q = project("btd,dnh->btnh", y, w.query_kernel) + w.query_bias
        k = project("btd,dgh->btgh", y, w.key_kernel) + w.key_bias
        v = tag(project("btd,dgh->btgh", y, w.value_kernel) + w.value_bias, "value")
        q = tag(rotate(q, position, config.rope_theta), "query")
        k = tag(rotate(k, position, config.rope_theta), "key")
        q = constrain(q, BATCH_AXES, None, "tensor", None)
        attended = tag(attend(q, k, v), "attention_out")
        x = x + project("btnh,nhd->btd", attended, w.out_kernel)
        x = constrain(x, BATCH_AXES, None, None)
    with jax.named_scope("mlp"):
        y = rms_norm(x, layer.mlp_norm, config.norm_eps)
        gate = tag(project("btd,df->btf", y, w.gate_kernel), "mlp_hidden")
        up = tag(project("btd,df->btf", y, w.up_kernel), "mlp_hidden")
        x = x + project("btf,fd->btd", jax.nn.silu(gate) * up, w.down_kernel)
        return constrain(x, BATCH_AXES, None, None), k, v
