"""TRL 1.16's whole list of losses: golden numbers of its own code, in float64, over pairs and over one big group."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from objective_samples import inputs_of, tokens_of, with_token_logps

from mmrlhf_jax.objectives import (
    AOT,
    BCO,
    DPO,
    EXO,
    IPO,
    MPO,
    NCA,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    ChosenNLL,
    DiscoPOP,
    Hinge,
    RobustDPO,
    SigmoidNorm,
)

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "data" / "trl_dpo_golden.json").read_text())
PAIRS = 5
OURS = {
    "sigmoid": DPO(),
    "hinge": Hinge(),
    "ipo": IPO(),
    "exo_pair": EXO(label_smoothing=1e-3),
    "nca_pair": NCA(),
    "robust": RobustDPO(label_smoothing=0.1),
    "bco_pair": BCO(),
    "sppo_hard": SPPO(),
    "aot": AOT(),
    "aot_unpaired": AOTUnpaired(),
    "apo_zero": APOZero(),
    "apo_down": APODown(),
    "discopop": DiscoPOP(),
    "sft": ChosenNLL(),
    "sigmoid_norm": SigmoidNorm(),
    "aot_ls0.1": AOT(label_smoothing=0.1),
    "mpo_sigmoid0.8_bco0.2_sft1.0": MPO(sigmoid=0.8, bco=0.2, gamma=1.0),
    "mm_rlhf_like_sigmoid1_sft0.25": DPO(gamma=0.25),
    "sigmoid_ld_alpha0.5": DPO(ld_alpha=0.5),
    "sigmoid_forward_kl": DPO(divergence="forward_kl"),
    "sigmoid_js_divergence": DPO(divergence="js_divergence"),
    "sigmoid_alpha_divergence": DPO(divergence="alpha_divergence"),
}
IN_FLOAT32 = {"sigmoid_alpha_divergence"}  # which TRL cannot compute in float64


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def golden_step(groups: list[list[int]], pair_weight):
    """The golden rows dealt into groups."""
    cut = {
        name: [np.array(row[:n]) for row, n in zip(GOLDEN[f"{name}_per_token_logps"], GOLDEN["lens"])]
        for name in ("policy", "ref")
    }
    token = [[np.arange(len(cut["policy"][row])) + 100 * row for row in group] for group in groups]
    logp, reference = ([[cut[name][row] for row in group] for group in groups] for name in ("policy", "ref"))
    return inputs_of(tokens_of(token, logp, reference), pair_weight)


def as_pairs():
    step = golden_step([[n, n + PAIRS] for n in range(PAIRS)], np.tile([[0.0, 1.0], [0.0, 0.0]], (PAIRS, 1, 1)))
    return step, [[n, n + PAIRS] for n in range(PAIRS)]


def as_one_group():
    weight = np.zeros((1, 2 * PAIRS, 2 * PAIRS))
    weight[0, np.arange(PAIRS), np.arange(PAIRS) + PAIRS] = 1
    return golden_step([list(range(2 * PAIRS))], weight), [list(range(2 * PAIRS))]


def test_every_golden_case_has_an_objective():
    assert OURS.keys() == GOLDEN["cases"].keys()


@pytest.mark.parametrize("arrange", [as_pairs, as_one_group])
@pytest.mark.parametrize("case", OURS)
def test_loss_gradient_and_metrics_are_trls(case, arrange):
    (inputs, rows), expected = arrange(), GOLDEN["cases"][case]
    rounding = 1e-5 if case in IN_FLOAT32 else 1e-10

    def loss(logp):
        return OURS[case](with_token_logps(inputs, logp))

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(inputs.tokens.logp)
    assert float(value) == pytest.approx(expected["loss"], rel=rounding)
    per_row = np.zeros(2 * PAIRS)
    for b, group in enumerate(rows):
        for i, row in enumerate(group):
            per_row[row] = np.asarray(gradient[b])[np.asarray(inputs.tokens.response[b]) == i].sum()
    np.testing.assert_allclose(per_row, expected["grad_sum_per_row"], rtol=rounding, atol=1e-13)
    assert np.linalg.norm(gradient) == pytest.approx(expected["grad_l2"], rel=rounding)
    shared = metrics.keys() & expected["metrics"].keys()
    assert shared == expected["metrics"].keys() or case == "sft"
    for name in shared:
        assert float(metrics[name]) == pytest.approx(expected["metrics"][name], rel=1e-6, abs=1e-7), name
