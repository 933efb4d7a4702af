"""TRL 1.16's own loss code beside ours, on random token log-probs: every loss with its options, LD-DPO, WPO and
f-divergences among them."""

from __future__ import annotations

import collections
import contextlib
import types

import jax
import numpy as np
import pytest
from objective_samples import inputs_of, tokens_of, with_token_logps
from torchvision_shim import mend_torchvision

from mmrlhf_jax.objectives import (
    AOT,
    BCO,
    DPO,
    EXO,
    IPO,
    NCA,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    RobustDPO,
    SigmoidNorm,
)

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
mend_torchvision()
pytest.importorskip("trl")

from trl.trainer import dpo_trainer  # noqa: E402

CLASSES = {
    "sigmoid": DPO, "hinge": Hinge, "ipo": IPO, "exo_pair": EXO, "nca_pair": NCA, "robust": RobustDPO, "bco_pair": BCO,
    "sppo_hard": SPPO, "aot": AOT, "aot_unpaired": AOTUnpaired, "apo_zero": APOZero, "apo_down": APODown,
    "discopop": DiscoPOP, "sigmoid_norm": SigmoidNorm,
}  # fmt: skip
SMOOTHED = {"exo_pair": 0.02, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.3}
SORTING = ("aot", "aot_unpaired")
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
CASES = [
    *((kind, {"beta": 0.3}) for kind in CLASSES),
    *((kind, {"ld_alpha": 0.4}) for kind in CLASSES),
    *((kind, {"wpo": True}) for kind in CLASSES if kind not in SORTING),
    *((kind, {"divergence": d, "beta": 0.05}) for kind in DIVERGENT for d in ("forward_kl", "js_divergence")),
    ("sigmoid", {"divergence": "alpha_divergence", "divergence_alpha": 0.3}),
    ("ipo", {"divergence": "alpha_divergence", "divergence_alpha": 1.0, "ld_alpha": 0.0}),
    ("discopop", {"tau": 0.2, "gamma": 0.5}),
]


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(before)


def random_rows(pairs=6, seed=3):
    """Five token log-probs, lengths and collisions of chosen rows, then rejected ones."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, 2 * pairs)
    return [[-rng.uniform(0, 3, n) for n in lengths] for _ in range(3)]


def trl_loss(kind, options, rows):
    """Loss and its gradient with respect to every token, from TRL's own code; no gradient where that raises."""
    policy, reference, collision = ([torch.tensor(r) for r in each] for each in rows)
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(r) for r in policy], batch_first=True)
    policy = pad(policy, batch_first=True).requires_grad_(True)
    reference, collision = pad(reference, batch_first=True), pad(collision, batch_first=True)

    def model(logp):
        nothing = torch.zeros_like(logp)
        return lambda **_: types.SimpleNamespace(
            log_probs=logp * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(),
            log_sum_sq_probs=collision,
        )  # fmt: skip

    gamma = options.get("gamma", 0.0)
    here = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        beta=options.get("beta", 0.1),
        ld_alpha=options.get("ld_alpha"),
        precompute_ref_logps=False,
        loss_types=[kind, "sft"] if gamma else [kind],  # WPO's weights cannot be multiplied into TRL's "sft"
        loss_weights=[1.0, gamma] if gamma else [1.0],
        label_smoothing=SMOOTHED.get(kind, 0.0),
        use_weighting=options.get("wpo", False),
        f_divergence_type=options.get("divergence", "reverse_kl"),
        f_alpha_divergence_coef=options.get("divergence_alpha", 0.5),
        args=types.SimpleNamespace(discopop_tau=options.get("tau", 0.05), gradient_checkpointing_kwargs=None),
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        ref_model=model(reference),
    )
    whole = torch.cat([torch.zeros(len(mask), 1), mask], 1)
    batch = {
        "input_ids": torch.zeros_like(whole).long(),
        "attention_mask": torch.ones_like(whole).long(),
        "completion_mask": whole.long(),
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(here, model(policy), batch, False)
    if (kind, here.use_weighting) == ("hinge", True):  # TRL multiplies in place what relu's backward pass reads
        return loss.item(), None
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.item(), [g[: len(r)].numpy() for g, r in zip(gradient, rows[0])]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_our_loss_is_trls(kind, options, monkeypatch):
    monkeypatch.setattr(dpo_trainer, "disable_gradient_checkpointing", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(dpo_trainer, "is_peft_model", lambda _: False)
    rows = random_rows()
    if options.get("divergence") == "alpha_divergence":  # TRL 1.16 clamps in float32 only
        rows = [[r.astype(np.float32) for r in each] for each in rows]
    smoothing = {"label_smoothing": SMOOTHED[kind]} if kind in SMOOTHED else {}
    objective = CLASSES[kind](**options, **smoothing)
    pairs = len(rows[0]) // 2
    groups = [[n, n + pairs] for n in range(pairs)]
    policy, reference, collision = ([[each[row] for row in group] for group in groups] for each in rows)
    token = [[np.arange(len(r)) + 50 * i for i, r in enumerate(group)] for group in policy]
    inputs = inputs_of(
        tokens_of(token, policy, reference, collision=collision), np.tile([[0.0, 1.0], [0.0, 0.0]], (pairs, 1, 1))
    )
    value, gradient = jax.value_and_grad(lambda logp: objective(with_token_logps(inputs, logp))[0])(inputs.tokens.logp)
    expected, expected_gradient = trl_loss(kind, options, rows)
    rounding = 1e-5 if rows[0][0].dtype == np.float32 else 1e-10
    assert float(value) == pytest.approx(expected, rel=rounding)
    for b, group in enumerate(groups if expected_gradient else []):
        for i, row in enumerate(group):
            mine = np.asarray(gradient[b])[np.asarray(inputs.tokens.response[b]) == i]
            np.testing.assert_allclose(mine, expected_gradient[row], rtol=rounding, atol=rounding)
