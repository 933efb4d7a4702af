"""Rows that each say "this answer is better than that one" -> ranked groups. What all such formats share.

A format checks one row at a time (`Check`); here rows of the same prompt come together, ranks are rebuilt from the
pairs, and what was left unread is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mmrlhf_jax.data.ranking import Preference, RankingCycle, weak_order
from mmrlhf_jax.data.sources.rows import (
    MAX_RESPONSES,
    Item,
    Rejected,
    Remark,
    Row,
    RowError,
    SourceError,
    number_of,
    read_rows,
)
from mmrlhf_jax.groups import Group, Media, Origin, Pair, Response, Turn


@dataclass(frozen=True, slots=True)
class PairRow:
    """One checked row. Rows of the same prompt, media and `apart` are one group, named by the first one's `id`.

    rejected   None: the row has one answer and nothing to compare it with
    reasons    of chosen and rejected
    notes      things true of this row that the user should know, counted over all rows
    """

    origin: Origin
    id: str
    prompt: tuple[Turn, ...]
    media: tuple[Media, ...]
    chosen: str
    rejected: str | None
    apart: str = ""
    reasons: tuple[str | None, str | None] = (None, None)
    tie: bool = False
    margin: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[Turn, ...], tuple[Media, ...]]:
        return self.apart, self.prompt, self.media

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


Check = Callable[[Row], PairRow]  # raises RowError


@dataclass(slots=True)
class _Tally:
    """What is counted over all rows of all files."""

    seen: set[str] = field(default_factory=set)
    unread: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    differing_reasons: int = 0


def read_pairs(
    files: Sequence[str],
    check: Check,
    *,
    columns: Sequence[str],
    margin_column: str | None,
    needed: Sequence[tuple[str, str]] = (),
) -> Iterator[Item]:
    """Groups in order of their first row; `Rejected` rows; `Remark`s at the end.

    `columns` are those the format knows; `needed` are (option, column) that the user named and some row must have.

    Raises:
        SourceError: a column that the user named is in no row.
    """
    tally, groups = _Tally(), dict[tuple[str, tuple[Turn, ...], tuple[Media, ...]], list[PairRow]]()
    rejected: list[Rejected] = []
    for row in read_rows(files):
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        tally.seen.update(row.fields)
        tally.unread.update(key for key in row.fields if key not in columns and key != margin_column)
        try:
            pair = check(row)
        except RowError as error:
            rejected.append(Rejected(row.origin, str(error)))
            continue
        tally.notes.update(pair.notes)
        groups.setdefault(pair.key, []).append(pair)
    _check_named([*needed, *([] if margin_column is None else [("--margin-column", margin_column)])], tally.seen)
    yield from rejected
    for rows in groups.values():
        yield from _group(rows, tally)
    for column, count in sorted(tally.unread.items()):
        yield Remark(f"column {column!r} is not read", count)
    for note, count in tally.notes.items():
        yield Remark(note, count)
    if tally.differing_reasons:
        yield Remark("another reason for a response that has one already; the first is kept", tally.differing_reasons)


def _check_named(named: Sequence[tuple[str, str]], seen: set[str]) -> None:
    for option, column in named:
        if seen and column not in seen:
            raise SourceError(f"{option} {column!r} is in no row; columns are {', '.join(sorted(seen))}")


def margin_of(row: Row, column: str | None) -> float | None:
    """The row's margin, where the user named a column of margins."""
    if column is None:
        return None
    if column not in row.fields:
        raise RowError(f"margin column {column!r} is missing")
    return number_of(row.fields[column], repr(column))


def check_different(chosen: str, rejected: str) -> None:
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are identical")


def _group(rows: list[PairRow], tally: _Tally) -> Iterator[Item]:
    """One group, or its rows rejected together where they contradict each other or are too many."""
    kept: dict[tuple[tuple[str, ...], bool], PairRow] = {}
    duplicates: list[Rejected] = []
    for row in rows:
        texts = tuple(sorted(row.texts)) if row.tie else row.texts
        earlier = kept.setdefault((texts, row.tie), row)
        if earlier is row:
            continue
        if earlier.margin != row.margin:
            reason = f"two margins for one pair: {earlier.origin} has {earlier.margin}, {row.origin} has {row.margin}"
            yield from (Rejected(each.origin, reason) for each in rows)
            return
        duplicates.append(Rejected(row.origin, f"duplicate of {earlier.origin}", duplicate=True))
    yield from duplicates
    rows = list(kept.values())
    index = {text: i for i, text in enumerate(dict.fromkeys(text for row in rows for text in row.texts))}
    if len(index) > MAX_RESPONSES:
        reason = f"its prompt has {len(index)} responses, more than {MAX_RESPONSES}"
        yield from (Rejected(row.origin, reason) for row in rows)
        return
    preferences = [
        Preference(index[r.chosen], index[r.rejected], r.origin, r.tie) for r in rows if r.rejected is not None
    ]
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
        for text, reason in zip(row.texts, row.reasons, strict=False):
            if reason is not None and reasons.setdefault(text, reason) != reason:
                tally.differing_reasons += 1
    texts = sorted(index, key=lambda text: (rank[index[text]], index[text]))
    place = {text: i for i, text in enumerate(texts)}
    compared = [(place[r.chosen], place[r.rejected], r) for r in rows if r.rejected is not None]
    pairs = [Pair(chosen, rejected, row.margin) for chosen, rejected, row in compared if not row.tie]
    ties = {(min(one, other), max(one, other)) for one, other, row in compared if row.tie}
    return Group(
        id=rows[0].id,
        prompt=rows[0].prompt,
        media=rows[0].media,
        responses=tuple(Response(text, rank[index[text]], reason=reasons.get(text)) for text in texts),
        pairs=tuple(sorted(pairs, key=lambda pair: (pair.chosen, pair.rejected))),
        origins=tuple(row.origin for row in rows),
        ties=tuple(sorted(ties)),
    )
