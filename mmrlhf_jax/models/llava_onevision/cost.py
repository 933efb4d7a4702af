"""What a step over groups costs in floating-point operations, from shapes alone, and what the same preferences cost a
trainer that forwards every pair as two full sequences.

Matrix products only, 2mnk each; norms, softmax and the optimizer are left out, as is usual for "model FLOPs" (PaLM,
arXiv 2204.02311, appendix B). A product that trains costs three forwards (its value, the gradients of its input and of
its weight); one that gradients only pass through costs two; a frozen tower costs one, since nothing below it trains.

`group_parts` also counts bytes: the least that must pass through memory where each part reads its inputs and weights
once, writes its results once and keeps everything between two matrix products on chip.
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
    TRL 1.16 computes them on CPUs and drops them; without it those of answers only, as it does on GPUs."""
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


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes read from and written to memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Widths:
    """Bytes of one activation, of one weight as it is kept, and of one value of the gradients of kernels and of the
    token table (0: they do not train)."""

    activation: int
    weight: int
    gradient: int = 0
    table_gradient: int = 0


@dataclass(frozen=True)
class Part:
    """What a part of the step costs: its forward pass, and with the gradients of its inputs and of what trains."""

    forward: Cost
    both: Cost


def group_parts(config: LlavaOnevisionConfig, shape: GroupShape, widths: Widths, tower_weight: int) -> dict[str, Part]:
    """The useful work of one group by part, tower frozen; the FLOPs add up to those of `group_flops`.

    `tower_weight`: bytes of one of the tower's weights. Recomputation is not counted. `widths.gradient` 0: nothing
    trains here but adapters, which count as none.
    """
    d, t, act = config.decoder, config.tower, widths.activation
    prompt, answers = shape.prompt, sum(shape.responses)
    scored = answers if shape.scored is None else shape.scored
    patches = shape.tiles * config.tokens_per_tile
    tile = t.layers * (12 * t.embed + 2 * t.mlp)  # values a patch brings to and takes from the products of all blocks
    tower = Cost(shape.tiles * tile_flops(t), patches * tile * act + _tower_weights(t) * tower_weight)
    # a token: norm in, q, k, v out; attention in, sum out; norm in, gate and up out, both in, sum out
    linear = d.layers * (4 * d.embed + 2 * (d.heads + d.kv_heads) * d.head_dim + 4 * d.mlp) * act
    queries, keys = (2 * d.layers * heads * d.head_dim * act for heads in (d.heads, d.kv_heads))
    taps = 5 * prompt + 2 * answers  # four rows in and one out; a token's row in and out
    lookup = d.vocab * d.embed * widths.table_gradient  # dense
    unembedding = dataclasses.replace(widths, gradient=widths.table_gradient)
    across = sum(_attention(d, r, prompt, False) for r in shape.responses)
    weights = token_flops(d) / 2
    return {
        "tower": Part(tower, tower),
        "projector and taps": _part(
            _projector(config, shape.tiles),
            (patches * (t.embed + 3 * d.embed) + taps * d.embed) * act,
            d.embed * (t.embed + d.embed),
            widths,
            also=lookup,
        ),
        "prompt, linear": _part(prompt * token_flops(d), prompt * linear, weights, widths),
        "prompt, attention": _through(_attention(d, prompt, 0, False), prompt * (queries + keys)),
        "responses, attention": _through(across, answers * queries + (prompt + answers) * keys),
        "responses, linear": _part(answers * token_flops(d), answers * linear, weights, widths),
        "log-probs": _part(_head(config, scored), scored * d.embed * act, d.vocab * d.embed, unembedding),
    }


def _part(flops: float, moved: float, weights: float, widths: Widths, *, also: float = 0.0) -> Part:
    """Products with `weights`: backward one more product for the inputs and, where they train, one for the weights.
    `moved`: bytes of activations; `also`: further bytes of gradients."""
    products = 2 if widths.gradient else 1
    forward = Cost(flops, moved + weights * widths.weight)
    backward = Cost(products * flops, products * moved + weights * (widths.weight + widths.gradient) + also)
    return Part(forward, forward + backward)


def _through(flops: float, moved: float) -> Part:
    """Attention: no weights; backward reads what forward read and wrote, and the slope, and writes three gradients."""
    return Part(Cost(flops, moved), Cost(3 * flops, 3 * moved))


def tile_flops(config: SiglipConfig) -> float:
    """One tile through the vision tower."""
    n, embed = config.grid**2, config.embed
    return 2 * n * _tower_weights(config) + config.layers * 4 * n * n * embed


def _tower_weights(config: SiglipConfig) -> float:
    block = 4 * config.embed**2 + 2 * config.embed * config.mlp
    return config.layers * block + 3 * config.patch_size**2 * config.embed


def token_flops(config: Qwen2Config) -> float:
    """One token through the decoder's linear layers."""
    attention = 2 * config.embed * (config.heads + config.kv_heads) * config.head_dim
    return 2 * config.layers * (attention + 3 * config.embed * config.mlp)


def _attention(config: Qwen2Config, queries: int, before: int, square: bool) -> float:
    """Scores and their product with the values: causal among the queries, all of the `before` tokens ahead of them."""
    among = queries**2 if square else queries * (queries + 1) / 2
    return 4 * config.layers * config.heads * config.head_dim * (queries * before + among)


def _forward(config: LlavaOnevisionConfig, tiles: int, tokens: int, scored: int, attention: float) -> Flops:
    return Flops(
        tower=tiles * tile_flops(config.tower),
        projector=_projector(config, tiles),
        linear=tokens * token_flops(config.decoder),
        attention=attention,
        head=_head(config, scored),
    )


def _projector(config: LlavaOnevisionConfig, tiles: int) -> float:
    width, inner = config.decoder.embed, config.tower.embed
    return tiles * config.tokens_per_tile * 2 * width * (inner + width)


def _head(config: LlavaOnevisionConfig, scored: int) -> float:
    return scored * 2 * config.decoder.embed * config.decoder.vocab


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
