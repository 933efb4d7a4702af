"""Our side of the step benchmark: the gradient of DPO by the trainer's own `accumulate`, with an online reference, or
under LoRA with the adapters off."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from mmrlhf_jax.batch import Entry, GroupBatch, Totals, pack
from mmrlhf_jax.benchmarks.ops import time_parts
from mmrlhf_jax.benchmarks.sides import Settings
from mmrlhf_jax.benchmarks.workload import Case, as_pairs, random_group
from mmrlhf_jax.data.buckets import MULTIPLE
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.nn import lora
from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh, replicated
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.model import load_adapters, load_model
from mmrlhf_jax.training.recipe import INFERENCE, LoraConfig, Recipe
from mmrlhf_jax.training.runtime import set_up_jax, to_devices
from mmrlhf_jax.training.setup import compute_of
from mmrlhf_jax.training.state import partition, sharing_tower, trains
from mmrlhf_jax.training.step import Sums, make_accumulate, make_zero_sums, metric_names

CPU_MULTIPLE = 64  # slots of our buckets; the training default of 128 serves attention kernels of accelerators


class OurSide:
    """A policy and its reference on the first device. `as_pairs`: every pair as two full sequences."""

    def __init__(self, settings: Settings, *, as_pairs: bool):
        set_up_jax(settings.compute.dtype)
        self._as_pairs, self._mesh = as_pairs, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        recipe = Recipe(
            objective=DPO(beta=settings.beta),
            compute=settings.compute,
            lora=LoraConfig(rank=settings.lora_rank),
            reference="lora_off" if settings.lora_rank else "online",
        )
        self._config, params, self._reference = _load(settings, recipe, self._mesh)
        self._trainable, self._frozen = partition(params, trains(recipe))
        self._compute = compute_of(recipe, self._mesh)
        shardings = Sums(jax.tree.map(lambda p: p.sharding, self._trainable), replicated(self._mesh))
        self._accumulate = make_accumulate(self._config, self._compute, recipe.objective, sums_sharding=shardings)
        names = metric_names(recipe.objective)
        self._zeros = make_zero_sums(self._trainable, names, sums_sharding=shardings)
        self._norm = jax.jit(lambda tree: sum(jnp.vdot(g, g) for g in jax.tree.leaves(tree)))
        self._key = jax.device_put(jax.random.key(0), replicated(self._mesh))

    def prepare(self, case: Case, pairs: tuple[tuple[int, int], ...]) -> None:
        groups = [random_group(self._config, case, seed) for seed in range(case.groups)]
        self._micro = [[pair] for group in groups for pair in as_pairs(group, pairs)] if self._as_pairs else [groups]
        wins, scored = (
            sum(case.responses[i] for i, _ in pairs),
            sum(case.responses[k] for pair in pairs for k in pair),
        )
        n = case.groups
        tokens = scored if self._as_pairs else sum(case.responses)
        self._totals = Totals(n * len(pairs), n * wins, n * tokens, n)
        self._shape = case.shape(self._config)

    def make_batches(self) -> None:
        """Packs the step's groups, already rendered, into batches and moves these to the device."""
        self._batches: list[GroupBatch] = []  # the last step's are freed before there are new ones
        self._batches = [to_devices(self._packed(entries), self._mesh) for entries in self._micro]
        jax.block_until_ready(self._batches)

    def _packed(self, entries: list[Entry]) -> GroupBatch:
        one = entries[0].rendered  # all are of one size
        lengths = [len(branch.token) for branch in one.branches]
        multiple = CPU_MULTIPLE if self._compute.platform == "cpu" else MULTIPLE
        prompt, response = (
            -(-tokens // multiple) * multiple
            for tokens in (len(one.prompt), max(lengths) if self._as_pairs else sum(lengths))
        )
        return pack(
            entries,
            Bucket(len(entries), len(one.tiles), prompt, response),
            self._totals,
            responses=len(lengths),
            tokens_per_tile=self._config.tokens_per_tile,
            tile_size=self._config.tower.image_size,
            separate=self._as_pairs,
        )

    def step(self) -> tuple[float, float, float]:
        began, sums = time.perf_counter(), self._zeros()
        with jax.set_mesh(self._mesh):
            for batch in self._batches:
                sums, _ = self._accumulate(self._trainable, self._frozen, self._reference, sums, batch, self._key)
        jax.block_until_ready(sums)
        seconds = time.perf_counter() - began
        return seconds, float(sums.metrics["loss"]), math.sqrt(float(self._norm(sums.gradients)))

    def parts(self, repeats: int) -> list[dict[str, Any]]:
        (batch,) = self._batches
        models = (self._trainable, self._frozen, self._reference)
        with jax.set_mesh(self._mesh):
            return time_parts(*models, self._config, self._compute, batch, self._shape, repeats)

    def device_peak(self) -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _load(settings: Settings, recipe: Recipe, mesh: Any) -> tuple[Any, Any, Any]:
    """Configuration, policy and reference, which is the policy's own base under LoRA; one tower for both."""
    models, rules = settings.models, recipe.sharding
    if models.adapter is not None:
        adapted = load_adapters(models.adapter, mesh, rules, rates=INFERENCE)
        assert adapted is not None
        return adapted.config, adapted.params, sharing_tower(recipe, lora.strip(adapted.params))
    assert models.reference is not None
    policy = load_model(models.policy, mesh, rules, rates=recipe.optimizer.rates)
    reference = load_model(models.reference, mesh, rules, rates=INFERENCE).params
    return policy.config, policy.params, sharing_tower(recipe, reference)
