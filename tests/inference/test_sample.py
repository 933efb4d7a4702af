"""Drawing tokens: what temperature, top-k and top-p leave, against sorting and against transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrlhf_jax.inference.sample import SamplingConfig, branch_keys, pick, request_key, warp

VOCAB = 997
SETTINGS = [
    (0.7, 0, 1.0),
    (1.0, 1, 1.0),
    (1.0, 40, 1.0),
    (2.0, 0, 0.9),
    (1.0, 0, 1e-6),
    (0.3, 5000, 0.5),
    (1.3, 50, 0.6),
]


def logits(rows: int = 6) -> np.ndarray:
    """Sharp and flat rows, of both signs."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, VOCAB)) * np.geomspace(0.1, 30, rows)[:, None] - 3).astype(np.float32)


def sorted_and_cut(row: np.ndarray, temperature: float, top_k: int, top_p: float) -> set[int]:
    """The tokens that may be drawn, by the definition: from the likeliest down."""
    order = np.argsort(-row, kind="stable")[: top_k or None]
    weight = np.exp((row[order] - row.max()).astype(np.float64) / temperature)
    before = np.cumsum(weight) - weight  # of the likelier ones
    return set(order[before < top_p * weight.sum()].tolist())


def kept(x: np.ndarray, config: SamplingConfig) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(warp(jnp.asarray(x), config))]


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_may_be_drawn_is_what_sorting_leaves(setting):
    x = logits()
    assert kept(x, SamplingConfig(8, *setting)) == [sorted_and_cut(row, *setting) for row in x]


@pytest.mark.parity
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_may_be_drawn_is_what_transformers_leaves(setting):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_k, top_p = setting
    x = logits()
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(x))
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    ours = warp(jnp.asarray(x), SamplingConfig(8, *setting))
    np.testing.assert_array_equal(np.isfinite(ours), torch.isfinite(scores).numpy())
    np.testing.assert_allclose(jax.nn.softmax(ours, axis=-1), torch.softmax(scores, -1).numpy(), atol=1e-5)


def test_ties_with_the_last_one_kept_are_kept():
    x = np.array([[2.0, 1.0, 1.0, -0.0, 0.0]], np.float32)
    assert kept(x, SamplingConfig(8, 1.0, top_k=2)) == [{0, 1, 2}]
    assert kept(x, SamplingConfig(8, 1.0, top_p=0.6)) == [{0, 1, 2}]


def test_tokens_come_as_often_as_they_are_likely():
    x, draws, config = logits(1)[:, :12] + 3, 40_000, SamplingConfig(8, temperature=0.05, top_k=6)
    keys = branch_keys(request_key(0, "a")[None], *jnp.zeros((2, 1, draws), jnp.int32), jnp.arange(draws)[None])
    found = pick(jnp.broadcast_to(x, (1, draws, 12)), keys, config)
    wanted = np.exp(x[0].astype(np.float64) / 0.05) * (x[0] >= np.sort(x[0])[-6])
    wanted /= wanted.sum()
    share = np.bincount(np.asarray(found)[0], minlength=12) / draws
    assert (share[wanted == 0] == 0).all()
    np.testing.assert_allclose(share, wanted, atol=4 * 0.5 / np.sqrt(draws))


def test_greedy_takes_the_likeliest():
    np.testing.assert_array_equal(pick(jnp.asarray(logits()), None, SamplingConfig()), logits().argmax(-1))


def test_a_hair_of_temperature_is_greedy():
    keys = branch_keys(request_key(0, "a")[None], *jnp.zeros((3, 1, 6), jnp.int32))
    found = pick(jnp.asarray(logits())[None], keys, SamplingConfig(temperature=1e-30, top_p=0.5))
    np.testing.assert_array_equal(found[0], logits().argmax(-1))


def test_every_branch_and_token_has_a_key_of_its_own():
    names = np.stack([request_key(0, "a"), request_key(0, "b"), request_key(1, "a")])
    places = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3).T  # response, sample, age
    keys = branch_keys(names, *(jnp.broadcast_to(place, (3, 27)) for place in places))
    assert len({tuple(key) for key in np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()}) == 81


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0.9}, "temperature 0 draws nothing"),
        ({"top_k": 5}, "temperature 0 draws nothing"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**wrong)
