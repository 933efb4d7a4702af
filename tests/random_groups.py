"""Random groups as arrays, for tests of the forward that need no tokenizer and no picture file."""

from __future__ import annotations

import numpy as np

from mmrlhf_jax.batch import Entry, Totals
from mmrlhf_jax.groups import NEWLINE, Branch, Rendered
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig


def rendered(
    rng: np.random.Generator, config: LlavaOnevisionConfig, *, tiles: int, text: int, lengths: tuple[int, ...]
) -> Rendered:
    """A prompt of `text` tokens with, after the third, every patch of `tiles` tiles (blended by random taps) and a
    newline."""
    count = tiles * config.tokens_per_tile + (1 if tiles else 0)
    vocab = config.decoder.vocab
    prompt = rng.integers(0, vocab, text).astype(np.int32)
    index = np.zeros((text + count, 4), np.int32)
    weight = np.zeros((text + count, 4), np.float32)
    if count:
        index[3 : 3 + count - 1] = rng.integers(0, count - 1, (count - 1, 4))
        weight[3 : 3 + count - 1] = rng.dirichlet(np.ones(4), count - 1)
        index[3 + count - 1, 0], weight[3 + count - 1, 0] = NEWLINE, 1.0
        prompt = np.insert(prompt, 3, np.full(count, config.image_token % vocab)).astype(np.int32)
    side = config.tower.image_size
    return Rendered(
        tiles=rng.integers(0, 256, (tiles, side, side, 3)).astype(np.uint8),
        prompt=prompt,
        tap_index=index,
        tap_weight=weight,
        branches=tuple(Branch(rng.integers(0, vocab, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths),
    )


def entry(rng: np.random.Generator, group: Rendered, row: int = 0) -> Entry:
    """The group with a random strict ranking, random margins and random reference log-probs."""
    k = len(group.branches)
    rank = rng.permutation(k).astype(np.int32)
    better = (rank[:, None] < rank[None, :]).astype(np.float32)
    return Entry(
        row=row,
        rendered=group,
        pair_weight=better,
        pair_margin=(better * rng.uniform(-1, 4, (k, k))).astype(np.float32),
        rank=rank,
        score=rng.normal(size=k).astype(np.float32),
        reference=tuple(-rng.uniform(1, 6, len(b.token)).astype(np.float32) for b in group.branches),
    )


def totals(entries: list[Entry]) -> Totals:
    wins = [e.pair_weight.sum(1) for e in entries]
    lengths = [np.array([b.loss_weight.sum() for b in e.rendered.branches]) for e in entries]
    return Totals(
        pairs=float(sum(w.sum() for w in wins)),
        chosen_tokens=float(sum((w * n).sum() for w, n in zip(wins, lengths, strict=True))),
        tokens=float(sum(n.sum() for n in lengths)),
        groups=float(len(entries)),
    )


def split_pairs(group: Entry) -> list[Entry]:
    """The same preferences as two-response entries, chosen first."""
    out = []
    for i, j in zip(*np.nonzero(group.pair_weight), strict=True):
        pick = (int(i), int(j))
        r = group.rendered
        upper = np.array([[0, 1], [0, 0]], np.float32)
        out.append(
            Entry(
                row=group.row,
                rendered=Rendered(r.tiles, r.prompt, r.tap_index, r.tap_weight, tuple(r.branches[p] for p in pick)),
                pair_weight=upper * group.pair_weight[i, j],
                pair_margin=upper * group.pair_margin[i, j],
                rank=np.array([0, 1], np.int32),
                score=group.score[list(pick)],
                reference=None if group.reference is None else tuple(group.reference[p] for p in pick),
            )
        )
    return out
