"""MM-RLHF-RewardBench: 170 human preferences between answers to 46 questions about pictures and videos.

The file is `mm_reward_bench.jsonl` (yifanzhang114/MM-RLHF-RewardBench on the Hugging Face hub, and the r1_reward
repository), one comparison a row: `id`, `image` or `video`, `prompt`, `chosen`, `rejected`, `chosen_reason`,
`rejected_reason`. Rows of one `id` are one question.

ACC is the share of rows with r_chosen > r_rejected, equality being wrong; ACC+ the share of ids all of whose rows are
right. A row's category is the first of `CATEGORIES`, in this order, that its picture's path contains anywhere,
case-sensitively; a row whose path contains none counts in `overall` alone. All this as the released scorer has it
(https://arxiv.org/abs/2502.10391, table 4; MM-RLHF's llava/eval/cal_performance_mmreweard_bench.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mmrlhf_jax.data.sources.pictures import Store, media_of
from mmrlhf_jax.data.sources.rows import Row, RowError, id_of, optional_text_of, prompt_of
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, Comparison, answer_of, read_comparisons, right
from mmrlhf_jax.evaluation.results import Benchmark, Measured

CATEGORIES = ("mcq", "long", "short", "safety", "video")
NO_CATEGORY = "other"
RELEASED = {"mcq": (42, 10), "long": (37, 10), "short": (34, 10), "safety": (32, 6), "video": (25, 10)}
"""(rows, ids) of each category in the released file."""
MAX_ANSWERS = 12  # of one question: orders are counted over all subsets of them


def read(file: str, store: Store) -> tuple[Comparison, ...]:
    """All rows of the file; pictures that stand in rows go to `store`.

    Raises:
        SourceError, BenchmarkError: the file, or a row of it, cannot be used.
    """
    return read_comparisons(file, partial(check_row, category=_category, store=store))


def check_row(row: Row, *, category: Any, store: Store) -> Comparison:
    """A row with `chosen` and `rejected`; `category` tells its category from its fields. Raises RowError."""
    fields = row.fields
    for column in ("id", "prompt", "chosen", "rejected"):
        if column not in fields:
            raise RowError(f"column {column!r} is missing; the row has {', '.join(sorted(fields)) or 'none'}")
    media = media_of(fields.get("image"), fields.get("video"), store)
    return Comparison(
        origin=row.origin,
        id=id_of(fields["id"], "'id'"),
        category=category(fields),
        question=prompt_of(fields["prompt"], media),
        media=media,
        chosen=answer_of(fields["chosen"], "'chosen'"),
        rejected=answer_of(fields["rejected"], "'rejected'"),
        reasons=(
            optional_text_of(fields.get("chosen_reason"), "'chosen_reason'"),
            optional_text_of(fields.get("rejected_reason"), "'rejected_reason'"),
        ),
    )


def _category(fields: Mapping[str, Any]) -> str:
    value = fields.get("image") if fields.get("image") is not None else fields.get("video")
    first = value[0] if isinstance(value, list) and value else value
    path = first.get("path") if isinstance(first, dict) else first
    return category_of(path) if isinstance(path, str) and not path.startswith("data:") else NO_CATEGORY


def category_of(path: str) -> str:
    """The first of the categories whose name the path contains."""
    return next((name for name in CATEGORIES if name in path), NO_CATEGORY)


def measure(rows: Sequence[Comparison], rewards: np.ndarray) -> Measured:
    """ACC and ACC+ of each category and overall, for `rewards` f64 [rows, 2] of chosen and rejected."""
    won = right(rewards)
    ids: dict[str, bool] = {}
    for row, is_right in zip(rows, won.tolist(), strict=True):
        ids[row.id] = ids.get(row.id, True) and is_right
    return _sections(rows, won.astype(float), {name: float(all_right) for name, all_right in ids.items()})


def chance(rows: Sequence[Comparison]) -> Measured:
    """What random scores reach, in expectation: each distinct answer of an id draws a score of its own, so all orders
    of an id's answers are equally likely.

    A row is then right with probability 1/2 (0 where both answers are one), an id with the share of orders that agree
    with all of its rows. (A coin for each row would understate ACC+: rows of an id share answers, so their outcomes go
    together; on the released file .112 instead of .188.)
    """
    of_id: dict[str, list[Comparison]] = {}
    for row in rows:
        of_id.setdefault(row.id, []).append(row)
    won = np.array([0.5 * (row.chosen != row.rejected) for row in rows])
    return _sections(rows, won, {name: _share_of_orders(name, mine) for name, mine in of_id.items()})


def _share_of_orders(name: str, rows: Sequence[Comparison]) -> float:
    index: dict[tuple[Any, ...], int] = {}
    pairs = [
        tuple(index.setdefault((row.question, row.media, text), len(index)) for text in (row.chosen, row.rejected))
        for row in rows
    ]
    if len(index) > MAX_ANSWERS:
        raise BenchmarkError(
            f"{rows[0].origin}: id {name!r} has {len(index)} different answers, more than {MAX_ANSWERS}: rows of "
            "one id are to be about one question"
        )
    return share_of_orders(len(index), [(better, worse) for better, worse in pairs])


def share_of_orders(answers: int, pairs: Sequence[tuple[int, int]]) -> float:
    """The share of the orders of so many answers that put the first of every pair before its second."""
    before = [0] * answers  # as bits: what must stand before each
    for better, worse in pairs:
        before[worse] |= 1 << better
    # `reach[set]`: probability that a random order begins with these answers and has broken no pair so far
    reach = [1.0, *[0.0] * ((1 << answers) - 1)]
    for placed in range(1 << answers):
        if reach[placed]:
            left = answers - placed.bit_count()
            for answer in range(answers):
                if not placed >> answer & 1 and before[answer] & ~placed == 0:
                    reach[placed | 1 << answer] += reach[placed] / left
    return reach[-1]


def _sections(rows: Sequence[Comparison], won: np.ndarray, ids_won: Mapping[str, float]) -> Measured:
    """`won` [rows] and `ids_won` are 0, 1 or probabilities."""
    present = {row.category for row in rows}
    sections: Measured = {}
    for name in (*CATEGORIES, NO_CATEGORY, "overall"):
        if name == NO_CATEGORY and name not in present:
            continue
        mine = np.array([name in (row.category, "overall") for row in rows])
        ids = dict.fromkeys(row.id for row, is_mine in zip(rows, mine.tolist(), strict=True) if is_mine)
        sections[name] = {
            "pairs": int(mine.sum()),
            "groups": len(ids),
            "acc": float(won[mine].mean()) if ids else None,
            "acc_plus": math.fsum(ids_won[one] for one in ids) / len(ids) if ids else None,
        }
    return sections


def remarks(rows: Sequence[Comparison]) -> list[str]:
    """What a reader of the figures should know of the file."""
    counted = _sections(rows, np.zeros(len(rows)), {row.id: 0.0 for row in rows})
    found = {name: (one["pairs"], one["groups"]) for name, one in counted.items() if name != "overall"}
    lines = []
    if NO_CATEGORY in found:
        lines.append(f"other: rows whose path contains none of {', '.join(CATEGORIES)}; they count in overall alone")
    if found != RELEASED:
        lines.append("not the released file (170 pairs in 46 groups): do not compare with published figures")
    return lines


BENCHMARK = Benchmark(
    name="reward_bench",
    title="MM-RLHF-RewardBench",
    counts=("pairs", "groups"),
    metrics={"acc": "ACC", "acc_plus": "ACC+"},
    read=read,
    measure=measure,
    chance=chance,
    remarks=remarks,
)
