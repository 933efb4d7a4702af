"""How one score is read from a reward model that says more than one number of a response: a direction over its
attributes, and of quantiles a measure of risk.

    outputs [..., A, Q]  -> direction ->  quantiles of one reward [..., Q]  -> risk ->  score [...]

Source of directions: DPA, https://arxiv.org/abs/2402.18571; of quantiles mixed one by one: QRM,
https://arxiv.org/abs/2409.10164, whose gate is the direction here. So attributes are taken to rise and fall together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmrlhf_jax.models.critique_reward.config import CritiqueRewardConfig
from mmrlhf_jax.models.critique_reward.model import CritiqueReward, read_outputs, shaped
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.objectives.reward_heads import (
    conditional_value_at_risk,
    expected,
    exponential_utility,
    gated_quantiles,
)

Risk = Literal["mean", "cvar", "entropic"]


@dataclass(frozen=True)
class ReadingConfig:
    """What of a reward model for attributes is its score; of one that has a score, nothing here may be set."""

    direction: tuple[tuple[str, float], ...] = ()
    """what each attribute counts for, NAME WEIGHT ...; others 0. None at all: the mean of all attributes"""
    risk: Risk = "mean"
    """of a head of quantiles. mean: the expected reward; cvar: the mean of its worst share --alpha; entropic: what is
    worth as much to somebody of constant --aversion to risk, -log E exp(-aversion r) / aversion"""
    alpha: float | None = None
    """cvar: the share, above 0, at most 1"""
    aversion: float | None = None
    """entropic: in one over units of the reward, above 0"""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no sense, or that the measure of risk would not read."""
        names = [name for name, _ in self.direction]
        if len(set(names)) < len(names):
            raise ValueError(f"--direction names an attribute twice: {' '.join(names)}")
        if names and not any(weight for _, weight in self.direction):
            raise ValueError("--direction gives every attribute the weight 0: nothing would be read")
        if not all(math.isfinite(weight) for _, weight in self.direction):
            raise ValueError("--direction holds a weight that is not finite")
        for name, value, needed in (("alpha", self.alpha, "cvar"), ("aversion", self.aversion, "entropic")):
            if (value is None) == (self.risk == needed):
                verb = "needs" if value is None else "reads no"
                raise ValueError(f"--risk {self.risk} {verb} --{name}")
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"--alpha is a share in (0, 1], got {self.alpha}")
        if self.aversion is not None and not 0 < self.aversion < math.inf:
            raise ValueError(f"--aversion must be positive and finite, got {self.aversion}")


@dataclass(frozen=True)
class HeadReading:
    """(params, hidden states [..., D]) -> scores f32 [...]: equal readings are equal, and hash alike."""

    config: CritiqueRewardConfig
    reading: ReadingConfig

    def __call__(self, params: CritiqueReward, hidden: jax.Array) -> jax.Array:
        output = shaped(self.config, read_outputs(params, hidden))
        return self.risk_of(gated_quantiles(output, jnp.asarray(weights_of(self.config, self.reading))))

    def attributes(self, params: CritiqueReward, hidden: jax.Array) -> jax.Array:
        """Each attribute by itself, f32 [..., A], under the same measure of risk."""
        return self.risk_of(shaped(self.config, read_outputs(params, hidden)))

    def risk_of(self, quantiles: jax.Array) -> jax.Array:
        """[..., Q] -> [...]."""
        if self.reading.alpha is not None:
            return conditional_value_at_risk(quantiles, self.reading.alpha)
        if self.reading.aversion is not None:
            return exponential_utility(quantiles, self.reading.aversion)
        return expected(quantiles)


def weights_of(config: CritiqueRewardConfig, reading: ReadingConfig) -> tuple[float, ...]:
    """What each of the head's attributes counts for, in their order."""
    asked = dict(reading.direction)
    return tuple(asked.get(name, 0.0) if asked else 1 / len(config.attributes) for name in config.attributes)


def reading_of(config: LlavaOnevisionConfig, reading: ReadingConfig) -> HeadReading | None:
    """How a model's head is read; None for one of one output, whose score needs no reading.

    Raises ValueError for an attribute the head does not have, and for settings that it would not read.
    """
    if not isinstance(config, CritiqueRewardConfig) or not config.attributes:
        if reading != ReadingConfig():
            raise ValueError(
                "--direction and --risk are for reward models of attributes; this one has a score: omit them"
            )
        return None
    if unknown := [name for name, _ in reading.direction if name not in config.attributes]:
        raise ValueError(
            f"--direction: no attribute {', '.join(unknown)}; the model has {', '.join(config.attributes)}"
        )
    if reading.risk != "mean" and not config.quantiles:
        raise ValueError(f"--risk {reading.risk} is of a distribution, and the model says one number an attribute")
    return HeadReading(config, reading)


def key_of(found: HeadReading | None) -> dict[str, Any]:
    """What a stored score depends on here, as JSON; empty for a model that has a score."""
    if found is None:
        return {}
    said = {"direction": list(weights_of(found.config, found.reading)), "risk": found.reading.risk}
    return {"reading": said | {"alpha": found.reading.alpha, "aversion": found.reading.aversion}}
