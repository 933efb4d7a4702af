"""The control beside MM-DPO: supervised fine-tuning on each group's best answers, from the same SFT run.

Same groups, same number of steps, same rate; it sees the best and never learns what was wrong with the others.
Hardware: two CPU cores, about half a minute. launch/quickstart.py runs it as

    python launch/train.py configs/quickstart/sft_best.py --model SFT_RUN --dataset DATASET --output RUN
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
    data=DataConfig(
        groups_per_step=16,
        max_steps=140,
        responses="best",
        max_buckets=1,
        multiple=16,
        slots_per_device=8192,
    ),
    optimizer=OptimizerConfig(learning_rate=5e-4, rates=PartRates(tower=1.0)),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
