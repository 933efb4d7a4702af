"""The groups the step benchmark is run on."""

from __future__ import annotations

import numpy as np
import pytest

from mmrlhf_jax.benchmarks.models import pinned_config
from mmrlhf_jax.benchmarks.workload import (
    ANSWERS,
    PICTURES,
    TEXT,
    as_pairs,
    mix_cases,
    random_group,
    ranked_case,
)

CONFIG = pinned_config(decoder_layers=2, embed=128, vocab=512, tower_layers=1)


def test_mm_rlhf_s_46_groups_hold_170_pairs_among_the_responses_they_name():
    groups = [line.split(": ") for line in ANSWERS]
    pairs = [[tuple(map(int, pair.split(">"))) for pair in order.split()] for _, order in groups]
    counts = [len(words.split()) for words, _ in groups]
    assert len(groups) == 46
    assert sum(map(len, pairs)) == 170
    assert sum(counts) / 46 == pytest.approx(3.70, abs=0.005)
    assert all(max(max(p) for p in found) == count - 1 for found, count in zip(pairs, counts, strict=True))
    assert all(len(found) == len({frozenset(p) for p in found}) for found in pairs)


def test_the_mix_s_pictures_are_of_the_stated_tokens():
    cases = mix_cases(1)
    assert [case.shape(CONFIG).prompt - TEXT for case in cases] == [1485, 2929, 4725, 7269]
    assert [case.shape(CONFIG).tiles for case in cases] == [2, 5, 7, 16]
    assert sum(PICTURES.values()) == pytest.approx(1)


def test_shares_of_the_mix_add_up_however_many_groups_there_are():
    cases = mix_cases(3)
    assert len(cases) == 12
    assert sum(case.share for case in cases) == pytest.approx(1)
    assert mix_cases(3) == cases


def test_a_case_has_the_prompt_and_the_pairs_it_is_asked_for():
    case = ranked_case(4, 1300, 64, (384, 200), CONFIG)
    shape = case.shape(CONFIG)
    assert (shape.tiles, shape.prompt, shape.responses) == (2, 1300, (64,) * 4)
    assert len(case.pairs) == 6
    with pytest.raises(ValueError, match=r"a picture of 384 x 200 is 1149 tokens, the prompt 1000"):
        ranked_case(4, 1000, 64, (384, 200), CONFIG)


def test_a_random_group_is_what_its_case_says_and_the_same_every_time():
    case = mix_cases(1)[0]
    group = random_group(CONFIG, case)
    shape = case.shape(CONFIG)
    lengths = group.rendered.lengths
    assert (lengths.tiles, lengths.prompt, lengths.responses) == (shape.tiles, shape.prompt, shape.responses)
    assert int((group.rendered.prompt == CONFIG.image_token).sum()) == shape.prompt - TEXT
    assert set(zip(*map(list, np.nonzero(group.pair_weight)), strict=True)) == set(case.pairs)
    again = random_group(CONFIG, case)
    np.testing.assert_array_equal(again.rendered.tiles, group.rendered.tiles)
    np.testing.assert_array_equal(again.rendered.prompt, group.rendered.prompt)


def test_pairs_of_a_group_hold_its_responses_the_preferred_first():
    case = ranked_case(3, 1300, 8, (384, 200), CONFIG)
    group = random_group(CONFIG, case)
    pairs = as_pairs(group, case.pairs)
    assert len(pairs) == 3
    for (i, j), pair in zip(case.pairs, pairs, strict=True):
        assert pair.rendered.branches == (group.rendered.branches[i], group.rendered.branches[j])
        assert pair.pair_weight[0, 1] == 1
        assert pair.pair_weight.sum() == 1
