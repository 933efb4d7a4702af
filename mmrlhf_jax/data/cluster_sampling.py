"""So many groups, as evenly as can be from clusters of their embeddings: the common does not crowd out the rare.

MM-RLHF takes its queries from over ten million dialogues so: CLIP embeddings of the pictures (of a video: of its first
frame), 100 clusters, as many from each (https://arxiv.org/abs/2502.10391, section 2). Embeddings come from outside, one
row for each group by its id. Clusters are those of k-means: greedy k-means++ (Arthur and Vassilvitskii 2007) starts,
then Lloyd's steps, scipy's, until no point moves; or they are given. Embeddings are taken as they are: where cosine is
meant, as with CLIP's, give them length 1.

Every random choice hangs on the sha256 of the seed and, within a cluster, of the group's id: on no library's random
numbers. The order of the embeddings' rows does not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.vq import kmeans2

from mmrlhf_jax import storage
from mmrlhf_jax.groups import Group

MAX_STEPS = 300


class SamplingError(ValueError):
    """Embeddings that cannot be used, or a sample that cannot be drawn."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is sampled from.

    embeddings   a .npy file: numbers [n, d], or whole numbers [n] that are the clusters
    ids          a text file: the id of the group that each row of `embeddings` belongs to, one a line
    count        groups to take
    clusters     how many k-means finds; None where the clusters are given
    """

    embeddings: str
    ids: str
    count: int
    clusters: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Of every group, in order: its `cluster` i64 [n], and whether it is `taken`, bool [n]."""

    ids: tuple[str, ...]
    cluster: np.ndarray
    taken: np.ndarray

    def line(self, sampling: Sampling) -> str:
        """For the report."""
        _, sizes = np.unique(self.cluster, return_counts=True)
        names, numbers = np.unique(self.cluster[self.taken], return_counts=True)
        return (
            f"--sample {sampling.count}: of {len(self.ids)} groups in {len(sizes)} clusters of {sizes.min()} to "
            f"{sizes.max()}; {numbers.min() if len(names) == len(sizes) else 0} to {numbers.max()} from each"
        )

    def to_json(self) -> str:
        """A line a group: id, cluster, taken."""
        rows = zip(self.ids, self.cluster.tolist(), self.taken.tolist(), strict=True)
        return "".join(json.dumps({"id": i, "cluster": cluster, "taken": taken}) + "\n" for i, cluster, taken in rows)


def sample(groups: Sequence[Group], sampling: Sampling) -> Sample:
    """Which of the groups to take.

    Raises:
        SamplingError: naming file and cure.
    """
    ids = [group.id for group in groups]
    points = _points_of(ids, sampling)
    if sampling.count > len(ids):
        raise SamplingError(f"--sample {sampling.count}: there are {len(ids)} groups to take from")
    if sampling.clusters is None:
        cluster = points.astype(np.int64)
    else:
        cluster = k_means(points.astype(np.float64), sampling.clusters, sampling.seed)
    return Sample(tuple(ids), cluster, _taken(ids, cluster, sampling.count, sampling.seed))


def k_means(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The cluster i64 [n] of each of the points f64 [n, d], numbered in the order in which k-means++ chose their first
    centres.

    Raises:
        SamplingError: there are fewer different points than clusters.
    """
    centres = points[_first_centres(points, clusters, seed)]
    labels = np.full(len(points), -1)
    for _ in range(MAX_STEPS):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")  # it keeps its centre
            centres, found = kmeans2(points, centres, iter=1, minit="matrix", missing="warn")
        if np.array_equal(found, labels):
            break
        labels = found
    return labels.astype(np.int64)


def _first_centres(points: np.ndarray, clusters: int, seed: int) -> list[int]:
    """Each is the best of several, drawn with a probability that grows with the square of their distance from the
    nearest centre so far: greedy k-means++, with as many draws as scikit-learn makes."""
    draws = 2 + int(math.log(clusters))
    chosen = [int(_lot(f"{seed} centre 0") * len(points))]
    nearest = _distances(points, chosen[0])
    for number in range(1, clusters):
        if not nearest.any():
            raise SamplingError(
                f"--clusters {clusters}: the embeddings have {number} different rows; ask for at most so many clusters"
            )
        reached = np.cumsum(nearest)
        lots = np.array([_lot(f"{seed} centre {number} {draw}") for draw in range(draws)]) * reached[-1]
        drawn = dict.fromkeys(np.searchsorted(reached, lots, side="right").tolist())
        after = {row: np.minimum(nearest, _distances(points, row)) for row in drawn}
        chosen.append(min(after, key=lambda row: float(after[row].sum())))
        nearest = after[chosen[-1]]
    return chosen


def _distances(points: np.ndarray, row: int) -> np.ndarray:
    """Squared, of all points from one."""
    return ((points - points[row]) ** 2).sum(1)


def even_shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many to take from each cluster: as many as from any other, unless it has fewer. What cannot be shared evenly
    comes from the larger ones."""
    shares, left = [0] * len(sizes), count
    for done, place in enumerate(sorted(range(len(sizes)), key=lambda place: sizes[place])):
        shares[place] = min(sizes[place], left // (len(sizes) - done))
        left -= shares[place]
    return shares


def _taken(ids: Sequence[str], cluster: np.ndarray, count: int, seed: int) -> np.ndarray:
    members = [np.flatnonzero(cluster == name).tolist() for name in np.unique(cluster)]
    taken = np.zeros(len(ids), bool)
    for rows, share in zip(members, even_shares([len(rows) for rows in members], count), strict=True):
        taken[sorted(rows, key=lambda row: _lot(f"{seed} group {ids[row]}"))[:share]] = True
    return taken


def _lot(name: str) -> float:
    """A number in [0, 1) that looks drawn."""
    return (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 11) / 2**53


def _points_of(ids: Sequence[str], sampling: Sampling) -> np.ndarray:
    """The embedding (or cluster) of each id, in this order."""
    points, named = _read_points(sampling), _read_ids(sampling.ids)
    if len(named) != len(points):
        raise SamplingError(f"{sampling.ids} has {len(named)} ids, {sampling.embeddings} has {len(points)} rows")
    row_of = {name: row for row, name in enumerate(named)}
    if len(row_of) < len(named):
        twice = next(name for row, name in enumerate(named) if row_of[name] != row)
        raise SamplingError(f"{sampling.ids}: the id {twice!r:.80} stands there twice")
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise SamplingError(f"two groups have the id {twice!r:.80}: embeddings need ids that name one group each")
    if missing := [name for name in ids if name not in row_of]:
        raise SamplingError(
            f"{len(missing)} of {len(ids)} groups are not in {sampling.ids} ({missing[0]!r:.80} first): write the ids "
            "of a dataset that prepare made of the same inputs without --sample"
        )
    return points[[row_of[name] for name in ids]]


def _read_points(sampling: Sampling) -> np.ndarray:
    file, path = sampling.embeddings, storage.to_path(sampling.embeddings)
    if not path.exists():
        raise SamplingError(f"{file} does not exist: correct --embeddings")
    try:
        points = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise SamplingError(f"{file} is no .npy file of numbers ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(points, np.ndarray):
        raise SamplingError(f"{file} is an archive of arrays: save one array with numpy.save")
    if points.ndim == 1 and points.dtype.kind in "iu":
        if sampling.clusters is not None:
            raise SamplingError(f"{file} holds whole numbers [n], which are clusters: leave out --clusters")
        return points
    if points.ndim != 2 or points.dtype.kind not in "fiu" or not points.size:
        raise SamplingError(
            f"{file} is {points.dtype} {list(points.shape)}: embeddings are numbers [n, d], clusters whole numbers [n]"
        )
    if sampling.clusters is None:
        raise SamplingError(f"{file} holds embeddings: say with --clusters how many clusters they make")
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(1))[0])
        raise SamplingError(f"{file} row {row} holds what is not finite")
    return points


def _read_ids(file: str) -> list[str]:
    path = storage.to_path(file)
    if not path.exists():
        raise SamplingError(f"{file} does not exist: correct --embedding-ids")
    try:
        return path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise SamplingError(f"{file} is not UTF-8 at byte {error.start}") from error
