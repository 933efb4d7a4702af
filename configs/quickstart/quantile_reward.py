"""Quantiles of what an answer would be rated, on the quickstart's world, instead of a mean of each: so that a policy
can be kept from answers that may be bad. Data and the rest as for multi_objective_reward.py.

Hardware: any CPU; not timed.

    python launch/train.py configs/quickstart/quantile_reward.py --model SFT_RUN --dataset DATASET --output RUN
    python launch/annotate.py --dataset DATASET --model RUN --with reward --direction correctness 1 \\
        --risk cvar --alpha 0.2
"""

from mmrlhf_jax.objectives import QuantileReward
from mmrlhf_jax.training.recipe import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    PartRates,
    Recipe,
    RewardConfig,
)

recipe = Recipe(
    objective=QuantileReward(),
    reward=RewardConfig(attributes=("correctness", "completeness", "brevity"), quantiles=9),
    data=DataConfig(groups_per_step=32, max_steps=500, max_buckets=2, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, b2=0.98, rates=PartRates(tower=1.0)),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
