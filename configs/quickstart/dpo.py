"""DPO beside the quickstart's MM-DPO, from the same SFT run: the same pairs, each with the same beta.

Same groups, same number of steps, same rate, same NLL of the chosen; it never learns by how much an answer is better.
Hardware: two CPU cores, about half a minute. launch/quickstart.py runs it as

    python launch/annotate.py --dataset DATASET --model SFT_RUN --with reference --dtype float32 --multiple 16
    python launch/train.py configs/quickstart/dpo.py --model SFT_RUN --dataset DATASET --output RUN
"""

from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    PartRates,
    Recipe,
)

recipe = Recipe(
    objective=DPO(gamma=0.25),
    # one bucket, as compiling a second program takes longer than it saves here
    data=DataConfig(groups_per_step=16, max_steps=140, max_buckets=1, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(learning_rate=5e-4, rates=PartRates(tower=1.0)),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
