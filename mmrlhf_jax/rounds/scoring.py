"""What an answer is worth, from its attributes: numbers under names, from reward models, from the truth about a board,
or from a program of the user's.

Attributes of an answer are a mapping such as {"helpful": 1.5, "supported": 3.0, "claims": 4.0}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Attributes = Mapping[str, float]
SUPPORTED, CLAIMS = "supported", "claims"  # attributes that `claim_score` reads
LEVELS = 5  # of a quantised attribute: 0 to 4, as HelpSteer labels them


def unit(direction: Mapping[str, float]) -> dict[str, float]:
    """`direction` at length 1. Raises ValueError where it has none."""
    length = math.hypot(*direction.values())
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"a direction needs a finite weight other than 0, got {dict(direction)}")
    return {name: weight / length for name, weight in direction.items()}


def along(attributes: Attributes, direction: Mapping[str, float]) -> float:
    """Attributes along a unit direction, v . r. Raises KeyError for an attribute that is missing.

    Source: DPA, https://arxiv.org/abs/2402.18571: v = (cos t, sin t) over helpfulness and verbosity.
    """
    return sum(weight * attributes[name] for name, weight in direction.items())


def claim_score(supported: float, claims: float, few: float = 10.0) -> float:
    """Share of an answer's claims that are true, times exp(1 - few / claims) where there are at most `few`, lest the
    shortest answer be the best; 0 without a claim.

    Source: FActScore's length penalty (its code; gamma = `few` = 10), the reward of https://arxiv.org/abs/2311.08401.
    """
    if not claims:
        return 0.0
    penalty = math.exp(1 - few / claims) if claims <= few else 1.0
    return penalty * supported / claims


def levels(values: Sequence[float]) -> list[int]:
    """Values on the scale 0 to 4 between the lowest and the highest of them; all 4 where they are equal."""
    low, high = min(values), max(values)
    if low == high:
        return [LEVELS - 1] * len(values)
    return [round((LEVELS - 1) * (value - low) / (high - low)) for value in values]


def steered(question: str, wanted: Mapping[str, int]) -> str:
    """A question that says which level of each attribute its answer has, or should have: "...? supported 4 wrong 0".

    Source: SteerLM, https://arxiv.org/abs/2310.05344, attribute-conditioned fine-tuning; its wording is ours.
    """
    return " ".join([question, *(f"{name} {level}" for name, level in wanted.items())])


def wanted_levels(direction: Mapping[str, float]) -> dict[str, int]:
    """What to ask for: the top level of what counts for an answer, the bottom one of what counts against it."""
    return {name: LEVELS - 1 if weight > 0 else 0 for name, weight in direction.items()}
