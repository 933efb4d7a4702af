"""The quickstart's critique reward model, from its SFT run: it learns to write the critiques that come with the
answers to every task, and to score behind them. All pairs of a group in one forward.

The template is a short one, as the built-in one's instructions would be most of what so small a model reads. Hardware:
two CPU cores, about three minutes. launch/quickstart.py runs it as

    python launch/train.py configs/quickstart/critique_reward_tasks.py --model SFT_RUN --dataset DATASET --output RUN
"""

from pathlib import Path

from mmrlhf_jax.objectives import CritiqueReward
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
    objective=CritiqueReward(critique=4.0),  # what a critique overlooks no score behind it can know
    data=DataConfig(groups_per_step=16, max_steps=600, max_buckets=2, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup=0.05, b2=0.98, rates=PartRates(tower=1.0)),
    reward=RewardConfig(template=str(Path(__file__).with_name("critique_template.txt"))),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
