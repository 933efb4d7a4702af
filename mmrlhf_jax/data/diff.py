"""Which tokens of a response another one does not share: the corrected segments of fine-grained feedback.

Two answers are compared as sequences of token ids; nothing else says where an annotator corrected one into the other,
since the released data sets (RLHF-V-Dataset among them) hold whole answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np

Segments = Literal["exact", "released"]
RELEASED_LEAST_MATCH = 3
MAX_CELLS = 64_000_000
"""of an alignment's table, a byte each: two answers of 8,000 tokens that share neither beginning nor end"""


def exact(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is outside a longest common subsequence of i32 [n] and [m]: bool [n] and [m].

    Insertions and deletions are marked on the side that has them, replacements on both. Of several longest ones the
    earliest match in `one` is taken; swapping the arguments may choose another, with as many marks. Raises ValueError
    where the part that differs is too long to align.
    """
    n, m = len(one), len(other)
    head = _shared(one, other)
    tail = _shared(one[head:][::-1], other[head:][::-1])
    marked = np.zeros(n, bool), np.zeros(m, bool)
    marked[0][head : n - tail], marked[1][head : m - tail] = True, True
    if head + tail < min(n, m):
        for i, j in _matches(one[head : n - tail], other[head : m - tail]):
            marked[0][head + i] = marked[1][head + j] = False
    return marked


def released(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RLHF-V's released rule: between difflib's matching blocks of at least three tokens, what both sides replace.

    Pure insertions and deletions are not marked, and difflib's `autojunk` ignores frequent tokens of sequences of 200
    and more.

    Source: https://github.com/RLHF-V/RLHF-V, `generate_modification_mapping`.
    """
    blocks = difflib.SequenceMatcher(None, one.tolist(), other.tolist()).get_matching_blocks()
    kept = [block for block in blocks if block.size >= RELEASED_LEAST_MATCH or not block.size]
    marked = np.zeros(len(one), bool), np.zeros(len(other), bool)
    i = j = 0
    for block in kept:  # the last is empty and stands at both ends
        if block.a > i and block.b > j:
            marked[0][i : block.a] = marked[1][j : block.b] = True
        i, j = block.a + block.size, block.b + block.size
    return marked


RULES: Mapping[Segments, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = MappingProxyType(
    {"exact": exact, "released": released}
)


def changed_tokens(responses: list[np.ndarray], segments: Segments) -> list[np.ndarray]:
    """Of each response bool [k, tokens]: [j, t], whether its token t is in a segment that response j has not."""
    k, rule = len(responses), RULES[segments]
    out = [np.zeros((k, len(tokens)), bool) for tokens in responses]
    for i in range(k):
        for j in range(i + 1, k):
            out[i][j], out[j][i] = rule(responses[i], responses[j])
    return out


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning."""
    least = min(len(one), len(other))
    differs = np.flatnonzero(one[:least] != other[:least])
    return int(differs[0]) if len(differs) else least


def _matches(one: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """Places (i, j) of a longest common subsequence, ascending."""
    n, m = len(one), len(other)
    if n * m > MAX_CELLS:
        raise ValueError(f"{n} and {m} tokens that differ are too long to align; drop the group or shorten its answers")
    # best[i][j] of the suffixes from i and j, a row at a time; of it only where it grows along a row is kept, as bits
    best, grows = np.zeros(m + 1, np.int32), np.zeros((n + 1, m), bool)
    for i in range(n - 1, -1, -1):
        candidate = np.where(other == one[i], best[1:] + 1, best[:-1])
        best[:-1] = np.maximum.accumulate(np.maximum(candidate, best[:-1])[::-1])[::-1]
        grows[i] = best[:-1] > best[1:]
    found, i, j = [], 0, 0
    # how long the common subsequence of what is left is: from here, below, and to the right
    here = int(grows[0].sum())
    while here:
        below = int(grows[i + 1, j:].sum())
        right = here - int(grows[i, j])
        if one[i] == other[j] and here == below - int(grows[i + 1, j]) + 1:
            found.append((i, j))
            here, i, j = below - int(grows[i + 1, j]), i + 1, j + 1
        elif right == here:
            j += 1
        else:
            here, i = below, i + 1
    return found
