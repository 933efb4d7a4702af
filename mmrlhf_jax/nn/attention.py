"""Attention over a group: the prompt is seen by everyone, a response only by itself.

The rule is structured, never a dense mask: tokens are laid out prompt first, branches end to end behind it, so that a
query sees no key to its right, and of those to its left the ones with `branch == -1` (prompt) or its own branch.
Backends differ in how the prompt attends to itself, where nearly all the work is; responses attend exactly, in blocks
of queries.

A backend asked for by name that cannot serve raises: a silent fallback costs pods.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from mmrlhf_jax.nn.sharding import BATCH_AXES

Backend = Literal["auto", "xla", "cudnn", "splash"]
QUERY_BLOCK = 256  # queries whose scores exist at once
TIERS = 4  # parts of a long prompt, each with the keys up to its own end: 1/8 more work than exact block skipping
SPLASH_BLOCK = 128
_ORDER: dict[str, tuple[Backend, ...]] = {"gpu": ("cudnn", "xla"), "tpu": ("splash", "xla")}
_MASKED = -1e30  # finite: a padded query must not become NaN


@struct.dataclass
class GroupRule:
    """Who may look at whom. `position`, `branch` i32 [B, P+S]; branch -1 = prompt, k = response k, K = padding.
    `prompt_length` i32 [B]; `prompt` = P, static."""

    position: jax.Array
    branch: jax.Array
    prompt_length: jax.Array
    prompt: int = struct.field(pytree_node=False)


def backend_problem(backend: Backend, platform: str, prompt: int, head_dim: int, dtype: str) -> str | None:
    """Why `backend` cannot serve prompts of `prompt` slots in `dtype` on `platform` ("cpu", "gpu", "tpu"); None if it
    can."""
    if backend == "cudnn":
        if platform != "gpu":
            return f"cudnn attention needs a GPU, this is {platform}"
        if dtype not in ("bfloat16", "float16"):
            return f"cudnn attention serves bfloat16 and float16, not {dtype}"
        if head_dim % 8 or head_dim > 128:
            return f"cudnn attention serves head sizes that are multiples of 8 up to 128, not {head_dim}"
    if backend == "splash":
        if platform != "tpu":
            return f"splash attention needs a TPU, this is {platform}"
        if prompt % SPLASH_BLOCK:
            return f"splash attention needs prompt buckets that are multiples of {SPLASH_BLOCK}, not {prompt}"
    return None


def choose_backend(asked: Backend, platform: str, prompt: int, head_dim: int, dtype: str) -> Backend:
    """The backend that runs: the one asked for, or for "auto" the first that serves of the platform's list.

    Raises ValueError naming the reason when a backend asked for by name cannot serve.
    """
    if asked != "auto":
        if problem := backend_problem(asked, platform, prompt, head_dim, dtype):
            raise ValueError(f"attention backend {asked!r}: {problem}; ask for 'auto' or 'xla'")
        return asked
    order = _ORDER.get(platform, ("xla",))
    return next(b for b in order if backend_problem(b, platform, prompt, head_dim, dtype) is None)


def group_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: GroupRule, *, backend: Backend, platform: str
) -> jax.Array:
    """q [B, P+S, N, H]; k, v [B, P+S, G, H] with N a multiple of G -> [B, P+S, N, H].

    Rows of padding hold finite garbage. Softmax in fp32.
    """
    p = rule.prompt
    backend = choose_backend(backend, platform, p, q.shape[-1], q.dtype.name)
    if backend == "xla":
        return _blocked(q, k, v, rule, 0)
    if backend == "cudnn":
        prompt = _prompt_cudnn(q[:, :p], k[:, :p], v[:, :p], rule.prompt_length)
    else:
        prompt = _prompt_splash(q[:, :p], k[:, :p], v[:, :p])
    if p == q.shape[1]:  # prompts alone
        return prompt
    return jnp.concatenate([prompt, response_attention(q[:, p:], k, v, rule)], axis=1)


def response_attention(q: jax.Array, k: jax.Array, v: jax.Array, rule: GroupRule) -> jax.Array:
    """The responses' rows of `group_attention`, which no backend computes otherwise: q [B, S, N, H]; k, v
    [B, P+S, G, H] -> [B, S, N, H]."""
    return _blocked(q, k, v, rule, rule.prompt)


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, rule: GroupRule, first: int) -> jax.Array:
    """Exact attention of the queries from `first` on, which `q` holds, a block at a time; keys right of a tier are
    never touched."""
    total = k.shape[1]
    # one tier ends where the prompt does, so that a tier's queries are all prompt or all response
    edges = [*_tiers(first, rule.prompt), *_tiers(max(first, rule.prompt), total), total]
    out = []
    for start, end in itertools.pairwise(edges):
        where = (rule.position[:, start:end], rule.branch[:, start:end], rule.position[:, :end], rule.branch[:, :end])
        only = functools.partial(_one_block, prompt_only=end <= rule.prompt)
        out.append(_tier(only, q[:, start - first : end - first], k[:, :end], v[:, :end], *where))
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def _tiers(start: int, end: int) -> range:
    """Where each tier of [start, end) begins."""
    blocks = -(-(end - start) // QUERY_BLOCK)
    return range(start, end, max(1, -(-blocks // TIERS)) * QUERY_BLOCK)


def _tier(attend: Callable[..., jax.Array], q, k, v, q_position, q_branch, k_position, k_branch) -> jax.Array:
    """Blocks one after the other in a loop: unrolled, a scheduler may hold the scores of all of them."""
    queries = q.shape[1]
    if queries <= QUERY_BLOCK:
        return attend(q, k, v, q_position, q_branch, k_position, k_branch)
    short = -queries % QUERY_BLOCK

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [blocks, B, QUERY_BLOCK, ...]
        padded = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    block = jax.checkpoint(lambda part: attend(part[0], k, v, part[1], part[2], k_position, k_branch))
    out = jax.lax.map(block, (cut(q), cut(q_position), cut(q_branch)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], queries + short, *q.shape[2:])[:, :queries]


def _one_block(q, k, v, q_position, q_branch, k_position, k_branch, *, prompt_only: bool):
    """Softmax attention with the query heads of a key head folded into rows: two plain batched products, and the
    division by the softmax's sum done on the output, not on the scores. On CPUs twice as fast as the textbook form."""
    batch, queries, heads, dim = q.shape
    groups, shared = k.shape[2], heads // k.shape[2]
    q = (q * dim**-0.5).reshape(batch, queries, groups, shared, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, groups, shared * queries, dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bgmh,bgsh->bgms", q, k, preferred_element_type=jnp.float32)
    seen = k_position[:, None, :] <= q_position[:, :, None]
    if not prompt_only:
        seen &= (k_branch[:, None, :] == -1) | (k_branch[:, None, :] == q_branch[:, :, None])
    unseen = jnp.where(seen, 0.0, _MASKED)[:, None, None]
    scores = (scores.reshape(batch, groups, shared, queries, -1) + unseen).reshape(scores.shape)
    # softmax does not depend on the shift, so its maximum needs no gradient
    weight = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    out = jnp.einsum("bgms,bgsh->bgmh", weight.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    out = out.astype(v.dtype).reshape(batch, groups, shared, queries, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


def _prompt_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> jax.Array:
    """cuDNN's flash attention, causal, keys bounded by each row's length: no score matrix in memory."""
    length = jnp.maximum(length, 1)  # an empty group still needs one key
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=length, key_value_seq_lengths=length, implementation="cudnn"
    )


def _prompt_splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Splash attention (jax.experimental.pallas.ops.tpu), causal, grouped queries. Padding stands behind every real
    prompt token, so the causal rule alone keeps it out of sight."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = q.shape[1]
    block = max(b for b in (SPLASH_BLOCK, 256, 512) if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:  # what one device holds
        mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(q.shape[2])])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)

    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v)
    # the partitioner cannot look into a kernel: each device runs it on its rows and heads
    spec = P(BATCH_AXES, None, "tensor", None)
    return jax.shard_map(attend, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q, k, v)
