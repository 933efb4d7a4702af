"""Law 13: an optimizer step of ours is TRL 1.16's, on the same model directory and the same preference rows.

Both sides go through the door their users take: `prepare`, `train` and the exported checkpoint here, `DPOTrainer` with
its own collator and processor there. Compared are what both log, and every updated tensor; since AdamW with eps = 1 is
nearly a step along the clipped gradient, what a tensor moved by IS its gradient, and its relative error is bounded.

Equal, hence compared: the tokens a turn is closed with, the mean over pairs, sums of log-probs in fp32, which
parameters train and decay, the gradient norm before clipping, AdamW, and gamma * NLL(chosen), which is TRL's "sft" loss
of weight gamma (the token mean over the chosen answers of all pairs). A ranking of K answers is K (K - 1) / 2 rows to
TRL; our groups run it once and must come to the same step. Not equal, by choice or by nature:

- TRL resizes pictures with torchvision unless told otherwise; it is given transformers' PIL processor here, as law 3.
- Where policy and reference are the same weights (the first step), all rewards are 0 up to rounding. TRL runs both
  through one program and finds no reward above another; ours are two programs, so `rewards/accuracies` means nothing
  there on either side and is compared from the second step on.
- `entropy` is a mean over the answer tokens that are forwarded: TRL's pairs repeat an answer, a group holds it once.
- `loss/nll` and `loss/preference` are ours alone; `logits/*` and `mean_token_accuracy` TRL's alone.
- `label_smoothing` has no counterpart: TRL's "sigmoid" ignores it.
- TRL's likelihood term under gradient accumulation is a mean of its micro-batches' token means; ours is the step's.
- With chat templates that open a past answer otherwise than a new one, as the hub's LLaVA-OneVision template does, TRL
  ends the prompt before the difference and scores the rest of the opening (last test); ours scores what is generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from torchvision_shim import mend_torchvision

pytestmark = [pytest.mark.parity, pytest.mark.slow]
pytest.importorskip("torch")
mend_torchvision()
pytest.importorskip("torchvision")
pytest.importorskip("trl")

import trl_peer  # noqa: E402 - imports torch
from trl_peer import Setting, Trained  # noqa: E402

from mmrlhf_jax.models.llava_onevision import model as model_module  # noqa: E402
from mmrlhf_jax.models.llava_onevision.chat import Chat  # noqa: E402
from mmrlhf_jax.models.llava_onevision.fresh import CHAT_TEMPLATE  # noqa: E402

LOGGED = ("loss", "grad_norm", "entropy", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected",
          "rewards/margins", "rewards/accuracies", "learning_rate")  # fmt: skip
TOLERANCE = 1e-4  # relative, of a metric and of what a tensor moved by; float32 agrees to below 1e-5
METRIC_ROUNDING, MOVEMENT_ROUNDING = 1e-5, 1e-6  # absolute: what should be 0 is a difference of sums over 150 nats

STEPS = {
    "full fine-tuning": Setting(),
    "tower frozen, gradient not clipped": Setting(tower=False, clip_norm=100.0),
    "another beta": Setting(beta=0.5),
    "likelihood of the chosen": Setting(gamma=0.25),
    "weight decay": Setting(weight_decay=0.1),
    "three steps of Adam, other betas": Setting(gamma=0.25, steps=3, rate=0.01, eps=1e-3, b1=0.8, b2=0.9),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return trl_peer.make_world(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def theirs(world, tmp_path_factory):
    """A setting -> what TRL makes of it, once."""

    @cache
    def trained(setting: Setting, **options) -> Trained:
        return trl_peer.train_theirs(world, setting, tmp_path_factory.mktemp("theirs"), **options)

    return trained


def differences(
    ours: Trained, theirs: Trained, start: dict[str, np.ndarray], *, leave_out: Container[str] = ()
) -> dict:
    """{metric and step: (ours, theirs)} and {tensor: relative error of its movement}, where they exceed TOLERANCE."""
    assert len(ours.records) == len(theirs.records)
    assert ours.weights.keys() == theirs.weights.keys() == start.keys()
    found: dict[str, Any] = {}
    for step, (have, want) in enumerate(zip(ours.records, theirs.records, strict=True), 1):
        for name in LOGGED:
            meaningless = name == "rewards/accuracies" and step == 1
            room = TOLERANCE * abs(want[name]) + METRIC_ROUNDING
            if name not in leave_out and not meaningless and abs(have[name] - want[name]) > room:
                found[f"{name}, step {step}"] = (have[name], want[name])
    for name, before in start.items():
        have, want = ours.weights[name] - before, theirs.weights[name] - before
        if np.linalg.norm(have - want) > TOLERANCE * np.linalg.norm(want) + MOVEMENT_ROUNDING:
            found[name] = np.linalg.norm(have - want) / np.linalg.norm(want)
    return found


@pytest.mark.parametrize("pairing", ["pairs", "groups"])
@pytest.mark.parametrize("setting", STEPS.values(), ids=STEPS.keys())
def test_a_step_is_trl_s(world, theirs, tmp_path, setting, pairing):
    ours = trl_peer.train_ours(world, setting, tmp_path / "ours", pairing)
    distinct = ["entropy"] if pairing == "groups" else []
    assert differences(ours, theirs(setting), trl_peer.start_of(world), leave_out=distinct) == {}


def test_a_step_is_trl_s_accumulating_pair_by_pair(world, theirs, tmp_path):
    ours = trl_peer.train_ours(world, Setting(), tmp_path / "ours")
    one_by_one = theirs(Setting(), pairs_at_once=1)
    assert differences(ours, one_by_one, trl_peer.start_of(world), leave_out=["entropy"]) == {}


def test_trl_s_likelihood_depends_on_how_a_step_is_accumulated(theirs):
    """Why ours is compared with one batch where gamma is not 0. If this fails, TRL has mended it: compare both."""
    whole, one_by_one = (theirs(Setting(gamma=0.25), pairs_at_once=n).records[0]["loss"] for n in (None, 1))
    assert abs(one_by_one - whole) > 1e-3


def test_the_settings_move_what_they_should(world, theirs):
    """Otherwise the comparison could be one of nothing with nothing."""
    start = trl_peer.start_of(world)

    def still(setting):
        moved = theirs(setting).weights
        return {name for name, before in start.items() if np.abs(moved[name] - before).max() < MOVEMENT_ROUNDING}

    # the features are taken before the tower's last norm; softmax takes no notice of a key bias without positions
    inert = {name for name in start if "vision" in name and ("post_layernorm" in name or "k_proj.bias" in name)}
    assert still(STEPS["full fine-tuning"]) == inert
    assert still(STEPS["tower frozen, gradient not clipped"]) == {name for name in start if "vision_tower" in name}
    assert theirs(STEPS["full fine-tuning"]).records[0]["grad_norm"] > Setting().clip_norm
    last = theirs(STEPS["three steps of Adam, other betas"]).records[-1]
    assert last["rewards/margins"] > 0.1
    assert last["rewards/accuracies"] > 0


def test_ordinary_settings_stay_together(world, theirs, tmp_path):
    """Where a gradient is nearly 0, Adam steps by the sign of its rounding: only what is logged can be compared."""
    setting = Setting(steps=4, rate=1e-3, eps=1e-8)
    ours = trl_peer.train_ours(world, setting, tmp_path / "ours")
    found = differences(ours, theirs(setting), trl_peer.start_of(world))
    assert [name for name in found if ", step" in name] == []


# --- seeded faults: each must show --------------------------------------------------------------------------------


def no_gradient_to_the_newline(patch):
    features = model_module.picture_features

    def without(params, *rest):
        return features(params.replace(newline=jax.lax.stop_gradient(params.newline)), *rest)

    patch.setattr(model_module, "picture_features", without)


def turns_end_without_a_newline(patch):
    patch.setattr(Chat, "closing", "<|im_end|>")


def turns_end_otherwise(patch):
    patch.setattr(Chat, "closing", "<|endoftext|>\n")


@pytest.mark.parametrize("fault", [turns_end_otherwise, turns_end_without_a_newline])
def test_another_end_of_turn_shows(monkeypatch, world, theirs, tmp_path, fault):
    fault(monkeypatch)
    ours = trl_peer.train_ours(world, Setting(), tmp_path / "ours")
    found = differences(ours, theirs(Setting()), trl_peer.start_of(world))
    assert {"logps/chosen, step 1", "logps/rejected, step 1", "grad_norm, step 1"} <= found.keys()


def test_a_lost_gradient_of_one_vector_shows(monkeypatch, world, theirs, tmp_path):
    no_gradient_to_the_newline(monkeypatch)
    setting = Setting(clip_norm=100.0)
    ours = trl_peer.train_ours(world, setting, tmp_path / "ours")
    found = differences(ours, theirs(setting), trl_peer.start_of(world))
    assert found.keys() == {"image_newline", "grad_norm, step 1"}


@pytest.mark.parametrize(
    ("wrong", "shows"),
    [
        ({"beta": 0.101}, "grad_norm, step 1"),
        ({"gamma": 0.01}, "loss, step 1"),
        ({"clip_norm": 1.01}, "image_newline"),
        ({"b1": 0.89}, "image_newline"),
        ({"b2": 0.99}, "image_newline"),
        ({"weight_decay": 0.01}, "image_newline"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_setting_shows(world, theirs, tmp_path, wrong, shows):
    right = Setting(steps=2, rate=0.01, eps=1e-3)
    ours = trl_peer.train_ours(world, dataclasses.replace(right, **wrong), tmp_path / "ours")
    assert shows in differences(ours, theirs(right), trl_peer.start_of(world))


def test_where_a_template_opens_past_answers_otherwise_trl_scores_the_opening(world):
    from transformers import AutoProcessor
    from trl.data_utils import apply_chat_template

    template = CHAT_TEMPLATE.replace("message.role + '\\n'", "message.role + ' \\n'")
    assert template != CHAT_TEMPLATE
    processor = AutoProcessor.from_pretrained(world.model, chat_template=template)
    turns = {"prompt": ("user", "What?"), "chosen": ("assistant", "Yes."), "rejected": ("assistant", "No.")}
    pair = {k: [{"role": role, "content": [{"type": "text", "text": text}]}] for k, (role, text) in turns.items()}
    theirs = apply_chat_template(pair, processor)
    assert theirs["prompt"].endswith("<|im_start|>assistant")
    assert theirs["chosen"] == " \nYes.<|im_end|>\n"
    ours = Chat(processor.tokenizer, template, "tiny")
    assert ours.tokenizer.decode(ours.prompt(pair["prompt"])).endswith("<|im_start|>assistant\n")
    assert ours.tokenizer.decode(ours.response("Yes.")) == "Yes.<|im_end|>\n"
