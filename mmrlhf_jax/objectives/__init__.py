"""Objectives: small pure functions, arrays in, (loss, metrics) out. No I/O, no models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mmrlhf_jax.objectives.attributes import MultiObjectiveReward, QuantileReward
from mmrlhf_jax.objectives.batchwise import AOT, AOTUnpaired, BetaDPO
from mmrlhf_jax.objectives.exploration import SELM, MinAvgOut
from mmrlhf_jax.objectives.listwise import PlackettLuce
from mmrlhf_jax.objectives.pairs import PreferenceInputs, PreferenceObjective, Tokens
from mmrlhf_jax.objectives.pairwise import (
    BCO,
    DPO,
    EXO,
    IPO,
    MPO,
    NCA,
    SPPO,
    APODown,
    APOZero,
    ChosenNLL,
    DiscoPOP,
    Hinge,
    Pairwise,
    RobustDPO,
    SigmoidNorm,
)
from mmrlhf_jax.objectives.preference import MMDPO, MMDPOReleasedBatch, MMDPOReleasedFactor
from mmrlhf_jax.objectives.regression import REFUEL
from mmrlhf_jax.objectives.reward import CritiqueReward, RewardInputs, ScalarReward
from mmrlhf_jax.objectives.scores import ClassificationReward, LLaVARLHFReward, MarginReward, TokenwiseReward
from mmrlhf_jax.objectives.soft_labels import MMPO, VisitDPO
from mmrlhf_jax.objectives.supervised import Supervised, SupervisedInputs
from mmrlhf_jax.objectives.token_level import DDPO, StepDPO
from mmrlhf_jax.objectives.totals import StepTotals, step_totals

AttributeObjective = MultiObjectiveReward | QuantileReward
"""Reward objectives that read ratings, through a head with outputs for each attribute."""
ScoreObjective = (
    ScalarReward | MarginReward | ClassificationReward | LLaVARLHFReward | TokenwiseReward | AttributeObjective
)
"""Reward objectives that ask for no token's probability."""
RewardObjective = CritiqueReward | ScoreObjective
AveragingObjective = BetaDPO | MinAvgOut
"""Objectives that keep averages over steps, and see a step whole: `initial_averages(vocab)` before the first,
`moved_averages(inputs)` after one."""
Objective = (
    Supervised | MinAvgOut | DPO | MMDPO | MMDPOReleasedFactor | MMDPOReleasedBatch
    | SigmoidNorm | Hinge | IPO | EXO | RobustDPO | DiscoPOP | NCA | BCO | SPPO | APOZero | APODown | MPO | ChosenNLL
    | AOT | AOTUnpaired | BetaDPO | MMPO | VisitDPO | PlackettLuce | DDPO | StepDPO | SELM | REFUEL
    | RewardObjective
)  # fmt: skip

OBJECTIVES: Mapping[str, type[Objective]] = MappingProxyType(
    {
        "supervised": Supervised,
        "min_avgout": MinAvgOut,
        "dpo": DPO,
        "mmdpo": MMDPO,
        "mmdpo_released_factor": MMDPOReleasedFactor,
        "mmdpo_released_batch": MMDPOReleasedBatch,
        "critique_reward": CritiqueReward,
        "scalar_reward": ScalarReward,
        # the others of TRL 1.16 under TRL's names; its "sigmoid" is dpo
        "sigmoid_norm": SigmoidNorm,
        "hinge": Hinge,
        "ipo": IPO,
        "exo_pair": EXO,
        "nca_pair": NCA,
        "robust": RobustDPO,
        "bco_pair": BCO,
        "sppo_hard": SPPO,
        "aot": AOT,
        "aot_unpaired": AOTUnpaired,
        "apo_zero": APOZero,
        "apo_down": APODown,
        "discopop": DiscoPOP,
        "sft": ChosenNLL,
        "mpo": MPO,
        # of the family of MM-RLHF
        "beta_dpo": BetaDPO,
        "mmpo": MMPO,
        "visit_dpo": VisitDPO,
        "step_dpo": StepDPO,
        "ddpo": DDPO,
        "plackett_luce": PlackettLuce,
        "refuel": REFUEL,
        "selm": SELM,
        "margin_reward": MarginReward,
        "classification_reward": ClassificationReward,
        "llava_rlhf_reward": LLaVARLHFReward,
        "tokenwise_reward": TokenwiseReward,
        "multi_objective_reward": MultiObjectiveReward,
        "quantile_reward": QuantileReward,
    }
)
"""Every objective under the name by which recipes and checkpoints know it."""

__all__ = [
    "AOT",
    "BCO",
    "DDPO",
    "DPO",
    "EXO",
    "IPO",
    "MMDPO",
    "MMPO",
    "MPO",
    "NCA",
    "OBJECTIVES",
    "REFUEL",
    "SELM",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AttributeObjective",
    "AveragingObjective",
    "BetaDPO",
    "ChosenNLL",
    "ClassificationReward",
    "CritiqueReward",
    "DiscoPOP",
    "Hinge",
    "LLaVARLHFReward",
    "MMDPOReleasedBatch",
    "MMDPOReleasedFactor",
    "MarginReward",
    "MinAvgOut",
    "MultiObjectiveReward",
    "Objective",
    "Pairwise",
    "PlackettLuce",
    "PreferenceInputs",
    "PreferenceObjective",
    "QuantileReward",
    "RewardInputs",
    "RewardObjective",
    "RobustDPO",
    "ScalarReward",
    "ScoreObjective",
    "SigmoidNorm",
    "StepDPO",
    "StepTotals",
    "Supervised",
    "SupervisedInputs",
    "Tokens",
    "TokenwiseReward",
    "VisitDPO",
    "step_totals",
]
