"""VLFeedback: one question about one picture a row, with the answers of several models and GPT-4V's ratings of each.

Columns read: `id`, `prompt`, `completions` and `image` (see `pictures`) or `img_path`. A completion is `{response,
annotations: {Helpfulness, Visual Faithfulness, Ethical Considerations: {Rating, Rationale}}}`; `completions` is a list
of these, as in the released JSON lines, or one object of lists, as `datasets` stores it in parquet. The picture of a
row that names none, or whose `img_path` is the place where the released loading script unpacked it, is `<id>.jpg`
under the media root (unpack merged_images.zip there).

An answer's score is the mean of its three ratings, from 1 to 5, and ranks it; equal means are tied. Its reason is the
three rationales. Answers without three numbers are left out, as Silkie's own pairs leave them out; an answer that
stands in a row twice has the mean of its scores.

Source: https://arxiv.org/abs/2312.10665; the data card and VLFeedback.py of MMInstruction/VLFeedback on the Hugging
Face hub; make_vlfeedback_paired_dataset in run_dpo.py of its authors' repository.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mmrlhf_jax.data.ranking import by_score, ties_of
from mmrlhf_jax.data.sources.pictures import Store, picture_of
from mmrlhf_jax.data.sources.rows import (
    MAX_RESPONSES,
    Item,
    Rejected,
    Remark,
    Row,
    RowError,
    SourceError,
    SourceOptions,
    id_of,
    optional_text_of,
    prompt_of,
    read_rows,
    text_of,
)
from mmrlhf_jax.groups import Group, Media, Origin, Response, Turn

ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
COLUMNS = ("id", "prompt", "models", "completions", "img_path", "image")
UNRATED = "answers without three ratings are left out"
TWICE = "an answer stands there twice with different ratings: it has their mean"

_LOWEST, _HIGHEST = 1, 5


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """One group a row; `Rejected` rows; `Remark`s at the end.

    Raises:
        SourceError: an option that the format has no use for.
    """
    if options.mapping:
        raise SourceError("--map belongs to --source mapped and sharegpt; vlfeedback has fixed columns")
    if options.margin_column is not None:
        raise SourceError(
            "--margin-column is for formats with a pair a row; vlfeedback's margins are those of its scores"
        )
    seen: dict[object, Origin] = {}
    notes: Counter[str] = Counter()
    for row in read_rows(files):
        if isinstance(row, Rejected):
            yield row
            continue
        notes.update(f"column {name!r} is not read" for name in sorted(row.fields) if name not in COLUMNS)
        try:
            group, found = _group(row, options.store)
        except RowError as error:
            yield Rejected(row.origin, str(error))
            continue
        earlier = seen.setdefault((group.prompt, group.media, group.responses), row.origin)
        if earlier is not row.origin:
            yield Rejected(row.origin, f"duplicate of {earlier}", duplicate=True)
            continue
        notes.update(found)
        yield group
    for note, count in notes.items():
        yield Remark(note, count)


def _group(row: Row, store: Store | None) -> tuple[Group, tuple[str, ...]]:
    fields = row.fields
    name = id_of(fields.get("id"), "'id'")
    media = (_picture(fields, name, store),)
    prompt = prompt_of(fields.get("prompt"), media)
    completions = _completions(fields.get("completions"))
    rated = [_rated(each, f"completion {number}") for number, each in enumerate(completions, 1)]
    found = [response for response in rated if response is not None]
    if not found:
        raise RowError("none of its completions has three ratings")
    responses, twice = _merged(found)
    responses, pairs = by_score(responses)
    group = Group(
        id=name,
        prompt=(Turn("user", prompt),),
        media=media,
        responses=tuple(responses),
        pairs=pairs,
        origins=(row.origin,),
        ties=ties_of([response.rank for response in responses]),
    )
    notes = ((UNRATED, len(found) < len(rated)), (TWICE, twice))
    return group, tuple(note for note, true in notes if true)


def _picture(fields: Mapping[str, Any], name: str, store: Store | None) -> Media:
    if fields.get("image") is not None:
        return picture_of(fields["image"], "'image'", store)
    path = fields.get("img_path")
    unpacked = isinstance(path, str) and path.startswith("/") and PurePosixPath(path).name == f"{name}.jpg"
    if path is None or unpacked:
        return picture_of(f"{name}.jpg", "'id'", store)
    return picture_of(path, "'img_path'", store)


def _completions(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):  # of lists, one for each field
        annotations, answers = value.get("annotations"), value.get("response")
        if not isinstance(annotations, list) or not isinstance(answers, list):
            raise RowError("'completions' is an object, and 'annotations' and 'response' in it are not lists")
        if len(annotations) != len(answers):
            raise RowError(f"'completions' have {len(annotations)} annotations of {len(answers)} responses")
        pairs = zip(annotations, answers, strict=True)
        value = [{"annotations": said, "response": answer} for said, answer in pairs]
    if not isinstance(value, list) or not value:
        raise RowError("'completions' is not a list of at least one completion")
    if len(value) > MAX_RESPONSES:
        raise RowError(f"{len(value)} completions, more than {MAX_RESPONSES}: keep fewer")
    if not all(isinstance(each, dict) for each in value):
        raise RowError("'completions' is not a list of objects with 'annotations' and 'response'")
    return value


def _rated(completion: Mapping[str, Any], where: str) -> Response | None:
    """The answer with its score and reason; None where a rating is no number."""
    text = text_of(completion.get("response"), f"{where}: 'response'")
    annotations = completion.get("annotations")
    if annotations is None:
        return None
    if not isinstance(annotations, dict):
        raise RowError(f"{where}: 'annotations' is not an object with {', '.join(ASPECTS)}")
    if unknown := sorted(key for key, value in annotations.items() if key not in ASPECTS and value is not None):
        raise RowError(f"{where}: 'annotations' rate {unknown[0]!r:.40}; they rate {', '.join(ASPECTS)}")
    ratings, reasons = [], []
    for aspect in ASPECTS:
        said = annotations.get(aspect)
        if said is not None and not isinstance(said, dict):
            raise RowError(f"{where}: {aspect!r} is not an object with 'Rating' and 'Rationale'")
        ratings.append(_rating((said or {}).get("Rating"), f"{where}: the rating of {aspect!r}"))
        if (
            why := optional_text_of((said or {}).get("Rationale"), f"{where}: the rationale of {aspect!r}")
        ) is not None:
            reasons.append(f"{aspect}: {why}")
    numbers = [rating for rating in ratings if rating is not None]
    if len(numbers) < len(ASPECTS):
        return None
    return Response(text, score=statistics.fmean(numbers), reason="\n".join(reasons) or None)


def _rating(value: Any, where: str) -> float | None:
    """Ratings are texts; GPT-4V also wrote "N/A"."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise RowError(f"{where} is no text and no number")
    try:
        number = None if value is None else float(value)
    except (ValueError, OverflowError):
        return None
    if number is not None and not _LOWEST <= number <= _HIGHEST:  # NaN too
        raise RowError(f"{where} is {str(value)[:20]!r}, not from {_LOWEST} to {_HIGHEST}")
    return number


def _merged(found: Sequence[Response]) -> tuple[list[Response], bool]:
    """Each text once, with the mean of its scores and its first reason; whether one had several scores."""
    same: dict[str, list[Response]] = {}
    for response in found:
        same.setdefault(response.text, []).append(response)
    merged = [
        Response(text, score=statistics.fmean(r.score for r in each if r.score is not None), reason=each[0].reason)
        for text, each in same.items()
    ]
    return merged, any(len({response.score for response in each}) > 1 for each in same.values())
