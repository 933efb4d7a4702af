"""Objectives: small pure functions, arrays in, (loss, metrics) out. No I/O, no models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mmrlhf_jax.objectives.preference import (
    DPO,
    MMDPO,
    MMDPOReleasedBatch,
    MMDPOReleasedFactor,
    PreferenceInputs,
    PreferenceObjective,
)
from mmrlhf_jax.objectives.reward import CritiqueReward, RewardInputs, ScalarReward
from mmrlhf_jax.objectives.supervised import Supervised, SupervisedInputs
from mmrlhf_jax.objectives.totals import StepTotals, step_totals

OBJECTIVES: Mapping[str, type] = MappingProxyType(
    {
        "supervised": Supervised,
        "dpo": DPO,
        "mmdpo": MMDPO,
        "mmdpo_released_factor": MMDPOReleasedFactor,
        "mmdpo_released_batch": MMDPOReleasedBatch,
        "critique_reward": CritiqueReward,
        "scalar_reward": ScalarReward,
    }
)
"""Every objective under the name by which recipes and checkpoints know it."""

__all__ = [
    "DPO",
    "MMDPO",
    "OBJECTIVES",
    "CritiqueReward",
    "MMDPOReleasedBatch",
    "MMDPOReleasedFactor",
    "PreferenceInputs",
    "PreferenceObjective",
    "RewardInputs",
    "ScalarReward",
    "StepTotals",
    "Supervised",
    "SupervisedInputs",
    "step_totals",
]
