"""MM-DPO by the released trainer's per-pair formula: beta (1 + w factor), floored and without an upper bound.

The factors it was released for were never published (where one is missing the trainer takes 1.0, which is DPO at beta
0.11); here the critique reward model's margin stands in as it is, so a pair the reward model would turn around gets a
smaller beta than one without margin. Everything else is the quickstart's MM-DPO. Hardware: two CPU cores, about a
minute. launch/study.py runs it as

    python launch/train.py configs/study/released_factor.py --model SFT_RUN --dataset DATASET --output RUN \\
        --margins REWARD_STORE
"""

import dataclasses
from pathlib import Path

from mmrlhf_jax.objectives import MMDPOReleasedFactor
from mmrlhf_jax.training.recipe import read_recipe

mm_dpo = read_recipe(Path(__file__).parents[1] / "quickstart" / "mm_dpo.py")
recipe = dataclasses.replace(mm_dpo, objective=MMDPOReleasedFactor())
