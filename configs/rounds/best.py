"""Supervised fine-tuning on the best of a policy's own answers, round by round, on the digit boards: rejection
sampling; with --score direction DPA's, with --select steer SteerLM's.

Beside configs/rounds/mm_dpo.py: the same rate and as many groups a step. Hardware: two CPU cores, about a quarter of a
minute a round. launch/rounds.py runs it as

    python launch/rounds.py --recipe configs/rounds/best.py --select best ...
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
    # one bucket, as compiling a second program takes longer than it saves here
    data=DataConfig(groups_per_step=16, max_buckets=1, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(learning_rate=5e-4, rates=PartRates(tower=1.0)),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
