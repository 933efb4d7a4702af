"""Supervised fine-tuning of the quickstart's model, from random weights, on answers of every quality to every task.

What comes out reads digits well and has the habits of those whose answers it saw. Steps are small, as looking up a row
or a cell is learned late and by number of steps. Hardware: two CPU cores, about two minutes. launch/quickstart.py runs
it as

    python launch/train.py configs/quickstart/sft_tasks.py --model MODEL --dataset DATASET --output RUN
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
    data=DataConfig(groups_per_step=16, max_steps=800, max_buckets=2, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(
        learning_rate=2e-3,
        warmup=0.05,
        b2=0.98,
        rates=PartRates(tower=1.0),  # nothing is pretrained here: the tower has to learn to read
    ),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
