"""Law 1: a packed group equals each of its responses as a sequence of its own.

Two things stand against the packed group: the same rows forwarded one branch each (`separate=True`, our code), and a
restatement that shares only the vision tower with it: one causal sequence [prompt | response], a dense triangular mask,
whole logits, DPO over the list of pairs.
"""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_groups
from tiny import TINY, random_params

from mmrlhf_jax.batch import Entry, GroupBatch, pack
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, LlavaOnevision, response_logps
from mmrlhf_jax.models.siglip import model as siglip
from mmrlhf_jax.nn import attention
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.step import loss_and_metrics

CONFIGS = {
    "untied": TINY,
    "tied": dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tied=True)),
}
# tiles, text tokens of the prompt, tokens of each response: K in 1..5, with pictures and without
GROUPS = [(2, 9, (7,)), (0, 5, (3, 4)), (1, 20, (6, 1, 8)), (3, 12, (5, 9, 2, 7)), (0, 30, (1, 2, 13, 4, 5))]
TILES, PROMPT, RESPONSES = 3, 48, 32  # a bucket that holds them
LONGEST = 40 + 13 + 3
OBJECTIVE = DPO(beta=0.3, gamma=0.25)

# every program here runs once: compiling it is what takes time
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def parameters(tied: str) -> LlavaOnevision:
    return random_params(CONFIGS[tied])


@cache
def entries() -> list[Entry]:
    rng = np.random.default_rng(0)
    groups = [random_groups.rendered(rng, TINY, tiles=t, text=p, lengths=r) for t, p, r in GROUPS]
    return [random_groups.entry(rng, group, row) for row, group in enumerate(groups)]


@cache
def batch(separate: bool) -> GroupBatch:
    """All groups packed, or all their pairs as two rows each."""
    items = [pair for entry in entries() for pair in random_groups.split_pairs(entry)] if separate else entries()
    return pack(
        items,
        Bucket(len(items), TILES, PROMPT, RESPONSES),
        random_groups.totals(entries()),
        responses=2 if separate else 5,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
        separate=separate,
    )


# --- the restatement ---------------------------------------------------------------------------------------------


@cache
def sequences() -> dict[str, np.ndarray]:
    """Every [prompt | response], padded behind its end, where a causal model cannot see."""
    rows = [(entry.rendered, branch) for entry in entries() for branch in entry.rendered.branches]
    side, newline = TINY.tower.image_size, TILES * TINY.tokens_per_tile
    out = {
        "tiles": np.zeros((len(rows), TILES, side, side, 3), np.uint8),
        "token": np.zeros((len(rows), LONGEST), np.int32),
        "tap_index": np.zeros((len(rows), LONGEST, 4), np.int32),
        "tap_weight": np.zeros((len(rows), LONGEST, 4), np.float32),
        "scored": np.zeros((len(rows), LONGEST - 1), bool),
        "reference": np.zeros((len(rows), LONGEST - 1), np.float32),
    }
    references = [reference for entry in entries() for reference in entry.reference]
    for n, (group, branch) in enumerate(rows):
        prompt = len(group.prompt)
        out["tiles"][n, : len(group.tiles)] = group.tiles
        out["token"][n, :prompt] = group.prompt
        out["token"][n, prompt : prompt + len(branch.token)] = branch.token
        out["tap_index"][n, :prompt] = np.where(group.tap_index < 0, newline, group.tap_index)
        out["tap_weight"][n, :prompt] = group.tap_weight
        out["scored"][n, prompt - 1 : prompt - 1 + len(branch.token)] = True
        out["reference"][n, prompt - 1 : prompt - 1 + len(branch.token)] = references[n]
    return out


def plain_sequence(params: LlavaOnevision, config: LlavaOnevisionConfig, row: dict[str, jax.Array]) -> jax.Array:
    """log p(token t+1 | tokens up to t) [T - 1] of one causal sequence."""
    pixels = (row["tiles"] / 255 - 0.5) / 0.5
    seen, p, d = siglip.encode(params.tower, config.tower, pixels, rung="none"), params.projector, params.decoder
    features = jax.nn.gelu(seen @ p.in_kernel + p.in_bias, approximate=False) @ p.out_kernel + p.out_bias
    features = jnp.concatenate([features.reshape(-1, config.decoder.embed), params.newline[None]])
    picture = (features[row["tap_index"]] * row["tap_weight"][..., None]).sum(1)
    x = jnp.where(row["tap_weight"].any(1, keepdims=True), picture, d.embedding[row["token"]])
    for i in range(config.decoder.layers):
        x = plain_layer(jax.tree.map(lambda w, i=i: w[i], d.layers), config, x)
    table = d.embedding if d.unembedding is None else d.unembedding
    logps = jax.nn.log_softmax(norm(x, d.norm, config) @ table.T)
    return jnp.take_along_axis(logps[:-1], row["token"][1:, None], axis=1)[:, 0]


def norm(x, scale, config):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.decoder.norm_eps) * scale


def turn(x: jax.Array, theta: float) -> jax.Array:
    """RoPE as complex numbers: halves are real and imaginary parts, x [T, N, H]."""
    half = x.shape[-1] // 2
    angle = jnp.arange(len(x))[:, None, None] * theta ** (-jnp.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag], -1)


def plain_layer(w, config, x):
    c = config.decoder
    y = norm(x, w.attention_norm, config)
    q, k, v = (
        jnp.einsum("td,dnh->tnh", y, kernel) + bias
        for kernel, bias in ((w.query_kernel, w.query_bias), (w.key_kernel, w.key_bias), (w.value_kernel, w.value_bias))
    )
    q, k = turn(q, c.rope_theta), turn(k, c.rope_theta)
    k, v = (jnp.repeat(z, c.heads // c.kv_heads, axis=1) for z in (k, v))
    scores = jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(c.head_dim)
    weight = jax.nn.softmax(jnp.where(np.tri(len(x), dtype=bool), scores, -jnp.inf))
    x = x + jnp.einsum("nts,snh,nhd->td", weight, v, w.out_kernel)
    y = norm(x, w.mlp_norm, config)
    return x + (jax.nn.silu(y @ w.gate_kernel) * (y @ w.up_kernel)) @ w.down_kernel


def plain_loss(params, config, rows):
    """DPO (arXiv 2305.18290, equation 7) + gamma NLL(chosen), a mean over pairs; log-probs [sequences, T - 1]."""
    logps = jax.vmap(partial(plain_sequence, params, config))({k: rows[k] for k in rows if k != "reference"})
    ratio = jnp.where(rows["scored"], logps - rows["reference"], 0).sum(1)
    chosen, rejected = pairs()
    preference = jnp.log1p(jnp.exp(-OBJECTIVE.beta * (ratio[chosen] - ratio[rejected]))).mean()
    nll = -jnp.where(rows["scored"][chosen], logps[chosen], 0).sum() / rows["scored"][chosen].sum()
    return preference + OBJECTIVE.gamma * nll, logps


@cache
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the chosen and of the rejected sequence of every pair."""
    first = np.cumsum([0, *(len(entry.rank) for entry in entries())])
    found = [first[n] + np.argwhere(entry.pair_weight) for n, entry in enumerate(entries())]
    return tuple(np.concatenate(found).T)


@cache
def restated(tied: str):
    """(loss, log-probs [R] of every response of every group in order, gradients) of the restatement."""
    function = jax.value_and_grad(partial(plain_loss, config=CONFIGS[tied]), has_aux=True)
    (loss, logps), gradients = quick(function)(parameters(tied), rows=sequences())
    return loss, [row[scored] for row, scored in zip(np.asarray(logps), sequences()["scored"])], gradients


# --- ours ---------------------------------------------------------------------------------------------------------


def logps_and_gradients(tied: str, batch: GroupBatch, compute: Compute):
    """(log-probs [N, S], loss, gradients) of our forward, compiled anew so that patched block sizes are seen."""

    def both(params):
        (loss, _), gradients = jax.value_and_grad(loss_and_metrics, has_aux=True)(
            params, None, batch, jax.random.key(0), config=CONFIGS[tied], compute=compute, objective=OBJECTIVE
        )
        return response_logps(params, CONFIGS[tied], batch, compute).logp, loss, gradients

    return quick(both)(parameters(tied))


def assert_close_logps(rows: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for row, together in zip(np.asarray(rows), wanted, strict=True):
        np.testing.assert_allclose(row[: len(together)], together, rtol=0, atol=1e-5)


def packed(responses: list[np.ndarray]) -> list[np.ndarray]:
    """Responses laid end to end, group by group."""
    left = iter(responses)
    return [np.concatenate([next(left) for _ in entry.rank]) for entry in entries()]


def assert_close_gradients(ours: LlavaOnevision, theirs: LlavaOnevision) -> None:
    ours, theirs = (dict(nn_params.named_leaves(jax.device_get(tree))) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    whole = max(float(abs(g).max()) for g in theirs.values())
    for name, wanted in theirs.items():
        # the gradient of the tower's key bias vanishes (softmax is blind to it): what it holds is rounding
        largest = max(float(abs(wanted).max()), 1e-3 * whole)
        assert float(abs(ours[name] - wanted).max()) <= 1e-4 * largest, name


HOW_IT_RUNS = [  # embeddings, remat rung, vocabulary chunk, its shards, queries in a block, tiers
    ("untied", "full", 8192, 1, 512, 4),
    ("untied", "attention", 64, 2, 16, 4),
    ("untied", "projections", 100, 1, 5, 4),
    ("tied", "none", 37, 4, 7, 2),
]


@pytest.mark.parametrize(("tied", "rung", "chunk", "shards", "block", "tiers"), HOW_IT_RUNS)
def test_a_group_equals_its_responses_one_at_a_time(monkeypatch, tied, rung, chunk, shards, block, tiers):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention, "TIERS", tiers)
    compute = Compute(remat=rung, vocab_chunk=chunk, vocab_shards=shards)
    logps, loss, gradients = logps_and_gradients(tied, batch(separate=False), compute)
    wanted, each, theirs = restated(tied)
    assert_close_logps(logps, packed(each))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert_close_gradients(gradients, theirs)


def test_a_group_equals_its_pairs_as_separate_rows():
    logps, loss, gradients = logps_and_gradients("untied", batch(separate=True), Compute())
    wanted, each, theirs = restated("untied")
    assert_close_logps(logps, [each[side] for pair in zip(*pairs()) for side in pair])
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert_close_gradients(gradients, theirs)


def test_the_groups_here_are_of_every_kind():
    assert sorted(len(lengths) for *_, lengths in GROUPS) == [1, 2, 3, 4, 5]
    assert {tiles > 0 for tiles, _, _ in GROUPS} == {True, False}
    smallest = min(block for *_, block, _ in HOW_IT_RUNS)
    assert max(len(entry.rendered.prompt) for entry in entries()) > 2 * smallest
    assert max(max(lengths) for *_, lengths in GROUPS) > smallest


@pytest.mark.parametrize("fault", ["branches see each other", "positions run on", "first token from the slot before"])
def test_a_fault_in_the_packing_is_caught(fault):
    whole = batch(separate=False)
    p = PROMPT
    if fault == "branches see each other":
        branch = whole.branch.copy()
        branch[:, p:] = np.minimum(branch[:, p:], 0)
        broken = whole.replace(branch=branch)
    elif fault == "positions run on":
        position = whole.position.copy()
        position[:, p:] = whole.prompt_length[:, None] + np.arange(RESPONSES)
        broken = whole.replace(position=position)
    else:
        broken = whole.replace(predictor=np.tile(p - 1 + np.arange(RESPONSES, dtype=np.int32), (len(GROUPS), 1)))
    logps = forward()(parameters("untied"), broken)
    with pytest.raises(AssertionError):
        assert_close_logps(logps, packed(restated("untied")[1]))


@cache
def forward():
    return quick(lambda params, batch: response_logps(params, TINY, batch, Compute()).logp)
