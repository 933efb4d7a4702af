"""What one device holds during a step, by kind: counted for what a run keeps, estimated for what comes and goes.

The counted part is exact, shape by shape, as arrays lie on the mesh. The estimate follows the program: what the rung of
recomputation keeps of every layer, and what is at work at the fullest moment: in the vision tower, in one decoder layer
of the backward pass, or in one chunk of the vocabulary. A compiler may do better or worse; TPUs' can be asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.nn.attention import QUERY_BLOCK, TIERS, choose_backend
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.nn.remat import RematRung
from mmrlhf_jax.nn.sharding import BATCH_AXES, AnyMesh
from mmrlhf_jax.objectives import ScoreObjective
from mmrlhf_jax.training.planning import AbstractRun, abstract_batch, abstract_run, bytes_per_device
from mmrlhf_jax.training.recipe import Recipe
from mmrlhf_jax.training.state import combine, first_moment, rate_of
from mmrlhf_jax.training.step import multiplied_in_compute_dtype

# XLA was seen to take up to this much of the estimate: of 0.5B and 7B with the typical bucket for v5e, v5p and v6e, of
# 0.5B with each rung for CPUs. Of a bucket so small that little but weights is estimated it took up to 1.3.
MARGIN = 1.15
GRADIENTS = "gradients of a micro-batch"  # come and go, but their size is known


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device by kind; `passing`, but for GRADIENTS, is estimated."""

    kept: dict[str, int]
    passing: dict[str, float]

    @property
    def total(self) -> float:
        """To be safe: all that is known, and a margin on what is estimated."""
        known = self.passing.get(GRADIENTS, 0.0)
        return sum(self.kept.values()) + known + MARGIN * (sum(self.passing.values()) - known)


@dataclass(frozen=True)
class Local:
    """One device's part of a micro-batch: groups, tokens of each, splits of a layer (`tensor`), bytes of a value."""

    groups: int
    tokens: int
    tensor: int
    value: int


def footprint(
    recipe: Recipe,
    config: LlavaOnevisionConfig,
    bucket: Bucket,
    mesh: AnyMesh,
    *,
    responses: int,
    platform: str,
) -> Footprint:
    """Of a micro-batch of `bucket` on `platform` ("gpu", "tpu", "cpu"). Raises ValueError where mesh and model, or
    mesh and bucket, do not divide."""
    local = local_part(recipe, bucket, mesh)
    run = abstract_run(recipe, config, mesh)
    return Footprint(
        kept_bytes(run, abstract_batch(bucket, responses, config, mesh)),
        _passing(recipe, config, bucket, local, run, platform),
    )


def local_part(recipe: Recipe, bucket: Bucket, mesh: AnyMesh) -> Local:
    """Raises ValueError where the groups of a micro-batch do not divide over the devices that split it."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if bucket.groups % shards:
        raise ValueError(f"{bucket.groups} groups of a micro-batch do not divide over data x fsdp = {shards} devices")
    value = 2 if recipe.compute.dtype == "bfloat16" else 4
    return Local(bucket.groups // shards, bucket.prompt + bucket.response, mesh.shape["tensor"], value)


def kept_bytes(run: AbstractRun, batch: Any) -> dict[str, int]:
    """What lies on a device from step to step, and a micro-batch while the next one is on its way."""
    state = run.state
    moments = bytes_per_device(state.optimizer)
    first = bytes_per_device(first_moment(state.optimizer))
    return {
        "parameters that train, fp32": bytes_per_device(state.trainable),
        "frozen parameters": bytes_per_device(state.frozen),
        "gradients, summed": bytes_per_device(run.sums),
        "first moment": first,
        "second moment": moments - first,
        "reference model": 0 if run.lends_reference else bytes_per_device(run.reference),
        "two batches": 2 * bytes_per_device(batch),
    }


def gathered_bytes(tree: Any, value: int) -> float:
    """What a tree of ShapeDtypeStructs takes when it is whole but for `tensor`, at `value` bytes a number: a layer's
    weights as they are multiplied."""
    total = 0.0
    for _, leaf in named_leaves(tree):
        split = leaf.sharding.mesh.shape["tensor"] if "tensor" in _axes(leaf) else 1
        total += math.prod(leaf.shape) * value / split
    return total


def _axes(leaf: Any) -> set[str]:
    return {name for over in leaf.sharding.spec if over for name in ((over,) if isinstance(over, str) else over)}


def _passing(
    recipe: Recipe, config: LlavaOnevisionConfig, bucket: Bucket, local: Local, run: AbstractRun, platform: str
) -> dict[str, float]:
    rung, policy = recipe.compute.rung, combine(run.state.trainable, run.state.frozen)
    layer = gathered_bytes(policy.decoder.layers, local.value) / config.decoder.layers
    decoder = rate_of("decoder", recipe.optimizer.rates) > 0 and not recipe.lora.rank
    kernels = sum(
        bytes_per_device(leaf) for name, leaf in named_leaves(run.state.trainable) if multiplied_in_compute_dtype(name)
    )
    rounded = kernels * local.value / 4
    gradients = {GRADIENTS: bytes_per_device(run.sums.gradients) - kernels + rounded}
    layers = {
        f"what layers keep, remat {rung!r}": config.decoder.layers * saved_of_decoder_layer(config, bucket, local, rung)
    }
    if local.value < 4:
        layers["kernels, rounded"] = rounded
    features = {"picture features": _features(config, bucket, local)}
    tower = {"at work on the tower": _working_tower(config, bucket, local)}
    if rate_of("tower", recipe.optimizer.rates):
        kept = {"what the tower keeps": config.tower.layers * saved_of_tower_layer(config, bucket, local, rung)}
        # a block's backward pass holds its scores and their gradients, when the decoder's inputs are gone
        tower = {**gradients, **kept, "at work on the tower": 2 * tower["at work on the tower"]}
        layers |= kept
    table = _table(run)
    if table is not None:
        gradients["gradient of the vocabulary, before it is split"] = gathered_bytes(table, local.value)
    moments = [
        tower,
        # its weights, those of the next, on their way, and the gradient before it is split again
        {**gradients, **layers, **features, "at work on one decoder layer": layer * (3 if decoder else 2)
         + _working_decoder_layer(recipe, config, bucket, local, platform)},
    ]  # fmt: skip
    if not isinstance(recipe.objective, ScoreObjective):  # which reads no log-probs
        vocabulary = _working_vocabulary(recipe, config, bucket, local, run)
        moments.append({**layers, **features, "at work on the vocabulary": vocabulary})
    return max(moments, key=lambda held: sum(held.values()))


def saved_of_decoder_layer(config: LlavaOnevisionConfig, bucket: Bucket, local: Local, rung: RematRung) -> float:
    """Bytes one decoder layer keeps for its backward pass: its input, and the values of its rung (nn/remat.py)."""
    d = config.decoder
    heads, keys = d.heads * d.head_dim, 2 * d.kv_heads * d.head_dim
    kept = {
        "full": 0,
        "attention": heads,
        "projections": 2 * heads + keys + 2 * d.mlp,
        # queries in blocks, and an inner width six times: gate, up, three of the activation, their product
        "none": 3 * heads + 2 * keys + 6 * d.mlp,
    }[rung]
    whole = d.embed * local.value
    if rung == "none":
        whole += 2 * d.embed * (8 + local.value)  # two norms, in fp32 and out of it
    inside = local.groups * local.tokens * (whole + kept * local.value / local.tensor)
    return inside + (_weights_kept(config, bucket, local) if rung == "none" else 0)


def saved_of_tower_layer(config: LlavaOnevisionConfig, bucket: Bucket, local: Local, rung: RematRung) -> float:
    """As `saved_of_decoder_layer`, of a block of a tower that trains, for all tiles of the device's groups."""
    t, patches = config.tower, config.tokens_per_tile
    kept = {"full": 0, "attention": t.embed, "projections": 4 * t.embed + t.mlp, "none": 6 * t.embed + 2 * t.mlp}[rung]
    scores = t.heads * patches * 6 if rung == "none" else 0  # fp32, and rounded for the product with the values
    whole = t.embed * local.value * (3 if rung == "none" else 1)
    tokens = local.groups * bucket.tiles * patches
    return tokens * (whole + (kept * local.value + scores) / local.tensor)


def _features(config: LlavaOnevisionConfig, bucket: Bucket, local: Local) -> float:
    """The projector's input, inside and output, and the rows that prompts tap."""
    rows = local.groups * bucket.tiles * config.tokens_per_tile
    return rows * local.value * (config.tower.embed + 4 * config.decoder.embed)


def _working_decoder_layer(
    recipe: Recipe, config: LlavaOnevisionConfig, bucket: Bucket, local: Local, platform: str
) -> float:
    """A layer computed again and its gradients: values, their gradients, norms in fp32, the scores of a block."""
    d = config.decoder
    again = 3 * d.heads * d.head_dim + 4 * d.kv_heads * d.head_dim + 3 * d.mlp
    values = local.groups * local.tokens * (2 * again * local.value / local.tensor + d.embed * (4 * local.value + 12))
    compute = recipe.compute
    backend = choose_backend(compute.attention, platform, bucket.prompt, d.head_dim, compute.dtype)
    queries = min(QUERY_BLOCK, max(bucket.response, bucket.prompt if backend == "xla" else 0))
    # of a block of queries, scores and their gradients, fp32, and the weights that are kept of the others
    scores = local.groups * local.tokens * d.heads * (8 * queries) / local.tensor + _weights_kept(config, bucket, local)
    return values + scores


def _weights_kept(config: LlavaOnevisionConfig, bucket: Bucket, local: Local) -> float:
    """Bytes of attention weights a layer keeps between its forward and backward pass: those of responses, fp32 and
    rounded, unless there is more than a block of queries a tier, which is then computed again."""
    if bucket.response > QUERY_BLOCK * TIERS:
        return 0.0
    each = 4 + (local.value if local.value < 4 else 0)
    return local.groups * bucket.response * local.tokens * config.decoder.heads * each / local.tensor


def _working_vocabulary(
    recipe: Recipe, config: LlavaOnevisionConfig, bucket: Bucket, local: Local, run: AbstractRun
) -> float:
    """Logits, probabilities and their gradient of one chunk, the gathered table and, where it trains, its gradient."""
    d = config.decoder
    positions = local.groups * bucket.response
    chunk = min(recipe.compute.vocab_chunk, d.vocab) / local.tensor
    table = d.vocab * d.embed * local.value / local.tensor
    moves = 1 if _table(run) is None else 2
    return positions * (chunk * (8 + local.value) + d.embed * (8 + local.value)) + table * moves


def _table(run: AbstractRun) -> Any:
    """The table that log-probs are read from, where it trains."""
    decoder = run.state.trainable.decoder
    tied = combine(run.state.trainable, run.state.frozen).decoder.unembedding is None
    return decoder.embedding if tied else decoder.unembedding


def _working_tower(config: LlavaOnevisionConfig, bucket: Bucket, local: Local) -> float:
    """Pixels, and one block over all tiles: it forms whole score matrices, in fp32, and their softmax."""
    t, patches = config.tower, config.tokens_per_tile
    pixels = 3 * t.image_size**2 * (4 + local.value)
    attention = 8 * t.heads * patches**2 / local.tensor + patches * local.value * t.embed * (2 + 3 / local.tensor)
    mlp = patches * local.value * (2 * t.embed + 2 * t.mlp / local.tensor)
    return local.groups * bucket.tiles * (pixels + max(attention, mlp))
