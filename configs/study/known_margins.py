"""MM-DPO on margin-matched labels: the same pairs in the order the annotators gave them, but each with the margin that
matches what is true, the difference in right claims, in place of a reward model's.

So no reward model can do better by its margins; what annotators got wrong stays wrong (the true margin is negative
there, and beta the base). Everything else is the quickstart's MM-DPO. Hardware: two CPU cores, about a minute.
launch/study.py runs it as

    python launch/train.py configs/study/known_margins.py --model SFT_RUN --dataset DATASET --output RUN
"""

import dataclasses
from pathlib import Path

from mmrlhf_jax.training.recipe import read_recipe

mm_dpo = read_recipe(Path(__file__).parents[1] / "quickstart" / "mm_dpo.py")
recipe = dataclasses.replace(mm_dpo, margins="data")
