"""Greedy answers, a batch of prompts at a time, without a cache.

Every new token costs a forward over prompt and answer so far: exact and simple, fit for short answers. The picture
tower runs once a prompt. One program, of one static shape, whatever the prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.batch import EMPTY, Entry, GroupBatch, Totals, pack
from mmrlhf_jax.data.media import decode
from mmrlhf_jax.groups import Branch, Bucket, Group, Rendered, Response, Turn
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, LlavaOnevision, embed
from mmrlhf_jax.models.llava_onevision.render import LlavaOnevisionRenderer
from mmrlhf_jax.models.qwen2 import model as qwen2
from mmrlhf_jax.nn.attention import GroupRule
from mmrlhf_jax.nn.sharding import BATCH_AXES
from mmrlhf_jax.training.model import LoadedModel
from mmrlhf_jax.training.runtime import to_devices


@dataclass(frozen=True)
class GreedyConfig:
    max_new_tokens: int = 128
    """an answer that has not ended by then is given as it stands"""
    prompts: int = 16
    """prompts forwarded at once, over all devices"""
    multiple: int = 128
    """prompt slots are a multiple of this"""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prompts", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Answer:
    """What a model says: its text, its tokens without the one that ends it, and whether it came to an end."""

    text: str
    token: tuple[int, ...]
    ended: bool


def greedy_answers(
    groups: Sequence[Group],
    renderer: LlavaOnevisionRenderer,
    model: LoadedModel,
    mesh: Mesh,
    compute: Compute,
    config: GreedyConfig,
) -> list[Answer]:
    """The model's answer to the prompt of each group, in order; the groups' responses are not looked at.

    Groups come with the bytes of their pictures. Raises ValueError where a prompt and `max_new_tokens` exceed the
    decoder's positions, and as `renderer.render` does.
    """
    prompts = [_prompt(group, renderer, config.max_new_tokens) for group in groups]
    if not prompts:
        return []
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    bucket = Bucket(
        groups=math.ceil(min(config.prompts, len(prompts)) / shards) * shards,
        tiles=max(prompt.lengths.tiles for prompt in prompts),
        prompt=math.ceil(max(prompt.lengths.prompt for prompt in prompts) / config.multiple) * config.multiple,
        response=config.max_new_tokens,
    )
    stop = stop_tokens(renderer)
    out: list[Answer] = []
    with jax.set_mesh(mesh):
        for start in range(0, len(prompts), bucket.groups):
            batch = _batch(prompts[start : start + bucket.groups], bucket, renderer)
            tokens = _greedy(model.params, to_devices(batch, mesh), config=model.config, compute=compute, stop=stop)
            out += [_answer(row, stop, renderer) for row in np.asarray(jax.device_get(tokens))]
    return out[: len(prompts)]


def stop_tokens(renderer: LlavaOnevisionRenderer) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's end of sequence, and the special tokens that close a trained one.

    Raises ValueError when there is none.
    """
    asked = Group("", (Turn("user", ""),), (), (Response(""),), (), ())
    closing = renderer.render(asked, decode).branches[0].token.tolist()
    special = {token for token, added in renderer.tokenizer.added_tokens_decoder.items() if added.special}
    stop = {renderer.tokenizer.eos_token_id, *special.intersection(closing)} - {None}
    if not stop:
        raise ValueError(f"{renderer.name}: neither the tokenizer nor the chat template names a token that ends a turn")
    return tuple(sorted(stop))


def _prompt(group: Group, renderer: LlavaOnevisionRenderer, slots: int) -> Rendered:
    """The group's prompt with one branch of `slots` blank tokens: room for the answer."""
    bare = renderer.render(dataclasses.replace(group, responses=(Response(""),), pairs=()), decode)
    most = renderer.config.decoder.max_positions
    if len(bare.prompt) + slots > most:
        raise ValueError(
            f"{', '.join(map(str, group.origins)) or group.id}: {len(bare.prompt)} prompt tokens and max_new_tokens "
            f"{slots} exceed the model's {most} positions"
        )
    return dataclasses.replace(bare, branches=(Branch(np.zeros(slots, np.int32), np.ones(slots, np.float32)),))


def _batch(prompts: Sequence[Rendered], bucket: Bucket, renderer: LlavaOnevisionRenderer) -> GroupBatch:
    nothing, none = np.zeros((1, 1), np.float32), np.zeros(1, np.int32)
    entries = [Entry(row, prompt, nothing, nothing, none, nothing[0]) for row, prompt in enumerate(prompts)]
    return pack(
        [*entries, *[None] * (bucket.groups - len(entries))],
        bucket,
        Totals(1.0, 1.0, 1.0, 1.0),  # nothing is divided: there is no loss
        responses=1,
        tokens_per_tile=renderer.tokens_per_tile,
        tile_size=renderer.tile_size,
    )


@functools.partial(jax.jit, static_argnames=("config", "compute", "stop"))
def _greedy(
    params: LlavaOnevision,
    batch: GroupBatch,
    *,
    config: LlavaOnevisionConfig,
    compute: Compute,
    stop: tuple[int, ...],
) -> jax.Array:
    """The likeliest next token of every row, again and again, until each has met a stop token: i32 [B, S].

    What stands behind a row's stop token is meaningless, as are filler rows.
    """
    p = batch.tap_index.shape[1]
    slots = batch.token.shape[1] - p
    prompt = embed(params, config, batch, compute)[:, :p]
    rule = GroupRule(batch.position, batch.branch, batch.prompt_length, prompt=p)
    table = qwen2.unembedding(params.decoder, prompt.dtype)

    def next_token(t: jax.Array, token: jax.Array) -> jax.Array:
        x = jnp.concatenate([prompt, qwen2.embed(params.decoder, token, prompt.dtype)], axis=1)
        hidden = qwen2.decode(
            params.decoder, config.decoder, x, rule, backend=compute.attention, platform=compute.platform, rung="none"
        )
        predictor = jax.lax.dynamic_index_in_dim(batch.predictor, t, axis=1)  # [B, 1]
        last = jnp.take_along_axis(hidden, predictor[:, :, None], axis=1)[:, 0]
        logits = jnp.einsum("bd,vd->bv", last, table, preferred_element_type=jnp.float32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        t, _, ended = carry
        return (t < slots) & ~jnp.all(ended)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        t, token, ended = carry
        # blank slots to the right of t are not seen: their positions are later
        found = next_token(t, token)
        token = jax.lax.dynamic_update_index_in_dim(token, found, t, axis=1)
        return t + 1, token, ended | jnp.isin(found, jnp.asarray(stop))

    start = (jnp.zeros((), jnp.int32), batch.token[:, p:], batch.row == EMPTY)
    return jax.lax.while_loop(unfinished, step, start)[1]


def _answer(row: np.ndarray, stop: tuple[int, ...], renderer: LlavaOnevisionRenderer) -> Answer:
    ends = np.flatnonzero(np.isin(row, stop))
    token = row[: ends[0]] if len(ends) else row
    text = renderer.tokenizer.decode(token.tolist(), skip_special_tokens=True)
    return Answer(str(text), tuple(token.tolist()), bool(len(ends)))
