"""Rows "people prefer this answer to that one" of a reward benchmark: read whole, scored as groups, taken apart again.

A benchmark with holes is no benchmark: one row that cannot be used, or one bad picture, and nothing is scored. All such
rows are listed at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mmrlhf_jax.command import one_line
from mmrlhf_jax.data.media import MediaError, MediaRoot, verify_media
from mmrlhf_jax.data.sources.pictures import is_embedded
from mmrlhf_jax.data.sources.rows import Rejected, Row, RowError, read_rows
from mmrlhf_jax.groups import Group, Media, Origin, Renderer, Response, Turn

SHOWN = 20  # bad rows in one message


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as it stands: one message that lists rows and says how to go on."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row; the texts as they stand in the file, `reasons` (human critiques) of chosen and rejected."""

    origin: Origin
    id: str
    category: str
    question: str
    media: tuple[Media, ...]
    chosen: str
    rejected: str
    reasons: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row's answers are scored: the number of its group, and of the two responses in it."""

    group: int
    chosen: int
    rejected: int


class Scored(Protocol):
    """What a reward model says of a group, as `data.rewards.GroupReward` has it."""

    @property
    def score(self) -> Sequence[float]:
        """One number a response."""

    @property
    def critiques(self) -> Sequence[Sequence[str]]:
        """The critiques each response's score rests on; empty texts where it was scored without."""

    @property
    def ended(self) -> Any:
        """bool [K, n]: whether the model closed each of them itself, rather than being cut short."""


def read_comparisons(file: str, check: Callable[[Row], Comparison]) -> tuple[Comparison, ...]:
    """Every row of the file, in its order; `check` makes one of a row or raises RowError.

    Raises:
        SourceError: the file cannot be read.
        BenchmarkError: a row cannot be used, or there is none.
    """
    rows: list[Comparison] = []
    bad: list[Rejected] = []
    for row in read_rows([file]):
        if isinstance(row, Rejected):
            bad.append(row)
            continue
        try:
            rows.append(check(row))
        except RowError as error:
            bad.append(Rejected(row.origin, str(error)))
    refuse(bad, "mend the file; figures of a part of it do not compare with those of others")
    if not rows:
        raise BenchmarkError(f"{file} holds no rows: correct --input")
    return tuple(rows)


def answer_of(value: Any, where: str) -> str:
    """An answer verbatim; a model may well have said nothing."""
    if not isinstance(value, str):
        raise RowError(f"{where} is not a string")
    return value


def check_reasons(rows: Sequence[Comparison]) -> None:
    """Raises BenchmarkError naming the rows that lack a human critique of one of their answers."""
    lacking = [
        Rejected(row.origin, f"no {name}_reason")
        for row in rows
        for name, reason in zip(("chosen", "rejected"), row.reasons, strict=True)
        if reason is None
    ]
    refuse(lacking, "--critiques human scores with the file's own reasons; use generated or none")


def as_groups(rows: Sequence[Comparison], *, human: bool) -> tuple[list[Group], list[Place]]:
    """The rows as groups, one for each id, question and media, and where each row is in them.

    An answer is one response however many rows it stands in. With `human` critiques it is one for each reason given for
    it, so that every row is scored with its own; else responses carry no reason.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    members: list[list[Comparison]] = []
    branches: list[dict[tuple[str, str | None], int]] = []
    places: list[Place] = []
    for row in rows:
        number = numbers.setdefault((row.id, row.question, row.media), len(numbers))
        if number == len(members):
            members.append([])
            branches.append({})
        members[number].append(row)
        reasons = row.reasons if human else (None, None)
        chosen, rejected = (
            branches[number].setdefault((text, reason), len(branches[number]))
            for text, reason in zip((row.chosen, row.rejected), reasons, strict=True)
        )
        places.append(Place(number, chosen, rejected))
    groups = [_group(each, list(known)) for each, known in zip(members, branches, strict=True)]
    return groups, places


def _group(rows: Sequence[Comparison], branches: Sequence[tuple[str, str | None]]) -> Group:
    return Group(
        id=rows[0].id,
        prompt=(Turn("user", rows[0].question),),
        media=rows[0].media,
        responses=tuple(Response(text, reason=reason) for text, reason in branches),
        pairs=(),  # whose answer is better is for the scores to say
        origins=tuple(row.origin for row in rows),
    )


def with_pictures(
    groups: Sequence[Group], media: MediaRoot | None, embedded: MediaRoot, *, workers: int, progress: Progress
) -> list[Group]:
    """The groups with the bytes of their pictures, every one of which has been decoded.

    `media` is the root of the paths in rows, `embedded` that of the pictures that stood in them.

    Raises:
        BenchmarkError: listing every row whose picture is missing, damaged or too large, or that needs `media`.
    """
    wanted = list(dict.fromkeys(each for group in groups for each in group.media))
    if media is None and (named := next((each for each in wanted if not is_embedded(each)), None)):
        raise BenchmarkError(f"the rows name pictures or videos ({named.path!r}): give their root with --media")
    with ThreadPoolExecutor(workers) as pool:  # Pillow's decoders release the GIL
        results = pool.map(lambda each: _proven(each, embedded if is_embedded(each) else media), wanted)
        found = dict(zip(wanted, progress(results, len(wanted)), strict=True))
    bad = [
        Rejected(origin, found[each])
        for group in groups
        for each in group.media
        if isinstance(found[each], str)
        for origin in group.origins
    ]
    refuse(bad, "put the pictures there (--media is the root of all paths); none is left out or replaced")
    return [dataclasses.replace(group, media=tuple(found[each] for each in group.media)) for group in groups]


Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Shows how far it is through so many items while it hands them on."""


def _proven(media: Media, root: MediaRoot | None) -> Any:
    """The media with their bytes, or what is wrong with them."""
    assert root is not None
    try:
        return verify_media(media, root)
    except MediaError as error:
        return str(error)
    except OSError as error:
        return f"{media.path!r} cannot be read: {error}"


def check_lengths(groups: Sequence[Group], renderer: Renderer, to_come: int) -> None:
    """Raises BenchmarkError listing the rows that, with `to_come` tokens of a critique, are too long for the model."""
    bad = []
    for group in groups:
        lengths = renderer.measure(group)
        tokens = lengths.prompt + max(lengths.responses) + to_come
        if tokens > renderer.max_positions:
            reason = f"{tokens} tokens (prompt {lengths.prompt}, {to_come} to come)"
            bad += [Rejected(origin, reason) for origin in group.origins]
    refuse(
        bad, f"the model takes {renderer.max_positions} tokens and nothing is cut; a video gets by with fewer frames"
    )


def rewards_of(rows: Sequence[Comparison], places: Sequence[Place], scored: Sequence[Scored]) -> np.ndarray:
    """f64 [rows, 2]: the scores of chosen and rejected.

    Raises:
        BenchmarkError: a score is not finite; a comparison with NaN would quietly count as wrong.
    """
    rewards = np.array([[scored[p.group].score[p.chosen], scored[p.group].score[p.rejected]] for p in places], float)
    bad = [
        Rejected(row.origin, f"the model scores {pair[0]} and {pair[1]}")
        for row, pair in zip(rows, rewards, strict=True)
        if not np.isfinite(pair).all()
    ]
    refuse(bad, "try --dtype float32")
    return rewards


def lengths_of(rows: Sequence[Comparison]) -> np.ndarray:
    """f64 [rows, 2]: characters of chosen and rejected, a reward that prefers the longer answer."""
    return np.array([[len(row.chosen), len(row.rejected)] for row in rows], float)


def right(rewards: np.ndarray) -> np.ndarray:
    """bool [rows]: the chosen answer has the higher reward. Equal rewards are wrong, as in the released scorers."""
    return rewards[:, 0] > rewards[:, 1]


def cut_short(scored: Sequence[Scored]) -> list[str]:
    """A remark on critiques that the model was not allowed to end, where there are any."""
    ended = [bool(one) for group in scored for one in np.ravel(group.ended)]
    if all(ended):
        return []
    return [f"{ended.count(False)} of {len(ended)} critiques were cut short: raise --max-new-tokens"]


def row_records(
    rows: Sequence[Comparison], places: Sequence[Place], scored: Sequence[Scored] | None
) -> list[Mapping[str, Any]]:
    """What rows.jsonl says of each row; without scores only what the baselines see."""
    rewards = None if scored is None else rewards_of(rows, places, scored)
    records: list[Mapping[str, Any]] = []
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        record = {
            "id": row.id,
            "line": row.origin.line,
            "category": row.category,
            "lengths": [len(row.chosen), len(row.rejected)],
        }
        if scored is not None and rewards is not None:
            said = scored[place.group].critiques
            record |= {
                "rewards": rewards[i].tolist(),
                "right": bool(right(rewards[i : i + 1])[0]),
                "critiques": [list(said[place.chosen]), list(said[place.rejected])],
            }
        records.append(record)
    return records


def refuse(bad: Sequence[Rejected], cure: str) -> None:
    """Raises BenchmarkError that lists bad rows, if there are any, and says what to do."""
    if not bad:
        return
    listed = [f"  {one_line(f'{row.origin}: {row.reason}')}" for row in bad[:SHOWN]]
    if len(bad) > SHOWN:
        listed.append(f"  ... and {len(bad) - SHOWN} more")
    count = len({row.origin for row in bad})
    raise BenchmarkError("\n".join([f"{count} row{'s' * (count != 1)} cannot be scored: {cure}", *listed]))
