"""MM-RLHF's `dpo_pairs.jsonl` and `mm_reward_bench.jsonl`: one pair a row, several rows a query.

Columns read: `id`, `image` (path or list) or `video` (directory of frames) or neither, `prompt`, `chosen`,
`rejected`, optional `chosen_reason`, `rejected_reason`, `is_tie`, and the margin column the user names. Rows of the
same id, prompt and media are one group; the same text is the same response.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmrlhf_jax.data.ranking import Preference, RankingCycle, weak_order
from mmrlhf_jax.data.sources.rows import (
    Item,
    Rejected,
    Remark,
    Row,
    RowError,
    SourceError,
    SourceOptions,
    id_of,
    media_of,
    number_of,
    optional_text_of,
    prompt_of,
    read_rows,
    text_of,
)
from mmrlhf_jax.groups import Group, Media, Origin, Pair, Response, Turn

COLUMNS = ("id", "image", "video", "prompt", "chosen", "rejected", "chosen_reason", "rejected_reason", "is_tie")


@dataclass(frozen=True, slots=True)
class PairRow:
    """One checked row."""

    origin: Origin
    key: tuple[str, str, tuple[Media, ...]]  # id, prompt, media
    chosen: str
    rejected: str
    reasons: tuple[str | None, str | None]
    tie: bool
    margin: float | None


@dataclass(slots=True)
class _Tally:
    """What is counted over all rows of all files."""

    rows: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    differing_reasons: int = 0


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """Groups in order of their first row; `Rejected` rows; `Remark`s at the end.

    Raises:
        SourceError: the margin column is in no row, or `--map` was given.
    """
    if options.mapping:
        raise SourceError("--map belongs to --source mapped; mm_rlhf has fixed columns")
    tally, groups = _Tally(), dict[tuple[str, str, tuple[Media, ...]], list[PairRow]]()
    rejected: list[Rejected] = []
    for row in read_rows(files):
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        _count(row, options.margin_column, tally)
        try:
            pair = _check(row, options.margin_column)
        except RowError as error:
            rejected.append(Rejected(row.origin, str(error)))
            continue
        groups.setdefault(pair.key, []).append(pair)
    if options.margin_column is not None and tally.rows and options.margin_column not in tally.seen:
        raise SourceError(
            f"--margin-column {options.margin_column!r} is in no row; columns are {', '.join(sorted(tally.seen))}"
        )
    yield from rejected
    for rows in groups.values():
        yield from _group(rows, tally)
    for column, count in sorted(tally.unread.items()):
        yield Remark(f"column {column!r} is not read", count)
    if tally.differing_reasons:
        yield Remark("another reason for a response that has one already; the first is kept", tally.differing_reasons)


def _count(row: Row, margin_column: str | None, tally: _Tally) -> None:
    tally.rows += 1
    tally.seen.update(row.fields)
    tally.unread.update(key for key in row.fields if key not in COLUMNS and key != margin_column)


def _check(row: Row, margin_column: str | None) -> PairRow:
    fields = row.fields
    for column in ("id", "prompt", "chosen", "rejected"):
        if column not in fields:
            raise RowError(f"column {column!r} is missing; the row has {', '.join(sorted(fields)) or 'none'}")
    media = media_of(fields.get("image"), fields.get("video"))
    chosen, rejected = text_of(fields["chosen"], "'chosen'"), text_of(fields["rejected"], "'rejected'")
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are identical")
    tie = fields.get("is_tie", False)
    if not isinstance(tie, bool):
        raise RowError("'is_tie' is not a boolean")
    return PairRow(
        origin=row.origin,
        key=(id_of(fields["id"], "'id'"), prompt_of(fields["prompt"], media), media),
        chosen=chosen,
        rejected=rejected,
        reasons=(
            optional_text_of(fields.get("chosen_reason"), "'chosen_reason'"),
            optional_text_of(fields.get("rejected_reason"), "'rejected_reason'"),
        ),
        tie=tie,
        margin=None if tie or margin_column is None else _margin(fields, margin_column),
    )


def _margin(fields: dict[str, Any], column: str) -> float:
    if column not in fields:
        raise RowError(f"margin column {column!r} is missing")
    return number_of(fields[column], repr(column))


def _group(rows: list[PairRow], tally: _Tally) -> Iterator[Item]:
    """One group, or its rows rejected together where they contradict each other."""
    kept: dict[tuple[str, str, bool], PairRow] = {}
    duplicates: list[Rejected] = []
    for row in rows:
        first, second = sorted((row.chosen, row.rejected)) if row.tie else (row.chosen, row.rejected)
        earlier = kept.setdefault((first, second, row.tie), row)
        if earlier is row:
            continue
        if earlier.margin != row.margin:
            reason = f"two margins for one pair: {earlier.origin} has {earlier.margin}, {row.origin} has {row.margin}"
            yield from (Rejected(each.origin, reason) for each in rows)
            return
        duplicates.append(Rejected(row.origin, f"duplicate of {earlier.origin}", duplicate=True))
    yield from duplicates
    rows = list(kept.values())
    index = {text: i for i, text in enumerate(dict.fromkeys(t for r in rows for t in (r.chosen, r.rejected)))}
    preferences = [Preference(index[r.chosen], index[r.rejected], r.origin, r.tie) for r in rows]
    try:
        ranking = weak_order(len(index), preferences)
    except RankingCycle as error:
        yield from (Rejected(row.origin, str(error)) for row in rows)
        return
    yield _assemble(rows, index, ranking.rank, tally)


def _assemble(rows: list[PairRow], index: dict[str, int], rank: tuple[int, ...], tally: _Tally) -> Group:
    """Responses best first; among equal ranks, in order of appearance."""
    reasons: dict[str, str] = {}
    for row in rows:
        for text, reason in zip((row.chosen, row.rejected), row.reasons, strict=True):
            if reason is not None and reasons.setdefault(text, reason) != reason:
                tally.differing_reasons += 1
    texts = sorted(index, key=lambda text: (rank[index[text]], index[text]))
    place = {text: i for i, text in enumerate(texts)}
    group_id, prompt, media = rows[0].key
    return Group(
        id=group_id,
        prompt=(Turn("user", prompt),),
        media=media,
        responses=tuple(Response(text, rank[index[text]], reason=reasons.get(text)) for text in texts),
        pairs=tuple(
            sorted(
                (Pair(place[r.chosen], place[r.rejected], r.margin) for r in rows if not r.tie),
                key=lambda pair: (pair.chosen, pair.rejected),
            )
        ),
        origins=tuple(row.origin for row in rows),
    )
