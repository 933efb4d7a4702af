"""Which groups an optimizer step sees, and in which micro-batches: a pure function of the seed.

The whole order of a run is known before its first step, so the position in the data is one integer, independent of
hosts and workers, and a resumed run cannot see a group twice or skip one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.batch import EMPTY, Totals
from mmrlhf_jax.data.buckets import BucketPlan
from mmrlhf_jax.groups import Bucket


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward: `items` of one bucket, EMPTY = filler; `last` closes the optimizer step."""

    step: int  # counts from 0
    bucket: int
    items: tuple[int, ...]
    totals: Totals
    last: bool


@dataclass(frozen=True)
class ItemWeights:
    """What each item adds to the step's totals, f64 [n] each."""

    pairs: np.ndarray
    chosen_tokens: np.ndarray
    tokens: np.ndarray
    ties: np.ndarray
    ratings: np.ndarray | None = None
    """None: nothing reads them"""

    def totals(self, items: Sequence[int]) -> Totals:
        chosen = np.asarray(items)
        return Totals(
            pairs=float(self.pairs[chosen].sum()),
            chosen_tokens=float(self.chosen_tokens[chosen].sum()),
            tokens=float(self.tokens[chosen].sum()),
            groups=float(len(chosen)),
            ties=float(self.ties[chosen].sum()),
            ratings=0.0 if self.ratings is None else float(self.ratings[chosen].sum()),
        )


@dataclass(frozen=True)
class StepPlan:
    """All micro-batches of a run, in order; `first_of_step[s]` is where step s begins (its last entry closes the run).

    `fingerprint` names which items each step sees, not how they are cut into micro-batches: a run may go on with other
    devices and buckets.
    """

    micro_batches: tuple[MicroBatch, ...]
    first_of_step: np.ndarray
    fingerprint: str

    @property
    def steps(self) -> int:
        return len(self.first_of_step) - 1

    @property
    def filler_share(self) -> float:
        """Share of group slots that hold no group."""
        slots = [item for micro in self.micro_batches for item in micro.items]
        return slots.count(EMPTY) / max(1, len(slots))


def plan_steps(
    buckets: BucketPlan,
    weights: ItemWeights,
    *,
    groups_per_step: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
    whole_step: bool = False,
) -> StepPlan:
    """Shuffles every epoch by (seed, epoch), cuts it into steps of `groups_per_step` items, deals each into
    micro-batches.

    `max_steps`, when given, decides instead of `epochs`. The last step of an epoch may be smaller; every item is seen
    once an epoch. `whole_step` puts each step into a single micro-batch, of the smallest bucket shape that covers it,
    for objectives with step-wide statistics.
    """
    count = len(buckets.assignment)
    per_epoch = math.ceil(count / groups_per_step)
    # 50 steps an epoch are 55 in 1.1 epochs, although 50 * 1.1 is a little more
    steps = math.ceil(round(per_epoch * epochs, 6)) if max_steps is None else max_steps
    micro_batches: list[MicroBatch] = []
    first = [0]
    seen: list[list[int]] = []
    order = np.empty(0, np.int64)
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            order = np.random.default_rng((seed, epoch)).permutation(count)
        items = [int(i) for i in order[at * groups_per_step : (at + 1) * groups_per_step]]
        seen.append(items)
        totals = weights.totals(items)
        dealt = deal_whole(items, buckets) if whole_step else deal(items, buckets)
        for n, (bucket, chosen) in enumerate(dealt):
            micro_batches.append(MicroBatch(step, bucket, chosen, totals, last=n == len(dealt) - 1))
        first.append(len(micro_batches))
    return StepPlan(tuple(micro_batches), np.array(first), hashlib.sha256(json.dumps(seen).encode()).hexdigest())


def deal(items: Sequence[int], plan: BucketPlan) -> list[tuple[int, tuple[int, ...]]]:
    """The items of a step as full micro-batches of one bucket each; what is left over moves up into a larger bucket's
    free slots when there are any, and only then is filled up with EMPTY."""
    queues: list[list[int]] = [[] for _ in plan.buckets]
    for item in items:
        queues[plan.assignment[item]].append(item)
    for small, bucket in enumerate(plan.buckets):
        left = len(queues[small]) % bucket.groups
        for large in range(small + 1, len(plan.buckets)):
            other = plan.buckets[large]
            free = -len(queues[large]) % other.groups
            if 0 < left <= free and covers(other, bucket):
                queues[large] += queues[small][-left:]
                del queues[small][-left:]
                break
    out = []
    for index, (bucket, queue) in enumerate(zip(plan.buckets, queues, strict=True)):
        for start in range(0, len(queue), bucket.groups):
            chosen = queue[start : start + bucket.groups]
            out.append((index, tuple(chosen + [EMPTY] * (bucket.groups - len(chosen)))))
    return out


def deal_whole(items: Sequence[int], plan: BucketPlan) -> list[tuple[int, tuple[int, ...]]]:
    """All items of a step in one micro-batch. Raises ValueError where no bucket holds them."""
    needed = [plan.buckets[plan.assignment[item]] for item in items]
    for index, bucket in enumerate(plan.buckets):
        if bucket.groups >= len(items) and all(covers(bucket, other) for other in needed):
            return [(index, (*items, *[EMPTY] * (bucket.groups - len(items))))]
    raise ValueError(
        f"this objective takes statistics over the whole step, so its {len(items)} groups must fit one micro-batch: "
        "set data.max_buckets to 1 and raise data.slots_per_device, or lower data.groups_per_step"
    )


def covers(large: Bucket, small: Bucket) -> bool:
    return large.tiles >= small.tiles and large.prompt >= small.prompt and large.response >= small.response
