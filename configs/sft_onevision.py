"""Supervised fine-tuning of LLaVA-OneVision on the best response of every group.

Not in the paper, which starts MM-DPO from lmms-lab's OneVision checkpoint: the control its gains are measured against,
and the way to bring in a base model of one's own. Values are those of configs/mm_dpo_onevision_7b.py where they mean
the same.

Hardware: 8 x H100 80 GB (--mesh.fsdp 8), or a v5p-16 slice. Not run yet: no figure is claimed.

    python launch/train.py configs/sft_onevision.py --model MODEL --dataset DATASET --output RUN
"""

from mmrlhf_jax.objectives import Supervised
from mmrlhf_jax.training.recipe import DataConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=Supervised(),
    data=DataConfig(groups_per_step=96, responses="best"),
    optimizer=OptimizerConfig(learning_rate=1e-6),
)
