"""What a step over groups costs in floating-point operations, from shapes alone, and what the same preferences cost a
trainer that forwards every pair as two full sequences.

Matrix products only, 2mnk each; norms, softmax and the optimizer are left out, as is usual for "model FLOPs" (PaLM,
arXiv 2204.02311, appendix B). A product that trains costs three forwards (its value, the gradients of its input and of
its weight); one that gradients only pass through costs two; a frozen tower costs one, since nothing below it trains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.siglip.config import SiglipConfig


@dataclass(frozen=True)
class GroupShape:
    """A group's sizes: tiles of its pictures and frames, prompt tokens (those of pictures included), tokens of each
    response, and how many of those are scored, each once through the vocabulary (None: all)."""

    tiles: int
    prompt: int
    responses: tuple[int, ...]
    scored: int | None = None


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by place: vision tower, projector, the decoder's linear layers, its attention, the
    vocabulary; `reference` is the whole forward of a reference model."""

    tower: float = 0.0
    projector: float = 0.0
    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    reference: float = 0.0

    @property
    def total(self) -> float:
        return math.fsum(dataclasses.astuple(self))

    def __add__(self, other: Flops) -> Flops:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Flops(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Flops:
        return Flops(*(times * a for a in dataclasses.astuple(self)))


def group_flops(
    config: LlavaOnevisionConfig,
    shape: GroupShape,
    *,
    decoder: bool = True,
    tower: bool = False,
    recompute: bool = False,
    reference: bool = False,
    square: bool = False,
) -> Flops:
    """Gradients of all pairs of one group, its prompt forwarded once.

    `decoder`, `tower`: whether that part's own weights train (adapters count as none). `recompute`: count the forward
    that the backward pass repeats under the remat rung "full"; without it this is the useful work that MFU divides by.
    `reference`: plus the forward of a reference model; the tower's features are shared when it is frozen. `square`:
    attention over the whole square of queries and keys, as XLA counts what it does not skip.
    """
    prompt, responses = shape.prompt, shape.responses
    attention = _attention(config.decoder, prompt, 0, square)
    if square:  # one block of all responses against everything before it
        attention += _attention(config.decoder, sum(responses), prompt, square)
    else:
        attention += sum(_attention(config.decoder, r, prompt, square) for r in responses)
    scored = sum(responses) if shape.scored is None else shape.scored
    forward = _forward(config, shape.tiles, prompt + sum(responses), scored, attention)
    return _with_gradients(forward, decoder=decoder, tower=tower, recompute=recompute, reference=reference)


def pairs_flops(
    config: LlavaOnevisionConfig,
    shape: GroupShape,
    pairs: Sequence[tuple[int, int]],
    *,
    decoder: bool = True,
    tower: bool = False,
    recompute: bool = False,
    reference: bool = True,
    square: bool = False,
    every_position: bool = False,
) -> Flops:
    """The same preferences one by one: pictures, prompt and answer anew for both answers of every pair (`pairs` are
    indices into the responses), the shorter answer padded to the longer. `every_position`: logits of prompts, too, as
    TRL 1.16 computes them and drops them; without it those of answers only."""
    total = Flops()
    for pair in pairs:
        lengths = [shape.responses[k] for k in pair]
        tokens = shape.prompt + max(lengths)
        attention = 2 * _attention(config.decoder, tokens, 0, square)
        scored = 2 * tokens if every_position else sum(lengths)
        forward = _forward(config, 2 * shape.tiles, 2 * tokens, scored, attention)
        total += _with_gradients(
            forward, decoder=decoder, tower=tower, recompute=recompute, reference=reference, shared_features=False
        )
    return total


def tile_flops(config: SiglipConfig) -> float:
    """One tile through the vision tower."""
    n, embed = config.grid**2, config.embed
    linear = 2 * n * (4 * embed**2 + 2 * embed * config.mlp)
    return config.layers * (linear + 4 * n * n * embed) + 2 * n * 3 * config.patch_size**2 * embed


def token_flops(config: Qwen2Config) -> float:
    """One token through the decoder's linear layers."""
    attention = 2 * config.embed * (config.heads + config.kv_heads) * config.head_dim
    return 2 * config.layers * (attention + 3 * config.embed * config.mlp)


def _attention(config: Qwen2Config, queries: int, before: int, square: bool) -> float:
    """Scores and their product with the values: causal among the queries, all of the `before` tokens ahead of them."""
    among = queries**2 if square else queries * (queries + 1) / 2
    return 4 * config.layers * config.heads * config.head_dim * (queries * before + among)


def _forward(config: LlavaOnevisionConfig, tiles: int, tokens: int, scored: int, attention: float) -> Flops:
    width, inner = config.decoder.embed, config.tower.embed
    return Flops(
        tower=tiles * tile_flops(config.tower),
        projector=tiles * config.tokens_per_tile * 2 * width * (inner + width),
        linear=tokens * token_flops(config.decoder),
        attention=attention,
        head=scored * 2 * width * config.decoder.vocab,
    )


def _with_gradients(
    forward: Flops, *, decoder: bool, tower: bool, recompute: bool, reference: bool, shared_features: bool = True
) -> Flops:
    again = 1 if recompute else 0
    weights = 3 if decoder else 2
    shared = Flops(tower=forward.tower) if shared_features and not tower else Flops()
    return Flops(
        tower=forward.tower * (3 + again if tower else 1),
        projector=3 * forward.projector,
        linear=forward.linear * (weights + again),
        attention=forward.attention * (3 + again),
        head=forward.head * (weights + again),
        reference=forward.total - shared.total if reference else 0.0,
    )
