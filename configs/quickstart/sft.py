"""Supervised fine-tuning of the model of launch/reward_quickstart.py, from random weights, on answers of every quality.

What comes out reads digits well and has the habits of those whose answers it saw. Hardware: two CPU cores, about two
minutes. launch/reward_quickstart.py runs it as

    python launch/train.py configs/quickstart/sft.py --model MODEL --dataset DATASET --output RUN
"""

from mmrlhf_jax.objectives import Supervised
from mmrlhf_jax.training.recipe import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    PartRates,
    Recipe,
)

recipe = Recipe(
    objective=Supervised(),
    data=DataConfig(groups_per_step=32, max_steps=480, max_buckets=2, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(
        learning_rate=2e-3,
        warmup=0.05,
        b2=0.98,
        rates=PartRates(tower=1.0),  # nothing is pretrained here: the tower has to learn to read
    ),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
