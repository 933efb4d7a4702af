"""f-divergences in place of the reverse KL: what takes the place of a response's log-ratio in a loss over pairs.

With t = policy / reference, DPO under an f-divergence compares f'(t) of both responses; reverse KL's is log t, up to a
constant that cancels.

Source: https://arxiv.org/abs/2309.16240, as TRL 1.16 has it, its clamp of the alpha-divergence's exponent included; the
forward KL, which is alpha = 0, has that clamp here too: without it a response 89 nats below the reference is infinite
in fp32, and the gradient of its pair not a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import Pairs, Sides, check_choice

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
DEFAULT_ALPHA = 0.5
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class Divergent:
    """The options of a loss over differences, where a divergence's additive constant cancels."""

    divergence: Divergence = "reverse_kl"
    """What holds the policy to the reference (f-DPO, arXiv 2309.16240)."""
    divergence_alpha: float = DEFAULT_ALPHA
    """Alpha of the alpha-divergence."""

    def score(self, pairs: Pairs) -> Sides:
        """f'(t) of both sides."""

        def of(log_t: jax.Array) -> jax.Array:
            return derivative(log_t, self.divergence, self.divergence_alpha)

        return jax.tree.map(of, pairs.ratio)

    def check_divergence(self) -> None:
        """Raises ValueError for an unknown divergence, and for an alpha that nothing would read."""
        check_choice(self, "divergence", self.divergence, get_args(Divergence))
        name, alpha = type(self).__name__, self.divergence_alpha
        if self.divergence != "alpha_divergence" and alpha != DEFAULT_ALPHA:
            raise ValueError(f"{name}: divergence_alpha is read by divergence = 'alpha_divergence' only")
        if not math.isfinite(alpha):
            raise ValueError(f"{name}: divergence_alpha must be finite, got {alpha}")


def derivative(log_t: jax.Array, divergence: Divergence, alpha: float = DEFAULT_ALPHA) -> jax.Array:
    """f'(t), shape of `log_t`: log t | 1 - 1/t | log(2t / (1 + t)) | (t^(alpha - 1) - 1) / (alpha - 1)."""
    if divergence == "forward_kl":
        return 1 - jnp.exp(jnp.minimum(-log_t, LARGEST_EXPONENT))
    if divergence == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(log_t)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return (jnp.exp(jnp.minimum((alpha - 1) * log_t, LARGEST_EXPONENT)) - 1) / (alpha - 1)
    return log_t  # reverse KL, and the alpha-divergence's limit
