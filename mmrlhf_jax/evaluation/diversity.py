"""Diversity of answers: of the samples to one prompt (per input), and of answers to different ones (across inputs).

Source: https://arxiv.org/abs/2310.06452 (Understanding the effects of RLHF on generalisation and diversity). Any
prompts, with the columns `id`, `prompt`, `image` or `video`; several samples of each for what stands per input, and the
first of each for what stands across inputs (the paper: 16 samples, 500 prompts).

    ead          expectation-adjusted distinct n-grams: N distinct ones of C over their expected number if all V were
                 equally likely, N / (V (1 - ((V - 1) / V)^C)), the mean over n = 1 to 5 (of n-grams that occur)
    similarity   the mean cosine of two different answers: of their word counts, or of sentence embeddings that the user
                 gives; the paper's diversity is 1 - similarity of SentBERT's

V is 50,257 for every n, as in the paper. What differs: words are runs of letters and digits, and single signs, in small
letters, where the paper's code takes a language library's; its third measure, by an entailment model, is left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from mmrlhf_jax import storage
from mmrlhf_jax.data.sources.pictures import Store, media_of
from mmrlhf_jax.data.sources.rows import Row, prompt_of
from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.judges import Reply
from mmrlhf_jax.evaluation.questions import Answer, AnswerBenchmark, Question, Record, column_of, mean, name_of

VOCABULARY = 50_257
LONGEST = 5  # n-grams
_WORD = re.compile(r"\w+|[^\w\s]")


def check(row: Row, store: Store) -> Question:
    media = media_of(row.fields.get("image"), row.fields.get("video"), store)
    return Question(
        row.origin, name_of(row), "diversity", prompt_of(column_of(row, "prompt", "question"), media), media
    )


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def expected_distinct(count: int, vocabulary: int) -> float:
    """How many different ones `count` draws from a vocabulary hold on average: V (1 - ((V - 1) / V)^count)."""
    return -vocabulary * math.expm1(count * math.log1p(-1 / vocabulary))


def ead(texts: Iterable[Sequence[str]], n: int, vocabulary: int = VOCABULARY) -> float | None:
    """Of the n-grams of all texts, each a list of words; None where there is none. It may exceed 1."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / expected_distinct(len(grams), vocabulary) if grams else None


def mean_ead(texts: Sequence[Sequence[str]], vocabulary: int = VOCABULARY) -> float | None:
    found = [ead(texts, n, vocabulary) for n in range(1, LONGEST + 1)]
    return mean([one for one in found if one is not None])


def similarity(vectors: np.ndarray) -> float | None:
    """The mean cosine over all pairs of rows [N, D]; None for fewer than two. A row of zeros is like nothing.

    The sum of unit vectors u has |sum u|^2 = sum |u|^2 + twice the sum of all cosines, so no pair is looked at.
    """
    if len(vectors) < 2:
        return None
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, lengths, out=np.zeros_like(vectors, dtype=float), where=lengths > 0)
    own = float((units**2).sum())
    whole = float((units.sum(axis=0) ** 2).sum())
    return (whole - own) / (len(vectors) * (len(vectors) - 1))


def word_similarity(texts: Sequence[Sequence[str]]) -> float | None:
    """As `similarity` of the texts' word counts; sparse, since hundreds of texts have many words."""
    if len(texts) < 2:
        return None
    total: dict[str, float] = {}
    own = 0.0
    for text in texts:
        counts = Counter(text)
        length = math.sqrt(math.fsum(count * count for count in counts.values()))
        for word, count in counts.items():
            total[word] = total.get(word, 0.0) + count / length
        own += bool(text)
    return (math.fsum(value * value for value in total.values()) - own) / (len(texts) * (len(texts) - 1))


def read_embeddings(file: str) -> np.ndarray:
    """f64 [answers, D] of a .npy file. Raises BenchmarkError for one that holds no such thing."""
    path = storage.to_path(file)
    if not path.exists() or path.is_dir():
        raise BenchmarkError(f"{file} is no file: correct --embeddings")
    try:
        with path.open("rb") as stream:
            found = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BenchmarkError(f"{file} is no .npy array: {error}") from error
    if getattr(found, "ndim", 0) != 2 or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise BenchmarkError(f"{file} is no array of finite floats [answers, dimensions]")
    return np.asarray(found, float)


def verdict(_: Question, answers: Sequence[Answer], __: Sequence[Reply], vocabulary: int) -> Record:
    texts = [words(answer.text) for answer in answers]
    if len(texts) < 2:
        return {}
    return {"ead": mean_ead(texts, vocabulary), "similarity": word_similarity(texts)}


def measure(records: Sequence[Record], vocabulary: int, embeddings: np.ndarray | None) -> dict[str, dict[str, Any]]:
    firsts = [words(record["answers"][0]) for record in records]
    sections: dict[str, dict[str, Any]] = {
        "per input": _per_input(records),
        "across inputs": {
            "rows": len(records),
            "answers": len(firsts),
            "ead": mean_ead(firsts, vocabulary) if len(firsts) > 1 else None,
            "similarity": word_similarity(firsts),
        },
    }
    if embeddings is not None:
        _embedded(records, embeddings, sections)
    return sections


def _per_input(records: Sequence[Record]) -> dict[str, Any]:
    several = [record for record in records if len(record["answers"]) > 1]
    return {
        "rows": len(several),
        "answers": sum(len(record["answers"]) for record in several),
        **{name: mean([one[name] for one in several if one[name] is not None]) for name in ("ead", "similarity")},
    }


def _embedded(records: Sequence[Record], embeddings: np.ndarray, sections: Mapping[str, dict[str, Any]]) -> None:
    """Adds what the embeddings say: rows of them are the answers of the first record, of the second, ..."""
    starts = np.cumsum([0, *(len(record["answers"]) for record in records)])
    if len(embeddings) != starts[-1]:
        raise BenchmarkError(f"--embeddings has {len(embeddings)} rows for {starts[-1]} answers: one each, in order")
    each = [similarity(embeddings[a:b]) for a, b in pairwise(starts)]
    sections["per input"]["embedded"] = mean([one for one in each if one is not None])
    sections["across inputs"]["embedded"] = similarity(embeddings[starts[:-1]])


def benchmark(*, vocabulary: int = VOCABULARY, embeddings: np.ndarray | None = None) -> AnswerBenchmark:
    return AnswerBenchmark(
        name="diversity",
        title="Diversity",
        counts=("rows", "answers"),
        metrics={"ead": "EAD", "similarity": "similarity", "embedded": "embedded"},
        check=check,
        verdict=partial(verdict, vocabulary=vocabulary),
        measure=partial(measure, vocabulary=vocabulary, embeddings=embeddings),
    )
