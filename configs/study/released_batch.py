"""MM-DPO as the released trainer really runs: one beta a batch, from the policy's own log-ratios (beta-DPO); no margin
is read.

Everything else is the quickstart's DPO. A step is one micro-batch, as beta is drawn from all of its pairs. Hardware:
two CPU cores, about a minute. launch/study.py runs it as

    python launch/train.py configs/study/released_batch.py --model SFT_RUN --dataset DATASET --output RUN
"""

import dataclasses
from pathlib import Path

from mmrlhf_jax.objectives import MMDPOReleasedBatch
from mmrlhf_jax.training.recipe import read_recipe

dpo = read_recipe(Path(__file__).parents[1] / "quickstart" / "dpo.py")
recipe = dataclasses.replace(dpo, objective=MMDPOReleasedBatch())
