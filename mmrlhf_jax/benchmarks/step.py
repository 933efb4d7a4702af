"""One group step against the same preferences as separate pairs, which is what trainers that forward every pair do:
same weights, same groups, same loss; interleaved repeats, medians, ratios."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmrlhf_jax.batch import Entry, GroupBatch, Totals, pack
from mmrlhf_jax.command import CommandError
from mmrlhf_jax.groups import NEWLINE, Branch, Bucket, Rendered
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.siglip.config import SiglipConfig
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh, replicated
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import ComputeConfig, Recipe
from mmrlhf_jax.training.runtime import set_up_jax, to_devices
from mmrlhf_jax.training.setup import compute_of
from mmrlhf_jax.training.state import partition, rate_of
from mmrlhf_jax.training.step import Sums, make_accumulate, make_zero_sums, metric_names


@dataclass(frozen=True)
class Step:
    """The gradient of DPO over all pairs of one group: packed as a group, and as separate pairs of full sequences."""

    responses: tuple[int, ...] = (2, 4)
    """the K to time"""
    prompt: int = 1300
    """prompt tokens, 730 of them a 384 x 384 picture"""
    response: int = 64
    """tokens of each response"""
    repeats: int = 5
    decoder_layers: int = 4
    embed: int = 512
    vocab: int = 4096
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(dtype="float32"))
    output: str | None = None
    """a JSON file for the figures"""


def model_config(command: Step) -> LlavaOnevisionConfig:
    heads = command.embed // 64
    return LlavaOnevisionConfig(
        tower=SiglipConfig(embed=256, layers=4, heads=4, mlp=1024),
        decoder=Qwen2Config(
            vocab=command.vocab,
            embed=command.embed,
            layers=command.decoder_layers,
            heads=heads,
            kv_heads=max(1, heads // 4),
            head_dim=64,
            mlp=3 * command.embed,
            tied=True,
        ),
        image_token=0,
        video_token=1,
    )


def random_group(config: LlavaOnevisionConfig, command: Step, responses: int) -> Entry:
    """A picture's base tile and newline, then text; strictly ranked responses of equal length."""
    rng = np.random.default_rng(0)
    features = config.tokens_per_tile
    index = np.zeros((command.prompt, 4), np.int32)
    weight = np.zeros((command.prompt, 4), np.float32)
    index[:features, 0], index[features, 0] = np.arange(features), NEWLINE
    weight[: features + 1, 0] = 1
    side = config.tower.image_size

    def tokens(count: int) -> np.ndarray:
        return rng.integers(2, config.decoder.vocab, count).astype(np.int32)

    ones = np.ones(command.response, np.float32)
    return Entry(
        row=0,
        rendered=Rendered(
            tiles=rng.integers(0, 256, (1, side, side, 3)).astype(np.uint8),
            prompt=tokens(command.prompt),
            tap_index=index,
            tap_weight=weight,
            branches=tuple(Branch(tokens(command.response), ones) for _ in range(responses)),
        ),
        pair_weight=np.triu(np.ones((responses, responses), np.float32), 1),
        pair_margin=np.zeros((responses, responses), np.float32),
        rank=np.arange(responses, dtype=np.int32),
        score=np.zeros(responses, np.float32),
        reference=tuple(-rng.uniform(1, 9, command.response).astype(np.float32) for _ in range(responses)),
    )


def as_pairs(group: Entry) -> list[Entry]:
    """Every preference of the group as an entry of its own, chosen first."""
    r, upper = group.rendered, np.array([[0, 1], [0, 0]], np.float32)
    reference = group.reference or ()
    return [
        Entry(
            row=0,
            rendered=Rendered(r.tiles, r.prompt, r.tap_index, r.tap_weight, (r.branches[i], r.branches[j])),
            pair_weight=upper,
            pair_margin=0 * upper,
            rank=np.array([0, 1], np.int32),
            score=np.zeros(2, np.float32),
            reference=(reference[i], reference[j]),
        )
        for i, j in zip(*np.nonzero(group.pair_weight), strict=True)
    ]


def time_step(command: Step) -> None:
    set_up_jax(command.compute.dtype)
    recipe = Recipe(objective=DPO(), compute=command.compute)
    config, mesh = model_config(command), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    params = nn_params.initialise(declare(config), 0, mesh, recipe.sharding)
    trainable, frozen = partition(params, lambda name: rate_of(name, recipe.optimizer.rates) > 0)
    shardings = Sums(jax.tree.map(lambda p: p.sharding, trainable), replicated(mesh))
    accumulate = make_accumulate(config, compute_of(recipe, mesh), recipe.objective, sums_sharding=shardings)
    zeros = make_zero_sums(trainable, metric_names(recipe.objective), sums_sharding=shardings)
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    print(
        f"{jax.devices()[0].device_kind}, {nn_params.count(declare(config)) / 1e6:.1f} M parameters "
        f"({config.decoder.layers} x {config.decoder.embed}, vocabulary {config.decoder.vocab}, tower "
        f"{config.tower.layers} x {config.tower.embed}), prompt {command.prompt} with one picture, responses of "
        f"{command.response}, {command.compute.dtype}, remat {command.compute.remat}"
    )

    def step(batches: list[GroupBatch]) -> tuple[float, float, float]:
        began, sums = time.perf_counter(), zeros()
        with jax.set_mesh(mesh):
            for batch in batches:
                sums, _ = accumulate(trainable, frozen, None, sums, batch, key)
        norm = math.sqrt(sum(float(jax.numpy.vdot(g, g)) for g in jax.tree.leaves(sums.gradients)))
        return time.perf_counter() - began, float(sums.metrics["loss"]), norm

    rows = [_time_one(command, config, k, mesh, step) for k in command.responses]
    if command.output:
        Path(command.output).write_text(json.dumps({"command": dataclasses.asdict(command), "rows": rows}, indent=2))


def _time_one(command: Step, config: LlavaOnevisionConfig, k: int, mesh: Any, step: Any) -> dict[str, Any]:
    group = random_group(config, command, k)
    pairs = as_pairs(group)

    def slots(tokens: int) -> int:  # both forms padded alike
        return -(-tokens // 64) * 64

    shape = (1, slots(command.prompt))
    totals = Totals(len(pairs), sum(command.response for _ in pairs), k * command.response, 1)
    sizes: Any = {"tokens_per_tile": config.tokens_per_tile, "tile_size": config.tower.image_size}
    whole = [pack([group], Bucket(1, *shape, slots(k * command.response)), totals, responses=k, **sizes)]
    apart = [
        pack([pair], Bucket(1, *shape, slots(command.response)), totals, responses=2, separate=True, **sizes)
        for pair in pairs
    ]
    forms = {"group": [to_devices(b, mesh) for b in whole], "pairs": [to_devices(b, mesh) for b in apart]}
    first = {name: step(batches) for name, batches in forms.items()}  # compiles
    if not math.isclose(
        first["group"][1], first["pairs"][1], rel_tol=1e-3 if command.compute.dtype == "float32" else 0.05
    ):
        raise CommandError(f"the two forms disagree, so their times mean nothing: loss {first}")
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(command.repeats):
        for name, batches in forms.items():
            seconds[name].append(step(batches)[0])
    ratios = [b / a for a, b in zip(seconds["group"], seconds["pairs"], strict=True)]
    slots_of = {name: sum(math.prod(b.token.shape) for b in batches) for name, batches in forms.items()}
    row: dict[str, Any] = {
        "K": k,
        "pairs": len(pairs),
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "slots": slots_of,
        "ratio": statistics.median(ratios),
        "ratio_range": (min(ratios), max(ratios)),
        "loss": {name: f[1] for name, f in first.items()},
        "gradient_norm": {name: f[2] for name, f in first.items()},
    }
    print(
        f"K={k}, {len(pairs)} pairs: group {row['seconds']['group']:.2f} s ({slots_of['group']} slots), separate pairs "
        f"{row['seconds']['pairs']:.2f} s ({slots_of['pairs']} slots): {row['ratio']:.2f}x faster "
        f"({min(ratios):.2f} to {max(ratios):.2f}), by slots {slots_of['pairs'] / slots_of['group']:.2f}x; same loss "
        f"{first['group'][1]:.6f} / {first['pairs'][1]:.6f}, same gradient norm {first['group'][2]:.5f} / "
        f"{first['pairs'][2]:.5f}",
        flush=True,
    )
    return row
