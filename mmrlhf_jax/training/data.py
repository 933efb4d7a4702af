"""A recipe's data, ready to be walked: measured, selected, bucketed, planned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.data.annotations import AnnotationStore, find
from mmrlhf_jax.data.buckets import BucketPlan, plan_buckets
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.data.pipeline import Item, Items, Loader, Selection, measure, rated_share, reading_plan, select
from mmrlhf_jax.data.plan import StepPlan, plan_steps
from mmrlhf_jax.data.rewards import stored_scores, with_scores
from mmrlhf_jax.groups import Bucket, Group, Lengths, Renderer
from mmrlhf_jax.models.critique_reward.render import check_facts
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.nn.sharding import BatchShare
from mmrlhf_jax.objectives import DDPO, CritiqueReward, Supervised, VisitDPO
from mmrlhf_jax.training.held_out import HeldOut, held_out_rows, with_totals
from mmrlhf_jax.training.recipe import DataConfig, Recipe, trains_on_ties

REFERENCE = "reference"  # the kind of annotation that holds reference log-probs, under the name `logp`


@dataclass(frozen=True)
class RunData:
    items: Items
    buckets: BucketPlan
    plan: StepPlan
    loader: Loader
    critiques: tuple[int, int] | None = None
    """of a run that learns to criticise: responses with a reason to learn from, and all"""
    notes: tuple[str, ...] = ()
    """lines for people on what else of the data is read: ratings, facts"""


def selection_of(recipe: Recipe) -> Selection:
    supervised = isinstance(recipe.objective, Supervised)
    return Selection(
        preferences=not supervised,
        pairing=recipe.data.pairing,
        mean=recipe.data.mean,
        kept=recipe.data.responses,
        margins=recipe.objective.needs_margin,
        critiques=isinstance(recipe.objective, CritiqueReward),
        visits=isinstance(recipe.objective, VisitDPO),
        changed=recipe.objective.segments if isinstance(recipe.objective, DDPO) else None,
        attributes=recipe.reward.attributes,
        ties=trains_on_ties(recipe.objective),
    )


@dataclass(frozen=True)
class Measured:
    """A dataset's groups and their lengths under a renderer, and which rows train and which are held out."""

    dataset: Dataset
    renderer: Renderer
    groups: list[Group]
    lengths: list[Lengths]
    train: list[int]
    held_out: list[int]
    scores: Mapping[int, Sequence[float]] | None = None
    """of every response, by row, where margins are those of a reward model"""


def measure_data(recipe: Recipe, dataset: Dataset, renderer: Renderer, *, held_out: bool = False) -> Measured:
    """`held_out`: the whole dataset is. Raises ValueError where a group is too long for the model, lacks facts that are
    to be shown, or no group would be left on a side."""
    groups, scores = list(dataset.groups()), None
    if recipe.reward.facts:
        check_facts(groups)
    if recipe.margins != "data":
        scores = stored_scores(dataset, recipe.margins, reward_command(dataset.path))
        groups = [with_scores(group, scores[row]) for row, group in enumerate(groups)]
    share = recipe.evaluation.share
    aside = list(range(len(groups))) if held_out else held_out_rows(groups, share, recipe.seed) if share else []
    train = sorted(set(range(len(groups))) - set(aside))
    aside = sorted({groups[row]: row for row in reversed(aside)}.values())  # once, how often a mixture repeats it
    return Measured(dataset, renderer, groups, measure(groups, renderer), train, aside, scores)


def shapes_of(
    measured: Measured, config: LlavaOnevisionConfig, share: BatchShare
) -> Callable[[Recipe], tuple[list[Bucket], int]]:
    """What `training/fit.py` asks: for a recipe whose slots are set, the rows of its buckets, and K."""

    def shapes(recipe: Recipe) -> tuple[list[Bucket], int]:
        items = select(measured.groups, measured.lengths, selection_of(recipe), measured.train)
        rows = 2 if recipe.data.pairing == "pairs" else 1
        buckets = bucket_items(items, recipe.data, config, shards=share.of).buckets
        return [dataclasses.replace(bucket, groups=rows * bucket.groups) for bucket in buckets], items.responses

    return shapes


def plan_data(recipe: Recipe, measured: Measured, config: LlavaOnevisionConfig, share: BatchShare) -> RunData:
    """Plans the whole run. Raises ValueError where the data cannot serve the objective."""
    selection = selection_of(recipe)
    critiques = _critiques(recipe, measured)
    items = select(measured.groups, measured.lengths, selection, measured.train)
    buckets = bucket_items(items, recipe.data, config, shards=share.of)
    plan = plan_steps(
        buckets,
        items.weights,
        groups_per_step=recipe.data.groups_per_step,
        epochs=recipe.data.epochs,
        max_steps=recipe.data.max_steps,
        seed=recipe.seed,
        whole_step=recipe.objective.needs_step_statistics,
    )
    trained = [measured.groups[row] for row in measured.train]
    notes = [rated_share(trained, selection.attributes)] if selection.attributes else []
    notes += [check_facts(trained)] if recipe.reward.facts else []
    return RunData(items, buckets, plan, _loader(measured, items, buckets, selection, share), critiques, tuple(notes))


def _critiques(recipe: Recipe, measured: Measured) -> tuple[int, int] | None:
    """Of a run that learns to criticise: responses with a reason to learn from, and all. Raises ValueError for none."""
    if not isinstance(recipe.objective, CritiqueReward):
        return None
    responses = [response for row in measured.train for response in measured.groups[row].responses]
    learned = sum(response.reason is not None for response in responses)
    if not learned:
        raise ValueError(
            f"none of {len(responses)} responses has a reason, so there is no critique to learn: prepare them with "
            "(mm_rlhf: chosen_reason and rejected_reason; mapped: --map reason=...), or train ScalarReward"
        )
    return learned, len(responses)


def plan_held_out(recipe: Recipe, measured: Measured, config: LlavaOnevisionConfig, share: BatchShare) -> HeldOut:
    """One visit to every held-out group of `measured`, or to all groups of an evaluation dataset of its own."""
    selection = selection_of(recipe)
    items = select(measured.groups, measured.lengths, selection, measured.held_out)
    buckets = bucket_items(items, recipe.data, config, shards=share.of, at_once=len(items.items))
    everything = range(len(items.items))
    rows = sorted({item.row for item in items.items})
    plan = with_totals(reading_plan(items, buckets.buckets, buckets.assignment, rows), items.weights.totals(everything))
    return HeldOut(plan, _loader(measured, items, buckets, selection, share), len(rows))


def _loader(measured: Measured, items: Items, buckets: BucketPlan, selection: Selection, share: BatchShare) -> Loader:
    return Loader(
        dataset=measured.dataset,
        renderer=measured.renderer,
        items=items.items,
        buckets=buckets.buckets,
        selection=selection,
        responses=items.responses,
        share=share.rows,
        scores=measured.scores,
    )


def bucket_items(
    items: Items, data: DataConfig, config: LlavaOnevisionConfig, *, shards: int, at_once: int | None = None
) -> BucketPlan:
    """`at_once`: items that may share micro-batches, a step's by default."""
    return plan_buckets(
        items.lengths,
        max_buckets=data.max_buckets,
        multiple=data.multiple,
        slots_per_shard=data.slots,
        shards=shards,
        groups_per_step=at_once or data.groups_per_step,
        rows_per_group=2 if data.pairing == "pairs" else 1,
        tile_cost=config.tile_cost,
    )


def describe(data: RunData, attention: Callable[[Bucket], str]) -> list[str]:
    """Lines that tell a user what will run, before it does; `attention` names the backend that serves a bucket."""
    items, plan = data.items, data.plan
    lines = [
        f"{len(items.items)} items, up to {items.responses} responses each, {items.pairs.sum()} pairs; "
        f"{items.skipped} groups without a preference skipped",
        f"{plan.steps} steps in {len(plan.micro_batches)} micro-batches; {data.buckets.padding_share:.1%} of slots are "
        f"padding, {plan.filler_share:.1%} of their places for groups stay empty",
    ]
    if data.critiques is not None:
        lines.append("{} of {} responses have a critique to learn from".format(*data.critiques))
    lines += data.notes
    counts = np.bincount(data.buckets.assignment, minlength=len(data.buckets.buckets))
    return lines + [
        f"  bucket {i}: {bucket}, {n} items, attention {attention(bucket)}"
        for i, (bucket, n) in enumerate(zip(data.buckets.buckets, counts, strict=True))
    ]


def reward_command(dataset: str) -> str:
    """The command that stores rewards beside `dataset`; the reward model is the user's to name."""
    return f"python launch/annotate.py --dataset {shlex.quote(dataset)} --model REWARD_MODEL --with reward"


def scores_fingerprint(scores: Mapping[int, Sequence[float]]) -> str:
    """Names the scores that margins are made of."""
    return hashlib.sha256(json.dumps(sorted(scores.items())).encode()).hexdigest()


def reference_key(model_fingerprint: str, renderer: Renderer, dtype: str) -> dict[str, str]:
    """Everything a stored log-prob depends on besides the group itself."""
    return {"model": model_fingerprint, "renderer": renderer.fingerprint, "dtype": dtype}


def annotate_command(recipe: Recipe, dataset: str) -> str:
    """The command that stores beside `dataset` what `recipe` looks for."""
    flags = [
        "--dataset",
        dataset,
        "--model",
        recipe.reference_model or recipe.model,
        "--with",
        "reference",
        "--dtype",
        recipe.compute.dtype,
    ]
    for option in dataclasses.fields(recipe.render):
        value = getattr(recipe.render, option.name)
        if value == option.default:
            continue
        name = option.name.replace("_", "-")
        flags += [f"--render.{name}"] if value is True else [f"--render.{name}", str(value)]
    return "python launch/annotate.py " + shlex.join(flags)


def with_reference(
    loader: Loader, dataset: Dataset, recipe: Recipe, model_fingerprint: str, renderer: Renderer
) -> Loader:
    """The loader of `dataset` with the log-probs that launch/annotate.py stored, where the recipe reads them."""
    if not recipe.objective.needs_reference or recipe.reference != "stored":
        return loader
    key = reference_key(model_fingerprint, renderer, recipe.compute.dtype)
    stored = stored_reference(dataset, key, loader.items, annotate_command(recipe, dataset.path))
    return dataclasses.replace(loader, reference=stored)


def stored_reference(
    dataset: Dataset, key: Mapping[str, str], items: Sequence[Item], command: str
) -> dict[int, np.ndarray]:
    """Reference log-probs f32 [tokens of all responses] by row, from beside each part of `dataset`. Raises ValueError
    with the command that makes them."""
    wanted = {item.row for item in items}
    found: dict[int, np.ndarray] = {}
    for part, row_of in dataset.parts():
        stored = _stored_beside(part, key, command)
        missing = sorted({row_of[row] for row in wanted & row_of.keys()} - stored.keys())
        if missing:
            raise ValueError(
                f"{part.path}: {len(missing)} groups have no reference log-probs yet (row {missing[0]} first). "
                f"Finish them: {command}"
            )
        found |= {row: stored[own] for row, own in row_of.items() if own in stored}
    return found


def _stored_beside(part: PreparedDataset, key: Mapping[str, str], command: str) -> dict[int, np.ndarray]:
    stores = find(part.path, REFERENCE)
    if not any(dict(store.key) == dict(key) for store in stores):
        found = "; ".join(
            f"{s.directory.name} differs in {', '.join(k for k in key if s.key.get(k) != key[k])}" for s in stores
        )
        raise ValueError(
            f"{part.path} has no reference log-probs of this model, rendering and dtype"
            + (f" (there: {found})" if found else "")
            + f". Make them: {command}"
        )
    stored = AnnotationStore.open(part.path, REFERENCE, key).read(part)
    return {row: arrays["logp"] for row, arrays in stored.items()}
