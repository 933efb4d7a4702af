"""Random groups with their tokens, as preference and reward objectives see them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mmrlhf_jax.data.diff import changed_tokens
from mmrlhf_jax.objectives import PreferenceInputs, RewardInputs, Tokens, step_totals


def tokens_of(responses, logp, reference_logp, *, slots=0, collision=None, segments="exact") -> Tokens:
    """One group each: `responses` token ids of every response, `logp` and `reference_logp` alike, packed end to end."""
    k = max(len(group) for group in responses)
    slots = max(slots, *(sum(len(r) for r in group) for group in responses))
    shape = (len(responses), slots)
    token, whose = np.zeros(shape, np.int32), np.full(shape, k, np.int32)
    arrays = {name: np.zeros(shape) for name in ("weight", "logp", "reference", "collision")}
    changed = np.zeros((len(responses), k, slots), bool)
    for b, group in enumerate(responses):
        marks, at = changed_tokens([np.asarray(r) for r in group], segments), 0
        for i, response in enumerate(group):
            here = slice(at, at + len(response))
            token[b, here], whose[b, here], arrays["weight"][b, here] = response, i, 1
            arrays["logp"][b, here], arrays["reference"][b, here] = logp[b][i], reference_logp[b][i]
            if collision is not None:
                arrays["collision"][b, here] = collision[b][i]
            changed[b, : len(group), here] = marks[i]
            at += len(response)
    return Tokens(
        token=jnp.asarray(token),
        response=jnp.asarray(whose),
        weight=jnp.asarray(arrays["weight"]),
        logp=jnp.asarray(arrays["logp"]),
        reference_logp=jnp.asarray(arrays["reference"]),
        changed=jnp.asarray(changed),
        collision=jnp.asarray(arrays["collision"]),
    )


def inputs_of(tokens: Tokens, pair_weight, pair_margin=None, score=None, totals=None, seed=0) -> PreferenceInputs:
    """One micro-batch that is the whole step, unless the step's totals are given; sums are those of its tokens."""
    pair_weight = jnp.asarray(pair_weight, float)
    k = pair_weight.shape[1]
    member = (tokens.response[:, None] == jnp.arange(k)[:, None]) * tokens.weight[:, None]
    length = member.sum(-1)
    return PreferenceInputs(
        logp=(member * tokens.logp[:, None]).sum(-1),
        reference_logp=(member * tokens.reference_logp[:, None]).sum(-1),
        length=length,
        pair_weight=pair_weight,
        pair_margin=jnp.zeros_like(pair_weight) if pair_margin is None else jnp.asarray(pair_margin, float),
        totals=totals or step_totals(pair_weight, length, tokens.weight),
        key=jax.random.key(seed),
        score=jnp.zeros_like(length) if score is None else jnp.asarray(score, float),
        tokens=tokens,
    )


def token_logps(text, model: int) -> np.ndarray:
    """What depends on a token and those before it alone: responses that begin alike agree as far as they do."""
    prefixes = (text[: n + 1].tolist() for n in range(len(text)))
    return np.array([-np.random.default_rng([model, *prefix]).uniform(0.1, 3) for prefix in prefixes])


def random_step(seed=0, groups=3, k=4, *, weights=True) -> PreferenceInputs:
    """Ragged groups (the last response of the first is missing) with ties, partial orders, uneven pair weights,
    margins of both signs and answers that share beginnings and segments."""
    rng = np.random.default_rng(seed)
    responses, logp, reference = [], [], []
    for b in range(groups):
        count = k - (b == 0)
        base = rng.integers(0, 9, 6)
        texts = [np.where(rng.random(6) < 0.4, rng.integers(0, 9, 6), base)[: rng.integers(3, 7)] for _ in range(count)]
        responses.append(texts)
        logp.append([token_logps(t, 2 * b) for t in texts])
        reference.append([token_logps(t, 2 * b + 1) for t in texts])
    collision = [[-rng.uniform(0.1, 2, len(t)) for t in texts] for texts in responses]
    order = rng.integers(0, 3, (groups, k))
    order[:, :2] = [0, 2]  # every group has a pair
    pair = order[:, :, None] < order[:, None, :]
    pair[0, :, k - 1] = pair[0, k - 1] = False
    weight = pair * (rng.uniform(0.2, 2, pair.shape) if weights else 1)
    score = rng.integers(0, 9, (groups, k))
    tokens = tokens_of(responses, logp, reference, slots=27, collision=collision)
    return inputs_of(tokens, weight, rng.normal(1, 2, pair.shape) * pair, score)


def with_token_logps(inputs: PreferenceInputs, logp: jax.Array) -> PreferenceInputs:
    """The step under other log-probs [B, T] of its tokens; what padding holds does not matter."""
    tokens = inputs.tokens
    k = inputs.logp.shape[1]
    member = (tokens.response[:, None] == jnp.arange(k)[:, None]) & (tokens.weight != 0)[:, None]
    summed = jnp.where(member, (tokens.weight * jnp.where(tokens.weight != 0, logp, 0))[:, None], 0).sum(-1)
    return inputs.replace(logp=summed, tokens=tokens.replace(logp=logp))


def permuted(inputs: PreferenceInputs, order) -> PreferenceInputs:
    """The same groups with their responses named otherwise; new response r is old response order[r]."""
    order = np.asarray(order)
    place = np.append(np.argsort(order), len(order))
    tokens = inputs.tokens
    return inputs.replace(
        logp=inputs.logp[:, order],
        reference_logp=inputs.reference_logp[:, order],
        length=inputs.length[:, order],
        score=inputs.score[:, order],
        pair_weight=inputs.pair_weight[:, order][:, :, order],
        pair_margin=inputs.pair_margin[:, order][:, :, order],
        tokens=tokens.replace(response=jnp.asarray(place)[tokens.response], changed=tokens.changed[:, order]),
    )


def reward_step(seed=0, *, weights=True) -> RewardInputs:
    """The groups of `random_step` with scores of responses and of tokens."""
    inputs, rng = random_step(seed, weights=weights), np.random.default_rng(seed + 1)
    token_score = jnp.asarray(rng.normal(0, 1, inputs.tokens.token.shape))
    return RewardInputs(
        score=jnp.asarray(rng.normal(0, 2, inputs.logp.shape)),
        logp=inputs.tokens.logp,
        loss_weight=inputs.tokens.weight,
        pair_weight=inputs.pair_weight,
        tie_weight=jnp.zeros_like(inputs.pair_weight),
        totals=inputs.totals,
        pair_margin=inputs.pair_margin,
        token_score=token_score,
        tokens=inputs.tokens,
    )
