"""A sample as even as can be over clusters; k-means against scikit-learn's."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from data_samples import row, write_rows
from sklearn.cluster import KMeans

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.cluster_sampling import (
    Sampling,
    SamplingError,
    _first_centres,
    even_shares,
    k_means,
    sample,
)
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.groups import Group, Origin

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "prepare.py"


def blobs(rng: np.random.Generator, sizes: list[int], spread: float = 0.1) -> np.ndarray:
    """Points around corners that lie 10 apart, in this order."""
    return np.concatenate(
        [10 * np.eye(len(sizes))[i] + spread * rng.normal(size=(n, len(sizes))) for i, n in enumerate(sizes)]
    )


@pytest.mark.parametrize("clusters", [1, 2, 7])
def test_k_means_ends_where_scikit_learn_s_ends(clusters: int) -> None:
    points = np.random.default_rng(clusters).normal(size=(300, 5))
    start = points[_first_centres(points, clusters, seed=3)]
    theirs = KMeans(clusters, init=start, n_init=1, tol=0, max_iter=300, algorithm="lloyd").fit(points)
    assert np.array_equal(k_means(points, clusters, seed=3), theirs.labels_)


def test_clusters_that_are_apart_are_found_whatever_the_seed() -> None:
    points = blobs(np.random.default_rng(0), [40, 3, 9, 20])
    for seed in range(10):
        found = k_means(points, 4, seed)
        assert [len(set(part)) for part in np.split(found, [40, 43, 52])] == [1, 1, 1, 1]
        assert len(set(found)) == 4


def test_first_centres_follow_greedy_k_means_plus_plus() -> None:
    # From 0, a draw is 1 with probability 1 / (1 + 9), else 3: the squares of the distances. 3 leaves less distance, so
    # 1 is taken only where both draws are 1.
    points = np.array([[0.0], [1.0], [3.0]])
    drawn = [tuple(_first_centres(points, 2, seed)) for seed in range(6000)]
    after = Counter(second for first, second in drawn if first == 0)
    assert abs(Counter(first for first, _ in drawn)[0] / 6000 - 1 / 3) < 0.03
    assert set(after) == {1, 2}
    assert 0.003 < after[1] / after.total() < 0.02


def test_fewer_different_points_than_clusters_are_refused() -> None:
    with pytest.raises(SamplingError, match="the embeddings have 2 different rows"):
        k_means(np.array([[0.0], [1.0], [1.0]]), 3, 0)


def test_shares_are_as_even_as_can_be() -> None:
    assert even_shares([5, 100, 2], 30) == [5, 23, 2]
    rng = Random(0)
    for _ in range(500):
        sizes = [rng.randrange(9) for _ in range(rng.randrange(1, 7))]
        count = rng.randrange(sum(sizes) + 1)
        shares = even_shares(sizes, count)
        assert sum(shares) == count
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        # whoever gets less than another by more than the remainder has no more to give
        assert all(share == size for share, size in zip(shares, sizes, strict=True) if share < max(shares) - 1)


def groups(count: int) -> list[Group]:
    return [Group(f"g{i}", (), (), (), (), (Origin("in.jsonl", i + 1),)) for i in range(count)]


@pytest.fixture
def sampling(tmp_path: Path) -> Callable[..., Sampling]:
    def make(array: Any, ids: list[str], count: int, clusters: int | None = None, seed: int = 0) -> Sampling:
        np.save(tmp_path / "e.npy", array, allow_pickle=True)
        (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in ids))
        return Sampling(str(tmp_path / "e.npy"), str(tmp_path / "ids.txt"), count, clusters, seed)

    return make


def test_the_rare_is_taken_whole_and_the_common_in_part(sampling: Any) -> None:
    points = blobs(np.random.default_rng(1), [60, 4, 30]).astype(np.float16)
    asked = groups(94)
    ids = [group.id for group in asked]
    found = sample(asked, sampling(points, ids, 24, 3))
    taken = [sum(part) for part in np.split(found.taken, [60, 64])]
    assert taken == [10, 4, 10]
    shuffled = np.random.default_rng(2).permutation(94)
    other = sample(asked, sampling(points[shuffled], [ids[i] for i in shuffled], 24, 3))
    assert np.array_equal(found.taken, other.taken)  # the files' order does not matter
    more = sample(asked, sampling(points, ids, 40, 3))
    assert (more.taken >= found.taken).all()  # a larger sample adds to a smaller one
    assert not np.array_equal(sample(asked, sampling(points, ids, 24, 3, seed=1)).taken, found.taken)


def test_clusters_may_be_given(sampling: Any) -> None:
    given = np.array([7, 7, 7, -1, 2, 2])
    found = sample(groups(6), sampling(given, [f"g{i}" for i in range(6)], 3))
    assert found.cluster.tolist() == given.tolist()
    assert Counter(given[found.taken].tolist()) == {7: 1, -1: 1, 2: 1}
    spare = sample(groups(4), sampling(given, [f"g{i}" for i in range(6)], 3))  # embeddings of rows that are gone
    assert len(spare.taken) == 4


PLAIN, IDS = np.zeros((3, 2)), ["g0", "g1", "g2"]
BAD = {
    "an id less": ((PLAIN, IDS[:2], 1, 1), "has 2 ids, "),
    "an id twice": ((PLAIN, ["g0", "g1", "g0"], 1, 1), "the id 'g0' stands there twice"),
    "other ids": ((PLAIN, ["a", "g1", "g2"], 1, 1), "1 of 3 groups are not in "),
    "a cube": ((np.zeros((3, 2, 2)), IDS, 1, 1), "is float64 [3, 2, 2]: embeddings are numbers [n, d]"),
    "texts": ((np.array([["a"], ["b"], ["c"]]), IDS, 1, 1), "is <U1 [3, 1]: embeddings are numbers [n, d]"),
    "objects": ((np.array([{}, {}, {}]), IDS, 1, 1), "is no .npy file of numbers"),
    "not finite": ((np.array([[1.0, 2], [np.nan, 1], [0, 0]]), IDS, 1, 1), "row 1 holds what is not finite"),
    "no clusters": ((PLAIN, IDS, 1, None), "say with --clusters how many clusters they make"),
    "clusters twice": ((np.arange(3), IDS, 1, 2), "holds whole numbers [n], which are clusters: leave out --clusters"),
    "fractions as clusters": ((np.arange(3.0), IDS, 1, None), "is float64 [3]: embeddings are numbers [n, d]"),
    "too many": ((np.arange(3), IDS, 4, None), "--sample 4: there are 3 groups to take from"),
}


@pytest.mark.parametrize(("made", "said"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_sampled_is_refused(sampling: Any, made: Any, said: str) -> None:
    with pytest.raises(SamplingError, match=re.escape(said)):
        sample(groups(3), sampling(*made))


def test_other_files_are_refused(sampling: Any, tmp_path: Path) -> None:
    asked = sampling(np.arange(3), IDS, 1)
    with pytest.raises(SamplingError, match="two groups have the id 'g0'"):
        sample([*groups(1), *groups(2)], asked)
    (tmp_path / "e.npy").write_bytes(b"PK not an array")
    with pytest.raises(SamplingError, match=r"is no .npy file of numbers"):
        sample(groups(3), asked)
    np.savez(tmp_path / "e.npz", a=np.arange(3))
    (tmp_path / "e.npz").rename(tmp_path / "e.npy")
    with pytest.raises(SamplingError, match="is an archive of arrays: save one array"):
        sample(groups(3), asked)
    (tmp_path / "ids.txt").write_bytes(b"\xff\n")
    np.save(tmp_path / "e.npy", np.arange(3))
    with pytest.raises(SamplingError, match="is not UTF-8 at byte 0"):
        sample(groups(3), asked)


def test_a_dataset_of_a_sample(sampling: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", [row(id=f"g{i}", image=None) for i in range(6)])
    given = sampling(np.array([0, 0, 0, 0, 1, 1]), [f"g{i}" for i in range(6)], 4)
    options = PrepareOptions("mm_rlhf", (file,), str(tmp_path / "out"), sampling=given)
    report = prepare(options)
    log = [json.loads(line) for line in (tmp_path / "out" / "sample.jsonl").read_text().splitlines()]
    assert [line["id"] for line in log] == [f"g{i}" for i in range(6)]
    assert [line["cluster"] for line in log] == [0, 0, 0, 0, 1, 1]
    kept = [group.id for group in open_dataset(options.output).groups()]
    assert kept == [line["id"] for line in log if line["taken"]]
    assert len(kept) == 4
    assert {"g4", "g5"} <= set(kept)
    assert report.stages == (
        "--sample 4: of 6 groups in 2 clusters of 2 to 4; 2 to 2 from each; 2 rows left out, see sample.jsonl",
    )
    assert prepare(options).reused
    with pytest.raises(ValueError, match="different: sampling"):
        prepare(PrepareOptions("mm_rlhf", (file,), str(tmp_path / "out"), sampling=sampling(np.arange(6), IDS, 4)))
    (tmp_path / "e.npy").unlink()
    with pytest.raises(ValueError, match=r"e.npy does not exist: correct --embeddings"):
        prepare(options)


REFUSED = {
    "alone": ({"clusters": 3}, "--clusters is for --sample COUNT, which is not given"),
    "a seed alone": ({"seed": 0}, "--seed is for --sample and --cross-prompt, neither"),
    "no embeddings": ({"sample": 3, "embedding_ids": "i"}, "--sample needs --embeddings FILE.npy and"),
    "no clusters at all": (
        {"sample": 3, "embeddings": "e", "embedding_ids": "i", "clusters": 0},
        "--clusters 0 is not",
    ),
    "none": ({"sample": 0, "embeddings": "e", "embedding_ids": "i"}, "--sample 0 is not positive"),
    "a negative seed": ({"sample": 3, "embeddings": "e", "embedding_ids": "i", "seed": -1}, "--seed -1 is negative"),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_options_without_a_use_are_refused(arguments: dict[str, Any], said: str) -> None:
    program = runpy.run_path(str(LAUNCH))
    base = {"source": "mm_rlhf", "input": ("in.jsonl",), "output": "out"}
    with pytest.raises(UsageError, match=re.escape(said)):
        program["_options"](program["Arguments"](**base, **arguments))
