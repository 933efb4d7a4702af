"""What a device sees: `GroupBatch`, and how rendered groups are packed into one.

Shapes are those of a bucket (groups, tiles, prompt slots, response slots), so that a run compiles a handful of
programs. A row holds one prompt and its branches end to end. In "pairs" mode, kept for exact comparison with trainers
that forward every pair as two full sequences, a pair takes two rows of one branch each; everything else is the same
code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import struct

from mmrlhf_jax.groups import NEWLINE, Bucket, Rendered

EMPTY = -1  # in `GroupBatch.row`: a filler group


@struct.dataclass
class GroupBatch:
    """N rows of B groups (N = B, or 2 B in pairs mode); K responses a group, I tiles, P prompt and S response slots.

    tiles             u8   [N, I, H, W, 3]       raw pixels, normalised on device
    token             i32  [N, P+S]              prompt, padding, then the branches end to end
    tap_index         i32  [N, P, 4]             rows of the projected features; the last row, I * tokens_per_tile, is
                                                 the newline
    tap_weight        f32  [N, P, 4]             all zero = a text token
    position          i32  [N, P+S]              every branch restarts at the prompt's length
    branch            i32  [N, P+S]              -1 prompt, 0..K-1, K = padding
    prompt_length     i32  [N]
    predictor         i32  [N, S]                which hidden state predicts this token
    loss_weight       f32  [N, S]                0 = not scored
    reference_logp    f32  [N, S]                zero where unknown
    branch_end        i32  [N, K / rows a group] index into P+S of a branch's last token, where a score is read
    response_mask     bool [B, K]                which responses exist
    pair_weight       f32  [B, K, K]             [i, j] > 0 iff i is preferred to j
    pair_margin       f32  [B, K, K]
    tie_weight        f32  [B, K, K]             [i, j] > 0 iff i and j are tied, i < j
    rank, score       i32, f32 [B, K]
    row               i32  [B]                   index into the dataset; EMPTY = filler
    total_*           f32  []                    of the whole optimizer step: what losses are divided by
    changed           bool [N, K, S]             [j, s]: this token's response does not share it with response j; None
                                                 where no objective reads it
    rating            f32  [B, K, A]             what each response was rated in each of A attributes; None as above
    rating_mask       bool [B, K, A]             which of them were rated; None as above
    total_ratings     f32  []                    of the whole optimizer step; None as above
    """

    tiles: Any
    token: Any
    tap_index: Any
    tap_weight: Any
    position: Any
    branch: Any
    prompt_length: Any
    predictor: Any
    loss_weight: Any
    reference_logp: Any
    branch_end: Any
    response_mask: Any
    pair_weight: Any
    pair_margin: Any
    tie_weight: Any
    rank: Any
    score: Any
    row: Any
    total_pairs: Any
    total_chosen_tokens: Any
    total_tokens: Any
    total_groups: Any
    total_ties: Any
    changed: Any = None
    rating: Any = None
    rating_mask: Any = None
    total_ratings: Any = None


@dataclass(frozen=True)
class Totals:
    """Sums over one optimizer step: pair weights, wins x scored tokens, scored tokens, groups, tie weights, ratings."""

    pairs: float
    chosen_tokens: float
    tokens: float
    groups: float
    ties: float = 0.0
    ratings: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One group ready to be packed: its arrays and what is known about its k responses.

    pair_weight, pair_margin, tie_weight f32 [k, k] (ties None: there are none); rank i32 [k]; score f32 [k];
    reference: per response f32 [R], or None; changed: per response bool [k, R], [j, t] iff response j does not have its
    token t, or None; rating: f32 [k, A], NaN = not rated, or None.
    """

    row: int
    rendered: Rendered
    pair_weight: np.ndarray
    pair_margin: np.ndarray
    rank: np.ndarray
    score: np.ndarray
    reference: tuple[np.ndarray, ...] | None = None
    tie_weight: np.ndarray | None = None
    changed: Sequence[np.ndarray] | None = None
    rating: np.ndarray | None = None


def pack(
    entries: Sequence[Entry | None],
    bucket: Bucket,
    totals: Totals,
    *,
    responses: int,
    tokens_per_tile: int,
    tile_size: int,
    pad_token: int = 0,
    separate: bool = False,
    changed: bool = False,
    attributes: int = 0,
) -> GroupBatch:
    """Packs `entries` (None = filler) into numpy arrays of the bucket's shape.

    `responses` is K. With `separate` each of an entry's responses gets a row of its own (pairs mode, k = K = 2);
    `changed` adds what every entry's `changed` says, `attributes` > 0 the ratings in so many. Raises ValueError naming
    the dataset row when a group does not fit: nothing is ever cut.
    """
    rows_each = responses if separate else 1
    batch = _blank(len(entries), rows_each, bucket, responses, tile_size, pad_token, totals)
    if changed:
        nothing = np.zeros((len(batch.loss_weight), responses, bucket.response), bool)
        batch = dataclasses.replace(batch, changed=nothing)
    if attributes:
        blank = np.zeros((len(entries), responses, attributes), np.float32)
        total = np.float32(totals.ratings)
        batch = dataclasses.replace(batch, rating=blank, rating_mask=blank != 0, total_ratings=total)
    for b, entry in enumerate(entries):
        if entry is None:
            continue
        k = len(entry.rendered.branches)
        if k > responses or (separate and k != responses):
            raise ValueError(f"row {entry.row}: {k} responses do not fit the batch's {responses}")
        batch.row[b] = entry.row
        batch.response_mask[b, :k] = True
        batch.pair_weight[b, :k, :k] = entry.pair_weight
        batch.pair_margin[b, :k, :k] = entry.pair_margin
        if entry.tie_weight is not None:
            batch.tie_weight[b, :k, :k] = entry.tie_weight
        batch.rank[b, :k] = entry.rank
        batch.score[b, :k] = entry.score
        if attributes:
            _rate(batch, b, entry, attributes)
        for i in range(rows_each):
            chosen = range(i, i + 1) if separate else range(k)
            _fill_row(batch, b * rows_each + i, entry, chosen, bucket, responses // rows_each, tokens_per_tile)
    return batch


def _blank(
    groups: int, rows_each: int, bucket: Bucket, k: int, tile_size: int, pad_token: int, totals: Totals
) -> GroupBatch:
    n, p, s = groups * rows_each, bucket.prompt, bucket.response
    return GroupBatch(
        tiles=np.zeros((n, bucket.tiles, tile_size, tile_size, 3), np.uint8),
        token=np.full((n, p + s), pad_token, np.int32),
        tap_index=np.zeros((n, p, 4), np.int32),
        tap_weight=np.zeros((n, p, 4), np.float32),
        # padding keeps its slot as position: the prompt part stays causal by index alone
        position=np.tile(np.concatenate([np.arange(p), np.zeros(s)]).astype(np.int32), (n, 1)),
        branch=np.full((n, p + s), k // rows_each, np.int32),
        prompt_length=np.zeros(n, np.int32),
        predictor=np.zeros((n, s), np.int32),
        loss_weight=np.zeros((n, s), np.float32),
        reference_logp=np.zeros((n, s), np.float32),
        branch_end=np.zeros((n, k // rows_each), np.int32),
        response_mask=np.zeros((groups, k), bool),
        pair_weight=np.zeros((groups, k, k), np.float32),
        pair_margin=np.zeros((groups, k, k), np.float32),
        tie_weight=np.zeros((groups, k, k), np.float32),
        rank=np.zeros((groups, k), np.int32),
        score=np.zeros((groups, k), np.float32),
        row=np.full(groups, EMPTY, np.int32),
        total_pairs=np.float32(totals.pairs),
        total_chosen_tokens=np.float32(totals.chosen_tokens),
        total_tokens=np.float32(totals.tokens),
        total_groups=np.float32(totals.groups),
        total_ties=np.float32(totals.ties),
    )


def _rate(batch: GroupBatch, b: int, entry: Entry, attributes: int) -> None:
    k = len(entry.rendered.branches)
    if entry.rating is None or entry.rating.shape != (k, attributes):
        raise ValueError(f"row {entry.row}: nothing says what its {k} responses were rated in {attributes} attributes")
    rated = ~np.isnan(entry.rating)
    batch.rating[b, :k] = np.where(rated, entry.rating, 0)
    batch.rating_mask[b, :k] = rated


def _fill_row(
    batch: GroupBatch, n: int, entry: Entry, chosen: range, bucket: Bucket, branches: int, tokens_per_tile: int
) -> None:
    rendered, p = entry.rendered, bucket.prompt
    length, tiles = len(rendered.prompt), len(rendered.tiles)
    used = sum(len(rendered.branches[i].token) for i in chosen)
    if tiles > bucket.tiles or length > p or used > bucket.response:
        raise ValueError(
            f"row {entry.row}: {tiles} tiles, {length} prompt and {used} response tokens do not fit bucket {bucket}"
        )
    batch.tiles[n, :tiles] = rendered.tiles
    batch.token[n, :length] = rendered.prompt
    newline = bucket.tiles * tokens_per_tile
    batch.tap_index[n, :length] = np.where(rendered.tap_index == NEWLINE, newline, rendered.tap_index)
    batch.tap_weight[n, :length] = rendered.tap_weight
    batch.branch[n, :length] = -1
    batch.prompt_length[n] = length
    at = 0
    for slot, i in enumerate(chosen):
        tokens = rendered.branches[i]
        end = at + len(tokens.token)
        batch.token[n, p + at : p + end] = tokens.token
        batch.position[n, p + at : p + end] = length + np.arange(end - at)
        batch.branch[n, p + at : p + end] = slot
        # a branch's first token is predicted by the prompt's last, the others by the one before
        batch.predictor[n, at:end] = np.concatenate([[length - 1], p + np.arange(at, end - 1)])
        batch.loss_weight[n, at:end] = tokens.loss_weight
        if entry.reference is not None:
            batch.reference_logp[n, at:end] = entry.reference[i]
        if batch.changed is not None:
            if entry.changed is None:
                raise ValueError(f"row {entry.row}: nothing says which tokens its responses do not share")
            batch.changed[n, : len(entry.changed), at:end] = entry.changed[i]
        batch.branch_end[n, slot] = p + end - 1
        at = end
