"""Full-annotation files, one query a row, with field names given by the user: `--map responses=answers rank=rank`.

Targets: `prompt` and `responses` (needed), `id`, `image`, `video`, `facts`, and for each response `text`, `rank`,
`score`, `reason`, `ratings`. A value is a dotted path from the row's top. `responses` may be
- a list of strings, or an object name -> string: `rank`, `score`, `reason`, `ratings` are then lists beside it (or
  objects with the same names);
- a list of objects: `text`, `rank`, `score`, `reason`, `ratings` are looked up inside each response; a path that starts
  with `/` is looked up from the row's top instead.
`ratings` is an object attribute -> number for each response, null or absent where nobody rated it. `facts` is a text
about the pictures, or a list of them, that a reward model may be shown (captions, options); null where there is none.
`rank` is numbers (1 = best, equal = tied) or a rank string `[1>2=3>4]` of positions counted from 1. Without `rank`
no response is preferred to another, unless `SourceOptions.by_score` has the scores say it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmrlhf_jax.data.ranking import by_score, pairs_of, ties_of
from mmrlhf_jax.data.sources.pictures import media_of
from mmrlhf_jax.data.sources.rows import (
    MAX_RESPONSES,
    Item,
    MissingField,
    Rejected,
    Row,
    RowError,
    SourceError,
    SourceOptions,
    id_of,
    number_of,
    optional_text_of,
    prompt_of,
    read_rows,
    text_of,
)
from mmrlhf_jax.groups import Group, Origin, Pair, Response, Turn

NEEDED = ("prompt", "responses")
OF_RESPONSE = ("text", "rank", "score", "reason", "ratings")
TARGETS = (*NEEDED, "id", "image", "video", "facts", *OF_RESPONSE)

_RANK_STRING = re.compile(r"\[?\s*(\d+(?:\s*[>=]\s*\d+)*)\s*\]?")
_MAX_RANK_STRING = 8 * MAX_RESPONSES  # characters: positions of three digits, their signs and spaces
_MISSING = object()
_MAX_RATINGS = 64  # of a response; ArmoRM, the most known here, has 19
_MAX_FACTS = 256  # of a row
_MAX_PATHS, _MAX_PATH_DEPTH = 40, 4  # of a row, shown to who has to correct --map


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """One group a row; bad rows as `Rejected`.

    Raises:
        SourceError: an unknown or missing target, or a mapped field that the first row lacks.
    """
    mapping = _check_mapping(options)
    seen: dict[object, Origin] = {}
    first = True
    for row in read_rows(files):
        if isinstance(row, Rejected):
            yield row
            continue
        if first:
            _check_first(row, mapping)
            first = False
        try:
            group = _group(row, mapping, options)
        except RowError as error:
            yield Rejected(row.origin, str(error))
            continue
        earlier = seen.setdefault(_identity(group, "id" in mapping), row.origin)
        if earlier is not row.origin:
            yield Rejected(row.origin, f"duplicate of {earlier}", duplicate=True)
        else:
            yield group


def _check_mapping(options: SourceOptions) -> Mapping[str, str]:
    if options.margin_column is not None:
        raise SourceError("--margin-column belongs to --source mm_rlhf, trl, sharegpt and rlhf_v; map 'score' instead")
    unknown = sorted(set(options.mapping) - set(TARGETS))
    if unknown:
        raise SourceError(f"--map does not know {', '.join(unknown)}; it knows {', '.join(TARGETS)}")
    missing = [target for target in NEEDED if target not in options.mapping]
    if missing:
        raise SourceError(f"--source mapped needs --map {' '.join(f'{target}=FIELD' for target in missing)}")
    return options.mapping


def _identity(group: Group, named: bool) -> object:
    return (group.id if named else "", group.prompt, group.media, group.facts, group.responses)


def _check_first(row: Row, mapping: Mapping[str, str]) -> None:
    try:
        _fields(row, mapping)
    except MissingField as error:
        raise SourceError(f"{row.origin}: {error}; it has {', '.join(_paths(row.fields))}: correct --map") from error
    except RowError:
        return  # the row is bad in itself; it is rejected like any other


def _group(row: Row, mapping: Mapping[str, str], options: SourceOptions) -> Group:
    found = _fields(row, mapping)
    media = media_of(found.get("image"), found.get("video"), options.store)
    ranked, scored = "rank" in found, options.by_score
    responses, pairs = _ranked(_merge(_responses(found["responses"], found)), scored and not ranked)
    return Group(
        id=id_of(found["id"], "id") if "id" in found else str(row.origin),
        prompt=(Turn("user", prompt_of(found["prompt"], media, "prompt")),),
        media=media,
        responses=tuple(responses),
        pairs=pairs,
        origins=(row.origin,),
        facts=_facts(found.get("facts")),
        ties=ties_of([response.rank for response in responses]) if ranked or scored else (),
    )


def _ranked(responses: list[Response], scores_rank: bool) -> tuple[list[Response], tuple[Pair, ...]]:
    """Best first, and the pairs of different rank."""
    if scores_rank:
        try:
            return by_score(responses)
        except ValueError as error:
            raise RowError(f"{error}, by which they are ranked") from error
    ranked = sorted(responses, key=lambda response: response.rank)
    return ranked, tuple(Pair(i, j) for i, j in pairs_of([response.rank for response in ranked]))


def _facts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if len(texts) > _MAX_FACTS:
        raise RowError(f"{len(texts)} facts, more than {_MAX_FACTS}: keep fewer")
    return tuple(text_of(text, f"fact {number}") for number, text in enumerate(texts, 1))


def _fields(row: Row, mapping: Mapping[str, str]) -> dict[str, Any]:
    """Every mapped target -> its value; per-response targets as lists in the order of the responses."""
    found = {t: _lookup(row.fields, mapping[t]) for t in mapping if t not in OF_RESPONSE}
    # A row has a picture or a video; where both are mapped one of them may be absent.
    if {"image", "video"} <= found.keys() and (found["image"] is not _MISSING or found["video"] is not _MISSING):
        found = {t: None if v is _MISSING and t in ("image", "video") else v for t, v in found.items()}
    found |= _of_responses(row, found["responses"], mapping)
    for target, value in found.items():
        if value is _MISSING or (target in OF_RESPONSE and isinstance(value, list) and _MISSING in value):
            raise MissingField(f"{target}={mapping[target]} is missing")
    return found


def _of_responses(row: Row, responses: Any, mapping: Mapping[str, str]) -> dict[str, Any]:
    objects = isinstance(responses, list) and bool(responses) and all(isinstance(r, dict) for r in responses)
    if objects and "text" not in mapping:
        raise MissingField("responses are objects, so --map needs text=FIELD")
    if not objects and responses is not _MISSING and "text" in mapping:
        raise RowError("text=FIELD is mapped, but responses are plain strings")
    found: dict[str, Any] = {}
    for target in OF_RESPONSE:
        path = mapping.get(target)
        if path is not None and objects and not path.startswith("/"):
            found[target] = [_lookup(response, path) for response in responses]
        elif path is not None:
            found[target] = _beside(_lookup(row.fields, path.removeprefix("/")), responses)
    return found


def _beside(value: Any, responses: Any) -> Any:
    """Values by name -> values in the order of the named responses."""
    if isinstance(value, dict) and isinstance(responses, dict):
        return [value.get(name, _MISSING) for name in responses]
    return value


def _lookup(fields: Any, path: str) -> Any:
    value = fields
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _responses(raw: Any, found: Mapping[str, Any]) -> list[Response]:
    texts = found["text"] if "text" in found else list(raw.values()) if isinstance(raw, dict) else raw
    if not isinstance(texts, list) or not texts:
        raise RowError("responses is not a list (or object) of at least one response")
    if (count := len(texts)) > MAX_RESPONSES:
        raise RowError(f"{count} responses, more than {MAX_RESPONSES}: keep fewer")
    ranks = _ranks(found["rank"], count) if "rank" in found else [0] * count
    scores, reasons, ratings = (
        _parallel(found.get(target), count, target) for target in ("score", "reason", "ratings")
    )
    return [
        Response(
            text=text_of(text, f"response {i + 1}"),
            rank=ranks[i],
            score=None if scores[i] is None else number_of(scores[i], f"score of response {i + 1}"),
            reason=optional_text_of(reasons[i], f"reason of response {i + 1}"),
            ratings=_ratings(ratings[i], f"ratings of response {i + 1}"),
        )
        for i, text in enumerate(texts)
    ]


def _ratings(value: Any, where: str) -> tuple[tuple[str, float], ...]:
    """The attributes that were rated, by name."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise RowError(f"{where}: an object attribute -> number was expected")
    if len(value) > _MAX_RATINGS:
        raise RowError(f"{where}: {len(value)} attributes, more than {_MAX_RATINGS}: map an object with fewer")
    rated = {name: number for name, number in value.items() if number is not None}
    return tuple((name, number_of(rated[name], f"{where}: {name[:80]!r}")) for name in sorted(rated))


def _parallel(values: Any, count: int, target: str) -> list[Any]:
    if values is None:
        return [None] * count
    if not isinstance(values, list) or len(values) != count:
        length = f"has {len(values)} values" if isinstance(values, list) else "is not a list"
        raise RowError(f"{target} {length}, there are {count} responses")
    return values


def _ranks(value: Any, count: int) -> list[int]:
    """Rank of each response, 0 = best, without gaps."""
    if isinstance(value, str):
        return _ranks_of_string(value, count)
    numbers = [number_of(v, f"rank of response {i + 1}") for i, v in enumerate(_parallel(value, count, "rank"))]
    levels = sorted(set(numbers))
    return [levels.index(number) for number in numbers]


def _ranks_of_string(text: str, count: int) -> list[int]:
    match = _RANK_STRING.fullmatch(text.strip()) if len(text) <= _MAX_RANK_STRING else None
    if match is None:
        raise RowError(f"rank {text[:80]!r} is not of the form [1>2=3>4]")
    levels = [[int(position) for position in level.split("=")] for level in match[1].split(">")]
    if sorted(p for level in levels for p in level) != list(range(1, count + 1)):
        raise RowError(f"rank {text[:80]!r} does not name each of the {count} responses once")
    rank_of = {position: rank for rank, level in enumerate(levels) for position in level}
    return [rank_of[position] for position in range(1, count + 1)]


def _merge(responses: list[Response]) -> list[Response]:
    """The same text is the same response; it cannot have two ranks or scores."""
    merged: dict[str, Response] = {}
    for number, response in enumerate(responses, 1):
        other = merged.setdefault(response.text, response)
        if (other.rank, other.score, other.ratings) != (response.rank, response.score, response.ratings):
            raise RowError(f"response {number} repeats an earlier one with another rank, score or rating")
    return list(merged.values())


def _paths(fields: dict[str, Any], prefix: str = "") -> list[str]:
    """Names a user may map, objects and the first of a list of objects opened; at most `_MAX_PATHS`."""
    names: list[str] = []
    for key, value in itertools.islice(fields.items(), _MAX_PATHS):
        key = key[:80]
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        names.append(prefix + key)
        if isinstance(inner, dict) and prefix.count(".") < _MAX_PATH_DEPTH:
            names += _paths(inner, f"{prefix}{key}[]." if inner is not value else f"{prefix}{key}.")
    return names[:_MAX_PATHS]
