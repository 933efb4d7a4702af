"""A critique reward model of some thousand parameters: to see that everything runs, not to learn anything.

Hardware: any CPU, minutes. The dataset's human reasons are the critiques.

    python launch/train.py configs/tiny_reward.py --model MODEL --dataset DATASET --output RUN
"""

from mmrlhf_jax.objectives import CritiqueReward
from mmrlhf_jax.training.recipe import CheckpointConfig, ComputeConfig, DataConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=CritiqueReward(),
    data=DataConfig(groups_per_step=8, max_buckets=4, slots_per_device=4096),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=2),
)
