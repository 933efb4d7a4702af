"""How much of a step's time was useful: tokens and floating-point operations of its groups, from their lengths.

MFU = operations of the step / (seconds x devices x a device's dense bf16 peak). Operations are those of
models/llava_onevision/cost.py: matrix products of the groups' own tokens, pictures counted, nothing twice that
rematerialisation does twice, no padding. Where no peak is known (CPUs, unlisted chips) the operations a second are
logged and no MFU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from mmrlhf_jax.batch import EMPTY
from mmrlhf_jax.groups import Lengths
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.cost import GroupShape, group_flops
from mmrlhf_jax.nn.devices import accelerator
from mmrlhf_jax.objectives import ScoreObjective
from mmrlhf_jax.training.data import RunData
from mmrlhf_jax.training.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """Of each step, f64 [steps]: tokens forwarded once, prompts included, operations, and pairs, whatever they weigh.
    `peak`: FLOP/s of all devices together, None where it is not known."""

    tokens: np.ndarray
    flops: np.ndarray
    pairs: np.ndarray
    peak: float | None

    def rates(self, step: int, seconds: float) -> dict[str, float]:
        """The metrics of step `step`, counted from 1, that took `seconds`."""
        tokens, flops = float(self.tokens[step - 1]), float(self.flops[step - 1])
        rates = {
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": float(self.pairs[step - 1]) / seconds,
            "model_tflops_per_second": flops / seconds / 1e12,
        }
        return rates if self.peak is None else {**rates, "mfu": flops / seconds / self.peak}


def work_of(
    recipe: Recipe, config: LlavaOnevisionConfig, data: RunData, lengths: Sequence[Lengths], mesh: Mesh
) -> Work:
    """`lengths` of every row of the dataset."""
    tokens, flops = (
        np.array(each)
        for each in zip(*(item_cost(recipe, config, lengths[i.row], i.responses) for i in data.items.items))
    )
    per_step = np.zeros((3, data.plan.steps))
    for micro in data.plan.micro_batches:
        items = [item for item in micro.items if item != EMPTY]
        per_step[:, micro.step] += tokens[items].sum(), flops[items].sum(), data.items.pairs[items].sum()
    chip = accelerator(mesh.devices.flat[0].device_kind)
    peak = None if chip is None else chip.bf16_flops * mesh.size
    return Work(per_step[0], per_step[1], per_step[2], peak)


def item_cost(
    recipe: Recipe, config: LlavaOnevisionConfig, lengths: Lengths, chosen: Sequence[int]
) -> tuple[float, float]:
    """Tokens and operations of one item, whose group has these lengths and of which these responses take part."""
    scored = (0,) * len(lengths.responses) if isinstance(recipe.objective, ScoreObjective) else lengths.scored
    rates, adapters = recipe.optimizer.rates, recipe.lora.rank > 0
    trains = {"decoder": rates.decoder > 0 and not adapters, "tower": rates.tower > 0 and not adapters}
    reference = recipe.objective.needs_reference and recipe.reference != "stored"
    # rows of a batch, each with its prompt and pictures
    rows = [(k,) for k in chosen] if recipe.data.pairing == "pairs" else [tuple(chosen)]
    tokens, flops = 0, 0.0
    for row in rows:
        responses = tuple(lengths.responses[k] for k in row)
        # of a score objective no token's probability is asked for
        shape = GroupShape(lengths.tiles, lengths.prompt, responses, sum((scored or lengths.responses)[k] for k in row))
        tokens += lengths.prompt + sum(responses)
        flops += group_flops(config, shape, reference=reference, **trains).total
    return tokens, flops
