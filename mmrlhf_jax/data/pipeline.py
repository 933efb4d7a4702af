"""From a prepared dataset to device-ready micro-batches: measured once, planned before training, loaded by grain.

An item is what a step counts: a group, or in "pairs" mode one pair of it. Knows no model: a `Renderer` is handed in.
Nothing here starts a jax backend, so grain's worker processes are free to run it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

import grain
import numpy as np
from absl import flags

from mmrlhf_jax.batch import EMPTY, Entry, GroupBatch, Totals, pack
from mmrlhf_jax.data.buckets import ItemLengths
from mmrlhf_jax.data.diff import Segments, changed_tokens
from mmrlhf_jax.data.media import decode
from mmrlhf_jax.data.plan import ItemWeights, MicroBatch, StepPlan
from mmrlhf_jax.data.ranking import tied
from mmrlhf_jax.data.rewards import with_scores
from mmrlhf_jax.groups import Branch, Bucket, Group, Lengths, Rendered, Renderer

Pairing = Literal["groups", "pairs"]
Mean = Literal["pairs", "groups"]
Kept = Literal["all", "best"]


@dataclass(frozen=True, slots=True)
class Item:
    """A dataset row and which of its responses take part, in order."""

    row: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Items:
    """Everything a run trains on, measured. `lengths` and `weights` are arrays over `items`, as are `pairs`, i64, which
    counts them whatever they weigh; `responses` is K."""

    items: tuple[Item, ...]
    lengths: ItemLengths
    weights: ItemWeights
    pairs: np.ndarray
    responses: int
    skipped: int
    """groups that take no part, because no response of theirs is preferred to another"""


@dataclass(frozen=True)
class Selection:
    """Which responses train, and how pairs are weighed."""

    preferences: bool
    """pairs are needed: groups without any are skipped"""
    pairing: Pairing = "groups"
    mean: Mean = "pairs"
    kept: Kept = "all"
    margins: bool = False
    """every pair must have a margin"""
    critiques: bool = False
    """responses with a reason are of use by themselves: their groups stay where there is no pair"""
    visits: bool = False
    """every response of a pair must have a score that counts visits"""
    changed: Segments | None = None
    """the rule by which tokens that two responses do not share are found; None: nothing reads them"""
    attributes: tuple[str, ...] = ()
    """attributes whose ratings are read: a group with one of them is of use where there is no pair"""
    ties: bool = False
    """tied responses are trained on: their groups stay where there is no pair"""


class MissingMargin(ValueError):
    """A pair has no margin where the objective needs one."""


class MissingRating(ValueError):
    """No response is rated in an attribute that the objective reads."""


class MissingVisits(ValueError):
    """A response of a pair has no count of visits where the objective needs one."""


def select(
    groups: Sequence[Group], lengths: Sequence[Lengths], selection: Selection, rows: Sequence[int] | None = None
) -> Items:
    """The items of a dataset, or of its `rows` only. Raises MissingMargin naming rows and cure, ValueError when nothing
    is left."""
    items: list[Item] = []
    tiles, prompt, response, pairs, chosen_tokens, tokens, ties, ratings, counts = ([] for _ in range(9))
    skipped = 0
    rows = range(len(groups)) if rows is None else rows
    if selection.margins:
        check_margins([groups[row] for row in rows])
    if selection.visits:
        check_visits([groups[row] for row in rows])
    if selection.attributes:
        check_ratings([groups[row] for row in rows], selection.attributes)
    for row in rows:
        group, length = groups[row], lengths[row]
        found = _items_of(row, group, selection)
        skipped += not found
        for item in found:
            weight = pair_weights(group, item, selection)
            slots = np.array([length.responses[i] for i in item.responses])
            scored = np.array([(length.scored or length.responses)[i] for i in item.responses])
            items.append(item)
            tiles.append(length.tiles)
            prompt.append(length.prompt)
            response.append(slots.max() if selection.pairing == "pairs" else slots.sum())
            pairs.append(weight.sum())
            counts.append(np.count_nonzero(weight))
            chosen_tokens.append((weight.sum(1) * scored).sum())
            tokens.append(scored.sum())
            ties.append(tie_weights(group, item, selection).sum())
            ratings.append((~np.isnan(rating_of(group, item, selection.attributes))).sum())
    if not items:
        raise ValueError(f"none of {len(rows)} groups holds what this objective trains on")
    return Items(
        items=tuple(items),
        lengths=ItemLengths(*(np.array(x, np.int64) for x in (tiles, prompt, response))),
        weights=ItemWeights(*(np.array(x, np.float64) for x in (pairs, chosen_tokens, tokens, ties, ratings))),
        pairs=np.array(counts, np.int64),
        responses=max(len(item.responses) for item in items),
        skipped=skipped,
    )


def _items_of(row: int, group: Group, selection: Selection) -> list[Item]:
    of_use = bool(group.pairs) or (selection.critiques and any(r.reason is not None for r in group.responses))
    of_use |= any(name in selection.attributes for r in group.responses for name, _ in r.ratings)
    of_use |= selection.ties and bool(group.ties)
    if selection.preferences and not of_use:
        return []
    if selection.pairing == "pairs":
        return [Item(row, (pair.chosen, pair.rejected)) for pair in group.pairs]
    best = dict[str | None, int]()  # by question
    for response in group.responses:
        best[response.question] = min(response.rank, best.get(response.question, response.rank))
    every = enumerate(group.responses)
    return [Item(row, tuple(i for i, r in every if selection.kept == "all" or r.rank == best[r.question]))]


def pair_weights(group: Group, item: Item, selection: Selection) -> np.ndarray:
    """f32 [k, k] over the item's responses: 1 a pair, or shares of the group that sum to 1 for a mean over groups."""
    place = {response: slot for slot, response in enumerate(item.responses)}
    weight = np.zeros((len(place), len(place)), np.float32)
    share = 1.0 / len(group.pairs) if selection.mean == "groups" and group.pairs else 1.0
    for pair in group.pairs:
        if pair.chosen in place and pair.rejected in place:
            weight[place[pair.chosen], place[pair.rejected]] = share
    if selection.pairing == "pairs":  # the reverse pair, were it listed, is an item of its own
        weight *= np.array([[0, 1], [0, 0]], np.float32)
    return weight


def tie_weights(group: Group, item: Item, selection: Selection) -> np.ndarray:
    """f32 [k, k] over the item's responses, 1 a tie (see `ranking.tied`), or shares of the group; each tie once, at
    [i, j] with i before j in the item."""
    equal = tied(group)
    weight = np.zeros((len(item.responses),) * 2, np.float32)
    for (i, one), (j, other) in itertools.combinations(enumerate(item.responses), 2):
        weight[i, j] = (min(one, other), max(one, other)) in equal
    return weight / max(1.0, weight.sum()) if selection.mean == "groups" else weight


def rating_of(group: Group, item: Item, attributes: Sequence[str]) -> np.ndarray:
    """f32 [k, A]: what the item's responses were rated in each of `attributes`; NaN = not rated."""
    rated = [dict(group.responses[i].ratings) for i in item.responses]
    return np.array([[each.get(name, np.nan) for name in attributes] for each in rated], np.float32)


def check_ratings(groups: Sequence[Group], attributes: Sequence[str]) -> None:
    """Raises MissingRating for an attribute in which no response is rated."""
    there = {name for group in groups for response in group.responses for name, _ in response.ratings}
    if missing := [name for name in attributes if name not in there]:
        known = f"they are rated in {', '.join(sorted(there))}" if there else "they have no ratings at all"
        raise MissingRating(
            f"no response of {len(groups)} groups is rated in {', '.join(missing)}; {known}. Correct "
            "reward.attributes, or prepare with --source mapped --map ratings=FIELD, an object attribute -> number for "
            "each response"
        )


def rated_share(groups: Sequence[Group], attributes: Sequence[str]) -> str:
    """How many responses are rated in each attribute, for people."""
    responses = [response for group in groups for response in group.responses]
    counts = {name: sum(name in dict(response.ratings) for response in responses) for name in attributes}
    return f"of {len(responses)} responses rated: " + ", ".join(f"{name} {count}" for name, count in counts.items())


def check_margins(groups: Sequence[Group]) -> None:
    """Raises MissingMargin when a pair has neither a margin nor two scores."""
    bare = [
        group for group in groups
        if any(group.margin(pair) is None for pair in group.pairs)
    ]  # fmt: skip
    if bare:
        where = ", ".join(str(group.origins[0]) for group in bare[:3]) + (", ..." if len(bare) > 3 else "")
        raise MissingMargin(
            f"{len(bare)} of {len(groups)} groups have a pair without a margin ({where}); this objective needs one. "
            "Score the responses (launch/annotate.py --with reward) and train with --margins reward, "
            "prepare with --margin-column NAME (or --source mapped --map score=...), or train without margins"
        )


def check_visits(groups: Sequence[Group]) -> None:
    """Raises MissingVisits when a response of a pair has no score, or a negative one."""

    def bare(group: Group) -> bool:
        scores = [group.responses[i].score for pair in group.pairs for i in (pair.chosen, pair.rejected)]
        return any(score is None or score < 0 for score in scores)

    if without := [group for group in groups if bare(group)]:
        where = ", ".join(str(group.origins[0]) for group in without[:3]) + (", ..." if len(without) > 3 else "")
        raise MissingVisits(
            f"{len(without)} of {len(groups)} groups have a response without a count of visits ({where}); this "
            "objective reads them as the responses' scores, at least 0: prepare with --source mapped --map score=..."
        )


class GroupSource(Protocol):
    """What a loader reads: a dataset, or groups at hand. Picklable."""

    @property
    def path(self) -> str:
        """What messages call it."""

    def with_media(self, row: int) -> Group:
        """A group with the encoded bytes of its pictures."""


@dataclass(frozen=True)
class Loader:
    """A picklable map from `MicroBatch` to the numpy `GroupBatch` of this process.

    `scores` stand for those of the responses, by dataset row, where margins do not come from the dataset.

    `share` says which groups of a micro-batch are this process's, given how many there are; None: all of them.
    `reference` holds per-token reference log-probs by dataset row: f32 [tokens of all responses, end to end].
    """

    dataset: GroupSource
    renderer: Renderer
    items: tuple[Item, ...]
    buckets: tuple[Bucket, ...]
    selection: Selection
    responses: int
    reference: Mapping[int, np.ndarray] | None = None
    share: Callable[[int], list[int]] | None = None
    scores: Mapping[int, Sequence[float]] | None = None

    def __call__(self, micro: MicroBatch) -> GroupBatch:
        bucket = self.buckets[micro.bucket]
        mine = range(bucket.groups) if self.share is None else self.share(bucket.groups)
        chosen = [micro.items[place] for place in mine]
        return pack(
            [None if item == EMPTY else self.entry(self.items[item]) for item in chosen],
            bucket,
            micro.totals,
            responses=self.responses,
            tokens_per_tile=self.renderer.tokens_per_tile,
            tile_size=self.renderer.tile_size,
            separate=self.selection.pairing == "pairs",
            changed=self.selection.changed is not None,
            attributes=len(self.selection.attributes),
        )

    def entry(self, item: Item) -> Entry:
        """Reads, decodes and renders one item."""
        group = self.dataset.with_media(item.row)
        if self.scores is not None:
            group = with_scores(group, self.scores[item.row])
        whole = self.renderer.render(group, decode)
        taken = [group.responses[i] for i in item.responses]
        branches = tuple(whole.branches[i] for i in item.responses)
        rule = self.selection.changed
        return Entry(
            row=item.row,
            rendered=Rendered(
                whole.tiles,
                whole.prompt,
                whole.tap_index,
                whole.tap_weight,
                branches,
            ),
            pair_weight=pair_weights(group, item, self.selection),
            pair_margin=self._margins(group, item),
            tie_weight=tie_weights(group, item, self.selection),
            rank=np.array([response.rank for response in taken], np.int32),
            score=np.array([response.score or 0.0 for response in taken], np.float32),
            reference=self._reference(item, whole),
            changed=None if rule is None else self._changed(item, branches, rule),
            rating=rating_of(group, item, self.selection.attributes) if self.selection.attributes else None,
        )

    def _changed(self, item: Item, branches: Sequence[Branch], rule: Segments) -> list[np.ndarray]:
        try:
            return changed_tokens([branch.token for branch in branches], rule)
        except ValueError as error:
            raise ValueError(f"{self.dataset.path}, row {item.row}: {error}") from error

    def _margins(self, group: Group, item: Item) -> np.ndarray:
        place = {response: slot for slot, response in enumerate(item.responses)}
        out = np.zeros((len(place), len(place)), np.float32)
        for pair in group.pairs:
            if pair.chosen in place and pair.rejected in place:
                margin = group.margin(pair)
                out[place[pair.chosen], place[pair.rejected]] = 0.0 if margin is None else margin
        return out

    def _reference(self, item: Item, rendered: Rendered) -> tuple[np.ndarray, ...] | None:
        if self.reference is None:
            return None
        if item.row not in self.reference:
            raise ValueError(f"row {item.row} has no reference log-probs")
        stored = self.reference[item.row]
        ends = np.cumsum(rendered.lengths.responses)
        if len(stored) != ends[-1]:
            raise ValueError(f"row {item.row}: {len(stored)} reference log-probs for {ends[-1]} response tokens")
        pieces = np.split(stored, ends[:-1])
        return tuple(pieces[i] for i in item.responses)


def micro_batches(
    plan: StepPlan, load: Callable[[MicroBatch], GroupBatch], *, first_step: int = 0, workers: int = 0, buffer: int = 4
) -> Generator[tuple[MicroBatch, GroupBatch], None, None]:
    """Micro-batches in order from `first_step` on, loaded ahead: by threads, or by `workers` processes, which end when
    the generator is closed."""
    start = int(plan.first_of_step[first_step])
    rest = plan.micro_batches[start:]
    if not rest:
        return
    source = grain.MapDataset.source(list(rest)).map(load)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own flags, and nobody else parsed them
            flags.FLAGS.mark_as_parsed()
        loaded = source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=min(workers, len(rest)), per_worker_buffer_size=buffer),
            worker_init_fn=_hang_on_the_parent,
        )
    else:
        loaded = source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=buffer))
    with closing(iter(loaded)) as batches:
        yield from zip(rest, batches, strict=True)


def _hang_on_the_parent(worker: int, workers: int) -> None:
    """Terminals and job schedulers send their signals to every process; the parent decides when a run stops. One that
    was killed cannot, and would leave its workers, and the memory they hold, behind."""
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def measure(groups: Sequence[Group], renderer: Renderer) -> list[Lengths]:
    """Lengths of every group. Raises ValueError, before any work is done, where one is longer than the model can
    take."""
    lengths = [renderer.measure(group) for group in groups]
    most = renderer.max_positions
    long = [g for g, n in zip(groups, lengths, strict=True) if n.prompt + max(n.responses) > most]
    if long:
        first = long[0].origins[0] if long[0].origins else long[0].id
        longest = max(n.prompt + max(n.responses) for n in lengths)
        raise ValueError(
            f"{len(long)} of {len(groups)} groups have more tokens than the model's {most} positions ({first} first): "
            f"up to {longest}, template and critique of a reward model included. Use fewer --render.frames or a "
            "shorter reward template, or prepare with --model and --max-tokens: they are then listed and left out"
        )
    return lengths


def reading_plan(items: Items, buckets: tuple[Bucket, ...], assignment: np.ndarray, rows: Sequence[int]) -> StepPlan:
    """Every item of `rows` once, in bucket-homogeneous micro-batches: for annotation and evaluation, where order is
    free."""
    out: list[MicroBatch] = []
    totals = Totals(1.0, 1.0, 1.0, 1.0)  # nothing is divided: per-token values are read, not a loss
    wanted = set(rows)
    for index, bucket in enumerate(buckets):
        mine = [i for i, item in enumerate(items.items) if assignment[i] == index and item.row in wanted]
        for start in range(0, len(mine), bucket.groups):
            chosen = mine[start : start + bucket.groups]
            filled = tuple(chosen + [EMPTY] * (bucket.groups - len(chosen)))
            out.append(MicroBatch(len(out), index, filled, totals, last=True))
    return StepPlan(tuple(out), np.arange(len(out) + 1), "")
