"""One optimizer step as two compiled functions: `accumulate` a micro-batch's gradients, `apply` their sum.

Losses are sums divided by the totals of the whole step, so adding gradients over micro-batches is exact however a step
was cut. A kernel's gradient is differentiated in the dtype it is multiplied in, and summed in fp32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmrlhf_jax.batch import GroupBatch
from mmrlhf_jax.models.critique_reward.config import CritiqueRewardConfig
from mmrlhf_jax.models.critique_reward.model import outputs, scores, scores_and_logps, scores_of_tokens
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import (
    Compute,
    branch_sums,
    collisions_of,
    hidden_states,
    logps_of,
    response_logps,
    summed_distribution_of,
    tower_features,
)
from mmrlhf_jax.nn.compiler import compiler_options
from mmrlhf_jax.nn.params import map_named
from mmrlhf_jax.nn.sharding import constrain
from mmrlhf_jax.objectives import (
    AttributeObjective,
    AveragingObjective,
    BetaDPO,
    CritiqueReward,
    MinAvgOut,
    Objective,
    Pairwise,
    PreferenceInputs,
    RewardInputs,
    RewardObjective,
    ScoreObjective,
    StepTotals,
    Supervised,
    SupervisedInputs,
    Tokens,
    TokenwiseReward,
)
from mmrlhf_jax.training.state import TrainState, combine
from mmrlhf_jax.training.tokens import group_tokens


@struct.dataclass
class Sums:
    """What adds up over a step: gradients of the trainable parameters, fp32, and metrics."""

    gradients: Any
    metrics: Any  # name -> f32 []
    averages: Any = struct.field(default_factory=dict)  # what the objective keeps, moved; its step is one micro-batch


class Seen(NamedTuple):
    """Which groups a micro-batch held (i32 [B], -1 = filler) and whether their log-probs and scores came out finite
    (bool [B])."""

    row: jax.Array
    finite: jax.Array


def loss_and_metrics(
    params: Any,
    reference: Any,
    batch: GroupBatch,
    key: jax.Array,
    *,
    config: LlavaOnevisionConfig,
    compute: Compute,
    objective: Objective,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Seen]]:
    """Loss f32 [] and metrics of one micro-batch; `reference` is a model tree, without a tower where the policy's
    serves both, or None when the batch brings log-probs. Of an objective that keeps averages use `make_accumulate`."""
    loss, (metrics, seen, _) = _evaluated(params, reference, batch, key, None, config, compute, objective)
    return loss, (metrics, seen)


def _evaluated(
    params: Any,
    reference: Any,
    batch: GroupBatch,
    key: jax.Array,
    averages: Any,
    config: LlavaOnevisionConfig,
    compute: Compute,
    objective: Objective,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Seen, dict[str, jax.Array]]]:
    """`loss_and_metrics`, and the averages that the objective leaves behind."""
    totals = StepTotals(
        pair_weight=batch.total_pairs,
        chosen_tokens=batch.total_chosen_tokens,
        tokens=batch.total_tokens,
        groups=batch.total_groups,
        ties=batch.total_ties,
        ratings=0.0 if batch.total_ratings is None else batch.total_ratings,
    )
    if isinstance(objective, ScoreObjective):
        score, inputs = _scored(params, batch, totals, config, compute, objective)
        loss, metrics = objective(inputs)
        return loss, ({"loss": loss, **metrics}, _seen(batch, _of_responses(score, batch)), {})
    features = None  # of the tower, where policy and reference share one
    if reference is not None and reference.tower is None and batch.tiles.shape[1]:
        features = tower_features(params, config, batch.tiles, compute)
    collision = None
    if isinstance(objective, CritiqueReward):
        score, (logp, entropy) = scores_and_logps(params, config, batch, compute)
    else:
        hidden = hidden_states(params, config, batch, compute, features)
        logp, entropy = logps_of(params, hidden, batch, compute)
        if isinstance(objective, Pairwise) and objective.wpo:
            collision = collisions_of(params, hidden, batch, compute)
    scored = batch.loss_weight != 0
    logp = jnp.where(scored, logp, 0.0)  # padding may hold anything
    summed = branch_sums(batch.loss_weight * logp, batch)
    moved: dict[str, jax.Array] = {}
    if isinstance(objective, Supervised):
        output = None
        if isinstance(objective, MinAvgOut):
            output = summed_distribution_of(params, hidden, batch, compute)
        spoken = SupervisedInputs(logp, batch.loss_weight, totals, output, averages)
        loss, metrics = objective(spoken)
        moved = objective.moved_averages(spoken) if isinstance(objective, MinAvgOut) else {}
    elif isinstance(objective, CritiqueReward):
        loss, metrics = objective(_reward_inputs(score, logp, batch, totals))
        summed += _of_responses(score, batch)  # is finite where both are
    else:
        reference_logp = batch.reference_logp
        if reference is not None:
            reference_logp = jax.lax.stop_gradient(response_logps(reference, config, batch, compute, features).logp)
        compared = _preference_inputs(logp, summed, reference_logp, collision, batch, totals, key)
        compared = dataclasses.replace(compared, averages=averages)
        loss, metrics = objective(compared)
        moved = objective.moved_averages(compared) if isinstance(objective, BetaDPO) else {}
    entropy = jnp.sum(jnp.where(scored, entropy, 0.0)) / jnp.maximum(batch.total_tokens, 1.0)
    moved = jax.lax.stop_gradient(moved)
    return loss, ({"loss": loss, **metrics, "entropy": entropy}, _seen(batch, summed), moved)


def _scored(
    params: Any,
    batch: GroupBatch,
    totals: StepTotals,
    config: LlavaOnevisionConfig,
    compute: Compute,
    objective: ScoreObjective,
) -> tuple[jax.Array, RewardInputs]:
    """Scores f32 [B, K], and the inputs of an objective that reads scores alone; of ratings, outputs in place of
    scores: those of all attributes, summed, are finite where each is."""
    if isinstance(objective, AttributeObjective):
        assert isinstance(config, CritiqueRewardConfig)
        output = outputs(params, config, batch, compute)
        score = output.sum(axis=(-2, -1))
        inputs = _reward_inputs(score, None, batch, totals)
        rating = {"rating": batch.rating, "rating_mask": batch.rating_mask}
        return score, dataclasses.replace(inputs, output=output, **rating)
    if not isinstance(objective, TokenwiseReward):
        score = scores(params, config, batch, compute)
        return score, _reward_inputs(score, None, batch, totals)
    score, token_score = scores_of_tokens(params, config, batch, compute)
    none = jnp.zeros_like(token_score)
    inputs = _reward_inputs(score, None, batch, totals)
    tokens = group_tokens(batch, none, none)
    return score, dataclasses.replace(inputs, tokens=tokens, token_score=token_score.reshape(tokens.token.shape))


def _preference_inputs(
    logp: jax.Array,
    summed: jax.Array,
    reference_logp: jax.Array,
    collision: jax.Array | None,
    batch: GroupBatch,
    totals: StepTotals,
    key: jax.Array,
) -> PreferenceInputs:
    scored = batch.loss_weight != 0
    return PreferenceInputs(
        logp=summed,
        reference_logp=branch_sums(jnp.where(scored, batch.loss_weight * reference_logp, 0.0), batch),
        length=branch_sums(batch.loss_weight, batch),
        pair_weight=batch.pair_weight,
        pair_margin=batch.pair_margin,
        totals=totals,
        key=key,
        score=batch.score,
        tokens=group_tokens(batch, logp, reference_logp, collision),
    )


def _reward_inputs(score: jax.Array, logp: jax.Array | None, batch: GroupBatch, totals: StepTotals) -> RewardInputs:
    """`logp` None: there is no critique."""
    return RewardInputs(
        score=score,
        logp=jnp.zeros_like(batch.loss_weight) if logp is None else logp,
        loss_weight=batch.loss_weight,
        pair_weight=batch.pair_weight,
        tie_weight=batch.tie_weight,
        totals=totals,
        pair_margin=batch.pair_margin,
    )


def _of_responses(score: jax.Array, batch: GroupBatch) -> jax.Array:
    """Scores [B, K] where there is a response, 0 elsewhere."""
    return jnp.where(batch.response_mask, score, 0.0)


def _seen(batch: GroupBatch, values: jax.Array) -> Seen:
    """`values` [B, K] of a group's responses say whether it came out finite."""
    finite = jnp.all(jnp.isfinite(values), axis=-1)
    # whole on every device: each process names the rows of all of them
    return Seen(constrain(batch.row), constrain(finite))


def multiplied_in_compute_dtype(name: str) -> bool:
    """Whether the forward uses the parameter called `name` only rounded to its compute dtype, and in one place, so that
    its gradient has no more digits than that: every kernel but those of a reward model's head. Tables are no kernels:
    many tokens add to one row."""
    return name.endswith("_kernel") and not name.startswith("head.")


def rounded(params: Any, dtype: str) -> Any:
    """`params` as the forward multiplies with them. Their gradients are in `dtype` too: in bf16 half the bytes, and
    half of what devices exchange."""
    return map_named(
        lambda name, leaf: leaf.astype(dtype) if multiplied_in_compute_dtype(name) else leaf,
        params,
    )


def make_accumulate(
    config: LlavaOnevisionConfig, compute: Compute, objective: Objective, *, sums_sharding: Any
) -> jax.stages.Wrapped:
    """(trainable, frozen, reference, sums, batch, key, averages) -> (sums, seen); `sums` is donated. `averages` are
    those of the step before, left out for an objective that keeps none."""

    def accumulate(trainable, frozen, reference, sums, batch, key, averages=None):
        def loss(trainable):
            params = combine(trainable, frozen)
            return _evaluated(params, reference, batch, key, averages, config, compute, objective)

        gradients, (metrics, seen, moved) = jax.grad(loss, has_aux=True)(rounded(trainable, compute.dtype))
        return jax.tree.map(jnp.add, sums, Sums(gradients, metrics, moved)), seen

    return jax.jit(
        accumulate,
        donate_argnums=3,
        out_shardings=(sums_sharding, None),
        compiler_options=compiler_options(compute.platform, "step"),
    )


def metric_names(objective: Objective) -> tuple[str, ...]:
    """The metrics `accumulate` sums for this objective, found without computing anything."""

    def metrics() -> dict[str, jax.Array]:
        one, row, pair = jnp.ones(()), jnp.ones((1, 2)), jnp.ones((1, 2, 2))
        slot = jnp.zeros((1, 2), jnp.int32)
        tokens = Tokens(slot, slot, row, row, row, changed=pair > 0, collision=row)
        totals = StepTotals(one, one, one, one, one, one)
        averages = initial_averages(objective, 2)
        if isinstance(objective, Supervised):
            return objective(SupervisedInputs(row, row, totals, row[0], averages))[1]
        if isinstance(objective, RewardObjective):
            rated = {"output": jnp.ones((1, 2, 1, 1)), "rating": row[..., None], "rating_mask": row[..., None] > 0}
            return objective(RewardInputs(row, row, row, pair, pair, totals, pair, row, tokens, **rated))[1]
        compared = PreferenceInputs(row, row, row, pair, pair, totals, jax.random.key(0), row, tokens, averages)
        return objective(compared)[1]

    names = ("loss", *jax.eval_shape(metrics))
    return names if isinstance(objective, ScoreObjective) else (*names, "entropy")


def initial_averages(objective: Objective, vocab: int) -> dict[str, jax.Array]:
    """What `objective` keeps over steps, before the first; {} of most."""
    return objective.initial_averages(vocab) if isinstance(objective, AveragingObjective) else {}


def make_zero_sums(
    trainable: Any, metric_names: tuple[str, ...], *, sums_sharding: Any, averages: Any = None
) -> jax.stages.Wrapped:
    """What a step starts from, born in its shards; `averages` as the state has them."""
    kept = {} if averages is None else averages
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), trainable)

    def zeros() -> Sums:
        return Sums(
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            {name: jnp.zeros((), jnp.float32) for name in metric_names},
            {name: jnp.zeros(value.shape, value.dtype) for name, value in kept.items()},
        )

    return jax.jit(zeros, out_shardings=sums_sharding)


def make_apply(optimizer: optax.GradientTransformation, *, state_sharding: Any) -> jax.stages.Wrapped:
    """(state, sums) -> (state, metrics of the step); `state` is donated."""

    def apply(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, jax.Array]]:
        updates, moments = optimizer.update(sums.gradients, state.optimizer, state.trainable)
        metrics = {
            **sums.metrics,
            "grad_norm": optax.global_norm(sums.gradients),
            "update_norm": optax.global_norm(updates),
        }
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, state.frozen, moments, sums.averages), metrics

    return jax.jit(apply, donate_argnums=0, out_shardings=(state_sharding, None))
