"""DPO on a model of some thousand parameters: to see that everything runs, not to learn anything.

Hardware: any CPU, minutes. Plain DPO, because most files come without the margins MM-DPO needs.

    python launch/train.py configs/tiny.py --model MODEL --dataset DATASET --output RUN
"""

from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import CheckpointConfig, ComputeConfig, DataConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=DPO(gamma=0.25),
    data=DataConfig(groups_per_step=8, max_buckets=4, slots_per_device=4096),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=2),
)
