"""The control beside the quickstart's critique reward model: a score at the end of the plain answer, from the same SFT
run.

Same groups, same number of steps, same rate; it is told which answer is better and never why. Hardware: two CPU cores,
about two minutes. launch/reward_quickstart.py runs it as

    python launch/train.py configs/quickstart/scalar_reward.py --model SFT_RUN --dataset DATASET --output RUN
"""

from mmrlhf_jax.objectives import ScalarReward
from mmrlhf_jax.training.recipe import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    PartRates,
    Recipe,
)

recipe = Recipe(
    objective=ScalarReward(),
    data=DataConfig(groups_per_step=32, max_steps=500, max_buckets=2, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, b2=0.98, rates=PartRates(tower=1.0)),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
