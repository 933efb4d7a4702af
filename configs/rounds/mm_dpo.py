"""MM-DPO on a policy's own answers, round by round, on the digit boards: margins are differences of the scores that the
answers were ranked by.

One pass a round, at the quickstart's rate. The reference runs online: of so small a model a stage of its own would take
longer. Hardware: two CPU cores, about a quarter of a minute a round. launch/rounds.py runs it, on what the quickstart
left behind, as

    python launch/rounds.py --policy runs/quickstart/sft --reward runs/quickstart/critique_reward \\
        --world runs/quickstart/world --recipe configs/rounds/mm_dpo.py --select all_pairs --output runs/rounds \\
        --sampling.max-new-tokens 24 --critique.max-new-tokens 24 --decode.multiple 16 --decode.max-buckets 1
"""

from mmrlhf_jax.objectives import MMDPO
from mmrlhf_jax.training.recipe import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    PartRates,
    Recipe,
)

recipe = Recipe(
    objective=MMDPO(),
    reference="online",
    # one bucket, as compiling a second program takes longer than it saves here
    data=DataConfig(groups_per_step=16, max_buckets=1, multiple=16, slots_per_device=8192),
    optimizer=OptimizerConfig(learning_rate=5e-4, rates=PartRates(tower=1.0)),
    compute=ComputeConfig(dtype="float32"),
    checkpoint=CheckpointConfig(every=1000, keep=1),
)
