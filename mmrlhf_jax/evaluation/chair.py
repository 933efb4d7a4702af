"""CHAIR: which objects a description mentions that are not in the picture.

Source: https://arxiv.org/abs/1809.02156. A row: `image`, `objects` (names of what is in the picture) and, if wished,
`captions` (human descriptions, whose objects count as there too, as the released script has it), `id`, `prompt` (else
`PROMPT`), `category`. Names and synonyms come from a file that the user gives, in the released synonyms.txt's form: a
line an object, its name first, then its synonyms, parted by commas.

CHAIRs is the share of descriptions with an object that is not there, CHAIRi the share of mentions that are of one,
recall the share of the objects there that are mentioned (all of these over the whole section, not means of rows);
`response` is CHAIRs among the descriptions that mention any object (Object HalBench's, RLHF-V).

Mentions are found as the released script finds them: `COMPOUNDS` are read as one (a baby bear is no baby, home plate
no plate), never across a sign of punctuation or a possessive's 's, and beside a toilet no seat is a chair. What
differs: the script takes the singulars of a language library, in which any word may become another; here a word is a
mention only if it, or a singular of it by `singulars`, stands in the user's file. Synonyms of any number of words are
found, the longest first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmrlhf_jax import storage
from mmrlhf_jax.data.sources.pictures import Store
from mmrlhf_jax.data.sources.rows import Row, RowError, prompt_of, text_of
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.judges import Reply
from mmrlhf_jax.evaluation.questions import (
    Answer,
    AnswerBenchmark,
    Question,
    Record,
    by_category,
    column_of,
    name_of,
    picture_named,
    share,
    texts_of,
)

PROMPT = "Please describe this image in detail."
MAX_SYNONYM_BYTES = 2**22
_ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
COMPOUNDS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "",
    "train track": "",
    "street light": "",
    "traffic signal": "",
    "stove top oven": "",
}
"""Words that are one, and the word they are read as; one that is in the user's file stands for itself there."""

_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
}
_TOKEN = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[^\sa-z0-9]")
_POSSESSIVE = "'s"


def tokens(text: str) -> list[str]:
    """Words in small letters, a possessive's 's and each other sign on its own, as the released script's tokenizer."""
    found = list[str]()
    for token in _TOKEN.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        if token.endswith(_POSSESSIVE):
            found += [token.removesuffix(_POSSESSIVE), _POSSESSIVE]
        else:
            found.append(token)
    return found


def phrase(name: str) -> str:
    """A name as `mentions` reads it, without the signs around it."""
    found = tokens(name)
    while found and not found[-1][-1].isalnum():
        found.pop()
    while found and not found[0][0].isalnum():
        found.pop(0)
    return " ".join(found)


@dataclass(frozen=True)
class Synonyms:
    """Name or synonym -> name, in small letters; `longest`: most words in one."""

    names: Mapping[str, str]
    longest: int


def read_synonyms(file: str) -> Synonyms:
    """Raises BenchmarkError for a file that is none of synonyms, naming the line."""
    path = storage.to_path(file)
    if not path.exists() or path.is_dir():
        raise BenchmarkError(f"{file} is no file: correct --synonyms")
    with storage.open_read(file) as stream:
        data = stream.read(MAX_SYNONYM_BYTES + 1)
    if len(data) > MAX_SYNONYM_BYTES:
        raise BenchmarkError(f"{file} has more than {MAX_SYNONYM_BYTES} bytes: it is no file of synonyms")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{file} is not UTF-8 at byte {error.start}: re-save it as UTF-8") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = [word for part in line.split(",") if (word := phrase(part))]
        for word in words:
            if names.setdefault(word, words[0]) != words[0]:
                raise BenchmarkError(
                    f"{file}:{number}: {word!r} is a synonym of {names[word]!r} and of {words[0]!r}: keep one"
                )
    if not names:
        raise BenchmarkError(f"{file} holds no names: a line an object, its name first, then its synonyms")
    return Synonyms(names, max(len(word.split()) for word in names))


def singulars(word: str) -> tuple[str, ...]:
    """What a word may be the plural of, itself first."""
    found = [word]
    if word in _IRREGULAR:
        found.append(_IRREGULAR[word])
    if word.endswith("ies"):
        found.append(f"{word[:-3]}y")
    if word.endswith("ves"):
        found += [f"{word[:-3]}f", f"{word[:-3]}fe"]
    if word.endswith("men"):
        found.append(f"{word[:-3]}man")
    if word.endswith("es"):
        found.append(word[:-2])
    if word.endswith("s"):
        found.append(word[:-1])
    return tuple(found)


def mentions(text: str, synonyms: Synonyms) -> list[str]:
    """The names of all objects mentioned, once a mention, in order."""
    words = tokens(text)
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(words):
        for length in range(min(max(synonyms.longest, 3), len(words) - at), 0, -1):
            if (read := _read(words[at : at + length], synonyms)) is not None:
                found += [read] if read[1] else []
                at += length
                break
        else:
            at += 1
    toilet = any(word == "toilet" for word, _ in found)
    return [name for word, name in found if not (toilet and word == "seat")]


def _read(words: Sequence[str], synonyms: Synonyms) -> tuple[str, str] | None:
    """(word, name) of words that are a mention; ("", "") where they are a compound that names nothing."""
    *first, last = words
    for form in singulars(last):
        phrase = " ".join([*first, form])
        if phrase in synonyms.names:
            return phrase, synonyms.names[phrase]
        if phrase in COMPOUNDS:
            word = COMPOUNDS[phrase]
            return word, synonyms.names.get(word, "")
    return None


def check(row: Row, store: Store, synonyms: Synonyms) -> Question:
    media = (picture_named(column_of(row, "image"), "'image'", store),)
    objects, captions = (texts_of(row.fields.get(name), repr(name)) for name in ("objects", "captions"))
    if row.fields.get("objects") is None and not captions:
        raise RowError("the row has neither 'objects' nor 'captions': what is in the picture?")
    there: set[str] = set()
    for name in objects:
        word = phrase(name)
        if word not in synonyms.names:
            raise RowError(f"'objects': {name[:80]!r} is not in the file of synonyms")
        there.add(synonyms.names[word])
    for caption in captions:
        there.update(mentions(caption, synonyms))
    category = row.fields.get("category")
    return Question(
        origin=row.origin,
        id=name_of(row),
        category="chair" if category is None else text_of(category, "'category'"),
        prompt=prompt_of(row.fields.get("prompt") or PROMPT, media),
        media=media,
        facts={"objects": tuple(sorted(there))},
    )


def verdict(question: Question, answers: Sequence[Answer], _: Sequence[Reply], synonyms: Synonyms) -> Record:
    found = mentions(answers[0].text, synonyms)
    there = question.facts["objects"]
    return {
        "mentioned": found,
        "hallucinated": [name for name in found if name not in there],
        "objects": list(there),
        "recalled": sorted(set(found) & set(there)),
    }


def figures(records: Sequence[Record]) -> Mapping[str, Any]:
    wrong = sum(bool(record["hallucinated"]) for record in records)
    mentioned = sum(len(record["mentioned"]) for record in records)
    return {
        "mentions": mentioned,
        "chair_s": share(wrong, len(records)),
        "chair_i": share(sum(len(record["hallucinated"]) for record in records), mentioned),
        "recall": share(
            sum(len(record["recalled"]) for record in records), sum(len(record["objects"]) for record in records)
        ),
        "response": share(wrong, sum(bool(record["mentioned"]) for record in records)),
    }


def measure(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    return by_category(records, figures)


def benchmark(synonyms: Synonyms) -> AnswerBenchmark:
    return AnswerBenchmark(
        name="chair",
        title="CHAIR",
        counts=("rows", "mentions"),
        metrics={
            "chair_s": "CHAIRs",
            "chair_i": "CHAIRi",
            "recall": "recall",
            "response": "response",
            "reward": "reward",
        },
        check=partial(check, synonyms=synonyms),
        verdict=partial(verdict, synonyms=synonyms),
        measure=measure,
    )
