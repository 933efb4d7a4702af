"""Diversity: EAD against its closed form, similarity against all pairs, and the two views of samples."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from answered import judged, questions_of
from data_samples import SHARED

from mmrlhf_jax.evaluation.comparisons import BenchmarkError
from mmrlhf_jax.evaluation.diversity import (
    benchmark,
    ead,
    expected_distinct,
    mean_ead,
    read_embeddings,
    similarity,
    word_similarity,
    words,
)

REAL = SHARED / "data" / "mm_reward_bench.jsonl"


def test_the_published_value():
    """'a b a c': 3 of 4, expected V (1 - (1 - 1/V)^4) = 3.9998806 for V = 50,257."""
    assert ead([words("a b a c")], 1) == pytest.approx(0.7500223853, abs=1e-10)


def test_expected_by_hand():
    """Two draws of two: half of the time they are one, so 1.5; three of three: 3 (1 - 8/27) = 19/9."""
    assert expected_distinct(2, 2) == pytest.approx(1.5)
    assert expected_distinct(3, 3) == pytest.approx(19 / 9)


def test_ngrams_end_with_their_text():
    """Bigrams of [a b] and [a b]: one of two; over the border there would be (b, a) too. V = 2: 1 / 1.5."""
    assert ead([["a", "b"], ["a", "b"]], 2, 2) == pytest.approx(1 / 1.5)
    assert ead([["a"]], 2) is None
    assert mean_ead([["a", "b"]], 2) == pytest.approx((2 / 1.5 + 1 / 1) / 2)  # n = 1 and 2


def test_similarity_by_hand():
    """Cosines of (1, 0), (1, 1), (0, 1): 1/sqrt 2, 0, 1/sqrt 2; the mean is sqrt(2) / 3. Words: the same."""
    vectors = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]])
    assert similarity(vectors) == pytest.approx(2**0.5 / 3)
    assert word_similarity([["a"], ["a", "b"], ["b"]]) == pytest.approx(2**0.5 / 3)
    assert similarity(vectors[:1]) is None
    assert word_similarity([["a"], []]) == 0


def test_similarity_is_the_mean_over_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(7, 5))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [float(units[i] @ units[j]) for i, j in combinations(range(7), 2)]
    assert similarity(vectors) == pytest.approx(np.mean(pairs))


def test_per_input_looks_at_samples_and_across_inputs_at_firsts(tmp_path: Path):
    bench = benchmark(vocabulary=2)
    questions = questions_of(bench, tmp_path, [{"prompt": "Why?"}, {"prompt": "How?"}])
    found = bench.measure(judged(bench, questions, [["a", "a"], ["a", "b"]]))
    # per input: 1 of 1.5 expected and similarity 1; 2 of 1.5 and 0. Across: "a" and "a"
    assert found["per input"] == {"rows": 2, "answers": 4, "ead": pytest.approx(1.0), "similarity": 0.5}
    assert found["across inputs"] == {"rows": 2, "answers": 2, "ead": pytest.approx(1 / 1.5), "similarity": 1.0}
    single = bench.measure(judged(bench, questions, ["a", "b"]))
    assert single["per input"] == {"rows": 0, "answers": 0, "ead": None, "similarity": None}


def test_embeddings_are_of_answers_in_order(tmp_path: Path):
    np.save(tmp_path / "e.npy", np.array([[1.0, 0], [1, 0], [0, 1], [0, -1]]))
    bench = benchmark(embeddings=read_embeddings(str(tmp_path / "e.npy")))
    questions = questions_of(bench, tmp_path, [{"prompt": "Why?"}, {"prompt": "How?"}])
    found = bench.measure(judged(bench, questions, [["a", "a"], ["a", "b"]]))
    assert (found["per input"]["embedded"], found["across inputs"]["embedded"]) == (0, 0)  # (1 - 1) / 2; (1, 0), (0, 1)
    with pytest.raises(BenchmarkError, match="has 4 rows for 3 answers"):
        bench.measure(judged(bench, questions, [["a", "a"], "a"]))


@pytest.mark.parametrize("array", [np.zeros(3), np.full((2, 2), np.nan), np.array([[object()]], dtype=object)])
def test_strange_embeddings_are_refused(array, tmp_path: Path):
    np.save(tmp_path / "e.npy", array, allow_pickle=True)
    with pytest.raises(BenchmarkError, match=r"is no .npy array|is no array of finite floats"):
        read_embeddings(str(tmp_path / "e.npy"))


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")
def test_real_answers_to_one_question_are_more_alike_than_answers_to_different_ones(tmp_path: Path):
    rows = [json.loads(line) for line in REAL.read_text().splitlines()]
    answers: dict[str, list[str]] = {}
    for one in rows:
        mine = answers.setdefault(one["id"], [])
        mine += [text for text in (one["chosen"], one["rejected"]) if text not in mine]
    bench = benchmark()
    questions = questions_of(bench, tmp_path, [{"id": name, "prompt": "?"} for name in answers])
    found = bench.measure(judged(bench, questions, list(answers.values())))
    assert (found["per input"]["rows"], found["per input"]["answers"]) == (46, 170)
    assert found["per input"]["similarity"] > found["across inputs"]["similarity"] > 0
    assert 0 < found["across inputs"]["ead"] < 1
