"""DPO as launch/study.py's control of the group step: the quickstart's DPO, but a step sees pairs, each as two full
sequences, and so few of them that it costs the operations of a step over whole groups.

Any pair may come beside any other, as trainers of pairs deal them. How many pairs cost what the groups do depends on
their lengths (models/llava_onevision/cost.py): launch/study.py counts it on each seed's own data and says so with
--data.groups-per-step; 12 is about what comes out. Hardware: two CPU cores, about a minute. launch/study.py runs it as

    python launch/train.py configs/study/dpo_pairs.py --model SFT_RUN --dataset DATASET --output RUN \\
        --data.groups-per-step PAIRS
"""

import dataclasses
from pathlib import Path

from mmrlhf_jax.training.recipe import read_recipe

dpo = read_recipe(Path(__file__).parents[1] / "quickstart" / "dpo.py")
recipe = dataclasses.replace(dpo, data=dataclasses.replace(dpo.data, pairing="pairs", groups_per_step=12))
