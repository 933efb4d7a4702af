"""MM-RLHF-RewardBench: figures worked by hand, and those of the real file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from data_samples import SHARED, row, write_rows

from mmrlhf_jax.data.sources.rows import SourceError
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, Comparison, lengths_of
from mmrlhf_jax.evaluation.reward_bench import BENCHMARK, category_of, chance, measure, read, remarks, share_of_orders
from mmrlhf_jax.groups import Media

REAL = SHARED / "data" / "mm_reward_bench.jsonl"


def no_store(encoded: bytes) -> Media:
    raise AssertionError("no picture stands in these rows")


@pytest.fixture
def rows_of(tmp_path: Path):
    def make(*rows: object) -> tuple[Comparison, ...]:
        return read(write_rows(tmp_path / "bench.jsonl", list(rows)), no_store)

    return make


def pair(id: str, chosen: str, rejected: str, image: str = "mcq/1.png") -> dict[str, object]:
    return row(id=id, chosen=chosen, rejected=rejected, image=image)


def test_accuracies_by_hand(rows_of):
    """Two questions of mcq (2 and 1 rows), one of video (2 rows)."""
    rows = rows_of(
        pair("a", "best", "good"),
        pair("b", "yes", "no"),
        pair("a", "best", "bad"),
        row(id="c", image=None, video="video/clip", chosen="x", rejected="y"),
        row(id="c", image=None, video="video/clip", chosen="x", rejected="z"),
    )
    rewards = np.array([[2, 1], [0.5, 0.5], [2, 0], [1, -1], [1, 1.5]])
    found = measure(rows, rewards)  # right: yes, no (equal), yes, yes, no
    assert found["mcq"] == {"pairs": 3, "groups": 2, "acc": 2 / 3, "acc_plus": 1 / 2}
    assert found["video"] == {"pairs": 2, "groups": 1, "acc": 1 / 2, "acc_plus": 0}
    assert found["long"] == {"pairs": 0, "groups": 0, "acc": None, "acc_plus": None}
    assert found["overall"] == {"pairs": 5, "groups": 3, "acc": 3 / 5, "acc_plus": 1 / 3}
    assert list(found) == ["mcq", "long", "short", "safety", "video", "overall"]


def test_equal_rewards_are_wrong(rows_of):
    rows = rows_of(pair("a", "x", "y"))
    assert measure(rows, np.zeros((1, 2)))["overall"]["acc"] == 0


def test_an_id_is_right_only_with_all_its_rows(rows_of):
    rows = rows_of(*(pair("a", "best", text) for text in ("b", "c", "d")))
    assert measure(rows, np.array([[1, 0], [1, 0], [1, 0]]))["overall"]["acc_plus"] == 1
    assert measure(rows, np.array([[1, 0], [1, 1], [1, 0]]))["overall"]["acc_plus"] == 0


@pytest.mark.parametrize(
    ("path", "category"),
    [
        ("mcq/073712.png", "mcq"),
        ("images/long/a.jpg", "long"),
        ("short/how_long_is_it.png", "long"),  # the order of the words counts, as in the released scorer
        ("video/-77dfCjTbSc", "video"),
        ("v_K_IqYFJKIgk-Scene-016", "other"),
        ("MCQ/1.png", "other"),
    ],
)
def test_the_category_is_the_first_word_the_path_contains(path, category):
    assert category_of(path) == category


def test_rows_of_no_category_count_overall_alone_and_are_told(rows_of):
    rows = rows_of(pair("a", "x", "y", image="pictures/1.png"), pair("b", "x", "y"))
    found = measure(rows, np.array([[0, 1], [1, 0]]))
    assert (found["other"]["acc"], found["mcq"]["acc"], found["overall"]["acc"]) == (0, 1, 0.5)
    assert any("other: rows whose path contains none of mcq, long" in line for line in remarks(rows))
    assert any("not the released file" in line for line in remarks(rows))


# --- baselines ------------------------------------------------------------------------------------------------------


def test_the_longer_answer_is_counted_in_characters(rows_of):
    rows = rows_of(pair("a", "four words are here", "incomprehensibilities"), pair("b", "äö", "ab"))
    np.testing.assert_array_equal(lengths_of(rows), [[19, 21], [2, 2]])
    assert measure(rows, lengths_of(rows))["overall"]["acc"] == 0


def test_random_scores_by_hand(rows_of):
    """a: best > good > bad is 1 of 6 orders; b: x beats two others in 2 of 6 orders; c: one pair, 1/2."""
    rows = rows_of(
        pair("a", "best", "good"),
        pair("a", "good", "bad"),
        pair("a", "best", "bad"),
        pair("b", "x", "y"),
        pair("b", "x", "z"),
        pair("c", "x", "y"),
    )
    found = chance(rows)["overall"]
    assert found["acc"] == 0.5
    assert found["acc_plus"] == pytest.approx((1 / 6 + 1 / 3 + 1 / 2) / 3, rel=1e-12)


def test_an_answer_preferred_to_itself_is_right_for_nobody(rows_of):
    found = chance(rows_of(pair("a", "x", "x")))["overall"]
    assert (found["acc"], found["acc_plus"]) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_orders_are_those_counted_one_by_one(seed):
    rng = np.random.default_rng(seed)
    answers = int(rng.integers(2, 6))
    pairs = [tuple(map(int, rng.choice(answers, 2, replace=False))) for _ in range(int(rng.integers(1, 6)))]
    orders = list(itertools.permutations(range(answers)))
    agreeing = [order for order in orders if all(order.index(a) < order.index(b) for a, b in pairs)]
    assert share_of_orders(answers, pairs) == pytest.approx(len(agreeing) / len(orders), abs=1e-15)


def test_an_id_that_holds_far_too_many_answers_is_refused(rows_of):
    rows = rows_of(*(pair("always the same", "best", f"answer {i}") for i in range(40)))
    with pytest.raises(BenchmarkError, match=r"id 'always the same' has 41 different answers, more than 12"):
        chance(rows)


# --- the file -------------------------------------------------------------------------------------------------------


def test_texts_are_read_verbatim_and_reasons_beside_them(rows_of):
    (found,) = rows_of(
        row(
            image="mcq/1.png",
            chosen=" C\n",
            rejected="",
            chosen_reason="right",
            rejected_reason=" ",
            prompt="<image>\nQ",
        )
    )
    assert (found.question, found.chosen, found.rejected) == ("Q", " C\n", "")
    assert found.reasons == ("right", None)
    assert found.media == (Media("image", "mcq/1.png"),)


def test_a_bad_row_refuses_the_file_and_all_bad_rows_are_listed(rows_of, tmp_path):
    with pytest.raises(BenchmarkError) as error:
        rows_of(pair("a", "x", "y"), "{", row(rejected=None), row(chosen=3))
    lines = str(error.value).split("\n")
    assert lines[0].startswith("3 rows cannot be scored: mend the file")
    assert [line.strip().split(": ")[0] for line in lines[1:]] == [f"{tmp_path}/bench.jsonl:{n}" for n in (2, 3, 4)]
    assert "column 'rejected' is missing" in lines[2]
    assert "'chosen' is not a string" in lines[3]


def test_no_rows_and_no_file(rows_of, tmp_path):
    with pytest.raises(BenchmarkError, match="holds no rows"):
        rows_of()
    with pytest.raises(SourceError, match="does not exist"):
        read(str(tmp_path / "nothing.jsonl"), no_store)


@pytest.mark.skipif(not REAL.exists(), reason="the real annotations (../shared) are not here")
def test_the_real_file():
    rows = read(str(REAL), no_store)
    chosen_longer, random = measure(rows, lengths_of(rows)), chance(rows)
    counts = {name: (one["pairs"], one["groups"]) for name, one in random.items()}
    assert counts == {
        "mcq": (42, 10),
        "long": (37, 10),
        "short": (34, 10),
        "safety": (32, 6),
        "video": (25, 10),
        "overall": (170, 46),
    }
    assert remarks(rows) == []
    assert (round(chosen_longer["overall"]["acc"], 3), round(chosen_longer["overall"]["acc_plus"], 3)) == (0.718, 0.478)
    assert (random["overall"]["acc"], round(random["overall"]["acc_plus"], 3)) == (0.5, 0.188)
    assert all(reason for row in rows for reason in row.reasons)
    assert json.loads(REAL.read_text().splitlines()[0])["chosen"] == rows[0].chosen


def test_the_benchmark_names_what_its_sections_hold():
    assert (BENCHMARK.counts, dict(BENCHMARK.metrics)) == (("pairs", "groups"), {"acc": "ACC", "acc_plus": "ACC+"})
