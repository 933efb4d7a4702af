"""The device's side of decoding: rows of groups in flight, slots of branches being said, and the loop that steps them.

A row holds one group: the keys and values of its prompt and forced prefixes, never copied, and W slots in which its M
branches are said, W at a time. Every step feeds one token of every slot and chooses the next; a slot whose branch is
finished takes the row's next waiting one in the same program, without a copy. Memory: a row's prefix, and what W
branches may say.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmrlhf_jax.batch import GroupBatch
from mmrlhf_jax.inference.sample import SamplingConfig, branch_keys, pick
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, prefill
from mmrlhf_jax.models.qwen2 import model as qwen2
from mmrlhf_jax.nn.branch_attention import BranchCache, branch_rule
from mmrlhf_jax.nn.compiler import compiler_options
from mmrlhf_jax.nn.sharding import BATCH_AXES

Read = Callable[[Any, jax.Array], jax.Array]
_SAMPLING = -1  # in `Slots.closed`


@dataclass(frozen=True)
class Shape:
    """Everything a program is compiled for. B = shards * rows; C = prefix; K = responses; M = K * samples."""

    model: LlavaOnevisionConfig
    compute: Compute
    sampling: SamplingConfig  # its seed is the host's business: 0 here
    stop: tuple[int, ...]
    closing: tuple[int, ...]
    read: Read | None
    shards: int
    rows: int
    slots: int
    prefix: int
    responses: int
    samples: int

    @property
    def branches(self) -> int:
        return self.responses * self.samples

    @property
    def columns(self) -> int:
        """T: tokens a branch feeds at most: the last forced one, what it says, and what closes it."""
        return 1 + self.sampling.max_new_tokens + len(self.closing)


@struct.dataclass
class Arrivals:
    """At most one group for each of the shards. `place` i32 [shards]: the shard's row it takes, -1 = none comes;
    `key` u32 [shards, 2]; `token`, `position` i32 [shards, K]: each forced prefix's last token, fed first, and where it
    stands; `branches` i32 [shards]: how many are said, its responses times samples."""

    place: Any
    key: Any
    token: Any
    position: Any
    branches: Any


@struct.dataclass
class Rows:
    """The groups in flight: what arrived with them, [B, ...], and how many branches have been `taken` by a slot and
    are `done`, i32 [B]. A row with `done == branches` is free."""

    key: jax.Array
    token: jax.Array
    position: jax.Array
    branches: jax.Array
    taken: jax.Array
    done: jax.Array


@struct.dataclass
class Slots:
    """i32 [B, W]: the `branch` of the row that is said (M = none), the `token` fed next, the `age` in tokens fed, the
    `count` of tokens said, and what is `closed`: _SAMPLING, or the closing tokens fed up to and with the next token."""

    branch: jax.Array
    token: jax.Array
    age: jax.Array
    count: jax.Array
    closed: jax.Array


@struct.dataclass
class Said:
    """What branches have said: `token` i32 [B, M, max_new_tokens], `length` i32, `ended` bool, `score` f32 [B, M]."""

    token: jax.Array
    length: jax.Array
    ended: jax.Array
    score: jax.Array


@struct.dataclass
class State:
    """All of it. `cache` is stacked over layers; `prefix_branch` i32 [B, C]; `now` i32 [] counts steps; `sampled` i32
    [B] counts tokens, `broken` bool [B] says that a logit was not finite."""

    cache: BranchCache
    prefix_branch: jax.Array
    now: jax.Array
    rows: Rows
    slots: Slots
    said: Said
    sampled: jax.Array
    broken: jax.Array


@struct.dataclass
class Status:
    """What the host looks at, [B] each: which rows are `busy`, tokens `sampled` in them so far, which are `broken`; and
    the `steps` i32 [] that were taken."""

    busy: jax.Array
    sampled: jax.Array
    broken: jax.Array
    steps: jax.Array


@dataclass(frozen=True)
class Programs:
    """Compiled once a shape and mesh. `blank()` -> State; `admit(params, state, batch, arrivals)` -> State;
    `run(params, state, waiting, need, steps)` -> (State, Status), see `run`; `collect(state.said)` -> Said, everywhere.
    States are donated."""

    blank: Callable[[], State]
    admit: Callable[[Any, State, GroupBatch, Arrivals], State]
    run: Callable[[Any, State, Any, Any, Any], tuple[State, Status]]
    collect: Callable[[Said], Said]


@functools.lru_cache(maxsize=64)
def programs(shape: Shape, mesh: Mesh) -> Programs:
    """The programs of a shape; asking again for the same one compiles nothing."""
    split, whole = NamedSharding(mesh, P(BATCH_AXES)), NamedSharding(mesh, P())
    # heads of a group stay together: key heads are split where they divide, as their kernels are
    heads = "tensor" if shape.model.decoder.kv_heads % mesh.shape["tensor"] == 0 else None
    stacked = NamedSharding(mesh, P(None, BATCH_AXES, heads))
    state = jax.tree.map(lambda _: split, jax.eval_shape(functools.partial(blank, shape)))
    state = dataclasses.replace(state, cache=jax.tree.map(lambda _: stacked, state.cache), now=whole)
    return Programs(
        blank=jax.jit(functools.partial(blank, shape), out_shardings=state),
        admit=jax.jit(functools.partial(admit, shape), donate_argnums=1, out_shardings=state),
        run=jax.jit(
            functools.partial(run, shape),
            donate_argnums=1,
            out_shardings=(state, whole),
            compiler_options=compiler_options(shape.compute.platform, "decode"),
        ),
        collect=jax.jit(lambda said: said, out_shardings=whole),
    )


def blank(shape: Shape) -> State:
    """Free rows."""
    model = shape.model.decoder
    b, w, c, m = shape.shards * shape.rows, shape.slots, shape.prefix, shape.branches
    dtype = jnp.dtype(shape.compute.dtype)
    prefix = jnp.zeros((model.layers, b, model.kv_heads, c, model.head_dim), dtype)
    own = jnp.zeros((model.layers, b, model.kv_heads, w, shape.columns, model.head_dim), dtype)
    row, slot, branch = jnp.zeros(b, jnp.int32), jnp.zeros((b, w), jnp.int32), jnp.zeros((b, m), jnp.int32)
    response = jnp.zeros((b, shape.responses), jnp.int32)
    return State(
        cache=BranchCache(prefix, prefix, own, own),
        prefix_branch=jnp.full((b, c), shape.responses, jnp.int32),
        now=jnp.zeros((), jnp.int32),
        rows=Rows(jnp.zeros((b, 2), jnp.uint32), response, response, row, row, row),
        slots=Slots(jnp.full_like(slot, m), slot, slot, slot, slot + _SAMPLING),
        said=Said(
            jnp.zeros((b, m, shape.sampling.max_new_tokens), jnp.int32), branch, branch > 0, branch.astype(jnp.float32)
        ),
        sampled=row,
        broken=row > 0,
    )


def admit(shape: Shape, params: Any, state: State, batch: GroupBatch, arrivals: Arrivals) -> State:
    """Prefills one group a shard and gives each the row asked for, which is free."""
    key, value = prefill(params, shape.model, batch, shape.compute)
    mine = (jnp.arange(shape.rows) == arrivals.place[:, None]).reshape(-1)  # [B]

    def put(old: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
        taken = mine.reshape((1,) * axis + (-1,) + (1,) * (old.ndim - axis - 1))
        return jnp.where(taken, jnp.repeat(new, shape.rows, axis=axis), old)

    nothing = jnp.zeros_like(arrivals.branches)
    rows = Rows(arrivals.key, arrivals.token, arrivals.position, arrivals.branches, nothing, nothing)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(
            state.cache,
            prefix_key=put(state.cache.prefix_key, key, 1),
            prefix_value=put(state.cache.prefix_value, value, 1),
        ),
        prefix_branch=put(state.prefix_branch, batch.branch),
        rows=jax.tree.map(put, state.rows, rows),
    )


def run(
    shape: Shape, params: Any, state: State, waiting: jax.Array, need: jax.Array, steps: jax.Array
) -> tuple[State, Status]:
    """Steps all slots until no row is busy, until `need` i32 [] shards have a free row and a group `waiting` bool
    [shards], or `steps` i32 [] times."""
    dtype = jnp.dtype(shape.compute.dtype)
    # once, not every step; norms compute in fp32 from either
    decoder = jax.tree.map(lambda p: p.astype(dtype), params.decoder)
    read = None if shape.read is None else functools.partial(shape.read, params)

    def goes_on(state: State, t: jax.Array) -> jax.Array:
        busy = _busy(state)
        free = jnp.any(~busy.reshape(shape.shards, shape.rows), axis=1)
        return (t < steps) & jnp.any(busy) & (jnp.sum(free & waiting) < need)

    def body(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, t, _ = carry
        state = _speak(shape, decoder, read, _take(shape, state))
        return state, t + 1, goes_on(state, t + 1)

    start = jnp.zeros((), jnp.int32)
    state, taken, _ = jax.lax.while_loop(lambda carry: carry[2], body, (state, start, goes_on(state, start)))
    return state, Status(_busy(state), state.sampled, state.broken, taken)


def _busy(state: State) -> jax.Array:
    return state.rows.done < state.rows.branches


def _take(shape: Shape, state: State) -> State:
    """Idle slots take their row's waiting branches, in order."""
    slots, rows = state.slots, state.rows
    idle = slots.branch == shape.branches
    next_branch = rows.taken[:, None] + jnp.cumsum(idle, axis=1) - 1
    takes = idle & (next_branch < rows.branches[:, None])
    branch = jnp.where(takes, next_branch, slots.branch)
    token = _of_response(rows.token, _response(shape, branch))
    return dataclasses.replace(
        state,
        slots=Slots(
            branch=branch,
            token=jnp.where(takes, token, slots.token),
            age=jnp.where(idle, 0, slots.age),
            count=jnp.where(idle, 0, slots.count),
            closed=jnp.where(idle, _SAMPLING, slots.closed),
        ),
        rows=dataclasses.replace(rows, taken=rows.taken + jnp.sum(takes, axis=1)),
    )


def _response(shape: Shape, branch: jax.Array) -> jax.Array:
    """Branches are numbered response by response; an idle slot's counts as the last."""
    return jnp.minimum(branch // shape.samples, shape.responses - 1)


def _of_response(values: jax.Array, response: jax.Array) -> jax.Array:
    """values [B, K] at response [B, W]."""
    return jnp.take_along_axis(values, response, axis=1)


def _speak(shape: Shape, decoder: qwen2.Qwen2, read: Callable[[jax.Array], jax.Array] | None, state: State) -> State:
    """One step of every slot: feeds its token, chooses the next, notes what is said and which branches are finished."""
    slots, rows, said = state.slots, state.rows, state.said
    busy = slots.branch < shape.branches
    hidden, cache = _feed(shape, decoder, state)
    logits = jnp.einsum(
        "bwd,vd->bwv", hidden, qwen2.unembedding(decoder, hidden.dtype), preferred_element_type=jnp.float32
    )
    found = _choose(shape, state, logits)

    sampling = busy & (slots.closed == _SAMPLING)
    stops = sampling & jnp.isin(found, jnp.asarray(shape.stop, jnp.int32))
    says = sampling & ~stops
    count = slots.count + says
    full = says & (count == shape.sampling.max_new_tokens)
    if shape.closing:
        # a stop token is not fed, the closing's first takes its place; the last token said is fed, then the closing
        closed = jnp.where(stops, 1, jnp.where(full, 0, slots.closed + (slots.closed >= 0)))
        closes = closed > 0
        finished = busy & (closed > len(shape.closing))
        closing = jnp.asarray(shape.closing, jnp.int32)[jnp.clip(closed - 1, 0, len(shape.closing) - 1)]
        token = jnp.where(closes, closing, found)
    else:
        closed, token, finished = slots.closed, found, stops | full
    score = jnp.zeros(found.shape, jnp.float32) if read is None else read(hidden).astype(jnp.float32)

    done = jnp.where(finished, slots.branch, shape.branches)
    return dataclasses.replace(
        state,
        cache=cache,
        now=state.now + 1,
        slots=Slots(
            branch=jnp.where(finished, shape.branches, slots.branch),
            token=token,
            age=slots.age + 1,
            count=count,
            closed=closed,
        ),
        rows=dataclasses.replace(rows, done=rows.done + jnp.sum(finished, axis=1)),
        said=Said(
            token=_write(said.token, (jnp.where(says, slots.branch, shape.branches), slots.count), found),
            length=_write(said.length, (done,), count),
            ended=_write(said.ended, (jnp.where(stops | full, slots.branch, shape.branches),), stops),
            score=_write(said.score, (done,), score),
        ),
        sampled=state.sampled + jnp.sum(sampling, axis=1),
        broken=state.broken | jnp.any(busy & ~jnp.isfinite(jnp.max(logits, axis=-1)), axis=1),
    )


def _feed(shape: Shape, decoder: qwen2.Qwen2, state: State) -> tuple[jax.Array, BranchCache]:
    """The slots' tokens through the decoder: hidden states [B, W, D], and the cache with their keys and values."""
    slots, cache = state.slots, state.cache
    response = _response(shape, slots.branch)
    position = _of_response(state.rows.position, response) + slots.age
    rule = branch_rule(position, response, slots.age, state.now, state.prefix_branch, shape.columns)
    x = qwen2.embed(decoder, slots.token, jnp.dtype(shape.compute.dtype))
    hidden, key, value = qwen2.step(decoder, shape.model.decoder, x, cache, rule)
    column = jnp.mod(state.now, shape.columns)

    def write(ring: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(ring, new[:, :, :, :, None], column, axis=4)

    return hidden, dataclasses.replace(
        cache, own_key=write(cache.own_key, key), own_value=write(cache.own_value, value)
    )


def _choose(shape: Shape, state: State, logits: jax.Array) -> jax.Array:
    if shape.sampling.temperature == 0:
        return pick(logits, None, shape.sampling)
    branch = state.slots.branch
    keys = branch_keys(state.rows.key, _response(shape, branch), branch % shape.samples, state.slots.count)
    return pick(logits, keys, shape.sampling)


def _write(values: jax.Array, place: tuple[jax.Array, ...], new: jax.Array) -> jax.Array:
    """values [B, M, ...] with new [B, W] at the indices [B, W] each; those out of bounds are dropped."""
    return jax.vmap(lambda values, place, new: values.at[place].set(new, mode="drop"))(values, place, new)
