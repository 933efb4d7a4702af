from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mmrlhf_jax.objectives import DPO, MMDPO, MMDPOReleasedBatch, MMDPOReleasedFactor, ScalarReward, Supervised
from mmrlhf_jax.objectives.preference import factor_beta, margin_beta
from mmrlhf_jax.report.beta_map import beta_of, histogram, rule_in_words

MARGINS = np.array([-3.0, -0.1, 0, 0.5, 1, 7, 100], np.float32)


def test_the_rules_are_those_that_train():
    published, factor = MMDPO(beta=0.2, w=0.7, k=0.3), MMDPOReleasedFactor(beta=0.2, w=0.7)
    ours = margin_beta(jnp.asarray(MARGINS), published.beta, published.w, published.k)
    assert beta_of(published, MARGINS) == pytest.approx(np.asarray(ours), rel=1e-6)
    ours = factor_beta(jnp.asarray(MARGINS), factor.beta, factor.w)
    assert beta_of(factor, MARGINS) == pytest.approx(np.asarray(ours), rel=1e-6)


def test_the_published_rule_stays_between_its_bounds():
    found = beta_of(MMDPO(beta=0.1, w=0.5, k=0.5), MARGINS)
    assert found[:3].tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert found[4] == pytest.approx(0.1 * (1 + 0.5 * (1 - np.exp(-0.5))))
    assert found[-1] == pytest.approx(0.15)


def test_dpo_has_one_beta_and_others_no_map():
    assert set(beta_of(DPO(beta=0.3), MARGINS)) == {0.3}
    assert beta_of(MMDPOReleasedBatch(), MARGINS) is None
    assert "no pair's margin decides it" in rule_in_words(MMDPOReleasedBatch())
    assert rule_in_words(Supervised()) is None
    assert rule_in_words(ScalarReward()) is None


def test_whole_margins_have_a_bar_each():
    found = histogram(np.array([1.0, 1, 2, 4]))
    assert found.edge.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert found.count.tolist() == [2, 1, 0, 1]


def test_other_margins_have_bars_of_a_round_width_and_none_is_lost():
    values = np.concatenate([np.random.default_rng(0).normal(1, 2, 999), [0.0]])
    found = histogram(values)
    widths = np.diff(found.edge)
    assert widths == pytest.approx(np.full(len(widths), 0.5))
    assert found.count.sum() == 1000
    assert found.edge[0] <= values.min() < values.max() <= found.edge[-1]


def test_equal_margins_are_one_bar():
    assert histogram(np.full(7, 0.3)).count.tolist().count(7) == 1
