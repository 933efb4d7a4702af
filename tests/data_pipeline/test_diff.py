"""Which tokens two answers do not share, exactly and as RLHF-V's released code says."""

from __future__ import annotations

import numpy as np
import pytest

from mmrlhf_jax.data import diff
from mmrlhf_jax.data.diff import changed_tokens, exact, released


def marks(rule, one: str, other: str) -> tuple[str, str]:
    """Changed letters as themselves, the others as dots."""
    found = rule(*(np.array([ord(c) for c in text], np.int32) for text in (one, other)))
    return tuple("".join(c if m else "." for c, m in zip(t, mark)) for t, mark in zip((one, other), found))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("abcdef", "abcdef", ("......", "......")),
        ("abXdef", "abYdef", ("..X...", "..Y...")),
        ("abcdef", "abcXYdef", ("......", "...XY...")),  # an insertion counts, on the side that has it
        ("abcdef", "abef", ("..cd..", "....")),
        ("", "ab", ("", "ab")),
        ("ab", "", ("ab", "")),
        ("abc", "xyz", ("abc", "xyz")),
        ("aXbYc", "abc", (".X.Y.", "...")),
        ("aaa", "aa", ("..a", "..")),
    ],
)
def test_what_is_outside_the_longest_common_subsequence(one, other, expected):
    assert marks(exact, one, other) == expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("abcXdef", "abcYdef", ("...X...", "...Y...")),
        ("abcdef", "abcXYdef", ("......", "........")),  # insertions alone are not marked
        ("XXabc", "Yabc", ("XX...", "Y...")),
        ("abcXX", "abcY", ("...XX", "...Y")),
        ("abcXdYefg", "abcUdVefg", ("...XdY...", "...UdV...")),  # a match of one token is none
        ("ab", "xy", ("ab", "xy")),
    ],
)
def test_the_released_rule(one, other, expected):
    assert marks(released, one, other) == expected


def longest(one, other) -> int:
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def test_what_is_left_is_common_to_both_and_as_long_as_can_be():
    rng = np.random.default_rng(0)
    for _ in range(300):
        one, other = (rng.integers(0, 3, rng.integers(0, 10)) for _ in range(2))
        ours, theirs = exact(one, other)
        np.testing.assert_array_equal(one[~ours], other[~theirs])
        assert (~ours).sum() == longest(one, other)


def test_every_response_is_compared_with_every_other():
    responses = [np.array(r, np.int32) for r in ([1, 2, 3], [1, 9, 3], [1, 2, 3, 4])]
    found = changed_tokens(responses, "exact")
    assert [f.shape for f in found] == [(3, 3), (3, 3), (3, 4)]
    np.testing.assert_array_equal(found[0], [[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found[2], [[0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]])


def test_what_would_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(diff, "MAX_CELLS", 8)
    exact(np.array([1, 2, 3, 4, 5, 6]), np.array([1, 2, 9, 9, 5, 6]))  # what differs is short
    with pytest.raises(ValueError, match="3 and 3 tokens that differ are too long to align"):
        exact(np.array([1, 2, 3]), np.array([2, 9, 8]))
