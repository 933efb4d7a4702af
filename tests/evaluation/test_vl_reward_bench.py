"""VL-RewardBench: both forms of the file, groups by prefix, micro and macro."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_samples import embedded, picture, write_parquet, write_rows
from etils import epath

from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import RowError
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, lengths_of
from mmrlhf_jax.evaluation.vl_reward_bench import BENCHMARK, chance, group_of, measure, read, remarks
from mmrlhf_jax.groups import Media


def row(id: str = "mmmu_pro_1", ranking: object = (0, 1), **changes: object) -> dict[str, object]:
    base = {
        "id": id,
        "query": "How many?",
        "response": ["two", "three"],
        "image": "a.png",
        "human_ranking": list(ranking) if isinstance(ranking, tuple) else ranking,
        "query_source": "MMMU",
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


@pytest.fixture
def read_all(tmp_path: Path):
    store = PictureStore(epath.Path(tmp_path / "pictures"))

    def make(*rows: dict[str, object], parquet: bool = False):
        write = write_parquet if parquet else write_rows
        return read(write(tmp_path / ("b.parquet" if parquet else "b.jsonl"), list(rows)), store)

    return make


def test_rank_zero_is_the_better_answer(read_all):
    first, second = read_all(row(ranking=(0, 1)), row(ranking=(1, 0)))
    assert (first.chosen, first.rejected) == ("two", "three")
    assert (second.chosen, second.rejected) == ("three", "two")


def test_parquet_with_pictures_in_it(read_all, tmp_path):
    (found,) = read_all(row(image={"bytes": picture(), "path": "x.jpg"}), parquet=True)
    assert found.media == (embedded(picture()),)
    assert (tmp_path / "pictures" / found.media[0].path).read_bytes() == picture()


def test_the_repositorys_file_names_pictures_by_image_path(read_all):
    (found,) = read_all(row(image=None, image_path="images/rlaif-v/1.jpg"))
    assert found.media == (Media("image", "images/rlaif-v/1.jpg"),)


def test_r1_rewards_form(read_all):
    (found,) = read_all(
        {"id": "RLHF-V-1", "image": "vl_reward/img/1.jpg", "prompt": "Q", "chosen": "a", "rejected": "b"}
        | {"chosen_reason": "", "rejected_reason": ""}
    )
    assert (found.category, found.question, found.reasons) == ("hallucination", "Q", (None, None))


@pytest.mark.parametrize(
    ("identity", "group"),
    [
        ("RLAIF-V-14", "hallucination"),
        ("RLHF-V-3", "hallucination"),
        ("hallucination_pair-1", "hallucination"),
        ("mathverse_7", "reasoning"),
        ("mmmu_pro_test_Computer_Science_334", "reasoning"),
        ("wildvision-battle-9", "general"),
        ("LRVInstruction-000000007746", "general"),  # VLFeedback's
    ],
)
def test_groups_follow_from_the_prefix(identity, group):
    assert group_of(identity) == group


@pytest.mark.parametrize(
    ("identity", "spelling"),
    [("rlhf-v-1", "RLHF-V"), ("RLAIFV-1", "RLAIF-V"), ("MMMU_1", "mmmu"), ("Mathverse", "mathverse")],
)
def test_an_almost_known_prefix_is_refused_rather_than_called_general(identity, spelling):
    with pytest.raises(RowError, match=f"does not begin with '{spelling}', which is spelled just so"):
        group_of(identity)


def test_accuracies_by_hand(read_all):
    """general 1 of 2, hallucination 1 of 3, reasoning 1 of 1: micro 3/6, macro (1/2 + 1/3 + 1) / 3."""
    ids = ["wildvision-1", "svit-1", "RLHF-V-1", "RLAIF-V-1", "hallucination_pair-1", "mmmu_1"]
    rows = read_all(*map(row, ids))
    found = measure(rows, np.array([[1, 0], [0, 0], [0, 1], [2, 1], [0, 1], [1, 0]], float))
    assert found == {
        "general": {"pairs": 2, "acc": 1 / 2},
        "hallucination": {"pairs": 3, "acc": 1 / 3},
        "reasoning": {"pairs": 1, "acc": 1},
        "overall": {"pairs": 6, "acc": 3 / 6},
        "macro": {"acc": pytest.approx((1 / 2 + 1 / 3 + 1) / 3, rel=1e-12)},
    }
    assert {name: one["acc"] for name, one in chance(rows).items()} == dict.fromkeys(found, 0.5)
    assert measure(rows, lengths_of(rows))["overall"]["acc"] == 0  # "two" is shorter
    assert remarks(rows) == [
        "general: 1 rows of no known prefix (VLFeedback's sources): svit 1",
        "not the released file (183 general, 749 hallucination, 318 reasoning): do not compare with published figures",
    ]


def test_macro_needs_all_three_groups(read_all):
    found = measure(read_all(row("mmmu_1")), np.array([[1.0, 0.0]]))
    assert (found["macro"]["acc"], found["general"]["acc"], found["overall"]["acc"]) == (None, None, 1)


def test_an_id_that_occurs_twice_counts_twice(read_all):
    rows = read_all(row("mmmu_1"), row("mmmu_1", query="Another?"), row("mmmu_1"))
    assert measure(rows, np.array([[1, 0], [0, 1], [0, 1]], float))["reasoning"] == {"pairs": 3, "acc": 1 / 3}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ranking": [0, 0]}, "'human_ranking' is .0, 0.; .0, 1. says the first answer is better"),
        ({"ranking": [1, 2]}, "'human_ranking' is"),
        ({"ranking": [0]}, "'human_ranking' is not a list of two ranks"),
        ({"response": ["one"]}, "'response' is not a list of two answers"),
        ({"response": ["one", 2]}, "'response' is not a string"),
        ({"response": None}, "neither 'response' .two answers. nor 'chosen' and 'rejected'"),
        ({"image": None}, "neither 'image' nor 'image_path'"),
        ({"query": None}, "column 'query' is missing"),
        ({"id": "rlaif-1"}, "id 'rlaif-1' does not begin with 'RLAIF-V'"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(read_all, changes, reason):
    with pytest.raises(BenchmarkError, match=rf"1 row cannot be scored(.|\n)*b.jsonl:2: (the row has )?{reason}"):
        read_all(row(), row(**changes))


def test_the_benchmark_names_what_its_sections_hold():
    assert (BENCHMARK.counts, dict(BENCHMARK.metrics)) == (("pairs",), {"acc": "ACC"})
