"""A reward model for attributes on the quickstart's world: correctness, completeness and brevity of an answer, each
rated by itself; refusals are not rated in completeness.

Of a world that is rated (`WorldConfig(rated=True)`, prepared with `RATED_MAPPING` of data/digit_boards/world.py).
Hardware: any CPU; not timed.

    python launch/train.py configs/quickstart/multi_objective_reward.py --model SFT_RUN --dataset DATASET --output RUN
    python launch/annotate.py --dataset DATASET --model RUN --with reward --direction correctness 1 brevity 0.2
"""

from mmrlhf_jax.objectives import MultiObjectiveReward
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
    objective=MultiObjectiveReward(),
    reward=RewardConfig(attributes=("correctness", "completeness", "brevity")),
    data=DataConfig(groups_per_step=32, max_steps=500, max_buckets=2, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, b2=0.98, rates=PartRates(tower=1.0)),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
