"""VL-RewardBench: 1,250 preferences between two answers to a question about a picture.

Source: https://arxiv.org/abs/2411.17451, MMInstruction/VL-RewardBench on the Hugging Face hub, its repository
vl-rewardbench/VL_RewardBench. Two forms are read, as parquet, JSON lines or a JSON array:
- the benchmark's own: `id`, `query`, `response` (two), `human_ranking` (rank of each: [0, 1] says the first is better),
  and the picture in `image` (bytes, or a path) or, as the repository's file has it, its path in `image_path`;
- r1_reward's: `id`, `prompt`, `chosen`, `rejected`, `image`.

`general`, `hallucination` and `reasoning` follow from the id's prefix, case-sensitively: `PREFIXES`. Ids that begin
with none of these are VLFeedback's, which keep the names of their own sources (`LRVInstruction-...`), and are
`general`. An id that almost begins with one, such as `rlhf-v` in small letters, is refused: a script that looked for
just that put 301 rows of hallucination into general.

Overall is the share of all rows that are right (micro), macro the mean of the three groups. 25 ids occur twice: nothing
here is keyed by id alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mmrlhf_jax.command import one_line
from mmrlhf_jax.data.sources.pictures import Store, picture_of
from mmrlhf_jax.data.sources.rows import Row, RowError, id_of, number_of, prompt_of
from mmrlhf_jax.evaluation.comparisons import Comparison, answer_of, read_comparisons, right
from mmrlhf_jax.evaluation.results import Benchmark, Measured
from mmrlhf_jax.evaluation.reward_bench import check_row

PREFIXES = {
    "wildvision": "general",
    "RLAIF-V": "hallucination",
    "RLHF-V": "hallucination",
    "hallucination_pair": "hallucination",  # POVID
    "mathverse": "reasoning",
    "mmmu": "reasoning",
}
GROUPS = ("general", "hallucination", "reasoning")
RELEASED = {"general": 183, "hallucination": 749, "reasoning": 318}
"""Rows of each group in the released file."""

_NEARLY = ("wildvision", "rlaif", "rlhf", "hallucination", "mathverse", "mmmu")


def read(file: str, store: Store) -> tuple[Comparison, ...]:
    """All rows of the file; pictures that stand in rows go to `store`.

    Raises:
        SourceError, BenchmarkError: the file, or a row of it, cannot be used.
    """
    return read_comparisons(file, partial(_check, store=store))


def _check(row: Row, store: Store) -> Comparison:
    fields = row.fields
    if "response" not in fields:
        if "chosen" not in fields:
            raise RowError("the row has neither 'response' (two answers) nor 'chosen' and 'rejected'")
        return check_row(row, category=lambda fields: group_of(id_of(fields["id"], "'id'")), store=store)
    for column in ("id", "query", "human_ranking"):
        if column not in fields:
            raise RowError(f"column {column!r} is missing; the row has {', '.join(sorted(fields))}")
    name = next((column for column in ("image", "image_path") if fields.get(column) is not None), None)
    if name is None:
        raise RowError("the row has neither 'image' nor 'image_path'")
    media = (picture_of(fields[name], repr(name), store),)
    identity = id_of(fields["id"], "'id'")
    chosen, rejected = _in_order(fields["response"], fields["human_ranking"])
    return Comparison(
        origin=row.origin,
        id=identity,
        category=group_of(identity),
        question=prompt_of(fields["query"], media, "'query'"),
        media=media,
        chosen=chosen,
        rejected=rejected,
    )


def _in_order(responses: Any, ranking: Any) -> tuple[str, str]:
    """The better answer, then the worse."""
    if not isinstance(responses, list) or len(responses) != 2:
        raise RowError("'response' is not a list of two answers")
    if not isinstance(ranking, list) or len(ranking) != 2:
        raise RowError("'human_ranking' is not a list of two ranks")
    ranks = [number_of(rank, "'human_ranking'") for rank in ranking]
    if sorted(ranks) != [0, 1]:
        raise RowError(f"'human_ranking' is {ranking}; [0, 1] says the first answer is better, [1, 0] the second")
    first, second = (answer_of(answer, "'response'") for answer in responses)
    return (first, second) if ranks[0] == 0 else (second, first)


def group_of(identity: str) -> str:
    """The group of an id. Raises RowError for one that almost begins with a known prefix."""
    if (prefix := _prefix(identity)) is not None:
        return PREFIXES[prefix]
    if (near := next((stem for stem in _NEARLY if identity.casefold().startswith(stem)), None)) is not None:
        known = next(prefix for prefix in PREFIXES if prefix.casefold().startswith(near))
        raise RowError(f"id {identity[:80]!r} does not begin with {known!r}, which is spelled just so: mend the id")
    return "general"


def _prefix(identity: str) -> str | None:
    return next((prefix for prefix in PREFIXES if identity.startswith(prefix)), None)


def measure(rows: Sequence[Comparison], rewards: np.ndarray) -> Measured:
    """Accuracy of each group, overall and macro, for `rewards` f64 [rows, 2] of chosen and rejected."""
    return _sections(rows, right(rewards).astype(float))


def chance(rows: Sequence[Comparison]) -> Measured:
    """What random scores reach, in expectation: 1/2, and 0 for a row whose answers are one."""
    return _sections(rows, np.array([0.5 * (row.chosen != row.rejected) for row in rows]))


def _sections(rows: Sequence[Comparison], won: np.ndarray) -> Measured:
    """`won` [rows] is 0, 1 or a probability. Macro needs rows of every group."""
    category = np.array([row.category for row in rows])
    sections: Measured = {}
    for name in GROUPS:
        mine = won[category == name]
        sections[name] = {"pairs": len(mine), "acc": float(mine.mean()) if len(mine) else None}
    each = [section["acc"] for section in sections.values() if section["acc"] is not None]
    sections["overall"] = {"pairs": len(won), "acc": float(won.mean())}
    sections["macro"] = {"acc": float(np.mean(each)) if len(each) == len(GROUPS) else None}
    return sections


def remarks(rows: Sequence[Comparison]) -> list[str]:
    """What a reader of the figures should know of the file."""
    lines = []
    if others := Counter(row.id.split("-")[0].split("_")[0] for row in rows if _prefix(row.id) is None):
        listed = ", ".join(f"{one_line(name)[:40]} {count}" for name, count in others.most_common(10))
        more = f", {len(others) - 10} more" if len(others) > 10 else ""
        lines.append(f"general: {others.total()} rows of no known prefix (VLFeedback's sources): {listed}{more}")
    found: Mapping[str, int] = Counter(row.category for row in rows)
    if found != RELEASED:
        lines.append(
            "not the released file (183 general, 749 hallucination, 318 reasoning): do not compare with "
            "published figures"
        )
    return lines


BENCHMARK = Benchmark(
    name="vl_reward_bench",
    title="VL-RewardBench",
    counts=("pairs",),
    metrics={"acc": "ACC"},
    read=read,
    measure=measure,
    chance=chance,
    remarks=remarks,
)
